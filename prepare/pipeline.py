"""Documents -> tokens -> shards, in two passes and bounded memory.

The first pass counts the characters, which says where the validation split begins, and collects the vocabulary of a
char tokenizer. The second encodes and writes.
"""

import contextlib
import errno
import hashlib
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from acorn import UserError, files
from acorn.shards import PARTIAL, SHARD_NAME, SHARD_TOKENS, ShardWriter, write_meta
from acorn.tokenizer import Tokenizer, get_tokenizer, split_text, tokenizer_hash

SEPARATOR = "\n\n"  # between two documents, for a tokenizer without an end-of-text token


class Piece(NamedTuple):
    split: str  # train | val
    text: str
    starts_document: bool


def prepare(
    documents: Iterable[str],
    out: Path,
    *,
    name: str,
    tokenizer: str | Tokenizer,
    source: dict,
    val_fraction: float = 0.1,
    overwrite: bool = False,
    shard_tokens: int = SHARD_TOKENS,
) -> dict:
    """Write the dataset `out` and return its meta.json. `documents` is gone through twice; empty ones are left out.
    `tokenizer` is a kind, or a tokenizer that is there already.

    Validation is the end of the corpus: of n characters, those from int(n * (1 - val_fraction)) on. Each document is
    preceded by one end-of-text token where the tokenizer has one. A document that the cut divides goes on in val
    without. An existing dataset is replaced only with `overwrite`, and only once the new one is whole.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction is {val_fraction}; it must lie between 0 and 1, as 0.1 does")
    if (out / "meta.json").exists() and not overwrite:
        raise UserError(f"{out} already holds a dataset; give --overwrite to replace it, or another --name")

    documents_count, chars, size, tokenizer = _survey(documents, tokenizer)
    meta = {
        "format": 1,
        "name": name,
        "tokenizer": tokenizer.to_dict(),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "vocab_size": tokenizer.n_vocab,
        "documents": documents_count,
    }
    existed, partial, written, lock = out.exists(), out / PARTIAL, {}, None
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = files.lock(out, "preparing")
        shutil.rmtree(partial, ignore_errors=True)  # of a preparation that was killed
        partial.mkdir()
        pieces = _Pieces(documents, int(chars * (1 - val_fraction)), tokenizer)
        with tqdm(total=size, desc="encoding", unit="B", unit_scale=True) as progress:
            written = _write_splits(pieces, tokenizer, partial, shard_tokens, progress)
        if pieces.chars != chars:
            raise UserError("the corpus changed while it was being read; run this again when its files are at rest")
        for split in ("train", "val"):
            if written[split]["tokens"] < 2:
                raise UserError(
                    f"the corpus is too short to split: {chars} characters and val_fraction {val_fraction} leave "
                    f"{written[split]['tokens']} tokens for {split}, and 2 are the least; give more text"
                )
        meta |= written | {"source": source | {"sha256": pieces.sha256.hexdigest()}}
        write_meta(partial, meta)
        _move_in(partial, out)
    except OSError as error:
        raise UserError(_explain(error, out, partial, size)) from error
    finally:
        if lock is not None:
            shutil.rmtree(partial, ignore_errors=True)
            (out / ".lock").unlink(missing_ok=True)
            lock.close()
        if not existed:
            with contextlib.suppress(OSError):  # it holds the finished dataset
                out.rmdir()
    return meta


def _survey(documents: Iterable[str], wanted: str | Tokenizer) -> tuple[int, int, int, Tokenizer]:
    """First pass: the numbers of documents, characters and UTF-8 bytes, and the tokenizer."""
    count = chars = size = 0

    def counted() -> Iterator[str]:
        nonlocal count, chars, size
        with tqdm(desc="reading", unit="B", unit_scale=True, leave=False) as progress:
            for document in filter(None, documents):
                count += 1
                chars += len(document)
                bytes_ = len(document.encode())
                size += bytes_
                progress.update(bytes_)
                yield document
        if count > 1:
            yield SEPARATOR

    texts = counted()
    tokenizer = get_tokenizer(wanted, texts) if isinstance(wanted, str) else wanted
    deque(texts, maxlen=0)  # a tokenizer that needs no training left them unread
    if not chars:
        raise UserError("the corpus is empty: there is no text in it; check the files that you named")
    separators = len(SEPARATOR) * (count - 1) if tokenizer.eot is None else 0
    return count, chars + separators, size + separators, tokenizer


class _Pieces:
    """Second pass: iterating gives the corpus in pieces, and `chars` and `sha256` grow on the way.

    The hash is that of all documents joined by SEPARATOR; of a corpus that is one file, it is the file's own.
    """

    def __init__(self, documents: Iterable[str], cut: int, tokenizer: Tokenizer):
        self.documents, self.cut, self.tokenizer = documents, cut, tokenizer
        self.chars, self.sha256 = 0, hashlib.sha256()

    def __iter__(self) -> Iterator[Piece]:
        for i, document in enumerate(filter(None, self.documents)):
            joined = SEPARATOR + document if i else document
            self.sha256.update(joined.encode())
            text = joined if self.tokenizer.eot is None else document
            cut = max(0, self.cut - self.chars)
            self.chars += len(text)
            starts_document = True
            for split, part in (("train", text[:cut]), ("val", text[cut:])):
                for piece in split_text(part) if part else ():
                    yield Piece(split, piece, starts_document)
                    starts_document = False


def _write_splits(
    pieces: Iterable[Piece], tokenizer: Tokenizer, folder: Path, shard_tokens: int, progress: tqdm
) -> dict[str, dict]:
    """Encode the pieces and write both splits; what meta.json says of them."""
    eot = np.array([] if tokenizer.eot is None else [tokenizer.eot], dtype=np.int32)
    sizes = {"train": 0, "val": 0}
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(ShardWriter(folder, split, tokenizer.n_vocab, shard_tokens)) for split in sizes
        }
        for piece, ids in _encode(pieces, tokenizer):
            if piece.starts_document:
                writers[piece.split].write(eot)
            writers[piece.split].write(ids)
            bytes_ = len(piece.text.encode())
            sizes[piece.split] += bytes_
            progress.update(bytes_)
    return {
        split: {"tokens": writer.tokens, "bytes": sizes[split], "shards": writer.shards}
        for split, writer in writers.items()
    }


def _encode(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[tuple[Piece, np.ndarray]]:
    """Encode on all cores, in order, a few pieces ahead. Threads do: tiktoken works outside the interpreter lock."""
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        ahead = deque()
        for piece in pieces:
            ahead.append((piece, pool.submit(tokenizer.encode, piece.text)))
            if len(ahead) > 4 * workers:
                piece, ids = ahead.popleft()
                yield piece, ids.result()
        for piece, ids in ahead:
            yield piece, ids.result()


def _move_in(partial: Path, out: Path) -> None:
    """Put the finished dataset in place of the old one. Other files in `out` stay.

    Without its meta.json the old dataset is incomplete, and so is the new one until its own has arrived: the two never
    mix unnoticed.
    """
    (out / "meta.json").unlink(missing_ok=True)
    for file in out.iterdir():
        if SHARD_NAME.fullmatch(file.name):
            file.unlink()
    for file in sorted(partial.glob("*.bin")):
        os.replace(file, out / file.name)
    os.replace(partial / "meta.json", out / "meta.json")


def _explain(error: OSError, out: Path, partial: Path, size: int) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        folder = next(folder for folder in (partial, out, *out.absolute().parents) if folder.exists())
        free = shutil.disk_usage(folder).free / 1e6
        return (
            f"the disk that holds {out} is full: about {2 * size / 1e6:.1f} MB are needed at most and {free:.1f} MB "
            "are free; make room, or choose another disk with --out"
        )
    return f"cannot write the dataset {out}: {error.strerror or error}; choose another place with --out"
