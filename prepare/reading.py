"""Read documents from files in bounded memory: plain text in blocks, and records of jsonl, csv and parquet.

Files whose names end in .gz or .zst are decompressed. An invalid file raises a UserError that names it.
"""

import codecs
import contextlib
import csv
import functools
import gzip
import io
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from acorn import UserError, files
from prepare.encoding import byte_error

BLOCK_BYTES = 1 << 20  # bytes of text that are read at once
MAX_RECORD = 1 << 26  # bytes of a .jsonl line, or characters of a .csv field, which are held in memory as a whole
MAX_WHOLE_CELL_BYTES = 1 << 24  # bytes above which a .parquet cell is decoded in blocks
BATCH_BYTES = 1 << 25  # bytes of .parquet rows that are decoded at once
MAX_PAGE_BYTES = 1 << 29  # maximum decompressed bytes of a .parquet page
MAX_RATIO = 1000  # compression ratio of a .parquet row group that decompresses to more than MAX_PAGE_BYTES
COMPRESSED_SUFFIXES = (".gz", ".zst")


def suffix(path: str) -> str:
    """Return the suffix of the file's format: .jsonl for x.JSONL.zst."""
    path = path.lower()
    for packed in COMPRESSED_SUFFIXES:
        path = path.removesuffix(packed)
    return os.path.splitext(path)[1]


def open_unpacked(path: str) -> BinaryIO | gzip.GzipFile:
    """Open a file in binary mode; .gz and .zst files are decompressed."""
    if path.lower().endswith(".gz"):
        return gzip.open(path)
    if path.lower().endswith(".zst"):
        import pyarrow  # unlike the package zstandard, it reports truncated files

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(path), "zstd"), 1 << 20)
    return open(path, "rb", buffering=1 << 20)  # each read waits for the interpreter lock


@contextlib.contextmanager
def naming_file(path: str):
    """A context manager that turns read errors into UserErrors that name the file."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a valid gzip file ({error}). Copy it again, or leave it out.") from error
    except OSError as error:
        if "requires too much memory for decoding" in str(error):  # zstd's message for files of `zstd --long=31`
            raise UserError(
                f"{path} was compressed with a larger window than pyarrow supports (128 MB). Unpack it with "
                "`zstd -d --long=31`, and name the unpacked file."
            ) from error
        if path.lower().endswith(".zst") and error.errno is None:
            raise UserError(f"{path} is not a valid zstd file ({error}). Copy it again, or leave it out.") from error
        raise UserError(f"cannot read {path}: {error.strerror or error}. Correct it, or leave it out.") from error


def head(path: str, size: int = 8192) -> bytes:
    """Return the first `size` bytes of a file, after decompression."""
    with naming_file(path), open_unpacked(path) as file:
        return file.read(size)


def text_blocks(path: str, errors: str = "strict", name: str = "", encoding: str | None = None) -> Iterator[str]:
    """Yield the text of a file block by block, with line breaks normalized as in Python's text mode.

    `errors` is strict, replace or another codecs error handler, for bytes that are invalid in the encoding. Messages
    call the file `name`. `encoding` None means UTF-8 in a command without the option --encoding."""
    name = name or path
    decoder = codecs.getincrementaldecoder(encoding or "utf-8")(errors)
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    done = 0
    with naming_file(name), open_unpacked(path) as file:
        while True:
            data = file.read(BLOCK_BYTES)
            pending = len(decoder.getstate()[0])  # bytes of an incomplete character at the end of the last block
            try:
                text = newlines.decode(decoder.decode(data, final=not data), final=not data)
            except UnicodeDecodeError as error:
                position = done - pending + error.start
                raise UserError(_byte_error(encoding, f"{name} is not {{}}: byte {position}", error)) from error
            yield text if done else text.removeprefix("\ufeff")  # a byte order mark
            if not data:
                return
            done += len(data)


def _byte_error(encoding: str | None, where: str, error: UnicodeDecodeError) -> str:
    """Return the message for invalid bytes; `where` has a {} for the name of the encoding."""
    name = "UTF-8" if encoding in (None, "utf-8") else encoding
    return byte_error(encoding, where.format(name), error.object[error.start])


def records(
    path: str, key: str | None, errors: str = "strict", encoding: str | None = None
) -> Iterator[str | Iterator[str]]:
    """Yield the texts of a file of records: the field `key` of each .jsonl line, .csv row or .parquet row.

    Long .parquet cells are iterators of blocks. Strings in JSON and parquet keep their line breaks. The default `key`
    is "text". A null field is an empty text. `errors` and `encoding` are as in `text_blocks`.
    """
    readers: dict[str, Callable] = {".parquet": _parquet, ".csv": _csv}
    reader = readers.get(suffix(path), _jsonl)
    field = key or "text"
    with naming_file(path):
        for where, value in reader(path, field, errors, encoding):
            if value is not None and not isinstance(value, str | Iterator):
                raise UserError(
                    f"{where} has {value!r:.40} in its field '{field}', which is not text. Choose another --key."
                )
            yield value or ""


class ExtraFields(UserError):
    """A row of a .csv file has more fields than the header."""


def has_field(path: str, field: str, encoding: str | None = None) -> bool:
    """Whether the first record of the file has the field, and the field is text."""
    try:
        next(records(path, field, "replace", encoding), None)
        return True
    except ExtraFields:
        return True
    except UserError:
        return False


def _missing(where: str, field: str, fields: list[str]) -> UserError:
    choices = ", ".join(map(str, fields)) or "none"
    return UserError(f"{where} has no field '{field}'. Choose one with --key (the fields are: {choices}).")


def _jsonl(path: str, field: str, errors: str, encoding: str | None) -> Iterator[tuple[str, object]]:
    for where, record in json_lines(path, errors, encoding=encoding):
        if field not in record:
            raise _missing(where, field, list(record))
        yield where, record[field]


def fail(error: UserError) -> None:
    """Raise the error of a bad record: the default handler."""
    raise error


def objects(
    path: str, errors: str = "strict", on_error: Callable[[UserError], None] = fail, encoding: str | None = None
) -> Iterator[tuple[str, dict]]:
    """Yield the location of each record, for messages, and the record as a dict: lines of .jsonl, elements of a list in
    .json, rows of .csv and .parquet. `on_error` is called with the errors of single records. `errors` and `encoding`
    are as in `text_blocks`."""
    readers: dict[str, Callable] = {".parquet": _parquet, ".csv": functools.partial(_csv, on_error=on_error)}
    if suffix(path) == ".json" and head(path).decode(encoding or "utf-8", "replace").lstrip("\ufeff \t\r\n").startswith(
        "["
    ):
        yield from _json_list(path, errors, on_error, encoding)
    elif reader := readers.get(suffix(path)):
        with naming_file(path):
            for where, record in reader(path, None, errors, encoding):
                yield where, _without_nulls(record)
    else:
        yield from json_lines(path, errors, on_error, encoding)


def _without_nulls(value):
    """Return a value without null fields, which tables have in rows that lack a field, and with text blocks joined."""
    if isinstance(value, Iterator):
        return "".join(value)
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _json_list(
    path: str, errors: str, on_error: Callable[[UserError], None], encoding: str | None
) -> Iterator[tuple[str, dict]]:
    text = "".join(text_blocks(path, errors, encoding=encoding))
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid JSON ({error}). Correct it, or use a .jsonl file with one object per line."
        ) from error
    for number, record in enumerate(records, 1):
        where = f"record {number} of {path}"
        if isinstance(record, dict):
            yield where, record
        else:
            on_error(UserError(f"{where} is {json.dumps(record)[:40]}, not an object. Correct it, or leave it out."))


def json_lines(
    path: str, errors: str = "strict", on_error: Callable[[UserError], None] = fail, encoding: str | None = None
) -> Iterator[tuple[str, dict]]:
    """Yield the location of each object in a .jsonl file, for messages, and the object. `on_error` is called with the
    errors of single lines."""
    with naming_file(path), open_unpacked(path) as file:
        lines, line_encoding = iter(lambda: file.readline(MAX_RECORD), b""), encoding or "utf-8"
        if "\n".encode(line_encoding) != b"\n":  # e.g. UTF-16, where a line break is not one byte
            lines, line_encoding = _as_utf8(file, path, errors, line_encoding), "utf-8"
        for number, line in enumerate(lines, 1):
            where = f"line {number} of {path}"
            if len(line) == MAX_RECORD:
                raise UserError(f"{where} has more than {MAX_RECORD:,} bytes. Put such a long text into its own file.")
            if line.isspace():
                continue
            try:
                text = line.decode(line_encoding, errors)
                record = files.parse_json_line(text.removeprefix("\ufeff") if number == 1 else text, where)
            except UnicodeDecodeError as error:
                on_error(UserError(_byte_error(encoding, f"{where} is not {{}}: its byte {error.start}", error)))
                continue
            except UserError as error:
                on_error(error)
                continue
            if isinstance(record, dict):
                yield where, record
                continue
            content = line.decode(errors="replace").strip()[:40]
            on_error(UserError(f"{where} is {content}, not an object. A .jsonl file has one object per line."))


def _as_utf8(file: BinaryIO | gzip.GzipFile, path: str, errors: str, encoding: str) -> Iterator[bytes]:
    """Yield the lines of a file in any encoding, converted to UTF-8."""
    text, number = io.TextIOWrapper(file, encoding, errors, newline="\n"), 0
    try:
        while line := text.readline(MAX_RECORD):
            yield line.encode("utf-8", "surrogatepass")
            number += 1
    except UnicodeDecodeError as error:
        raise UserError(_byte_error(encoding, f"{path} is not {{}} after line {number}: a byte", error)) from error


def _csv(
    path: str,
    field: str | None,
    errors: str,
    encoding: str | None,
    on_error: Callable[[UserError], None] = fail,
) -> Iterator[tuple[str, object]]:
    """Yield the location of each row and the value of `field`, or the row as a dict if `field` is None. `on_error` is
    called with the errors of single rows."""
    csv.field_size_limit(MAX_RECORD)
    with open_unpacked(path) as file, io.TextIOWrapper(file, encoding or "utf-8", errors) as text:
        number = line = 1  # number of the next row, and the line where it begins
        try:
            lines = itertools.chain([next(text, "").removeprefix("\ufeff")], text)  # without a byte order mark
            rows = csv.reader(lines, strict=True)  # otherwise an unclosed quote swallows the rest of the file
            header = next(rows, [])
            if field is not None and field not in header:
                raise _missing(path, field, header)
            column = None if field is None else header.index(field)
            number, line = 2, rows.line_num + 1
            for row in rows:
                where = f"row {number} of {path}" + f" (line {line})" * (line != number)
                value: object
                if column is None:
                    value = dict(zip(header, row, strict=False))
                else:
                    value = row[column] if column < len(row) else None
                if any(row[len(header) :]):  # a comma in a text without quotes would cut it off
                    on_error(
                        ExtraFields(
                            f"{where} has {len(row)} fields, but the header has {len(header)}. Put texts that contain "
                            "commas in double quotes, or leave the row out."
                        )
                    )
                elif row:
                    yield where, value
                number, line = number + 1, rows.line_num + 1
        except UnicodeDecodeError as error:
            raise UserError(
                _byte_error(encoding, f"{path} is not {{}} after row {number - 1}: a byte", error)
            ) from error
        except csv.Error as error:
            reason = str(error)
            if "end of data" in reason:
                reason = "a quote is never closed"
            elif "field limit" in reason:
                reason = f"a field has more than {MAX_RECORD:,} characters, perhaps because a quote is never closed"
            raise UserError(
                f"{path} is not valid CSV in row {number}, which begins in line {line} ({reason}). Correct it, or "
                "leave the file out."
            ) from error


def _parquet(path: str, field: str | None, errors: str, encoding: str | None = None) -> Iterator[tuple[str, object]]:
    """Yield the location of each row and the value of `field`, or the row as a dict if `field` is None."""
    number = 0
    row: dict | None
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
            batch = row = None  # free them before the next batch is read


def parquet_batches(source: BinaryIO, path: str, field: str | None, skip: int = 0) -> Iterator:
    """Yield the rows of a parquet file after the first `skip` rows as pyarrow.RecordBatches of one field, or of all
    fields if `field` is None. Messages call the file `path`.

    pyarrow holds one page, compressed and decompressed, and one batch in memory. A batch has at most BATCH_BYTES if
    texts have similar lengths. Raises UserError before decompressing texts if the average row is longer than
    MAX_RECORD, if a page is larger than MAX_PAGE_BYTES, or if the compression ratio exceeds MAX_RATIO.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(source, pre_buffer=False, buffer_size=BLOCK_BYTES) as file:
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
                    batch = None  # free it before the next one is read
                pyarrow.default_memory_pool().release_unused()
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # an error of the system, such as a failed read
            raise
        reason = " ".join(str(error).split()).removesuffix(".")
        raise UserError(f"{path} is not a valid parquet file ({reason}). Copy it again, or leave it out.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} has a field whose name is not UTF-8: {error.object!r:.80}. Rename it, or leave the file out."
        ) from error


def _rows_at_once(group, source: BinaryIO, path: str, field: str | None) -> int:
    """Return the number of rows to decode at once; `group` is the metadata of a row group."""
    columns = [group.column(i) for i in range(group.num_columns)]
    columns = [c for c in columns if field is None or (c.path_in_schema + ".").startswith(field + ".")]
    size = sum(column.total_uncompressed_size for column in columns)
    packed = sum(column.total_compressed_size for column in columns)
    mean = size / max(1, group.num_rows)
    pages = [(column, _first_page_size(source, column)) for column in columns]
    page = max((size for _, size in pages), default=0)
    if mean > MAX_RECORD:
        raise UserError(
            f"{path} has rows of {mean / 1e6:,.0f} MB on average, more than the limit of {MAX_RECORD / 1e6:.0f} MB. "
            "Put such long texts into their own files."
        )
    if page > MAX_PAGE_BYTES:
        raise UserError(
            f"{path} has a page of {page / 1e6:,.0f} MB, more than the limit of {MAX_PAGE_BYTES / 1e6:.0f} MB. Write "
            "the file again with fewer rows per row group, such as row_group_size=100 in pyarrow."
        )
    if size > MAX_PAGE_BYTES and size > MAX_RATIO * packed:  # then any page may be as large
        raise UserError(
            f"{path} has a row group of {packed / 1e6:,.1f} MB that decompresses to {size / 1e6:,.0f} MB, like a "
            "decompression bomb. Leave it out, or write it again with smaller row groups."
        )
    # a dictionary stores a long value once, but any number of rows may have it
    dictionaries = sum(size for column, size in pages if any("DICTIONARY" in name for name in column.encodings))
    longest = max(dictionaries, 16 * mean, 1)
    return int(min(256, max(1, BATCH_BYTES // longest)))


def _first_page_size(source: BinaryIO, column) -> int:
    """Return the decompressed size in bytes of a column's first page, which is the dictionary if there is one.

    `column` is its metadata. A page begins with a Thrift struct in the compact protocol, whose first two fields are
    i32: the page's type and this size.
    """
    offset = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
    source.seek(offset or 0)
    header = source.read(16)
    numbers, i = [], 0
    for _ in range(2):
        if header[i : i + 1] != b"\x15":  # the marker of an i32 field
            break
        number, shift, i = 0, 0, i + 1
        while i < len(header):
            byte = header[i]
            number, shift, i = number | (byte & 0x7F) << shift, shift + 7, i + 1
            if byte < 0x80:
                break
        numbers.append(number >> 1)  # zigzag encoding
    return numbers[1] if len(numbers) == 2 else column.total_uncompressed_size


def cell(scalar, where: str, field: str, errors: str = "strict", encoding: str | None = None):
    """Return the Python value of a pyarrow scalar; for long text, an iterator of blocks. `where` and `field` name it in
    the UserError if it cannot be decoded. `errors` and `encoding` are as in `text_blocks`."""
    import pyarrow

    scalar = scalar.value if isinstance(scalar, pyarrow.DictionaryScalar) else scalar
    try:
        if not isinstance(scalar, pyarrow.StringScalar | pyarrow.LargeStringScalar | pyarrow.StringViewScalar):
            return None if scalar is None else _nested_cell(scalar, errors, encoding)
        data = scalar.as_buffer()
        if data is None:
            return None
        if data.size > MAX_WHOLE_CELL_BYTES:
            return _cell_blocks(data, where, field, errors, encoding)
        return str(data, encoding or "utf-8", errors)
    except UnicodeDecodeError as error:
        location = f"{where} is not {{}} in its field '{field}': byte {error.start}"
        raise UserError(_byte_error(encoding, location, error)) from error


def _nested_cell(scalar, errors: str, encoding: str | None):
    """Return the Python value of a pyarrow scalar, in which strings are decoded at any depth."""
    import pyarrow

    if encoding is None:
        with contextlib.suppress(UnicodeDecodeError):
            return scalar.as_py()  # three times as fast
    if not scalar.is_valid:
        return None
    if isinstance(scalar, pyarrow.DictionaryScalar):
        return _nested_cell(scalar.value, errors, encoding)
    if isinstance(scalar, pyarrow.StringScalar | pyarrow.LargeStringScalar | pyarrow.StringViewScalar):
        return str(scalar.as_buffer(), encoding or "utf-8", errors)
    if isinstance(scalar, pyarrow.StructScalar):
        return {name: _nested_cell(value, errors, encoding) for name, value in scalar.items()}
    if isinstance(scalar, pyarrow.MapScalar):
        return [tuple(_nested_cell(part, errors, encoding) for part in pair.values()) for pair in scalar.values]
    if isinstance(scalar, pyarrow.ListScalar):
        return [_nested_cell(value, errors, encoding) for value in scalar.values]
    return scalar.as_py()


def _cell_blocks(data, where: str, field: str, errors: str, encoding: str | None) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding or "utf-8")(errors)
    for start in range(0, data.size, BLOCK_BYTES):
        block = bytes(data[start : start + BLOCK_BYTES])
        pending = len(decoder.getstate()[0])
        try:
            yield decoder.decode(block, final=start + BLOCK_BYTES >= data.size)
        except UnicodeDecodeError as error:
            location = f"{where} is not {{}} in its field '{field}': byte {start - pending + error.start}"
            raise UserError(_byte_error(encoding, location, error)) from error
