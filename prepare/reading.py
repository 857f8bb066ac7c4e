"""Files as documents, in bounded memory: plain text in blocks, and the records of jsonl, csv and parquet.

A file whose name ends in .gz or .zst is unpacked on the way. Whatever is wrong with one is a UserError that names it.
"""

import codecs
import contextlib
import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from acorn import UserError

BLOCK = 1 << 20  # bytes; a longer text comes in blocks
LONGEST = 1 << 26  # bytes of a line of .jsonl, characters of a field of .csv, which are held whole
PACKED = (".gz", ".zst")


def suffix(path: str) -> str:
    """The suffix that says what is in the file: .jsonl for x.JSONL.zst."""
    path = path.lower()
    for packed in PACKED:
        path = path.removesuffix(packed)
    return os.path.splitext(path)[1]


def open_unpacked(path: str) -> BinaryIO:
    """A file's bytes, those of .gz and .zst unpacked."""
    if path.lower().endswith(".gz"):
        return gzip.open(path)
    if path.lower().endswith(".zst"):
        import pyarrow  # unlike the package zstandard, it says when a file is cut short

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(path), "zstd"), 1 << 20)
    return open(path, "rb")


@contextlib.contextmanager
def naming(path: str):
    """Errors of reading as UserErrors that name the file."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is no whole gzip file ({error}); get it again or leave it out") from error
    except OSError as error:
        if path.lower().endswith(".zst") and error.errno is None:
            raise UserError(f"{path} is no whole zstd file ({error}); get it again or leave it out") from error
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def head(path: str, size: int = 8192) -> bytes:
    """The first bytes of a file, unpacked."""
    with naming(path), open_unpacked(path) as file:
        return file.read(size)


def text_blocks(path: str, errors: str = "strict", name: str = "") -> Iterator[str]:
    """The text of a UTF-8 file, block by block. `errors`: strict | replace, for bytes that are not UTF-8. `name` is how
    messages call the file."""
    name = name or path
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    done = 0
    with naming(name), open_unpacked(path) as file:
        while True:
            data = file.read(BLOCK)
            pending = len(decoder.getstate()[0])  # the beginning of a character that the last block ended in
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                at = done - pending + error.start
                raise UserError(_not_utf8(f"{name} is not UTF-8: byte {at}", error)) from error
            yield text if done else text.removeprefix("\ufeff")  # the mark that some editors put in front
            if not data:
                return
            done += len(data)


def _not_utf8(where: str, error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"{where} is 0x{byte:02x}; convert the file, leave it out, or go on with --errors replace"


def records(path: str, key: str | None, errors: str = "strict") -> Iterator[str]:
    """The texts of a file of records: the field `key` of each line of .jsonl, or of each row of .csv or .parquet.

    Without a `key` the field is "text". A record whose field is null is empty text.
    """
    reader = {".parquet": _parquet, ".csv": _csv}.get(suffix(path), _jsonl)
    field = key or "text"
    with naming(path):
        for where, value in reader(path, field, errors):
            if value is not None and not isinstance(value, str):
                raise UserError(
                    f"{where} has {value!r:.40} in its field '{field}': that is no text; choose another --key"
                )
            yield value or ""


def has_field(path: str, field: str) -> bool:
    """Whether the first record of the file has the field."""
    try:
        next(records(path, field, "replace"), None)
        return True
    except UserError:
        return False


def _missing(where: str, field: str, fields: list[str]) -> UserError:
    there_are = ", ".join(map(str, fields)) or "none"
    return UserError(f"{where} has no field '{field}'; choose one with --key (the fields are: {there_are})")


def _jsonl(path: str, field: str, errors: str) -> Iterator[tuple[str, object]]:
    for where, record in json_lines(path, errors):
        if field not in record:
            raise _missing(where, field, list(record))
        yield where, record[field]


def fail(error: UserError) -> None:
    """What is done about a bad record unless it is passed over."""
    raise error


def objects(path: str, errors: str = "strict", bad: Callable[[UserError], None] = fail) -> Iterator[tuple[str, dict]]:
    """The records of a file as objects, each with the words by which messages say where it stands: lines of .jsonl,
    elements of a list in .json, rows of .csv and .parquet. `bad` gets the errors of single records."""
    if suffix(path) == ".json" and head(path).decode("utf-8-sig", "replace").lstrip().startswith("["):
        yield from _json_list(path, errors, bad)
    elif reader := {".parquet": _parquet, ".csv": _csv}.get(suffix(path)):
        with naming(path):
            for where, record in reader(path, None, errors):
                yield where, _without_nulls(record)
    else:
        yield from json_lines(path, errors, bad)


def _without_nulls(value):
    """A value without the fields that are null: a table has each field in each of its rows."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _json_list(path: str, errors: str, bad: Callable[[UserError], None]) -> Iterator[tuple[str, dict]]:
    text = "".join(text_blocks(path, errors))
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is no JSON ({error}); mend it, or give a .jsonl file with one object a line"
        ) from error
    for number, record in enumerate(records, 1):
        where = f"record {number} of {path}"
        if isinstance(record, dict):
            yield where, record
        else:
            bad(UserError(f"{where} is {json.dumps(record)[:40]}, not an object with fields"))


def json_lines(
    path: str, errors: str = "strict", bad: Callable[[UserError], None] = fail
) -> Iterator[tuple[str, dict]]:
    """The objects of a .jsonl file, each with the words by which messages say where it stands. `bad` gets the errors of
    single lines."""
    with naming(path), open_unpacked(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST), b""), 1):
            where = f"line {number} of {path}"
            if len(line) == LONGEST:
                raise UserError(f"{where} has more than {LONGEST:,} bytes; give so long a text as a file of its own")
            if line.isspace():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8", errors))
            except UnicodeDecodeError as error:
                bad(UserError(_not_utf8(f"{where} is not UTF-8: its byte {error.start}", error)))
                continue
            except (ValueError, RecursionError) as error:
                why = f"{where} is no JSON ({error}); a .jsonl file has one object a line: mend it or leave it out"
                bad(UserError(why))
                continue
            if isinstance(record, dict):
                yield where, record
                continue
            found = line.decode(errors="replace").strip()[:40]
            bad(UserError(f"{where} is {found}, not an object with fields; a .jsonl file has one a line"))


def _csv(path: str, field: str | None, errors: str) -> Iterator[tuple[str, object]]:
    """The values of a field, or, where it is None, whole rows as dicts."""
    csv.field_size_limit(LONGEST)
    with open_unpacked(path) as file, io.TextIOWrapper(file, "utf-8-sig", errors, newline="") as text:
        rows = csv.reader(text, strict=True)  # or a quote that is never closed takes all the rest in
        number = line = 1  # of the row that is read next, and where it begins
        try:
            heads = next(rows, [])
            if field is not None and field not in heads:
                raise _missing(path, field, heads)
            column = None if field is None else heads.index(field)
            number, line = 2, rows.line_num + 1
            for row in rows:
                if row and column is None:
                    yield f"row {number} of {path}", dict(zip(heads, row, strict=False))
                elif row:
                    yield f"row {number} of {path}", row[column] if column < len(row) else None
                number, line = number + 1, rows.line_num + 1
        except UnicodeDecodeError as error:
            raise UserError(_not_utf8(f"{path} is not UTF-8 after row {number - 1}: a byte", error)) from error
        except csv.Error as error:
            why = str(error)
            if "end of data" in why:
                why = "a quote there is never closed"
            elif "field limit" in why:
                why = f"a field there has more than {LONGEST:,} characters, as where a quote is never closed"
            raise UserError(
                f"{path} is no table of comma-separated values in row {number}, which begins in line {line} ({why}); "
                "mend it or leave it out"
            ) from error


def _parquet(path: str, field: str | None, errors: str) -> Iterator[tuple[str, object]]:
    """The values of a field, or, where it is None, whole rows as dicts."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field is not None and field not in names:
                raise _missing(path, field, names)
            if field is None:
                rows = (row for batch in file.iter_batches(256) for row in batch.to_pylist())
                yield from ((f"row {number} of {path}", row) for number, row in enumerate(rows, 1))
                return
            for batch in file.iter_batches(256, columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield path, value
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(f"a text in {path} is not UTF-8: its byte {error.start}", error)) from error
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is no whole parquet file ({error}); get it again or leave it out") from error
