"""your own text: files, folders, globs, or - for standard input; .gz and .zst are decompressed

Each file is a document. In .jsonl, .parquet and .csv files, each record is a document: its field --key. A folder is
read recursively, in sorted order: only files with a text suffix (.txt, .md, source code, records), but no hidden or
binary files. A .jsonl or .csv file in a folder that lacks the field is one document. A file that you name is read
regardless of its suffix.

UTF-8, UTF-16, GB18030, Big5, Shift-JIS, EUC-JP and EUC-KR are detected if they are unambiguous; --encoding names
another encoding. Line breaks become \\n, as in Python's text mode; strings in JSON and parquet are not changed.
"""

import argparse
import contextlib
import glob
import hashlib
import os
import sys
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from acorn import UserError, printable
from prepare.encoding import (
    SEARCHED_BYTES,
    Detected,
    Faults,
    binary_type,
    check_name,
    counting_handler,
    detection_notes,
    encoding_of,
    is_html,
    subject,
)
from prepare.reading import has_field, head, naming_file, records, suffix, text_blocks

TOKENIZER = "gpt2"
SUFFIXES = """
    .txt .text .md .markdown .rst .org .tex .adoc .asc .log .csv .tsv .json .jsonl .ndjson .yaml .yml .toml .ini .cfg
    .conf .xml .html .htm .css .scss .svg .sql .srt .vtt .po .bib .diff .patch
    .py .pyi .pyx .ipynb .c .h .cc .cpp .cxx .hh .hpp .cu .cuh .m .mm .rs .go .java .kt .scala .swift .cs .fs .vb .js
    .jsx .mjs .ts .tsx .vue .rb .pl .pm .php .lua .r .jl .hs .ml .mli .ex .exs .erl .clj .lisp .el .scm .zig .nim .d
    .dart .f .f90 .f95 .asm .s .sh .bash .zsh .fish .ps1 .bat .cmake .mk .tcl .vim .v .sv .vhd .proto .gradle
"""


RECORDS = (".jsonl", ".ndjson", ".parquet", ".csv")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILES", help="files, folders, globs, or - for standard input")
    parser.add_argument("--key", metavar="FIELD", help="the field of a record with its text; default: text")
    parser.add_argument(
        "--encoding",
        metavar="NAME",
        help="encoding of the files, such as gb18030 or cp1252; default: detected per file",
    )


def default_name(args: argparse.Namespace) -> str:
    """Return the stem of the first path: `mine` for ~/mine.txt.gz, for the folder mine/ and for mine/*.txt."""
    first = args.files[0]
    if first == "-":
        return "stdin"
    parts = [part for part in Path(os.path.abspath(first)).parts if os.path.exists(first) or not glob.has_magic(part)]
    return parts[-1].lstrip(".").split(".")[0] or "text"


def documents(args: argparse.Namespace) -> "TextFiles":
    files = TextFiles(args.errors, args.key, getattr(args, "encoding", None))  # absent in older meta.json
    for name in args.files:
        files.add(name)
    files.drop_repeated()
    if args.key and not any(source.is_records for source in files.sources):
        if any(suffix(source.path) in RECORDS for source in files.sources):
            raise UserError(f"no .jsonl or .csv file has the field {args.key!r} in its first record. Check --key.")
        raise UserError(
            f"--key {args.key} needs records, but none of the files is .jsonl, .csv or .parquet. Remove --key."
        )
    if files.skipped:
        print(f"skipped {files.skipped} files that do not look like text", file=sys.stderr)
    for note in files.notes():
        print(printable(note), file=sys.stderr)
    return files


@contextlib.contextmanager
def _naming(name: str, path: str) -> Iterator[None]:
    """Replace `path` by `name` in a UserError. They differ for streams, which are read from a temporary file."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(path, name)) from error


class Source(NamedTuple):
    name: str  # for messages
    path: str
    is_records: bool
    version: list  # differs if the content differs
    encoding: str


class TextFiles:
    """A re-iterable of documents. A document is a file, in blocks, or the text of a record."""

    def __init__(self, errors: str = "strict", key: str | None = None, encoding: str | None = None):
        self.errors = errors  # strict | replace: what to do with invalid bytes
        self.key = key
        self.encoding = check_name(encoding) if encoding else None  # of all files; None: detected per file
        self._detected: dict[str, Detected] = {}  # by the file's name
        self._html: list[str] = []
        self._linked: list[str] = []
        self._printed: set[str] = set()
        self.sources: list[Source] = []
        self.skipped = 0

    def add(self, name: str) -> None:
        """Add a file, a folder, a glob, or - for standard input. Raises UserError if there is no text."""
        if name == "-":
            if sys.stdin is None:
                raise UserError("standard input is closed. Pipe a text into the command, or name files.")
            self._spool("standard input", sys.stdin.buffer)
        elif os.path.isdir(name):
            paths_found = self._in_folder(name)
            if not paths_found:
                raise UserError(f"the folder {name} holds no text files. To read files of any suffix, name them.")
            self._add_files(paths_found, in_folder=True)
        elif os.path.isfile(name):
            if os.path.getsize(name) == 0:
                raise UserError(f"{name} is empty. Leave it out, or name a file with text in it.")
            self._add_files([name])
        elif os.path.exists(name):  # a pipe, such as in `python prepare text <(zcat mine.gz)`
            with naming_file(name), open(name, "rb") as pipe:
                self._spool(name, pipe)
        elif glob.has_magic(name):
            paths_found = sorted(glob.glob(name, recursive=True))
            if not paths_found:
                raise UserError(f"no file matches {name}. Paths are relative to the working directory {os.getcwd()}.")
            for path in paths_found:
                if os.path.isdir(path):
                    self._add_files(self._in_folder(path), in_folder=True)
                elif not os.path.exists(path) or os.path.isfile(path):
                    self._add_files([path])
                else:
                    raise UserError(f"{path} is neither a file nor a folder. Leave it out, or name it without a glob.")
        else:
            raise UserError(
                f"there is no file or folder {name}. Paths are relative to the working directory {os.getcwd()}."
            )

    def drop_repeated(self) -> None:
        """Keep the first occurrence of each file: ** matches a folder and its files."""
        unique = {os.path.abspath(source.path): source for source in reversed(self.sources)}
        self.sources = list(reversed(unique.values()))

    def _add_files(self, paths: list[str], in_folder: bool = False) -> None:
        for path in paths:
            with naming_file(path):
                status = os.stat(path)
            self._add_file(path, path, suffix(path) in RECORDS, [status.st_size, status.st_mtime_ns], in_folder)

    def _add_file(self, name: str, path: str, is_records: bool, version: list, in_folder: bool = False) -> None:
        encoding = self.encoding or "utf-8"
        if suffix(path) != ".parquet":
            data = head(path, SEARCHED_BYTES)
            try:
                detected = encoding_of(data, name, self.encoding, self.errors)
            except UserError:
                if in_folder and (binary_type(data) or b"\0" in data):
                    self.skipped += 1
                    return
                raise
            encoding = detected.encoding
            if in_folder and b"\0" in data and encoding == "utf-8":
                self.skipped += 1
                return
            if in_folder:
                is_records = is_records and has_field(path, self.key or "text", encoding)
            if not self.encoding:
                self._detected[name] = detected
            if not is_records and is_html(data[:1000].decode(encoding, "replace")):
                self._html.append(name)
        self.sources.append(Source(name, path, is_records, version, encoding))

    def _in_folder(self, folder: str) -> list[str]:
        paths_found = []

        def refuse(error: OSError) -> None:
            raise UserError(f"cannot read the folder {error.filename}: {error.strerror}. Leave it out.") from error

        for parent, folders, files in os.walk(folder, onerror=refuse):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            self._linked += [path for name in folders if os.path.islink(path := os.path.join(parent, name))]
            if "meta.json" in files and "train_000000.bin" in files:  # the dataset that this command wrote here
                files.remove("meta.json")
            for path in (os.path.join(parent, name) for name in sorted(files) if not name.startswith(".")):
                is_file = os.path.isfile(path)  # not a FIFO, which would block
                if is_file and (suffix(path) in SUFFIXES.split() or suffix(path) == ".parquet"):
                    paths_found.append(path)
                else:
                    self.skipped += 1
        return paths_found

    def _spool(self, name: str, stream: BinaryIO) -> None:
        """Copy a stream, which can be read only once, to a temporary file, and add it. The file is deleted with this
        object. The first bytes tell the compression."""
        start = stream.read(4)
        packed = ".gz" if start[:2] == b"\x1f\x8b" else ".zst" if start == b"\x28\xb5\x2f\xfd" else ""
        handle, path = tempfile.mkstemp(suffix=packed)  # closed before it is read, as Windows demands
        weakref.finalize(self, os.remove, path)
        digest = hashlib.sha256()
        with open(handle, "wb") as file:
            while start:
                file.write(start)
                digest.update(start)
                start = stream.read(1 << 20)
        with _naming(name, path):
            self._add_file(name, path, self.key is not None, [digest.hexdigest()])  # with --key, it is jsonl

    def notes(self) -> list[str]:
        """Return notes on the files for the user: detected encodings, HTML, and folders that were left out."""
        notes = detection_notes(self._detected)
        if self._linked:
            kind = "a link to a folder" if len(self._linked) == 1 else "links to folders"
            notes.append(f"note: {subject(self._linked)} left out as {kind}; to read the files there, name the folder")
        if self._html:
            notes.append(
                f"note: {subject(self._html)} HTML; the model will learn its markup, so extract the text first"
            )
        return notes

    def fingerprint(self) -> list:
        """Return a JSON-serializable value that differs if the text differs."""
        sources = [[source.name, source.is_records, *source.version] for source in self.sources]
        return [self.errors, self.key, self.encoding, sources]

    def __length_hint__(self) -> int:
        """The number of documents if it is known before reading."""
        return NotImplemented if any(source.is_records for source in self.sources) else len(self.sources)

    def __iter__(self) -> Iterator[str | Iterator[str]]:
        faults, errors = Faults(), counting_handler(self.errors)
        for source in self.sources:
            name = source.name
            texts: Iterable[str | Iterator[str]]
            if source.is_records:
                texts = records(source.path, self.key, errors, source.encoding)
            else:
                texts = [text_blocks(source.path, errors, name, source.encoding)]
            with _naming(name, source.path):
                for text in texts:
                    if isinstance(text, str):
                        yield faults.look(text, name)
                    else:
                        yield (faults.look(block, name) for block in text)
        for note in faults.notes("--encoding NAME"):
            if note not in self._printed:  # a corpus may be read twice
                print(printable(note), file=sys.stderr)
            self._printed.add(note)
