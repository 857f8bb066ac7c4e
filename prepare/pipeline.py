"""Documents -> pieces -> tokens -> shards, in bounded memory.

`Reader` decides a document's split and cuts it into pieces. `_batches` packs pieces into batches of about a megabyte.
`_encode_ahead` encodes batches on all cores, in order. `_write` writes the ids into shards. After each finished shard
`_write_shards` saves its progress, from which the same command resumes after an interruption.
"""

import contextlib
import errno
import hashlib
import json
import math
import operator
import os
import re
import shutil
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby, islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from acorn import UserError, files, settings
from acorn.data.shards import KINDS, PARTIAL, SHARD_NAME, SHARD_TOKENS, ShardWriter, meta_hash, write_meta
from acorn.data.tokenizer import Tokenizer, split_text, tokenizer_hash
from acorn.data.tokenizer_kinds import from_dict, get_tokenizer

SEPARATOR = "\n\n"  # between documents, for tokenizers without an end-of-text token
MIN_DOCUMENTS = 100  # with fewer documents, a validation split of whole documents would be poor
PIECE_CHARS = 1 << 17  # target characters of a piece
MAX_PIECE_CHARS = 1 << 20  # maximum characters of a piece; cutting a long run of letters may change a token or two
BATCH_CHARS = 1 << 20  # characters
MAX_QUEUED_BATCHES = 32  # batches
MAX_UNKNOWN = 10_000  # different words unknown to the tokenizer that are counted
MAX_TRAINING_CHARS = 1 << 30  # maximum characters that are read to train a tokenizer
TRAINING_CHARS_PER_TOKEN = 8  # maximum characters that are read for each token of --max_tokens
PROGRESS_FILE = "progress.json"  # the file in PARTIAL that holds the progress


class Document(NamedTuple):
    """A document of a corpus with its own validation split. Other corpora yield only the text."""

    text: str | Iterable[str]  # whole, or in blocks
    split: str  # train | val


class Piece(NamedTuple):
    text: str
    split: str  # train | val
    size: int  # bytes of UTF-8
    starts_document: bool
    ends_document: bool = False
    only_val: bool = False  # of the corpus's own validation split, which must not be trained on


@dataclass
class Place:
    """A position in a corpus, between two pieces of a document."""

    documents: int = 0  # complete documents before this position
    pieces: int = 0  # pieces of the current document before this position
    chars: int = 0  # characters before the current document
    sha256: str = ""  # hash of the documents before the current one: see `_chain`
    bookmark: dict | None = None  # the corpus's own position, for resuming without reading everything again


class Batch(NamedTuple):
    pieces: list[Piece]
    end: Place


class EmptySplit(UserError):
    """The hashes of the documents put too little text into a split."""

    n_documents = 0


def prepare(
    documents: Iterable[str | Iterable[str] | Document],
    out: Path,
    *,
    name: str,
    tokenizer: str | Tokenizer,
    source: dict,
    val_by: str | None = None,
    val_fraction: float = 0.1,
    val_tokens: int | None = None,
    max_tokens: int | None = None,
    overwrite: bool = False,
    shard_tokens: int = SHARD_TOKENS,
) -> dict:
    """Write the dataset `out` and return its meta.json.

    `documents` must be re-iterable; empty documents are left out. It may have these methods: `fingerprint()` returns a
    JSON-serializable value that differs if the text differs. `bookmark()` returns a JSON-serializable dict for a
    position at or before the last yielded document, with that document's number as "documents".
    `read_from(bookmark)` yields the documents from there on. `tokenizer` is the name of a kind, or a tokenizer.

    Each document is preceded by one end-of-text token if the tokenizer has one, or by the BOS that its post-processor
    puts before a text. An EOS that it puts after a text follows each document. `val_by` selects the validation split:
      end       the end of the corpus: of n characters, those from int(n * (1 - val_fraction)) on. A document that spans
                the cut continues in val without another end-of-text token. The default for few documents.
      document  whole documents, about val_fraction of them. A hash of the text (of the first block, if it comes in
                blocks) decides, so a document's split does not depend on the rest of the corpus.
    `val_tokens` limits val. With `end`, val is then the last tokens of the corpus. With `document`, a document that
    does not fit into val as a whole goes to train, at its place in the corpus. Of a corpus with its own validation
    split, the first `val_tokens` tokens are val, and the rest is left out. `max_tokens` limits the whole dataset.

    After an interruption, such as a kill or a full disk, the same call resumes after the last complete shard. (With
    `end` and `val_tokens`, it encodes the last part of the text again.) The result is byte-identical. An existing
    dataset is replaced only with `overwrite`, once the new one is complete.
    """
    counts = {"val_tokens": val_tokens, "max_tokens": max_tokens, "shard_tokens": shard_tokens}
    settings.check_bounds({"val_fraction": val_fraction, **counts})
    if (out / "meta.json").exists() and not overwrite:
        raise UserError(f"{out} already holds a dataset. Use --overwrite to replace it, or another --name.")
    options: dict = {"val_by": val_by, "val_fraction": val_fraction, "val_tokens": val_tokens, "max_tokens": max_tokens}
    command = options | {
        "name": name,
        "source": source,
        "documents": documents.fingerprint() if hasattr(documents, "fingerprint") else None,
        "tokenizer": tokenizer if isinstance(tokenizer, str) else tokenizer_hash(tokenizer),
        "shard_tokens": shard_tokens,
    }
    is_large = max_tokens or operator.length_hint(documents, MIN_DOCUMENTS) >= MIN_DOCUMENTS
    # an interrupted run may already know that the hashes leave a split empty
    if not val_by and is_large and not _read_progress(out / PARTIAL, command | {"val_by": "end"}):
        by_hash = {"val_by": "document", "overwrite": overwrite, "shard_tokens": shard_tokens, "source": source}
        try:
            return prepare(documents, out, name=name, tokenizer=tokenizer, **options | by_hash)
        except EmptySplit as error:  # of few documents, whose number was not known
            if max_tokens:
                raise
            print(
                f"note: {error.n_documents} documents leave a split empty; the end of the text is val", file=sys.stderr
            )
    options["val_by"] = command["val_by"] = val_by = val_by or "end"
    if val_by == "end" and max_tokens:
        raise UserError(
            "--max_tokens cuts off the end of the corpus, which --val_by end needs for validation. Remove one of them."
        )

    existed, partial, lock, progress = out.exists(), out / PARTIAL, None, {}
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = files.lock(out, "preparing")
        progress = _read_partial(partial, command)
        if not (partial / "meta.json").exists():  # otherwise the interruption was after the last shard
            if not progress:
                progress = {"command": command} | _survey(documents, tokenizer, options)
            write_meta(partial, {"format": 1, "name": name} | _write_shards(documents, partial, progress))
        meta = move_in(partial, out)
        shutil.rmtree(partial)
    except OSError as error:
        raise UserError(explain(error, out, partial, progress.get("size"))) from error
    finally:
        if lock is not None:
            if not (partial / PROGRESS_FILE).exists():
                files.remove(partial, ignore_errors=True)
            elif sys.exc_info()[0] is not None:
                print(f"complete shards are kept in {partial}; run the same command to resume", file=sys.stderr)
            files.unlock(lock)
        if not existed:
            with contextlib.suppress(OSError):  # not empty if it holds the dataset or complete shards
                out.rmdir()
    return meta


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def _survey(documents: Iterable, requested: str | Tokenizer, options: dict) -> dict:
    """Return what must be known before the first token is written, JSON-serializable: the tokenizer, and, if the whole
    corpus had to be read, its size in characters and bytes and the character at which val begins with --val_by end.
    `options` are those of `prepare`. With `max_tokens`, only the beginning of the corpus is read."""
    val_by, val_fraction, max_tokens = (options[name] for name in ("val_by", "val_fraction", "max_tokens"))
    limit = math.inf
    if max_tokens:  # a char tokenizer must see every character up to the end of the batch that reaches max_tokens
        limit = TRAINING_CHARS_PER_TOKEN * max_tokens + BATCH_CHARS + MAX_PIECE_CHARS
    count = chars = size = 0

    def texts() -> Iterator[str]:
        nonlocal count, chars, size
        with tqdm(desc="reading", unit="B", unit_scale=True, leave=False, disable=None) as bar:
            for document in documents:
                chars_before = chars
                for block in _blocks(document):
                    chars += len(block)
                    size += (bytes_ := _size(block))
                    bar.update(bytes_)
                    yield block
                    if chars > limit:
                        break
                count += chars > chars_before
                if chars > limit:
                    break
        if count > 1:
            yield SEPARATOR

    tokenizer = get_tokenizer("char", texts()) if requested == "char" else requested
    if val_by == "end":
        deque(texts() if not chars else (), maxlen=0)
        if not chars:
            raise UserError("the corpus is empty: there is no text in it. Check the names of the files.")
    if not isinstance(tokenizer, str) and not tokenizer.marks_documents:
        chars += len(SEPARATOR) * (count - 1)
        size += len(SEPARATOR) * (count - 1)
    cut = int(chars * (1 - val_fraction)) if val_by == "end" else None
    if isinstance(tokenizer, str):
        text = _train_part(Reader(documents, cut, val_fraction), min(limit, MAX_TRAINING_CHARS))
        tokenizer = get_tokenizer(tokenizer, text)
    # no progress is saved while ValLimit holds text back, so cut as late as val_tokens allows
    if cut is not None and options["val_tokens"]:
        cut = max(cut, chars - options["val_tokens"] * int(tokenizer.token_bytes().max()))
    return {"tokenizer": tokenizer.to_dict(), "chars": chars, "size": 0 if max_tokens else size, "cut": cut}


def _train_part(reader: "Reader", limit: float) -> Iterator[str]:
    """Yield the text of the train split among about the first `limit` characters of the corpus. It is read only if the
    tokenizer needs training."""
    chars = 0
    for piece in reader:
        if piece.split == "train":
            yield piece.text
        chars += len(piece.text)
        if chars > limit:
            return


class Reader:
    """Iterates over the corpus in pieces from `place` on, and updates `place` to the position after the last piece.
    `cut` is the character at which val begins, None if documents are chosen by their hash."""

    def __init__(self, documents, cut: int | None, val_fraction: float, separator="", place=None):
        self.documents, self.cut, self.val_fraction, self.separator = documents, cut, val_fraction, separator
        self.place = place or Place()
        self._at_end = (0, "")

    def __iter__(self) -> Iterator[Piece]:
        bookmark, skipped = self.place.bookmark, self.place.pieces
        documents = self.documents.read_from(bookmark) if bookmark else self.documents
        passed = bookmark["documents"] if bookmark else 0
        for document in islice(documents, self.place.documents - passed, None):
            self.place.pieces = 0
            for piece in self._pieces(document):
                self.place.pieces += 1
                if self.place.pieces > skipped:
                    yield piece
            self.place.documents += 1
            self.place.pieces = skipped = 0
            self.place.chars, self.place.sha256 = self._at_end

    def current_place(self) -> Place:
        """Return a copy of `place` with the corpus's bookmark for it."""
        if hasattr(self.documents, "bookmark"):
            self.place.bookmark = self.documents.bookmark()
        return Place(**asdict(self.place))

    def _pieces(self, document) -> Iterator[Piece]:
        last = None  # held back until it is known whether it ends the document
        for split, parts in groupby(self._parts(document), key=lambda part: part[1]):
            for text in cut_pieces(text for text, _ in parts):
                if last:
                    yield last
                only_val = isinstance(document, Document) and split == "val"
                last = Piece(text, split, _size(text), last is None, only_val=only_val)
        if last:
            yield last._replace(ends_document=True)

    def _parts(self, document) -> Iterator[tuple[str, str]]:
        """Yield the document's text, block by block, with its split. All blocks are read before the last piece is
        yielded, so `_at_end` keeps the characters and hash after this document until `place` moves past it."""
        split = document.split if isinstance(document, Document) else None
        digest, chars = hashlib.sha256(), self.place.chars
        for i, block in enumerate(_blocks(document)):
            digest.update(_utf8(block))
            if i == 0:
                if not split and self.cut is None:
                    split = "val" if int(digest.hexdigest()[:16], 16) < self.val_fraction * 2**64 else "train"
                if chars:
                    block = self.separator + block
            if split:
                yield block, split
            else:
                assert self.cut is not None, "without a cut, each document has a split"
                n_train = max(0, self.cut - chars)
                parts = (block[:n_train], "train"), (block[n_train:], "val")
                yield from ((part, name) for part, name in parts if part)
            chars += len(block)
        is_empty = chars == self.place.chars
        self._at_end = chars, self.place.sha256 if is_empty else _chain(self.place.sha256, digest.hexdigest())


def _blocks(document: str | Iterable[str] | Document) -> Iterator[str]:
    """Return the non-empty blocks of a document."""
    text = document.text if isinstance(document, Document) else document
    if not isinstance(text, str | Iterable):
        raise UserError(f"documents(args) of the corpus returns {text!r:.80}, which is not text. Return only str.")
    return filter(None, [text] if isinstance(text, str) else text)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # tokenizers replace lone surrogates by U+FFFD


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(_utf8(text))


def _chain(sha256: str, document: str) -> str:
    """Return the hash of a corpus after another document: for the first document its own hash, else the hash of both
    hashes. Unlike a hash of the whole text, it can be resumed in the middle."""
    return hashlib.sha256((sha256 + document).encode()).hexdigest() if sha256 else document


def cut_pieces(texts: Iterable[str]) -> Iterator[str]:
    """Yield the joined texts in pieces that can be encoded separately. The pieces do not depend on how the text was
    divided into `texts`."""
    rest = ""
    for text in texts:
        *whole, rest = split_text(rest + text, PIECE_CHARS)
        while whole and len(rest) <= PIECE_CHARS:  # near the end, the following text may move a cut
            rest = whole.pop() + rest
        *chopped, rest = _chop(rest)
        for piece in whole:
            yield from _chop(piece)
        yield from chopped
    for piece in split_text(rest, PIECE_CHARS):
        yield from _chop(piece)


def _chop(piece: str) -> Iterator[str]:
    """Yield a piece without whitespace in parts of at most MAX_PIECE_CHARS characters. It is cut between a digit or
    punctuation and a letter, where tokens have a boundary, or anywhere if there is no such place."""
    start = 0
    while len(piece) - start > MAX_PIECE_CHARS:
        end = start + MAX_PIECE_CHARS
        if found := _SAFE_CUT.search(piece, end - MAX_PIECE_CHARS // 2, end):
            end = found.start()
        yield piece[start:end]
        start = end
    yield piece[start:]


_SAFE_CUT = re.compile(r"(?<=[0-9;,)}])(?=[A-Za-z])")


def _batches(reader: Reader) -> Iterator[Batch]:
    pieces, chars = [], 0
    for piece in reader:
        pieces.append(piece)
        chars += len(piece.text)
        if chars >= BATCH_CHARS:
            yield Batch(pieces, reader.current_place())
            pieces, chars = [], 0
    yield Batch(pieces, reader.current_place())  # possibly empty, but with the final position


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def _write_shards(documents: Iterable, folder: Path, progress: dict) -> dict:
    """Encode the documents and write both splits, continuing from `progress`. Returns their entries of meta.json."""
    command, tokenizer = progress["command"], from_dict(progress["tokenizer"])
    place = Place(**progress["place"]) if "place" in progress else Place()
    counts = progress.get("counts") or {"documents": 0, "train": 0, "val": 0}  # train and val in bytes
    separator = "" if tokenizer.marks_documents else SEPARATOR
    reader = Reader(documents, progress["cut"], command["val_fraction"], separator, place)
    with contextlib.ExitStack() as stack:
        writers = {}
        for split in ("train", "val"):
            writer = ShardWriter(folder, split, tokenizer.n_vocab, command["shard_tokens"])
            writers[split] = stack.enter_context(writer)
            if "splits" in progress:
                try:
                    writer.resume(progress["splits"][split])
                except UserError:  # would recur on every attempt
                    (folder / PROGRESS_FILE).unlink(missing_ok=True)
                    raise
        bar = stack.enter_context(
            tqdm(total=progress["size"] or None, desc="encoding", unit="B", unit_scale=True, disable=None)
        )
        bar.update(counts["train"] + counts["val"])
        limit = ValLimit(command["val_tokens"], writers["val"].tokens, progress["cut"] is not None, tokenizer)
        saved = sum(len(writer.shards) for writer in writers.values())
        for batch, ids, unknown in _encode_ahead(_batches(reader), tokenizer):
            batch, ids = limit.drop_surplus(batch, ids)
            if room := command["max_tokens"]:
                room -= limit.n_held + sum(writer.tokens for writer in writers.values())
            is_full = bool(room) and sum(map(len, ids)) >= room
            if is_full:
                batch, ids = _beginning(batch, ids, room, tokenizer)
            counts["documents"] += sum(piece.starts_document for piece in batch.pieces)
            _write(limit.assign(batch.pieces, ids), writers, counts)
            if n_unknown := sum(int((array == tokenizer.unk_id).sum()) for array in ids if unknown):
                found = counts.setdefault("unknown", {"tokens": 0, "words": {}})
                found["tokens"] += n_unknown
                found["words"] = dict((Counter(found["words"]) + unknown).most_common(MAX_UNKNOWN))
            bar.update(counts["train"] + counts["val"] - bar.n)
            place = batch.end
            if is_full:
                break
            finished = sum(len(writer.shards) for writer in writers.values())
            if finished > saved and not limit.held:
                saved = finished
                progress |= {"place": asdict(place), "counts": counts}
                progress["splits"] = {split: writer.save() for split, writer in writers.items()}
                files.replace(folder / PROGRESS_FILE, json.dumps(progress))
        _write(limit.rest(), writers, counts)
    changed = progress["cut"] is not None and place.chars != progress["chars"]
    if changed or min(writer.tokens for writer in writers.values()) < 2:
        (folder / PROGRESS_FILE).unlink(missing_ok=True)  # resuming would fail again
        raise _empty_split_error(changed, writers, counts, command, place.chars)
    return {
        "tokenizer": tokenizer.to_dict(),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "vocab_size": tokenizer.n_vocab,
        "document_mark": next(iter(tokenizer.before_document), tokenizer.eot),
        "documents": counts["documents"],
        "val_by": command["val_by"],
        "source": command["source"] | {"sha256": place.sha256},
        **{name: counts[name] for name in ("unknown",) if name in counts},  # and the most frequent words among them
    } | {
        split: {"tokens": writer.tokens, "bytes": counts[split], "shards": writer.shards}
        for split, writer in writers.items()
    }


def _encode_ahead(batches: Iterator[Batch], tokenizer: Tokenizer) -> Iterator[tuple[Batch, list, Counter]]:
    """Read and encode on all cores, in order, a few batches ahead. Threads suffice, because tokenizers, hashes and file
    access release the interpreter lock. Reading runs further ahead than encoding, because the vocabulary is loaded at
    the start."""
    workers = os.cpu_count() or 1
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(ThreadPoolExecutor(n)) for n in (workers, 1)]
        for pool in pools:
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        encoder, reader = pools
        loaded = encoder.submit(tokenizer.encode_batch, [])

        def encode(batch: Batch):
            loaded.result()  # two threads must not load the vocabulary at once
            return _encode(batch, tokenizer)

        reading = deque(reader.submit(next, batches, None) for _ in range(MAX_QUEUED_BATCHES))
        ahead: deque = deque()
        while batch := reading.popleft().result():
            reading.append(reader.submit(next, batches, None))
            ahead.append((batch, encoder.submit(encode, batch)))
            if len(ahead) > 2 * workers:
                batch, ids = ahead.popleft()
                yield batch, *ids.result()
        for batch, ids in ahead:
            yield batch, *ids.result()


def _encode(batch: Batch, tokenizer: Tokenizer) -> tuple[list[np.ndarray], Counter]:
    """Return the ids of each piece (int32, with the marks before and after each document), and the words that the
    tokenizer does not know with their counts."""
    prefix, ending = (np.array(ids, dtype=np.int32) for ids in (tokenizer.before_document, tokenizer.after_text))
    texts, continues, unknown = [], [], Counter[str]()
    for piece in batch.pieces:
        is_joined = not tokenizer.marks_documents and piece.text.startswith(SEPARATOR)  # to the document before
        texts.append(piece.text)
        continues.append(not piece.starts_document or is_joined)
    encoded = tokenizer.encode_batch(texts, continues)
    arrays, ends = [np.empty(0, dtype=np.int32)], [0]
    for piece, ids in zip(batch.pieces, encoded, strict=True):
        if tokenizer.unk_id is not None and tokenizer.unk_id in ids:
            unknown.update(tokenizer.unknown(piece.text))
        parts = [prefix] * piece.starts_document + [ids] + [ending] * piece.ends_document
        arrays += parts
        ends.append(ends[-1] + sum(map(len, parts)))
    joined = np.concatenate(arrays)  # one call, because each releases the interpreter lock and waits for it
    return [joined[start:end] for start, end in pairwise(ends)], unknown


def _beginning(batch: Batch, ids: list[np.ndarray], room: int, tokenizer: Tokenizer) -> tuple[Batch, list[np.ndarray]]:
    """Return the first `room` tokens of a batch. The last piece may be truncated."""
    ends = np.cumsum([len(part) for part in ids])
    n = int(np.searchsorted(ends, room)) + 1
    pieces, ids = batch.pieces[:n], ids[:n]
    if ends[n - 1] > room:
        ids[-1] = ids[-1][: room - ends[n - 1]]
        pieces[-1] = pieces[-1]._replace(size=_size_of(ids[-1], tokenizer))
    return Batch(pieces, batch.end), ids


class Part(NamedTuple):
    """A part of the corpus that goes into one split."""

    split: str  # train | val
    ids: np.ndarray
    size: int  # bytes of UTF-8


class ValLimit:
    """Assigns pieces to splits so that val has at most `val_tokens` tokens (None: no limit). `n_val` of them are
    already written.

    Parts for val are held until their split is known. With `by_end`, val gets the last tokens of the corpus; otherwise,
    it gets each document that fits as a whole. Everything else goes to train, in corpus order."""

    def __init__(self, val_tokens: int | None, n_val: int, by_end: bool, tokenizer: Tokenizer):
        self.val_tokens, self.by_end, self.tokenizer = val_tokens, by_end, tokenizer
        self.room = (val_tokens or 0) - n_val
        self.held: deque[Part] = deque()
        self.n_held = 0

    def drop_surplus(self, batch: Batch, ids: list[np.ndarray]) -> tuple[Batch, list[np.ndarray]]:
        """Leave out what exceeds the limit of the corpus's own validation split. The last piece may be truncated."""
        if not self.val_tokens:
            return batch, ids
        pieces, kept = [], []
        for piece, part in zip(batch.pieces, ids, strict=True):
            if piece.only_val:
                part, n = part[: self.room], len(part)
                self.room -= len(part)
                piece = piece if len(part) == n else piece._replace(size=_size_of(part, self.tokenizer))
            if len(part):
                pieces.append(piece)
                kept.append(part)
        return Batch(pieces, batch.end), kept

    def assign(self, pieces: list[Piece], ids: list[np.ndarray]) -> Iterator[Part]:
        """Yield the parts whose split is known."""
        for piece, part in zip(pieces, ids, strict=True):
            if not self.val_tokens or piece.only_val:
                yield Part(piece.split, part, piece.size)
            elif piece.split == "train" or not (self.by_end or self.held or piece.starts_document):
                yield Part("train", part, piece.size)  # or it continues a document that did not fit
            else:
                self.held.append(Part("val", part, piece.size))
                self.n_held += len(part)
                if self.by_end:
                    while self.n_held - len(self.held[0].ids) >= self.val_tokens:
                        yield self._release()._replace(split="train")
                elif self.n_held > self.room:
                    while self.held:
                        yield self._release()._replace(split="train")
                elif piece.ends_document:
                    yield from self.rest()

    def rest(self) -> Iterator[Part]:
        """Yield the held parts. With `by_end`, the tokens beyond the limit go to train."""
        if self.held and (surplus := self.n_held - self.room) > 0:
            split, ids, size = self._release()
            n_bytes = _size_of(ids[:surplus], self.tokenizer)
            yield Part("train", ids[:surplus], n_bytes)
            yield Part(split, ids[surplus:], size - n_bytes)
        while self.held:
            part = self._release()
            self.room -= len(part.ids)
            yield part

    def _release(self) -> Part:
        part = self.held.popleft()
        self.n_held -= len(part.ids)
        return part


def _write(parts: Iterable[Part], writers: dict[str, ShardWriter], counts: dict) -> None:
    """Write ids and count their bytes."""
    ids: dict[str, list[np.ndarray]] = {split: [np.empty(0, dtype=np.int32)] for split in writers}
    for part in parts:
        ids[part.split].append(part.ids)
        counts[part.split] += part.size
    for split, writer in writers.items():
        writer.write(np.concatenate(ids[split]))


def _size_of(ids: np.ndarray, tokenizer: Tokenizer) -> int:
    return int(tokenizer.token_bytes()[ids].sum())


def _empty_split_error(changed: bool, writers: dict, counts: dict, command: dict, chars: int) -> UserError:
    if changed:
        return UserError("the corpus changed while it was being read. Run this again once its files stop changing.")
    if not chars:
        return UserError("the corpus is empty: there is no text in it. Check the names of the files.")
    split, tokens = min(((split, writer.tokens) for split, writer in writers.items()), key=lambda pair: pair[1])
    if command["val_by"] == "document":
        options = {name: command[name] for name in ("val_fraction", "val_tokens", "max_tokens") if command[name]}
        if "max_tokens" in options:
            advice = f"a larger --max_tokens, or a {'larger' if split == 'val' else 'smaller'} --val_fraction"
        else:
            larger = "a larger --val_tokens" if "val_tokens" in options and split == "val" else "more text"
            advice = f"{larger}, or --val_by end"
        error = EmptySplit(
            f"--val_by document with {' '.join(f'--{name} {value}' for name, value in options.items())} leaves too "
            f"little text for {split} (documents read: {counts['documents']}). Use {advice}."
        )
        error.n_documents = counts["documents"]
        return error
    return UserError(
        f"the corpus is too short to split: {chars} characters with val_fraction={command['val_fraction']} leave "
        f"{tokens} tokens for {split}, but 2 are needed. Use more text."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Interruption and resuming


def _read_partial(partial: Path, command: dict) -> dict:
    """Return the progress of an interrupted run of the same command; without one, empty `partial` and return {}."""
    files.make_folder(partial)
    if os.path.lexists(partial / PROGRESS_FILE):
        if progress := _read_progress(partial, command):
            tokens = sum(split["tokens"] for split in progress["splits"].values())
            print(f"resuming after {tokens:,} tokens of an earlier run", file=sys.stderr)
            return progress
        print(f"starting over: {partial} belongs to another command, or its input files have changed", file=sys.stderr)
    files.remove(partial)
    partial.mkdir()
    return {}


def _read_progress(partial: Path, command: dict) -> dict:
    """Return the progress of `command` in `partial`; {} if it belongs to another command or is damaged."""
    try:
        progress = files.read_json(partial / PROGRESS_FILE)
        place, bookmark, splits = progress["place"], progress["place"]["bookmark"] or {}, progress["splits"]
        listed = [shard for split in splits.values() for shard in split["shards"]]
        counts = [progress["chars"], progress["size"], 0 if progress["cut"] is None else progress["cut"]]
        counts += [place["documents"], place["pieces"], place["chars"], *(shard["tokens"] for shard in listed)]
        counts += [progress["counts"][name] for name in ("documents", "train", "val")]
        counts += [split[name] for split in splits.values() for name in ("tokens", "in_shard")]
        counts += [bookmark[name] for name in ("documents", "part") if bookmark]
        texts = [place["sha256"], *(shard[name] for shard in listed for name in ("file", "sha256"))]
        from_dict(progress["tokenizer"])
        is_valid = (
            progress["command"] == json.loads(json.dumps(command))
            and splits.keys() == {"train", "val"}
            and place.keys() == asdict(Place()).keys()
            and all(isinstance(count, int) and 0 <= count < 2**62 for count in counts)
            and all(isinstance(text, str) for text in texts)
            and all(SHARD_NAME.fullmatch(shard["file"]) for shard in listed)
        )
        if (partial / "meta.json").exists():
            _new_shards(partial)
        else:
            is_valid = is_valid and all((partial / shard["file"]).exists() for shard in listed)
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return progress if is_valid else {}


def _new_shards(partial: Path) -> set[str]:
    """Return the names of the shards, masks and indices of a finished dataset in `partial`. Raises ValueError if its
    meta.json was changed."""
    meta = files.read_json(partial / "meta.json")
    names = {file["file"] for split in ("train", "val") for key in KINDS for file in meta[split].get(key, ())}
    if meta.pop("sha256") != meta_hash(meta) or not all(SHARD_NAME.fullmatch(name) for name in names):
        raise ValueError("its SHA-256 does not match its content")
    return names


def move_in(partial: Path, out: Path) -> dict:
    """Replace the old dataset in `out` by the finished one, and return its meta.json. Other files in `out` stay.

    The old meta.json is removed first and the new one is moved last, so a mix of both never looks complete. An
    interrupted move can be repeated.
    """
    meta, new = files.read_json(partial / "meta.json"), _new_shards(partial)
    (out / "meta.json").unlink(missing_ok=True)
    for file in out.iterdir():
        if SHARD_NAME.fullmatch(file.name) and file.name not in new:
            file.unlink()
    for name in sorted(new):
        if (partial / name).exists():
            os.replace(partial / name, out / name)
    os.replace(partial / "meta.json", out / "meta.json")
    return meta


def explain(error: OSError, out: Path, partial: Path, size: int | None) -> str:
    """Return the message for an error of writing the dataset `out`; `size` is the size of the text in bytes."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        folder = next(folder for folder in (partial, out, *out.absolute().parents) if folder.exists())
        free = shutil.disk_usage(folder).free / 1e6
        needed = f"at most about {2 * size / 1e6:.1f} MB are needed, " if size else ""
        return (
            f"the disk of {out} is full: {needed}{free:.1f} MB are free. Free some space and run the same command "
            "again, or choose another disk with --out."
        )
    return f"cannot write the dataset {out}: {error.strerror or error}. Choose another folder with --out."
