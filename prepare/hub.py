"""any dataset of the Hugging Face hub, or a local folder of its kind, through the library datasets

It streams by default: nothing is stored but the shards. `--max_tokens` takes the beginning of a large corpus.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator

from acorn import UserError
from prepare.pipeline import Document

TOKENIZER = "gpt2"
VAL_FRACTION = 0.0005
ROWS = 1000  # read at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="NAME", help="as the hub writes it: OWNER/NAME; or a folder")
    add_options(parser)


def add_options(
    parser: argparse.ArgumentParser, config: str | None = None, split: str = "train", val_split: str | None = None
) -> None:
    """The options of every corpus that comes from the hub, with its own defaults."""
    add = parser.add_argument
    add("--config", default=config, help="the part of the dataset, where it has several; default: %(default)s")
    add("--split", default=split, help="the split to read; default: %(default)s")
    add("--val_split", default=val_split, help="a split that is all for validation; default: %(default)s")
    add("--key", default="text", metavar="FIELD", help="the field that is the text; default: %(default)s")
    add("--revision", help="a branch, tag or commit of the dataset")
    add("--max_tokens", type=int, metavar="N", help="stop after so many tokens")
    add(
        "--streaming",
        type=lambda word: {"true": True, "false": False}.get(word.lower(), word),
        default=True,
        choices=(True, False),
        help="False downloads all of it first, into the cache of datasets; default: True",
    )


def default_name(args: argparse.Namespace) -> str:
    """The last part of the name: fineweb for HuggingFaceFW/fineweb."""
    return re.split(r"[/\\]", args.dataset.rstrip("/\\"))[-1]


def documents(args: argparse.Namespace) -> "HubDocuments":
    if os.path.isfile(args.dataset) or not args.dataset.strip():
        raise UserError(
            f"'{args.dataset}' is no dataset of the hub; for files use `python prepare text FILES --key FIELD`"
        )
    return HubDocuments(args.dataset, args)


class HubDocuments:
    """An iterable of the texts of a dataset, read anew each time; those of `--val_split` come first.

    A row is a document, unless `join` makes documents from an iterator of rows.
    """

    def __init__(
        self, name: str, args: argparse.Namespace, join: Callable[[Iterator[str]], Iterator[str]] | None = None
    ):
        self.name, self.args, self.join = name, args, join
        self.parts = [("val", args.val_split), ("train", args.split)] if args.val_split else [(None, args.split)]
        self._bookmark = {"documents": 0, "part": 0, "state": None}

    def fingerprint(self) -> list:
        args = self.args
        return [self.name, args.config, args.split, args.val_split, args.key, args.revision, args.streaming]

    def bookmark(self) -> dict:
        return self._bookmark

    def __iter__(self) -> Iterator[str | Document]:
        return self.read_from({"documents": 0, "part": 0, "state": None})

    def read_from(self, bookmark: dict) -> Iterator[str | Document]:
        self._bookmark = bookmark
        for part in range(bookmark["part"], len(self.parts)):
            split, rows = self.parts[part][0], self._rows(part)
            for text in self.join(rows) if self.join else rows:
                yield Document(text, split) if split else text

    def _rows(self, part: int) -> Iterator[str]:
        """The texts of a part from the bookmark on, which moves along; where rows are joined it stays at the start."""
        table_rows = self._open(self.parts[part][1])
        count, state = self._bookmark["documents"], self._bookmark["state"]
        if state:
            try:
                table_rows.load_state_dict(state)
            except Exception as error:  # the library does not check what it takes
                raise UserError(
                    f"the place in {self.name} where reading stopped is not as it was written ({error!s:.80}); remove "
                    "the folder .acorn_partial of the dataset, and start again"
                ) from error
        tables = table_rows.iter(ROWS)
        while True:
            try:
                table = next(tables, None)
            except Exception as error:
                raise self._explained(error) from error
            if table is None:
                break
            for text in table[self.args.key].to_pylist():
                if not isinstance(text, str | None):
                    raise UserError(f"the field '{self.args.key}' of {self.name} is no text but {text!r:.40}")
                yield text or ""
            count += len(table)
            if not self.join:
                self._bookmark = {"documents": count, "part": part, "state": table_rows.state_dict()}
        if not self.join:
            self._bookmark = {"documents": count, "part": part + 1, "state": None}

    def _open(self, split: str):
        """The rows of a split, as an iterable dataset of Arrow tables with the one field."""
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
        except Exception as error:
            raise self._explained(error) from error
        if args.key not in fields:
            raise UserError(
                f"{self.name} has no field '{args.key}'; choose one with --key (the fields are: {', '.join(fields)})"
            )
        return rows.select_columns([args.key]).with_format("arrow")

    def _explained(self, error: Exception) -> Exception:
        """The error as a UserError that says what to do; itself where it is none of the known ones."""
        import datasets.exceptions
        import httpx

        text = " ".join(str(error).split())
        chain = [error, error.__cause__, error.__context__]
        status = next((e.response.status_code for e in chain if isinstance(e, httpx.HTTPStatusError)), None)
        page = f"https://huggingface.co/datasets/{self.name}"
        if "scripts are no longer supported" in text:
            return UserError(
                f"{self.name} is a Python script, which datasets no longer runs; try --revision refs/convert/parquet, "
                "the copy that the hub made of many of these, or download its files for `python prepare text`"
            )
        if "gated dataset" in text or status in (401, 403):
            return UserError(
                f"{self.name} is gated or private: ask for access on {page}, log in with `hf auth login` (or set "
                "HF_TOKEN), and run this again"
            )
        if isinstance(error, datasets.exceptions.DatasetNotFoundError) or status == 404:
            return UserError(
                f"there is no dataset {self.name} on the hub ({text:.200}); a name is as in the address {page}"
            )
        if isinstance(error, datasets.exceptions.DataFilesNotFoundError | FileNotFoundError):
            return UserError(f"{self.name} holds no data files that datasets knows ({text:.200})")
        if "BuilderConfig" in text or "Config name is missing" in text:
            return UserError(f"{self.name} needs another --config: {text:.600}")
        if "split" in text and isinstance(error, ValueError):
            return UserError(f"{self.name} needs another --split: {text:.300}")
        if isinstance(error, ConnectionError | TimeoutError | httpx.HTTPError):
            return UserError(
                f"the Hugging Face hub cannot be reached ({text:.200}); run this again with a network, or use a corpus "
                "that needs none: `python prepare text FILES` or `python prepare stdlib`"
            )
        if isinstance(error, datasets.exceptions.DatasetsError | OSError):
            return UserError(f"datasets cannot read {self.name}: {text:.300}")
        return error
