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
from prepare.encoding import not_in

BLOCK = 1 << 20  # bytes; a longer text comes in blocks
LONGEST = 1 << 26  # bytes of a line of .jsonl, characters of a field of .csv, which are held whole
LONG = 1 << 24  # bytes of a cell of .parquet; a longer one comes in blocks
HELD = 1 << 25  # bytes of rows of .parquet that are decoded at once
LARGEST_PAGE = 1 << 29  # bytes of a page of .parquet, unpacked
MOST_UNPACKED = 1000  # times the packed size of a row group of .parquet, if that is more than LARGEST_PAGE
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


def fail(error: UserError) -> None:
    """What is done about a bad record unless it is passed over."""
    raise error


def objects(
    path: str, errors: str = "strict", bad: Callable[[UserError], None] = fail, encoding: str | None = None
) -> Iterator[tuple[str, dict]]:
    """The records of a file as objects, each with the words by which messages say where it stands: lines of .jsonl,
    elements of a list in .json, rows of .csv and .parquet. `bad` gets the errors of single records. `errors` and
    `encoding` are as in `text_blocks`."""
    if suffix(path) == ".json" and head(path).decode(encoding or "utf-8", "replace").lstrip("\ufeff \t\r\n").startswith(
        "["
    ):
        yield from _json_list(path, errors, bad, encoding)
    elif reader := {".parquet": _parquet, ".csv": _csv}.get(suffix(path)):
        with naming(path):
            for where, record in reader(path, None, errors, encoding):
                yield where, _without_nulls(record)
    else:
        yield from json_lines(path, errors, bad, encoding)


def _without_nulls(value):
    """A value without the fields that are null, since a table has each field in each of its rows, and with a text that
    comes in blocks as a whole."""
    if isinstance(value, Iterator):
        return "".join(value)
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _json_list(
    path: str, errors: str, bad: Callable[[UserError], None], encoding: str | None
) -> Iterator[tuple[str, dict]]:
    text = "".join(text_blocks(path, errors, encoding=encoding))
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
    path: str, errors: str = "strict", bad: Callable[[UserError], None] = fail, encoding: str | None = None
) -> Iterator[tuple[str, dict]]:
    """The objects of a .jsonl file, each with the words by which messages say where it stands. `bad` gets the errors of
    single lines."""
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
                bad(UserError(_not_in(encoding, f"{where} is not {{}}: its byte {error.start}", error)))
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


def _as_utf8(file: BinaryIO, path: str, errors: str, encoding: str) -> Iterator[bytes]:
    """The lines of a file in any encoding as UTF-8."""
    text, number = io.TextIOWrapper(file, encoding, errors, newline="\n"), 0
    try:
        while line := text.readline(LONGEST):
            yield line.encode("utf-8", "surrogatepass")
            number += 1
    except UnicodeDecodeError as error:
        raise UserError(_not_in(encoding, f"{path} is not {{}} after line {number}: a byte", error)) from error


def _csv(path: str, field: str | None, errors: str, encoding: str | None) -> Iterator[tuple[str, object]]:
    """The values of a field, or, where it is None, whole rows as dicts."""
    csv.field_size_limit(LONGEST)
    codec = "utf-8-sig" if encoding in (None, "utf-8") else encoding
    with open_unpacked(path) as file, io.TextIOWrapper(file, codec, errors) as text:
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
    """The values of a field, or, where it is None, whole rows as dicts."""
    number = 0
    with open(path, "rb") as file:
        for batch in parquet_batches(file, path, field):
            for i in range(batch.num_rows):
                number += 1
                where = f"row {number} of {path}"
                row = {
                    name: cell(column[i], where, name, errors, encoding)
                    for name, column in zip(batch.schema.names, batch.columns, strict=True)
                }
                yield where, row if field is None else row[field]
            batch = row = None  # not beside the next one


def parquet_batches(source: BinaryIO, path: str, field: str | None, skip: int = 0) -> Iterator:
    """The rows of a parquet file after the first `skip` ones, as pyarrow.RecordBatches of a field, or of all where it
    is None. `path` is how messages call the file.

    pyarrow holds a page and a batch of rows decoded, the page packed and unpacked. A batch has HELD bytes at most where
    texts are of like length. A file is refused before its texts are unpacked where its rows are longer than LONGEST on
    average, where a page is larger than LARGEST_PAGE, or where it unpacks to more than MOST_UNPACKED times its size.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(source, pre_buffer=False, buffer_size=BLOCK) as file:
            names = file.schema_arrow.names
            if field is not None and field not in names:
                raise _missing(path, field, names)
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                if skip >= group.num_rows:
                    skip -= group.num_rows
                    continue
                rows = _rows_at_once(group, source, path, field)
                columns = None if field is None else [field]
                for batch in file.iter_batches(rows, row_groups=[number], columns=columns):
                    if skip < batch.num_rows:
                        yield batch.slice(skip)
                    skip = max(0, skip - batch.num_rows)
                    batch = None  # not beside the next one
                pyarrow.default_memory_pool().release_unused()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is no whole parquet file ({error}); get it again or leave it out") from error


def _rows_at_once(group, source: BinaryIO, path: str, field: str | None) -> int:
    """The rows of a row group (its metadata) that may be decoded at once."""
    columns = [group.column(i) for i in range(group.num_columns)]
    columns = [c for c in columns if field is None or (c.path_in_schema + ".").startswith(field + ".")]
    size = sum(column.total_uncompressed_size for column in columns)
    packed = sum(column.total_compressed_size for column in columns)
    mean = size / max(1, group.num_rows)
    pages = [(column, _first_page_size(source, column)) for column in columns]
    page = max((size for _, size in pages), default=0)
    if mean > LONGEST:
        raise UserError(
            f"{path} has rows of {mean / 1e6:,.0f} MB, and more than {LONGEST / 1e6:.0f} are not held in memory; give "
            "so long a text as a file of its own"
        )
    if page > LARGEST_PAGE:
        raise UserError(
            f"{path} has pages of {page / 1e6:,.0f} MB, and more than {LARGEST_PAGE / 1e6:.0f} are not held in memory; "
            "write it again with fewer rows in a row group, such as row_group_size=100 of pyarrow"
        )
    if size > LARGEST_PAGE and size > MOST_UNPACKED * packed:  # then any page may be as large
        raise UserError(
            f"{path} has a row group of {packed / 1e6:,.1f} MB that unpacks to {size / 1e6:,.0f} MB, as in a file made "
            "to fill the memory; leave it out, or write it again in smaller row groups"
        )
    # each value of a dictionary may be any row's, and is stored once however long it is
    dictionaries = sum(size for column, size in pages if any("DICTIONARY" in name for name in column.encodings))
    longest = max(dictionaries, 16 * mean, 1)
    return int(min(256, max(1, HELD // longest)))


def _first_page_size(source: BinaryIO, column) -> int:
    """The unpacked size of the first page of a column (its metadata): the dictionary, where there is one.

    A page begins with a Thrift struct in the compact protocol, whose first fields are i32: its type and this size.
    """
    offset = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
    source.seek(offset or 0)
    head = source.read(16)
    numbers, at = [], 0
    for _ in range(2):
        if head[at : at + 1] != b"\x15":  # the next field, an i32
            break
        number, shift, at = 0, 0, at + 1
        while at < len(head):
            byte = head[at]
            number, shift, at = number | (byte & 0x7F) << shift, shift + 7, at + 1
            if byte < 0x80:
                break
        numbers.append(number >> 1)  # zigzag
    return numbers[1] if len(numbers) == 2 else column.total_uncompressed_size


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
