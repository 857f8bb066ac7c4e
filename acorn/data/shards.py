"""Token shards: the files that `prepare` writes and training reads. acorn/data/batches.py makes batches of them.

A dataset is a folder of shards `train_000000.bin`, `val_000000.bin`, ... and a `meta.json`. The latter is written last,
so its existence means that the dataset is complete. A shard is a header of 256 little-endian int32 (magic, version,
token count, zeros), then the tokens. The two layouts are those of llm.c and modded-nanogpt: uint16, and uint32 for
larger vocabularies.

Text is one stream. Each document begins with one end-of-text token, or with the BOS that the tokenizer puts before a
text. Only `prepare` writes this token, because its name inside a document is encoded as ordinary text. The token
therefore marks documents; meta.json records its id as `document_mark`.

Conversations (`prepare chat`) have no such mark, because a template may end turns with the same token. They have two
more files per shard, with the same header. `train_000000.mask` has one byte per token: 1 if it is learned, else 0.
`train_000000.index` describes each conversation and its forms without the oldest turns: five int32 per form, the
columns `FORM` of acorn/data/batches.py. Preferences (`prepare preferences`) have the same files: conversations 2i and
2i + 1 have the same prompt, the first with the chosen answer, the second with the rejected one.
"""

import contextlib
import difflib
import hashlib
import json
import os
import pickle
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

import numpy as np

from acorn import REPO, UserError, files
from acorn.data.batches import FORM, Conversations
from acorn.data.corpora import dataset_names, prepare_command
from acorn.data.tokenizer import Tokenizer, tokenizer_hash
from acorn.data.tokenizer_gpt2 import GPT2Tokenizer
from acorn.data.tokenizer_json import is_hf, load_hf
from acorn.data.tokenizer_kinds import from_dict

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MASK_MAGIC, INDEX_MAGIC = 20261122, 20261123
LAYOUTS: dict[int, tuple[int, np.dtype]] = {  # magic: (version, dtype)
    20240520: (1, np.dtype("<u2")),
    20240801: (7, np.dtype("<u4")),
    MASK_MAGIC: (1, np.dtype("u1")),
    INDEX_MAGIC: (1, np.dtype("<i4")),
}
SHARD_TOKENS = 100_000_000
HASH_LIMIT = 2_000_000_000  # bytes of a dataset that are hashed each time it is opened, which takes a second or two
OPEN_FILES = 256  # the maximum per split
SHARD_NAME = re.compile(r"(train|val)_\d{6}\.(bin|mask|index)")
KINDS = {"shards": "bin", "masks": "mask", "index": "index"}  # key in meta.json -> file suffix
DTYPE_KINDS = {LAYOUTS[MASK_MAGIC][1].str: "masks", LAYOUTS[INDEX_MAGIC][1].str: "index"}  # other dtypes are tokens
PARTIAL = ".acorn_partial"  # a folder inside the dataset's folder that holds new shards until all are complete


# ---------------------------------------------------------------------------------------------------------------------
# Writing


class ShardWriter:
    """A context manager that writes the shards of one split into `folder`.

    A shard is written under a temporary name and renamed once it is complete and synced to disk. After an exception the
    unfinished shard is removed, unless `save` was called. `tokens` is the number of tokens written; `shards` describes
    the finished files for meta.json.
    """

    suffix = "bin"

    def __init__(self, folder: str | Path, split: str, vocab_size: int, shard_tokens: int = SHARD_TOKENS):
        self.folder, self.split, self.vocab_size, self.shard_tokens = Path(folder), split, vocab_size, shard_tokens
        self.magic = 20240520 if vocab_size <= 2**16 else 20240801
        self.version, self.dtype = LAYOUTS[self.magic]
        self.tokens = 0
        self.shards: list[dict] = []
        self._file: IO | None = None
        self._in_shard = 0
        self._saved = False

    def write(self, ids: np.ndarray) -> None:
        """Append ids, a one-dimensional integer array. Raises UserError if an id is outside the vocabulary."""
        if len(ids) and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise UserError(
                f"token ids from {ids.min()} to {ids.max()} are outside the vocabulary of {self.vocab_size}. Use the "
                "tokenizer that made them."
            )
        while len(ids):
            if self._file is None:
                self._file = files.create(self._temporary)
                self._write_header(self._file)
            part, ids = np.split(ids, [self.shard_tokens - self._in_shard])
            self._file.write(part.astype(self.dtype).data)
            self._in_shard += len(part)
            self.tokens += len(part)
            if self._in_shard == self.shard_tokens:
                self._finish_shard(self._file)

    def save(self) -> dict:
        """Sync everything written so far to disk. Returns a JSON-serializable state for `resume`."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._saved = True
        return {"tokens": self.tokens, "in_shard": self._in_shard, "shards": list(self.shards)}

    def resume(self, state: dict) -> None:
        """Continue in the same folder from the state that `save` returned; tokens written after it are dropped.

        Raises UserError if the folder no longer holds the tokens of that state.
        """
        self.tokens, self._in_shard, self.shards = state["tokens"], state["in_shard"], list(state["shards"])
        self._saved = True
        for shard in self.shards:
            open_shard(self.folder / shard["file"])
        if self._in_shard:
            if (self.folder / self._name).exists():  # the shard was finished after `save`
                os.replace(self.folder / self._name, self._temporary)
            size = HEADER_BYTES + self._in_shard * self.dtype.itemsize
            is_own = self._temporary.is_file() and not self._temporary.is_symlink()
            if not is_own or self._temporary.stat().st_size < size:
                raise UserError(f"{self._temporary} is shorter than when it was saved. Prepare the dataset again.")
            self._file = files.open_own(self._temporary, "r+b")
            self._file.seek(size)
            self._file.truncate()

    @property
    def _name(self) -> str:
        return f"{self.split}_{len(self.shards):06d}.{self.suffix}"

    @property
    def _temporary(self) -> Path:
        return self.folder / (self._name + ".tmp")

    def _write_header(self, file: IO) -> None:
        header = np.zeros(HEADER_INTS, dtype="<i4")
        header[:3] = self.magic, self.version, self._in_shard
        file.write(header.data)

    def _finish_shard(self, file: IO) -> None:
        file.seek(0)
        self._write_header(file)  # again, because the token count is known now
        file.flush()
        file.close()
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
                self._finish_shard(self._file)
        finally:
            if self._file is not None:
                with contextlib.suppress(OSError):  # closing flushes, which fails on a full disk
                    self._file.close()
            if not self._saved:
                self._temporary.unlink(missing_ok=True)


class MaskWriter(ShardWriter):
    """Writes the masks of one split: 0 or 1 per token. Use the same `shard_tokens` as for the tokens' ShardWriter, so
    that both write the same number of files of the same lengths."""

    suffix = "mask"

    def __init__(self, folder: str | Path, split: str, shard_tokens: int = SHARD_TOKENS):
        super().__init__(folder, split, 2, shard_tokens)
        self.magic = MASK_MAGIC
        self.version, self.dtype = LAYOUTS[MASK_MAGIC]


class IndexWriter(ShardWriter):
    """Writes the index of one split: five int32 per form, flattened."""

    suffix = "index"

    def __init__(self, folder: str | Path, split: str):
        super().__init__(folder, split, 2**31)
        self.magic = INDEX_MAGIC
        self.version, self.dtype = LAYOUTS[INDEX_MAGIC]


def write_meta(folder: str | Path, meta: dict) -> None:
    """Write meta.json atomically, with a hash of its content in it."""
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
    file: tuple[int, int, int]  # the file's identity, from `_file_id`


class Tokens:
    """The tokens of one split: a read-only stream over its memory-mapped shards.

    Messages call the split `name`. `mask` is a stream of the same length that is 0 for tokens that are not targets;
    None makes every token a target. `conversations` is the index of a chat dataset, else None. `document_mark` is the
    token that begins each document; None lets attention cross document boundaries. Memory maps are opened on demand
    and dropped regularly, because each page read through them counts as resident memory until then.
    """

    DROP_AFTER = 1 << 25  # tokens read

    def __init__(self, shards: Sequence[Shard], vocab_size: int, name: str = "train"):
        self.shards, self.vocab_size, self.name = list(shards), vocab_size, name
        self.mask: Tokens | None = None
        self.conversations: Conversations | None = None
        self.document_mark: int | None = None
        counts = [shard.tokens for shard in self.shards]
        self._ends = np.cumsum(counts, dtype=np.int64)  # where each shard ends in the stream
        self._starts = (self._ends - counts).tolist()
        self._maps: dict[int, tuple[BinaryIO, np.ndarray]] = {}
        self._resident = 0  # tokens that are in memory through the maps, estimated

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.shards else 0

    def read(self, starts: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """Return the windows [start, start + length): int64, shape (len(starts), length). A window may span shards.

        Raises IndexError for a window outside the stream, and UserError for a token outside the vocabulary or a shard
        that was changed or removed.
        """
        starts = np.asarray(starts, dtype=np.int64)
        if starts.size and (starts.min() < 0 or starts.max() + length > len(self)):
            raise IndexError(f"a window of {length} tokens is outside the {self.name} split of {len(self)} tokens")
        windows = np.empty((len(starts), length), dtype=np.int64)
        first_shards = np.searchsorted(self._ends, starts, side="right")
        read_shards = set()
        for window, start, shard in zip(windows, starts.tolist(), first_shards.tolist(), strict=True):
            filled = 0
            while filled < length:
                begin = start + filled - self._starts[shard]
                part = self._map(shard)[begin : begin + length - filled]
                window[filled : filled + len(part)] = part
                filled += len(part)
                read_shards.add(shard)
                shard += 1
        for shard in read_shards:  # check again: the tokens of a truncated file read as 0
            self._map(shard)
        self._drop_maps(windows)
        if windows.size and windows.max() >= self.vocab_size:
            raise UserError(
                f"token id {windows.max()} is outside the vocabulary of {self.vocab_size} in the {self.name} split: "
                "another tokenizer made its shards. Prepare the dataset again."
            )
        return windows

    def read_pairs(self, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return windows as inputs and targets, each of shape (len(starts), length); a target of -1 is masked."""
        windows = self.read(starts, length + 1)
        x, y = windows[:, :-1], windows[:, 1:]
        if self.mask is not None:
            y = np.where(self.mask.read(np.asarray(starts) + 1, length), y, -1)
        return x, y

    def _map(self, shard: int) -> np.ndarray:
        path, dtype, offset, tokens, file_id = self.shards[shard]
        if not tokens:
            return np.empty(0, dtype)
        try:
            file, mapped = self._maps.get(shard) or (files.open_regular(path), None)
            current_id = _file_id(os.fstat(file.fileno()))
        except OSError as error:
            raise UserError(f"{path} is no longer readable ({error.strerror}). Restore it, then {_ADVICE}.") from error
        if current_id != file_id:  # also because reading past the end of a mapped file would kill the process
            raise UserError(f"{path} was replaced, changed or truncated while in use. Restore it, then {_ADVICE}.")
        if mapped is None:
            if len(self._maps) >= OPEN_FILES:
                self._maps = {}
            mapped = np.memmap(file, dtype, "r", offset, tokens).view(np.ndarray)
            self._maps[shard] = file, mapped
        return mapped

    def _drop_maps(self, windows: np.ndarray) -> None:
        self._resident += windows.size + 2**15 * len(windows)  # the kernel maps up to 64 KB around each page fault
        if self._resident > self.DROP_AFTER:
            self._maps, self._resident = {}, 0


_ADVICE = "continue the run from its last checkpoint with --init_from=resume"


def _file_id(stat: os.stat_result) -> tuple[int, int, int]:
    """Return a file's identity: it changes if the file is replaced or written to."""
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def open_shard(path: str | Path) -> Shard:
    """Read and check the header of a shard. Raises UserError if the file is not a complete shard."""
    path = Path(path)
    try:
        if not path.is_file():
            raise UserError(f"the token shard {path} is missing or not a regular file. Prepare the dataset again.")
        with open(path, "rb") as file:
            file_id = _file_id(os.fstat(file.fileno()))
            size = file_id[1]
            header = np.frombuffer(file.read(HEADER_BYTES), dtype="<i4", count=-1 if size >= HEADER_BYTES else 0)
    except OSError as error:
        raise UserError(f"cannot read the token shard {path}: {error.strerror}. Prepare the dataset again.") from error
    if not len(header) or int(header[0]) not in LAYOUTS:
        raise UserError(f"{path} is not a token shard. Run `python prepare ...` to make token shards from text.")
    magic, version, tokens = (int(value) for value in header[:3])
    known_version, dtype = LAYOUTS[magic]
    if version != known_version:
        raise UserError(
            f"{path} is a token shard of version {version}, not {known_version}. Prepare the dataset again."
        )
    if tokens < 0 or size != HEADER_BYTES + tokens * dtype.itemsize:
        stored = (size - HEADER_BYTES) / dtype.itemsize
        raise UserError(
            f"{path} is truncated or damaged: its header says {tokens} tokens, but the file holds {stored:g}. Prepare "
            "or download it again."
        )
    return Shard(path, dtype, HEADER_BYTES, tokens, file_id)


@dataclass
class Dataset:
    name: str
    path: Path
    train: Tokens
    val: Tokens | None  # None if the folder has no validation split
    tokenizer: Tokenizer
    vocab_size: int
    meta: dict  # the parsed meta.json; empty if another program made the folder
    unhashed: int = 0  # bytes of shards whose hashes were not verified: see HASH_LIMIT

    def notes(self, block_size: int) -> list[str]:
        """Return sentences that a user should read before training on this data with this `block_size`."""
        notes = []
        if self.train.conversations is not None and self.train.conversations.pairs:
            rows = self.train.conversations.rows(block_size)
            notes.append(
                f"{len(self.train.conversations) // 2:,} pairs in {len(rows.starts) - 1:,} rows of {block_size:,} "
                f"tokens, {rows.padding:.1%} of them padding"
                + (f"; {rows.left_out:,} left out (longer than a row)" if rows.left_out else "")
            )
        elif self.train.conversations is not None:
            rows = self.train.conversations.rows(block_size)
            shortened = {
                "lose their oldest turns": rows.dropped,
                "lose the end of their reply": rows.cut,
                "are left out (the question fills a row)": rows.left_out,
            }
            notes.append(
                f"{len(self.train.conversations):,} conversations in {len(rows.starts) - 1:,} rows of {block_size:,} "
                f"tokens, {rows.padding:.1%} of them padding"
                + "".join(f"; {count:,} {effect}" for effect, count in shortened.items() if count)
            )
        elif self.train.mask is not None:
            notes.append(
                f"{self.path} was prepared by an older version: windows may cut its conversations, and document_mask "
                "has no effect. Run `python prepare chat ... --overwrite` to train on whole conversations."
            )
        if self.unhashed:
            notes.append(
                f"the hashes of {self.unhashed / 1e9:.1f} GB of its shards are not verified at each start. To verify "
                f"them, run {shlex.join(['python', 'prepare', 'inspect', self.name, '--verify'])}"
            )
        return notes

    @property
    def document_mark(self) -> int | None:
        """The token at document boundaries, None if there is none. It begins each document, or ends each if the
        tokenizer puts it after a text."""
        if not self.meta:  # another program made the folder
            return next(iter(self.tokenizer.before_document), self.tokenizer.eot)
        return self.meta.get("document_mark", self.tokenizer.eot)

    def mask_documents(self) -> None:
        """From now on, return document numbers with samples, so that attention stays within documents. Conversations
        are always separated. Raises UserError if no token marks the documents."""
        if self.train.mask is not None:
            return
        if self.document_mark is None:
            raise UserError(
                f"document_mask=True needs document boundaries, but the {self.tokenizer.kind} tokenizer of {self.path} "
                "has no end-of-text token. Use --document_mask=False, or prepare the dataset again with --tokenizer "
                "byte or gpt2."
            )
        for split in filter(None, (self.train, self.val)):
            split.document_mark = self.document_mark

    def identity(self) -> str:
        """Return a SHA-256 (hex) that identifies the dataset: of its shards' hashes, else of their sizes."""
        splits = [self.train, self.val] if self.val else [self.train]
        kinds = [(split, key) for key in KINDS for split in ("train", "val")]
        listed = [self.meta[split][key] for split, key in kinds if self.meta and key in self.meta[split]]
        sizes = [[shard.tokens for shard in split.shards] for split in splits]
        return hashlib.sha256(json.dumps(listed or sizes, sort_keys=True).encode()).hexdigest()


def load_dataset(name: str, hashed: bool = True) -> Dataset:
    """Open a dataset by its path, or by the name of a folder in `data/` here or in the repository.

    Reads datasets of `prepare`, of nanoGPT (headerless `train.bin`), and of llm.c and modded-nanogpt
    (`NAME_train_000001.bin`, `NAME_train.bin`). Raises UserError if the dataset is missing or invalid. `hashed` may be
    False if another process on this machine verifies the hashes of the shards.
    """
    candidates = [Path(name), Path("data") / name, REPO / "data" / name] if name else []
    for path in candidates:
        if os.path.isfile(path / "meta.json"):  # not Path.is_file, which raises OSError if the name is too long
            return _load_prepared(name, path, HASH_LIMIT if hashed else 0)
        if os.path.isfile(path / "train.bin"):
            return _load_nanogpt(name, path)
        if os.path.isdir(path) and _foreign_shards(path, "train"):
            return _load_llmc(name, path)
        if os.path.isdir(path) and (
            (path / PARTIAL).is_dir() or any(SHARD_NAME.fullmatch(f.name) for f in path.iterdir())
        ):
            raise UserError(f"preparation of {path} was interrupted. Run the same `python prepare` command again.")
    raise UserError(_no_dataset(name[:200]))


def _no_dataset(name: str) -> str:
    """Return the error message for a missing dataset: it suggests a similar name, else a command that prepares it."""
    existing = sorted({meta.parent.name for data in (Path("data"), REPO / "data") for meta in data.glob("*/meta.json")})
    error = f"there is no dataset {name!r}" + (f" (existing datasets: {', '.join(existing)})" if existing else "")
    if "," in name:
        mixture = ",".join(f"{part.strip()}:0.5" for part in name.split(","))
        return f"{error}. A mixture of datasets needs their proportions, such as --dataset={mixture}"
    siblings = [str(meta.parent) for meta in Path(name).parent.glob("*/meta.json")] if Path(name).name != name else []
    if paths := difflib.get_close_matches(str(Path(name)), siblings, 1, 0.75):
        return f"{error}. Did you mean --dataset={paths[0]}?"
    known = [*existing, *dataset_names()]
    near = next(iter(difflib.get_close_matches(Path(name).name, known, 1, 0.75)), "")
    if near in existing:
        return f"{error}. Did you mean --dataset={near}?"
    if near == "shakespeare":  # nanoGPT has a dataset of this name, so the corpus of this name makes the dataset plays
        plays = f"{prepare_command('plays')} makes --dataset=plays"
        return f"{error}. {plays}; {prepare_command(near)} makes nanoGPT's dataset shakespeare."
    if near and near != name:
        return f"{error}. Did you mean --dataset={near}? Prepare it with {prepare_command(near)}"
    return f"{error}. Prepare it with {prepare_command(name)}"


def _load_prepared(name: str, path: Path, to_hash: int) -> Dataset:
    meta_path = path / "meta.json"
    try:
        meta = files.read_json(meta_path)
        sha256 = meta.pop("sha256", None)  # older versions wrote none
        if sha256 not in (None, meta_hash(meta)):
            raise ValueError("its SHA-256 does not match its content")
        if meta["format"] != 1:
            raise UserError(f"{meta_path} has format {meta['format']!r:.20}, not 1. Prepare the dataset again.")
        tokenizer, vocab_size = from_dict(meta["tokenizer"]), meta["vocab_size"]
        same = meta["tokenizer_hash"] == tokenizer_hash(tokenizer) and vocab_size == tokenizer.n_vocab
        counts = {split: meta[split].get("tokens") for split in ("train", "val")}
        no_chat_files: dict[str, list] = {"masks": [], "index": []}
        listed = {
            (split, key): [(str(entry["file"]), int(entry["tokens"]), str(entry["sha256"])) for entry in entries]
            for split in ("val", "train")
            for key, entries in ((key, {**no_chat_files, **meta[split]}[key]) for key in KINDS)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{meta_path} is truncated or damaged, or was edited. Prepare the dataset again with --overwrite."
        ) from error
    if not same:
        raise UserError(
            f"the tokenizer in {meta_path} is not the one that made the shards. Prepare the dataset again with "
            "--overwrite."
        )

    opened: dict[tuple[str, str], list[Shard]] = {}
    unhashed = 0
    for (split, key), entries in listed.items():
        opened[split, key] = []
        for file, tokens, sha256 in entries:
            if not SHARD_NAME.fullmatch(file) or not file.endswith(KINDS[key]):
                raise UserError(
                    f"{meta_path} lists {file!r:.60}, which is not the name of a shard. Prepare the dataset again."
                )
            shard = open_shard(path / file)
            size = tokens * shard.dtype.itemsize
            if size <= to_hash:
                to_hash -= size
                differs = shard.tokens != tokens or files.sha256(shard.path) != sha256
            else:  # compare only the count
                unhashed += size
                differs = shard.tokens != tokens
            if differs or DTYPE_KINDS.get(shard.dtype.str, "shards") != key:
                raise UserError(
                    f"{shard.path} is not the shard that {meta_path} lists: it is damaged, or one of them belongs to "
                    "another dataset. Prepare the dataset again with --overwrite."
                )
            opened[split, key].append(shard)
    for split, count in counts.items():
        if count != sum(shard.tokens for shard in opened[split, "shards"]):
            raise UserError(
                f"{meta_path} says {count!r:.20} tokens of {split}, but its shards hold a different number. Prepare "
                "the dataset again with --overwrite."
            )
    dataset = _dataset(name, path, opened["train", "shards"], opened["val", "shards"], tokenizer, meta)
    dataset.unhashed = unhashed
    for split, stream in (("train", dataset.train), ("val", dataset.val)):
        masks, index = opened[split, "masks"], opened[split, "index"]
        if not masks and not index:
            continue
        mask = Tokens(masks, 2, f"mask of the {split} ({path})")
        if stream is None or len(mask) != len(stream):
            raise UserError(f"the masks of {path} differ in length from its shards. Prepare the dataset again.")
        stream.mask = mask
        if index:
            forms, pairs = Tokens(index, 2**31, f"index of the {split} ({path})"), "preferences" in meta
            stream.conversations = _read_index(path, stream, forms, pairs)
    return dataset


def _read_index(path: Path, tokens: Tokens, index: Tokens, pairs: bool) -> Conversations:
    try:
        return Conversations(tokens, index.read([0], len(index)).reshape(-1, len(FORM)), pairs)
    except ValueError as error:
        raise UserError(
            f"the index of {path} does not match its shards. Prepare the dataset again with --overwrite."
        ) from error


def _load_nanogpt(name: str, path: Path) -> Dataset:
    """Open `train.bin` and `val.bin`, headerless uint16. `meta.pkl` holds the characters; without it, the tokens are
    GPT-2's."""

    def shards(file: Path) -> list[Shard]:
        file_id = _file_id(file.stat())
        size = file_id[1]
        if size % 2:
            raise UserError(f"{file} is truncated: {size} bytes is odd, but its tokens are uint16. Prepare it again.")
        return [Shard(file, np.dtype("<u2"), 0, size // 2, file_id)]

    meta_pkl = path / "meta.pkl"
    tokenizer = _read_meta_pkl(meta_pkl) if meta_pkl.exists() else GPT2Tokenizer()
    val = shards(path / "val.bin") if (path / "val.bin").is_file() else []
    return _dataset(name, path, shards(path / "train.bin"), val, tokenizer, {})


class _PlainUnpickler(pickle._Unpickler):
    """An unpickler for dicts, lists, strings and numbers only. A pickle runs code by naming a class or function, which
    is refused here. The Python implementation is used because the C one can be made to exhaust memory."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _read_meta_pkl(path: Path) -> Tokenizer:
    try:
        with files.open_regular(path) as file:
            itos = _PlainUnpickler(file).load()["itos"]
        return from_dict({"kind": "char", "vocab": [itos[i] for i in range(len(itos))]})
    except Exception as error:  # a broken pickle can raise nearly anything
        raise UserError(
            f"{path} is not nanoGPT's meta.pkl, a plain dict with the characters in 'itos' ({error}). No code in it "
            "was run. Prepare the dataset again."
        ) from error


def _foreign_shards(path: Path, split: str) -> list[Path]:
    """Return a split's shards named as in llm.c and modded-nanogpt: NAME_train_000001.bin, or one NAME_train.bin."""
    return sorted(path.glob(f"*_{split}_*.bin")) or sorted(path.glob(f"*_{split}.bin"))


def _load_llmc(name: str, path: Path) -> Dataset:
    """Open shards without a meta.json. Their tokenizer is a tokenizer.json in the same folder, else GPT-2's."""
    train, val = ([open_shard(file) for file in _foreign_shards(path, split)] for split in ("train", "val"))
    tokenizer = load_hf(path) if is_hf(path) else GPT2Tokenizer()
    for shard in train + val:
        if shard.dtype.itemsize != 2 and not is_hf(path):
            raise UserError(
                f"{shard.path} holds uint32 tokens of an unknown tokenizer. Copy the model's tokenizer.json and "
                f"tokenizer_config.json into {path}."
            )
    return _dataset(name, path, train, val, tokenizer, {})


def _dataset(name: str, path: Path, train: list[Shard], val: list[Shard], tokenizer: Tokenizer, meta: dict) -> Dataset:
    streams = [
        Tokens(shards, tokenizer.n_vocab, f"{split} ({path})") for split, shards in (("train", train), ("val", val))
    ]
    return Dataset(name, path, streams[0], streams[1] if val else None, tokenizer, tokenizer.n_vocab, meta)
