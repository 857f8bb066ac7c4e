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
from collections.abc import Iterator
from typing import BinaryIO

from acorn import UserError
from prepare.encoding import not_in

BLOCK = 1 << 20  # bytes; a longer text comes in blocks
LONGEST = 1 << 26  # bytes of a line of .jsonl, characters of a field of .csv, which are held whole
LONG = 1 << 24  # bytes of a cell of .parquet; a longer one comes in blocks
HELD = 1 << 26  # bytes of rows of .parquet that are decoded at once
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


def text_blocks(path: str, errors: str = "strict", name: str = "", encoding: str | None = None) -> Iterator[str]:
    """The text of a file, block by block, with line breaks as Python's text mode has them. `errors`: strict | replace
    (or another name of codecs), for bytes that are not text in the encoding. `name` is how messages call the file; they
    offer --encoding where an `encoding` is given; without one it is UTF-8."""
    name = name or path
    decoder = codecs.getincrementaldecoder(encoding or "utf-8")(errors)
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    done = 0
    with naming(name), open_unpacked(path) as file:
        while True:
            data = file.read(BLOCK)
            pending = len(decoder.getstate()[0])  # the beginning of a character that the last block ended in
            try:
                text = newlines.decode(decoder.decode(data, final=not data), final=not data)
            except UnicodeDecodeError as error:
                at = done - pending + error.start
                raise UserError(_not_in(encoding, f"{name} is not {{}}: byte {at}", error)) from error
            yield text if done else text.removeprefix("\ufeff")  # the mark that some editors put in front
            if not data:
                return
            done += len(data)


def _not_in(encoding: str | None, where: str, error: UnicodeDecodeError) -> str:
    name = "UTF-8" if encoding in (None, "utf-8") else encoding
    return not_in(encoding, where.format(name), error.object[error.start])


def records(
    path: str, key: str | None, errors: str = "strict", encoding: str | None = None
) -> Iterator[str | Iterator[str]]:
    """The texts of a file of records: the field `key` of each line of .jsonl, or of each row of .csv or .parquet, where
    one that is long comes in blocks. Strings of JSON and parquet keep their line breaks.

    Without a `key` the field is "text". A record whose field is null is empty text. `errors` and `encoding` are as in
    `text_blocks`.
    """
    reader = {".parquet": _parquet, ".csv": _csv}.get(suffix(path), _jsonl)
    field = key or "text"
    with naming(path):
        for where, value in reader(path, field, errors, encoding):
            if value is not None and not isinstance(value, str | Iterator):
                raise UserError(
                    f"{where} has {value!r:.40} in its field '{field}': that is no text; choose another --key"
                )
            yield value or ""


def has_field(path: str, field: str, encoding: str | None = None) -> bool:
    """Whether the first record of the file has the field."""
    try:
        next(records(path, field, "replace", encoding), None)
        return True
    except UserError:
        return False


def _missing(where: str, field: str, fields: list[str]) -> UserError:
    there_are = ", ".join(map(str, fields)) or "none"
    return UserError(f"{where} has no field '{field}'; choose one with --key (the fields are: {there_are})")


def _jsonl(path: str, field: str, errors: str, encoding: str | None) -> Iterator[tuple[str, object]]:
    for where, record in json_lines(path, errors, encoding=encoding):
        if field not in record:
            raise _missing(where, field, list(record))
        yield where, record[field]


def json_lines(path: str, errors: str = "strict", *, encoding: str | None = None) -> Iterator[tuple[str, dict]]:
    """The objects of a .jsonl file, each with the words by which messages say where it stands."""
    with naming(path), open_unpacked(path) as file:
        lines, line_encoding = iter(lambda: file.readline(LONGEST), b""), encoding or "utf-8"
        if "\n".encode(line_encoding) != b"\n":  # a line break of UTF-16 is not one byte
            lines, line_encoding = _as_utf8(file, path, errors, encoding), "utf-8"
        for number, line in enumerate(lines, 1):
            where = f"line {number} of {path}"
            if len(line) == LONGEST:
                raise UserError(f"{where} has more than {LONGEST:,} bytes; give so long a text as a file of its own")
            if line.isspace():
                continue
            try:
                text = line.decode(line_encoding, errors)
                record = json.loads(text.removeprefix("\ufeff") if number == 1 else text)
            except UnicodeDecodeError as error:
                raise UserError(_not_in(encoding, f"{where} is not {{}}: its byte {error.start}", error)) from error
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{where} is no JSON ({error}); a .jsonl file has one object a line: mend it or leave it out"
                ) from error
            if not isinstance(record, dict):
                found = line.decode(errors="replace").strip()[:40]
                raise UserError(f"{where} is {found}, not an object with fields; a .jsonl file has one a line")
            yield where, record


def _as_utf8(file: BinaryIO, path: str, errors: str, encoding: str) -> Iterator[bytes]:
    """The lines of a file in any encoding as UTF-8."""
    text, number = io.TextIOWrapper(file, encoding, errors, newline="\n"), 0
    try:
        while line := text.readline(LONGEST):
            yield line.encode("utf-8", "surrogatepass")
            number += 1
    except UnicodeDecodeError as error:
        raise UserError(_not_in(encoding, f"{path} is not {{}} after line {number}: a byte", error)) from error


def _csv(path: str, field: str, errors: str, encoding: str | None) -> Iterator[tuple[str, object]]:
    csv.field_size_limit(LONGEST)
    codec = "utf-8-sig" if encoding in (None, "utf-8") else encoding
    with open_unpacked(path) as file, io.TextIOWrapper(file, codec, errors) as text:
        rows = csv.reader(text, strict=True)  # or a quote that is never closed takes all the rest in
        number = line = 1  # of the row that is read next, and where it begins
        try:
            heads = next(rows, [])
            if field not in heads:
                raise _missing(path, field, heads)
            column = heads.index(field)
            number, line = 2, rows.line_num + 1
            for row in rows:
                if row:
                    yield f"row {number} of {path}", row[column] if column < len(row) else None
                number, line = number + 1, rows.line_num + 1
        except UnicodeDecodeError as error:
            raise UserError(_not_in(encoding, f"{path} is not {{}} after row {number - 1}: a byte", error)) from error
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


def _parquet(path: str, field: str | None, errors: str, encoding: str | None = None) -> Iterator[tuple[str, object]]:
    """The values of a field, or, where it is None, whole rows as dicts.

    pyarrow holds a page and a batch of rows decoded, so the rows of a batch are few where texts may be long: by the
    size of the row group, a batch of them has HELD bytes at most. A cell is held whole, twice where it is a page of
    its own. Where rows are longer than LONGEST on average, which the file says before anything is unpacked, it is
    refused.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=BLOCK) as file:
            names = file.schema_arrow.names
            if field is not None and field not in names:
                raise _missing(path, field, names)
            number = 0
            for group in range(file.num_row_groups):
                rows = _rows_at_once(file.metadata.row_group(group), path, field)
                columns = None if field is None else [field]
                for batch in file.iter_batches(rows, row_groups=[group], columns=columns):
                    for i in range(batch.num_rows):
                        number += 1
                        where = f"row {number} of {path}"
                        row = {
                            name: cell(column[i], where, name, errors, encoding)
                            for name, column in zip(batch.schema.names, batch.columns, strict=True)
                        }
                        yield where, row if field is None else row[field]
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is no whole parquet file ({error}); get it again or leave it out") from error


def _rows_at_once(group, path: str, field: str | None) -> int:
    """The rows of a row group (its metadata) that may be decoded at once."""
    columns = [group.column(i) for i in range(group.num_columns)]
    paths = [(column.path_in_schema + ".", column.total_uncompressed_size) for column in columns]
    size = max(1, sum(size for name, size in paths if field is None or name.startswith(field + ".")))
    mean = size / max(1, group.num_rows)
    if mean > LONGEST:
        raise UserError(
            f"{path} has rows of {mean / 1e6:,.0f} MB, and more than {LONGEST / 1e6:.0f} are not held in memory; give "
            "so long a text as a file of its own"
        )
    # one value of a dictionary can be each row's, and then as long as the whole group; of short rows, where one by one
    # would take long, only up to 1000 times the mean
    longest = size if mean >= 1024 else min(size, 1000 * mean)
    return int(min(256, max(1, HELD // longest)))


def cell(scalar, where: str, field: str, errors: str = "strict", encoding: str | None = None):
    """The Python value of a pyarrow scalar. Text comes in blocks where it is long; `where` and `field` name it in the
    UserError if it cannot be decoded. `errors` and `encoding` are as in `text_blocks`."""
    import pyarrow

    scalar = scalar.value if isinstance(scalar, pyarrow.DictionaryScalar) else scalar
    try:
        if not isinstance(scalar, pyarrow.StringScalar | pyarrow.LargeStringScalar | pyarrow.StringViewScalar):
            return scalar.as_py() if scalar is not None else None
        data = scalar.as_buffer()
        if data is None:
            return None
        if data.size > LONG:
            return _cell_blocks(data, where, field, errors, encoding)
        return str(data, encoding or "utf-8", errors)
    except UnicodeDecodeError as error:
        at = f"{where} is not {{}} in its field '{field}': byte {error.start}"
        raise UserError(_not_in(encoding, at, error)) from error


def _cell_blocks(data, where: str, field: str, errors: str, encoding: str | None) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding or "utf-8")(errors)
    for start in range(0, data.size, BLOCK):
        block = bytes(data[start : start + BLOCK])
        pending = len(decoder.getstate()[0])
        try:
            yield decoder.decode(block, final=start + BLOCK >= data.size)
        except UnicodeDecodeError as error:
            at = f"{where} is not {{}} in its field '{field}': byte {start - pending + error.start}"
            raise UserError(_not_in(encoding, at, error)) from error
