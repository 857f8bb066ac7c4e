"""Token shards: the files between `prepare` and the training loop. Batches of them: see acorn/data/batches.py.

A dataset is a folder of shards `train_000000.bin`, `val_000000.bin`, ... and a `meta.json`, written last, so that its
existence means complete. A shard is a header of 256 little-endian int32 (magic, version, token count, zeros), then the
tokens. There are two layouts, those of llm.c and modded-nanogpt: uint16, and uint32 for vocabularies that need it.

Text is one stream. A document begins at one end-of-text token, or at the BOS that the tokenizer puts before a text.
Only `prepare` writes it: inside a document that token's name is ordinary text. So the token marks documents, whichever
id the tokenizer has for it; meta.json names it as `document_mark`.

Conversations (`prepare chat`) have no such token: a template may end turns with it. Two files stand beside
`train_000000.bin` there, with the same header. `train_000000.mask` has a byte for each token, 1 where it is learned and
0 where it is only read. `train_000000.index` says where each conversation begins, and how the template renders it
without its oldest turns: five int32 for each of these forms, the columns `FORM` of acorn/data/batches.py.
"""

import contextlib
import difflib
import hashlib
import io
import json
import os
import pickle
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from acorn import REPO, UserError, files
from acorn.data.batches import FORM, Conversations
from acorn.data.tokenizer import CharTokenizer, GPT2Tokenizer, Tokenizer, from_dict, is_hf, load_hf, tokenizer_hash

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MASK_MAGIC, INDEX_MAGIC = 20261122, 20261123
LAYOUTS = {  # magic: (version, type of a token)
    20240520: (1, np.dtype("<u2")),
    20240801: (7, np.dtype("<u4")),
    MASK_MAGIC: (1, np.dtype("u1")),
    INDEX_MAGIC: (1, np.dtype("<i4")),
}
SHARD_TOKENS = 100_000_000
HASHED = 2_000_000_000  # bytes; of a dataset so much is hashed whenever it is opened, which takes a second or two
OPEN_FILES = 256  # at most, of each split
SHARD_NAME = re.compile(r"(train|val)_\d{6}\.(bin|mask|index)")
KINDS = {"shards": "bin", "masks": "mask", "index": "index"}  # of files, as meta.json lists them: their suffixes
MARKS = {LAYOUTS[MASK_MAGIC][1].str: "masks", LAYOUTS[INDEX_MAGIC][1].str: "index"}  # those that hold no tokens
PARTIAL = ".acorn_partial"  # inside a dataset's folder: the new shards, until all of them are whole


# ---------------------------------------------------------------------------------------------------------------------
# Writing


class ShardWriter:
    """Writes the shards of one split into `folder`; a context manager.

    A shard grows under a temporary name and gets its own only when it is whole and on the disk. After an exception the
    unfinished one is removed, unless `save` promised that it would stay. `tokens` counts what was written; `shards`
    describes the finished files for meta.json.
    """

    suffix = "bin"

    def __init__(self, folder: str | Path, split: str, vocab_size: int, shard_tokens: int = SHARD_TOKENS):
        self.folder, self.split, self.vocab_size, self.shard_tokens = Path(folder), split, vocab_size, shard_tokens
        self.magic = 20240520 if vocab_size <= 2**16 else 20240801
        self.version, self.dtype = LAYOUTS[self.magic]
        self.tokens = 0
        self.shards: list[dict] = []
        self._file = None
        self._in_shard = 0
        self._saved = False

    def write(self, ids: np.ndarray) -> None:
        """Append ids, an integer array of one dimension. An id outside the vocabulary is refused, never wrapped."""
        if len(ids) and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise UserError(
                f"a token id lies outside the vocabulary of {self.vocab_size}: the ids to write lie between "
                f"{ids.min()} and {ids.max()}; this tokenizer cannot have made them"
            )
        while len(ids):
            if self._file is None:
                self._file = files.create(self._temporary)
                self._write_header()
            part, ids = np.split(ids, [self.shard_tokens - self._in_shard])
            self._file.write(part.astype(self.dtype).data)
            self._in_shard += len(part)
            self.tokens += len(part)
            if self._in_shard == self.shard_tokens:
                self._finish_shard()

    def save(self) -> dict:
        """Put all that was written on the disk, to stay there: a JSON-able state from which `resume` goes on."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._saved = True
        return {"tokens": self.tokens, "in_shard": self._in_shard, "shards": list(self.shards)}

    def resume(self, state: dict) -> None:
        """Go on in the same folder from what `save` returned; what was written after it is dropped.

        Raises UserError where the folder no longer holds the tokens of that state.
        """
        self.tokens, self._in_shard, self.shards = state["tokens"], state["in_shard"], list(state["shards"])
        self._saved = True
        for shard in self.shards:
            open_shard(self.folder / shard["file"])
        if self._in_shard:
            if (self.folder / self._name).exists():  # it was finished after that
                os.replace(self.folder / self._name, self._temporary)
            size = HEADER_BYTES + self._in_shard * self.dtype.itemsize
            is_own = self._temporary.is_file() and not self._temporary.is_symlink()
            if not is_own or self._temporary.stat().st_size < size:
                raise UserError(f"{self._temporary} has lost tokens; prepare the dataset again")
            self._file = files.open_own(self._temporary, "r+b")
            self._file.seek(size)
            self._file.truncate()

    @property
    def _name(self) -> str:
        return f"{self.split}_{len(self.shards):06d}.{self.suffix}"

    @property
    def _temporary(self) -> Path:
        return self.folder / (self._name + ".tmp")

    def _write_header(self) -> None:
        header = np.zeros(HEADER_INTS, dtype="<i4")
        header[:3] = self.magic, self.version, self._in_shard
        self._file.write(header.data)

    def _finish_shard(self) -> None:
        self._file.seek(0)
        self._write_header()  # again, now that the count is known
        self._file.flush()
        self._file.close()
        self._file = None
        files.sync(self._temporary)
        sha256 = files.sha256(self._temporary)
        os.replace(self._temporary, self.folder / self._name)
        files.sync(self.folder)
        self.shards.append({"file": self._name, "tokens": self._in_shard, "sha256": sha256})
        self._in_shard = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        try:
            if error_type is None and self._file is not None:
                self._finish_shard()
        finally:
            if self._file is not None:
                with contextlib.suppress(OSError):  # closing flushes, which a full disk refuses
                    self._file.close()
            if not self._saved:
                self._temporary.unlink(missing_ok=True)


class MaskWriter(ShardWriter):
    """Writes the masks beside the shards of one split, 0 or 1 for each token. With the same `shard_tokens` as the
    ShardWriter of the tokens it makes as many files, equally long."""

    suffix = "mask"

    def __init__(self, folder: str | Path, split: str, shard_tokens: int = SHARD_TOKENS):
        super().__init__(folder, split, 2, shard_tokens)
        self.magic = MASK_MAGIC
        self.version, self.dtype = LAYOUTS[MASK_MAGIC]


class IndexWriter(ShardWriter):
    """Writes the index beside the shards of one split: the numbers of its forms, five each, one after the other."""

    suffix = "index"

    def __init__(self, folder: str | Path, split: str):
        super().__init__(folder, split, 2**31)
        self.magic = INDEX_MAGIC
        self.version, self.dtype = LAYOUTS[INDEX_MAGIC]


def write_meta(folder: str | Path, meta: dict) -> None:
    """Write meta.json, whole or not at all, with a hash of what it says in it."""
    files.replace(Path(folder) / "meta.json", json.dumps({**meta, "sha256": meta_hash(meta)}, indent=1))


def meta_hash(meta: dict) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class Shard(NamedTuple):
    path: Path
    dtype: np.dtype  # of a token in the file
    offset: int  # of the first token, in bytes
    tokens: int
    file: tuple[int, int, int]  # which file it is, as `_which_file` has it


class Tokens:
    """The tokens of one split: a read-only stream over its shards, memory mapped.

    `name` is how messages call the split. `mask`, a stream as long as this one, says by 0 which tokens are no targets;
    without one all are. `conversations`, where there are any, says where each begins; else `document_mark` is the
    token that begins a document, None where attention is to cross from one to the next. The maps are opened when
    needed and dropped now and then, since every page that they brought in counts as resident memory until then.
    """

    DROP_AFTER = 1 << 25  # tokens brought in

    def __init__(self, shards: Sequence[Shard], vocab_size: int, name: str = "train"):
        self.shards, self.vocab_size, self.name = list(shards), vocab_size, name
        self.mask: Tokens | None = None
        self.conversations: Conversations | None = None
        self.document_mark: int | None = None
        counts = [shard.tokens for shard in self.shards]
        self._ends = np.cumsum(counts, dtype=np.int64)  # of each shard, in the stream
        self._starts = (self._ends - counts).tolist()
        self._maps: dict[int, tuple[io.BufferedReader, np.ndarray]] = {}
        self._brought_in = 0

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.shards else 0

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The windows [start, start + length) as int64, shape (len(starts), length). A window may cross shards.

        A window that leaves the stream is an IndexError; a token outside the vocabulary, or a shard that is not there
        any more as it was, is a UserError.
        """
        starts = np.asarray(starts, dtype=np.int64)
        if starts.size and (starts.min() < 0 or starts.max() + length > len(self)):
            raise IndexError(f"a window of {length} leaves the {self.name} split of {len(self)} tokens")
        windows = np.empty((len(starts), length), dtype=np.int64)
        first_shards = np.searchsorted(self._ends, starts, side="right")
        for window, start, shard in zip(windows, starts.tolist(), first_shards.tolist(), strict=True):
            filled = 0
            while filled < length:
                begin = start + filled - self._starts[shard]
                part = self._map(shard)[begin : begin + length - filled]
                window[filled : filled + len(part)] = part
                filled += len(part)
                shard += 1
        self._drop_maps(windows)
        if windows.size and windows.max() >= self.vocab_size:
            raise UserError(
                f"a token id {windows.max()} is outside the vocabulary of {self.vocab_size} in the {self.name} split: "
                "its shards were made by another tokenizer; prepare the dataset again"
            )
        return windows

    def read_pairs(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The windows as inputs and targets, each of the shape (len(starts), length); a target of -1 is masked."""
        windows = self.read(starts, length + 1)
        x, y = windows[:, :-1], windows[:, 1:]
        if self.mask is not None:
            y = np.where(self.mask.read(np.asarray(starts) + 1, length), y, -1)
        return x, y

    def _map(self, shard: int) -> np.ndarray:
        path, dtype, offset, tokens, which = self.shards[shard]
        if not tokens:
            return np.empty(0, dtype)
        try:
            file, mapped = self._maps.get(shard) or (files.open_regular(path), None)
            now = _which_file(os.fstat(file.fileno()))
        except OSError as error:
            raise UserError(f"{path} cannot be read any more ({error.strerror}); bring it back: {_GO_ON}") from error
        if now != which:  # and to read behind the end of a mapped file would kill the process
            raise UserError(f"{path} was replaced, changed or cut short while it was in use; start again: {_GO_ON}")
        if mapped is None:
            if len(self._maps) >= OPEN_FILES:
                self._maps = {}
            mapped = np.memmap(file, dtype, "r", offset, tokens).view(np.ndarray)
            self._maps[shard] = file, mapped
        return mapped

    def _drop_maps(self, windows: np.ndarray) -> None:
        self._brought_in += windows.size + 2**15 * len(windows)  # the kernel maps up to 64 KB around each fault
        if self._brought_in > self.DROP_AFTER:
            self._maps, self._brought_in = {}, 0


_GO_ON = "a run goes on from its last checkpoint with --init_from=resume"


def _which_file(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def open_shard(path: str | Path) -> Shard:
    """Read and check the header of a shard. A file that is not a whole shard is a UserError that names it."""
    path = Path(path)
    try:
        if not path.is_file():
            raise UserError(f"the token shard {path} is missing or is no file; prepare the dataset again")
        with open(path, "rb") as file:
            which = _which_file(os.fstat(file.fileno()))
            size = which[1]
            header = np.frombuffer(file.read(HEADER_BYTES), dtype="<i4", count=-1 if size >= HEADER_BYTES else 0)
    except OSError as error:
        raise UserError(f"cannot read the token shard {path}: {error.strerror}; prepare the dataset again") from error
    if not len(header) or int(header[0]) not in LAYOUTS:
        raise UserError(f"{path} is not a token shard; run `python prepare ...` to make token shards from text")
    magic, version, tokens = (int(value) for value in header[:3])
    known_version, dtype = LAYOUTS[magic]
    if version != known_version:
        raise UserError(f"{path} is a token shard of version {version}, not {known_version}; prepare the dataset again")
    if tokens < 0 or size != HEADER_BYTES + tokens * dtype.itemsize:
        holds = (size - HEADER_BYTES) / dtype.itemsize
        raise UserError(
            f"{path} is truncated or damaged: its header says {tokens} tokens, the file holds {holds:g}; "
            "prepare (or download) it again"
        )
    return Shard(path, dtype, HEADER_BYTES, tokens, which)


@dataclass
class Dataset:
    name: str
    path: Path
    train: Tokens
    val: Tokens | None  # None where the folder has no validation split
    tokenizer: Tokenizer
    vocab_size: int
    meta: dict  # the whole meta.json; empty for folders that others made
    unhashed: int = 0  # bytes of shards whose hashes were not compared with it: see HASHED

    def notes(self, block_size: int) -> list[str]:
        """What a person who trains on windows of `block_size` tokens should know of this data, a sentence each."""
        notes = []
        if self.train.conversations is not None:
            rows = self.train.conversations.rows(block_size)
            found = {
                "lose their oldest turns": rows.dropped,
                "lose the end of their reply": rows.cut,
                "are left out (the question fills a row)": rows.left_out,
            }
            notes.append(
                f"{len(self.train.conversations):,} conversations in {len(rows.starts) - 1:,} rows of {block_size:,} "
                f"tokens, {rows.padding:.1%} of them padding"
                + "".join(f"; {count:,} {what}" for what, count in found.items() if count)
            )
        elif self.train.mask is not None:
            notes.append(
                f"{self.path} was prepared by an older version: windows cut its conversations, and document_mask does "
                "not apply to it. Run `python prepare chat ... --overwrite` to train on whole conversations."
            )
        if self.unhashed:
            notes.append(
                f"{self.unhashed / 1e9:.1f} GB of it are not compared with their hashes at each start; "
                f"{shlex.join(['python', 'prepare', 'inspect', self.name, '--verify'])} does it"
            )
        return notes

    @property
    def document_mark(self) -> int | None:
        """The token that tells documents apart: it begins each, but for those that the tokenizer ends with it."""
        if not self.meta:  # another program made it
            return next(iter(self.tokenizer.before_document), self.tokenizer.eot)
        return self.meta.get("document_mark", self.tokenizer.eot)

    def mask_documents(self) -> None:
        """Number the documents in samples from now on, so that attention stays inside each. Conversations always are
        kept apart. Raises UserError where no token marks the documents."""
        if self.train.mask is not None:
            return
        if self.document_mark is None:
            raise UserError(
                f"document_mask = True, but the {self.tokenizer.kind} tokenizer of {self.path} has no end-of-text "
                "token that would tell documents apart; prepare it with --tokenizer byte or gpt2, or leave "
                "document_mask out"
            )
        for split in filter(None, (self.train, self.val)):
            split.document_mark = self.document_mark

    def identity(self) -> str:
        """SHA-256 (hex) that tells datasets apart: of the shards' hashes, or, where none are known, of their sizes."""
        splits = [self.train, self.val] if self.val else [self.train]
        kinds = [(split, key) for key in KINDS for split in ("train", "val")]
        listed = [self.meta[split][key] for split, key in kinds if self.meta and key in self.meta[split]]
        sizes = [[shard.tokens for shard in split.shards] for split in splits]
        return hashlib.sha256(json.dumps(listed or sizes, sort_keys=True).encode()).hexdigest()


def load_dataset(name: str, hashed: bool = True) -> Dataset:
    """Open a dataset: a path, or the name of a folder in `data/` here or in the repository.

    Reads what `prepare` wrote, nanoGPT's folders (headerless `train.bin`), and those of llm.c and modded-nanogpt
    (`NAME_train_000001.bin`, `NAME_train.bin`). Whatever is wrong with the dataset is a UserError. Where another
    process of this machine compares the shards with their hashes, `hashed` may be False.
    """
    candidates = [Path(name), Path("data") / name, REPO / "data" / name] if name else []
    for path in candidates:
        if os.path.isfile(path / "meta.json"):  # not Path.is_file, which a name that is too long makes an error
            return _load_prepared(name, path, HASHED if hashed else 0)
        if os.path.isfile(path / "train.bin"):
            return _load_nanogpt(name, path)
        if os.path.isdir(path) and _foreign_shards(path, "train"):
            return _load_llmc(name, path)
        if os.path.isdir(path) and (
            (path / PARTIAL).is_dir() or any(SHARD_NAME.fullmatch(f.name) for f in path.iterdir())
        ):
            raise UserError(f"preparation of {path} was interrupted; run it again: {_prepare_command(name)}")
    raise UserError(_no_dataset(name[:200]))


CORPORA = "tinyshakespeare stdlib openwebtext fineweb fineweb_edu tinystories wikitext103".split()  # also dataset names


def _no_dataset(name: str) -> str:
    """The error for a dataset that does not exist: the nearest one that does, else a command that makes one."""
    found = sorted({meta.parent.name for data in (Path("data"), REPO / "data") for meta in data.glob("*/meta.json")})
    error = f"there is no dataset {name!r}" + (f" (the datasets here: {', '.join(found)})" if found else "")
    known = [*found, *CORPORA, "shakespeare", "shakespeare_char", "plays"]
    near = next(iter(difflib.get_close_matches(Path(name).name, known, 1, 0.75)), "")
    if near in found:
        return f"{error}; did you mean --dataset={near}?"
    if near == "shakespeare":  # the corpus has another name than its dataset, since nanoGPT has one of this name
        plays = "--dataset=plays is what `python prepare shakespeare` makes"
        return f"{error}; {plays}, and nanoGPT's dataset shakespeare comes from {_prepare_command(near)}"
    if near and near != name:
        return f"{error}; did you mean --dataset={near}? Make it with {_prepare_command(near)}"
    return f"{error}; make it with {_prepare_command(name)}"


def _prepare_command(name: str) -> str:
    if name == "shakespeare_char":
        return "`python prepare tinyshakespeare --name shakespeare_char`"
    if name == "shakespeare":
        return "`python prepare tinyshakespeare --tokenizer gpt2 --name shakespeare`"
    if name == "plays":
        return "`python prepare shakespeare`"
    if name in CORPORA:
        return f"`python prepare {name}`"
    return f"`python prepare text FILES --name {Path(name).name or 'NAME'}`"


def _load_prepared(name: str, path: Path, to_hash: int) -> Dataset:
    meta_path = path / "meta.json"
    try:
        meta = files.read_json(meta_path)
        sha256 = meta.pop("sha256", None)  # those of older versions have none
        if sha256 not in (None, meta_hash(meta)):
            raise ValueError("it says something else than when it was written")
        if meta["format"] != 1:
            raise UserError(f"{meta_path} has format {meta['format']!r:.20}, not 1; prepare the dataset again")
        tokenizer, vocab_size = from_dict(meta["tokenizer"]), meta["vocab_size"]
        same = meta["tokenizer_hash"] == tokenizer_hash(tokenizer) and vocab_size == tokenizer.n_vocab
        counts = {split: meta[split].get("tokens") for split in ("train", "val")}
        listed = {
            (split, key): [(str(entry["file"]), int(entry["tokens"]), str(entry["sha256"])) for entry in entries]
            for split in ("val", "train")
            for key, entries in ((key, {"masks": [], "index": [], **meta[split]}[key]) for key in KINDS)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{meta_path} is truncated or damaged, or was changed; prepare the dataset again with --overwrite"
        ) from error
    if not same:
        raise UserError(f"the tokenizer in {meta_path} is not the one its shards were made with; prepare it again")

    opened, unhashed = {}, 0
    for (split, key), entries in listed.items():
        opened[split, key] = []
        for file, tokens, sha256 in entries:
            if not SHARD_NAME.fullmatch(file) or not file.endswith(KINDS[key]):
                raise UserError(f"{meta_path} lists {file!r:.60}, which is no shard's name; prepare the dataset again")
            shard = open_shard(path / file)
            size = tokens * shard.dtype.itemsize
            if size <= to_hash:
                to_hash -= size
                other = shard.tokens != tokens or files.sha256(shard.path) != sha256
            else:  # the count has to do
                unhashed += size
                other = shard.tokens != tokens
            if other or MARKS.get(shard.dtype.str, "shards") != key:
                raise UserError(
                    f"{shard.path} is not the shard that {meta_path} lists: it is damaged, or one of the two belongs "
                    "to another dataset; prepare the dataset again with --overwrite"
                )
            opened[split, key].append(shard)
    for split, count in counts.items():
        if count != sum(shard.tokens for shard in opened[split, "shards"]):
            raise UserError(
                f"{meta_path} says {count!r:.20} tokens of {split}, but its shards have another number; prepare the "
                "dataset again with --overwrite"
            )
    dataset = _dataset(name, path, opened["train", "shards"], opened["val", "shards"], tokenizer, meta)
    dataset.unhashed = unhashed
    for split, tokens in (("train", dataset.train), ("val", dataset.val)):
        if masks := opened[split, "masks"]:
            mask = Tokens(masks, 2, f"mask of the {split} ({path})")
            if tokens is None or len(mask) != len(tokens):
                raise UserError(f"the masks of {path} are of another length than its shards; prepare the dataset again")
            tokens.mask = mask
        if index := opened[split, "index"]:
            tokens.conversations = _read_index(path, tokens, Tokens(index, 2**31, f"index of the {split} ({path})"))
    return dataset


def _read_index(path: Path, tokens: Tokens, index: Tokens) -> Conversations:
    try:
        return Conversations(tokens, index.read([0], len(index)).reshape(-1, len(FORM)))
    except ValueError as error:
        raise UserError(
            f"the index of {path} does not belong to its shards; prepare the dataset again with --overwrite"
        ) from error


def _load_nanogpt(name: str, path: Path) -> Dataset:
    """`train.bin` and `val.bin`, headerless uint16; `meta.pkl` holds the characters, else the tokens are GPT-2's."""

    def shards(file: Path) -> list[Shard]:
        which = _which_file(file.stat())
        size = which[1]
        if size % 2:
            raise UserError(f"{file} is truncated: {size} bytes is no whole number of uint16 tokens; prepare it again")
        return [Shard(file, np.dtype("<u2"), 0, size // 2, which)]

    meta_pkl = path / "meta.pkl"
    tokenizer = _read_meta_pkl(meta_pkl) if meta_pkl.exists() else GPT2Tokenizer()
    val = shards(path / "val.bin") if (path / "val.bin").is_file() else []
    return _dataset(name, path, shards(path / "train.bin"), val, tokenizer, {})


class _PlainUnpickler(pickle._Unpickler):
    """Builds dicts, lists, strings and numbers. A pickle runs code by naming a class or function: none is to be had.
    Written in Python; the one in C can be told to take all the memory that there is."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_meta_pkl(path: Path) -> CharTokenizer:
    try:
        with files.open_regular(path) as file:
            itos = _PlainUnpickler(file).load()["itos"]
        return from_dict({"kind": "char", "vocab": [itos[i] for i in range(len(itos))]})
    except Exception as error:  # a broken pickle can raise nearly anything
        raise UserError(
            f"{path} is not nanoGPT's meta.pkl, a plain dict with the characters in 'itos' ({error}); "
            "nothing in it was run; prepare the dataset again"
        ) from error


def _foreign_shards(path: Path, split: str) -> list[Path]:
    """The shards of a split as llm.c and modded-nanogpt name them: NAME_train_000001.bin, or one NAME_train.bin."""
    return sorted(path.glob(f"*_{split}_*.bin")) or sorted(path.glob(f"*_{split}.bin"))


def _load_llmc(name: str, path: Path) -> Dataset:
    """Shards without a meta.json. Their tokens are those of the tokenizer.json beside them, else GPT-2's."""
    train, val = ([open_shard(file) for file in _foreign_shards(path, split)] for split in ("train", "val"))
    tokenizer = load_hf(path) if is_hf(path) else GPT2Tokenizer()
    for shard in train + val:
        if shard.dtype.itemsize != 2 and not is_hf(path):
            raise UserError(
                f"{shard.path} holds uint32 tokens of an unknown tokenizer. Copy the tokenizer.json and "
                f"tokenizer_config.json of the model that they are for into {path}."
            )
    return _dataset(name, path, train, val, tokenizer, {})


def _dataset(name: str, path: Path, train: list[Shard], val: list[Shard], tokenizer: Tokenizer, meta: dict) -> Dataset:
    streams = [
        Tokens(shards, tokenizer.n_vocab, f"{split} ({path})") for split, shards in (("train", train), ("val", val))
    ]
    return Dataset(name, path, streams[0], streams[1] if val else None, tokenizer, tokenizer.n_vocab, meta)
