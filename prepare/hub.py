"""any dataset on the Hugging Face hub, or a local folder in the same format, read with the library datasets

It streams by default, so only the shards are stored. `--max_tokens` uses only the beginning of a large corpus.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator

from acorn import UserError, printable
from prepare.encoding import Faults, counting_handler
from prepare.pipeline import Document
from prepare.reading import cell, parquet_batches

TOKENIZER = "gpt2"
DEFAULT_NAME = "the last part of NAME, such as fineweb"
VAL_FRACTION = 0.0005
MAX_ROWS = 1000  # maximum rows to read at once
FIRST_ROWS = 16  # rows whose size determines how many rows to read at once
BATCH_BYTES = 1 << 24  # target bytes of the rows to read at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="NAME", help="a name on the hub, OWNER/NAME, or a folder")
    add_options(parser)


def add_options(
    parser: argparse.ArgumentParser, config: str | None = None, split: str = "train", val_split: str | None = None
) -> None:
    """Add the options of every corpus on the hub, with these defaults."""
    add = parser.add_argument
    add(
        "--config",
        default=config,
        help=f"the configuration (subset), if there are several; default: {config or 'none'}",
    )
    add("--split", default=split, help="the split to read; default: %(default)s")
    add("--val_split", default=val_split, help=f"a split to use only for validation; default: {val_split or 'none'}")
    add("--key", default="text", metavar="FIELD", help="the field with the text; default: %(default)s")
    add("--revision", help="a branch, tag or commit of the dataset")
    add("--max_tokens", type=int, metavar="N", help="stop after N tokens")
    add(
        "--streaming",
        type=lambda word: {"true": True, "false": False}.get(word.lower(), word),
        default=True,
        choices=(True, False),
        help="False downloads the whole dataset first, into the cache of datasets; default: True",
    )


def default_name(args: argparse.Namespace) -> str:
    """Return the last part of the name: fineweb for HuggingFaceFW/fineweb."""
    return re.split(r"[/\\]", args.dataset.rstrip("/\\"))[-1]


def documents(args: argparse.Namespace) -> "HubDocuments":
    if os.path.isfile(args.dataset) or not args.dataset.strip():
        raise UserError(
            f"'{args.dataset}' is not a dataset on the hub. For files, use `python prepare text FILES --key FIELD`."
        )
    if not os.path.isdir(args.dataset) and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", args.dataset):
        raise UserError(
            f"'{args.dataset}' is neither a local folder nor a dataset name. Use a folder, or a name from the hub such "
            "as OWNER/NAME."
        )
    return HubDocuments(args.dataset, args)


def _parquet_columns(files: list[str], name: str, key: str, state: dict | None) -> Iterator[tuple]:
    """Yield the field `key` of the files' rows from `state` on as pyarrow arrays, each with the state after it."""
    from datasets.utils.file_utils import xopen  # authenticates at the hub, and retries

    try:
        first, skip = (int(state["file"]), int(state["rows"])) if state else (0, 0)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged_bookmark(name, error) from error
    for number in range(first, len(files)):
        with xopen(files[number], "rb") as file:
            for batch in parquet_batches(file, f"{name} ({os.path.basename(files[number])})", key, skip):
                skip += len(batch)
                yield batch.column(key), {"file": number, "rows": skip}
                batch = None  # free it before the next one is read
        skip = 0


def _columns(rows, name: str, key: str, state: dict | None) -> Iterator[tuple]:
    """Yield the field `key` of an iterable dataset from `state` on as arrays, each with the state after it."""
    if state:
        try:
            batch_size = min(MAX_ROWS, max(1, int(state["rows"])))
            rows.load_state_dict(state["datasets"])
        except Exception as error:  # the library does not validate the state
            raise _damaged_bookmark(name, error) from error
    else:
        first = next(rows.iter(min(FIRST_ROWS, MAX_ROWS)), None)
        batch_size = BATCH_BYTES * len(first) // max(1, first.nbytes) if first is not None else MAX_ROWS
        batch_size = min(MAX_ROWS, max(1, batch_size))
    for table in rows.iter(batch_size):
        # the state holds batch_size, because datasets would lose or repeat rows with a different one
        yield table[key], {"rows": batch_size, "datasets": rows.state_dict()}


def _damaged_bookmark(name: str, error: Exception) -> UserError:
    return UserError(
        f"the saved position in {name} is damaged ({error!s:.80}). Remove the dataset's folder .acorn_partial, and "
        "start again."
    )


class HubDocuments:
    """A re-iterable of the texts of a dataset. The texts of `--val_split` come first.

    Each row is a document, unless `join` is given: it makes documents from an iterator of rows.
    """

    def __init__(
        self, name: str, args: argparse.Namespace, join: Callable[[Iterator[str]], Iterator[str]] | None = None
    ):
        self.name, self.args, self.join = name, args, join
        self.parts = [("val", args.val_split), ("train", args.split)] if args.val_split else [(None, args.split)]
        self._bookmark: dict = {"documents": 0, "part": 0, "state": None}
        self._printed: set[str] = set()

    def fingerprint(self) -> list:
        args = self.args
        return [self.name, args.config, args.split, args.val_split, args.key, args.revision, args.streaming]

    def bookmark(self) -> dict:
        return self._bookmark

    def __iter__(self) -> Iterator[str | Iterator[str] | Document]:
        return self.read_from({"documents": 0, "part": 0, "state": None})

    def read_from(self, bookmark: dict) -> Iterator[str | Iterator[str] | Document]:
        self._bookmark = bookmark
        faults = Faults()
        try:
            for part in range(bookmark["part"], len(self.parts)):
                split, rows = self.parts[part][0], self._rows(part, faults)
                if self.join:
                    rows = self.join(row if isinstance(row, str) else "".join(row) for row in rows)
                for text in rows:
                    yield Document(text, split) if split else text
        finally:  # also if --max_tokens closes the iterator early
            for note in faults.notes():
                if note not in self._printed:
                    print(printable(note), file=sys.stderr)
                self._printed.add(note)

    def _rows(self, part: int, faults: Faults) -> Iterator[str | Iterator[str]]:
        """Yield the texts of a part from the bookmark on. The bookmark is updated, except if rows are joined."""
        source, key = self._open(self.parts[part][1]), self.args.key
        count, state = self._bookmark["documents"], self._bookmark["state"]
        errors = counting_handler(getattr(self.args, "errors", "strict"))
        read = _parquet_columns if isinstance(source, list) else _columns
        columns = read(source, self.name, key, state)
        while True:
            try:
                column, state = next(columns, (None, None))
            except UserError:
                raise
            except Exception as error:
                raise self._explained(error) from error
            if column is None:
                break
            for number, value in enumerate(column, count + 1):
                text = cell(value, f"row {number} of {self.name}", key, errors)
                if text is not None and not isinstance(text, str | Iterator):
                    raise UserError(
                        f"the field '{key}' of {self.name} is not text but {text!r:.40}. Choose another field with "
                        "--key."
                    )
                if isinstance(text, Iterator):
                    yield (faults.look(block, self.name) for block in text)
                else:
                    yield faults.look(text or "", self.name)
            count += len(column)
            column = None  # free it before the next one is read
            if not self.join:
                self._bookmark = {"documents": count, "part": part, "state": state}
        if not self.join:
            self._bookmark = {"documents": count, "part": part + 1, "state": None}

    def _open(self, split: str):
        """Open the rows of a split. Returns its parquet files if it has only those, because reading.py reads them in
        bounded memory, whereas datasets holds whole row groups. Otherwise returns an iterable dataset of Arrow tables
        with the one field."""
        import datasets

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        args = self.args
        try:
            rows = datasets.load_dataset(
                self.name, args.config, split=split, revision=args.revision, streaming=args.streaming
            )
            if not args.streaming:
                rows = rows.to_iterable_dataset()
            fields = rows.column_names or list(next(iter(rows), {}))
            files = []
            if args.streaming and rows.info.builder_name == "parquet":
                builder = datasets.load_dataset_builder(self.name, args.config, revision=args.revision)
                files = list((builder.config.data_files or {}).get(split, ()))
        except Exception as error:
            raise self._explained(error) from error
        if args.key not in fields:
            found = ", ".join(fields) or "none"
            raise UserError(f"{self.name} has no field '{args.key}'. Choose one with --key (the fields are: {found}).")
        if files and all(file.endswith(".parquet") for file in files):
            return files
        return rows.select_columns([args.key]).with_format("arrow")

    def _explained(self, error: BaseException) -> BaseException:
        """Return a UserError with advice for an error of datasets or of a library that it uses; MemoryError is returned
        unchanged. Damaged files can raise almost any type of exception."""
        import datasets.exceptions
        import httpx

        text = " ".join(str(error).split())
        chain = [error, error.__cause__, error.__context__]
        status = next((e.response.status_code for e in chain if isinstance(e, httpx.HTTPStatusError)), None)
        page = f"https://huggingface.co/datasets/{self.name}"
        if "scripts are no longer supported" in text:
            return UserError(
                f"{self.name} is a Python script, which datasets no longer runs. Try --revision refs/convert/parquet, "
                "the hub's parquet copy of many such datasets, or download its files for `python prepare text`."
            )
        if "gated dataset" in text or status in (401, 403):
            return UserError(
                f"{self.name} is gated or private. Request access on {page}, log in with `hf auth login` (or set "
                "HF_TOKEN), and run this again."
            )
        if isinstance(error, datasets.exceptions.DatasetNotFoundError) or status == 404:
            return UserError(
                f"there is no dataset {self.name} on the hub ({text:.200}). Use the name in the address of its page, "
                f"such as {page}."
            )
        if isinstance(error, datasets.exceptions.DataFilesNotFoundError | FileNotFoundError):
            return UserError(
                f"{self.name} has no data files in a format that datasets supports ({text:.200}). For "
                "other files, use `python prepare text FILES`."
            )
        if "BuilderConfig" in text or "Config name is missing" in text:
            return UserError(f"{self.name} needs another --config: {text:.600}")
        if "split" in text and isinstance(error, ValueError):
            return UserError(f"{self.name} needs another --split: {text:.300}")
        if isinstance(error, ConnectionError | TimeoutError | httpx.HTTPError):
            return UserError(
                f"the Hugging Face hub cannot be reached ({text:.200}). Run this again with a network, set the "
                "environment variable HF_ENDPOINT to the address of a mirror, or use a corpus that needs no network: "
                "`python prepare text FILES` or `python prepare stdlib`."
            )
        if isinstance(error, MemoryError):
            return error
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__:
            error = error.__cause__
        reason = f"{' '.join(str(error).split()).removesuffix('.')} ({type(error).__name__})"
        if "StopIteration" in reason:  # from the library that reads zstd
            reason = "a file is empty or cut short"
        return UserError(
            f"datasets cannot read {self.name}: {reason:.300}. Download its files again. To find the damaged file, "
            "read them with `python prepare text FILES`."
        )
