"""your own text: files, folders, globs, or - for standard input; each file is a document

Of a folder it takes, recursively and sorted, what looks like text by its suffix (.txt, .md, source code, and gzip of
these), and leaves out hidden and binary files. A file that you name is taken whatever its suffix.
"""

import argparse
import glob
import gzip
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from acorn import UserError

TOKENIZER = "gpt2"
SUFFIXES = """
    .txt .text .md .markdown .rst .org .tex .adoc .asc .log .csv .tsv .json .jsonl .yaml .yml .toml .ini .cfg .conf
    .xml .html .htm .css .scss .svg .sql .srt .vtt .po .bib .diff .patch
    .py .pyi .pyx .ipynb .c .h .cc .cpp .cxx .hh .hpp .cu .cuh .m .mm .rs .go .java .kt .scala .swift .cs .fs .vb .js
    .jsx .mjs .ts .tsx .vue .rb .pl .pm .php .lua .r .jl .hs .ml .mli .ex .exs .erl .clj .lisp .el .scm .zig .nim .d
    .dart .f .f90 .f95 .asm .s .sh .bash .zsh .fish .ps1 .bat .cmake .mk .tcl .vim .v .sv .vhd .proto .gradle
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILES", help="files, folders, globs, or - for standard input")


def default_name(args: argparse.Namespace) -> str:
    """The stem of the first path: `mine` for ~/mine.txt.gz, for the folder mine/ and for mine/*.txt."""
    first = args.files[0]
    if first == "-":
        return "stdin"
    parts = [part for part in Path(os.path.abspath(first)).parts if not glob.has_magic(part)]
    return parts[-1].lstrip(".").split(".")[0] or "text"


def documents(args: argparse.Namespace) -> "TextFiles":
    files = TextFiles(args.errors)
    for name in args.files:
        files.add(name)
    if files.skipped:
        print(f"left out {files.skipped} files that do not look like text", file=sys.stderr)
    return files


class TextFiles:
    """An iterable of the texts of files, read anew each time, so that the corpus need not fit in memory."""

    def __init__(self, errors: str = "strict"):
        self.errors = errors  # strict | replace: what to do with bytes that are not UTF-8
        self.sources: list[tuple[str, bytes | None]] = []  # path, and the bytes of what can be read only once
        self.skipped = 0

    def add(self, name: str) -> None:
        """Add a file, a folder, a glob, or - for standard input. A UserError where there is no text to be found."""
        if name == "-":
            self.sources.append(("standard input", _unpacked(sys.stdin.buffer.read())))
        elif os.path.isdir(name):
            found = self._in_folder(name)
            if not found:
                raise UserError(f"the folder {name} holds no text files; name the files to read whatever their suffix")
            self.sources += [(path, None) for path in found]
        elif os.path.isfile(name):
            if os.path.getsize(name) == 0:
                raise UserError(f"{name} is empty; leave it out, or give a file with text in it")
            self.sources.append((name, None))
        elif os.path.exists(name):  # a pipe, as in `python prepare text <(zcat mine.gz)`
            self.sources.append((name, _read(name)))
        elif glob.has_magic(name):
            found = sorted(glob.glob(name, recursive=True))
            if not found:
                raise UserError(f"no file matches {name}; paths are relative to where you stand: {os.getcwd()}")
            for path in found:
                self.sources += [(file, None) for file in (self._in_folder(path) if os.path.isdir(path) else [path])]
        else:
            raise UserError(f"there is no file or folder {name}; paths are relative to where you stand: {os.getcwd()}")

    def _in_folder(self, folder: str) -> list[str]:
        found = []

        def refuse(error: OSError) -> None:
            raise UserError(f"cannot read the folder {error.filename}: {error.strerror}; leave it out") from error

        for parent, folders, files in os.walk(folder, onerror=refuse):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for path in (os.path.join(parent, name) for name in sorted(files) if not name.startswith(".")):
                suffix = os.path.splitext(path.removesuffix(".gz"))[1].lower()
                if suffix in SUFFIXES.split() and os.path.isfile(path) and b"\0" not in _read(path, 8192):
                    found.append(path)
                else:
                    self.skipped += 1
        return found

    def __iter__(self) -> Iterator[str]:
        for name, data in self.sources:
            yield self._decode(name, _read(name) if data is None else data)

    def _decode(self, name: str, data: bytes) -> str:
        try:
            return data.decode("utf-8", self.errors).removeprefix("\ufeff")  # the mark that some editors put in front
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}; "
                "convert the file, leave it out, or go on with --errors replace"
            ) from error


def _read(path: str, limit: int = -1) -> bytes:
    """The bytes of a file, those of a .gz unpacked."""
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            return file.read(limit)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is no whole gzip file ({error}); get it again or leave it out") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _unpacked(data: bytes) -> bytes:
    """What came through a pipe has no suffix; gzip shows by its first two bytes."""
    if not data.startswith(b"\x1f\x8b"):
        return data
    try:
        return gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"standard input is no whole gzip file ({error}); send it again") from error
