"""conversations: .jsonl, .json, .parquet or .csv with {"messages"}, {"prompt", "response"}, ShareGPT or Alpaca records

A chat template turns conversations into text, and a mask marks the replies, each with its end token, as the tokens to
learn. The template is the tokenizer's own, else ChatML if the tokenizer has its tokens, else a plain one. An index
stores where each conversation begins and how the template renders it without its oldest turns. Training packs whole
conversations into rows of block_size tokens; a longer conversation loses its oldest turns, as in sampling. If the
template rewrites earlier turns, a conversation of n replies becomes n examples. A hash of the conversation decides
whether it is for validation.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from acorn import UserError, files, printable, settings
from acorn.data import chat
from acorn.data.records import Conversation, read_messages
from acorn.data.shards import PARTIAL, IndexWriter, MaskWriter, ShardWriter, write_meta
from acorn.data.tokenizer import Tokenizer, tokenizer_hash
from acorn.data.tokenizer_kinds import get_tokenizer
from prepare import encoding, pipeline, reading, text

TOKENIZER = "gpt2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared_arguments(
        parser,
        "maximum tokens per conversation: a longer one loses its oldest turns or, if it has only one turn, the end of "
        "its reply; default: no limit, because training fits each conversation to its block_size",
    )


def add_shared_arguments(parser: argparse.ArgumentParser, max_tokens: str) -> None:
    """Add the arguments of conversations and of pairs of answers; `max_tokens` is the help of --max_tokens."""
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILES",
        help=".jsonl, .json, .parquet or .csv files, also compressed (.gz, .zst)",
    )
    parser.add_argument(
        "--skip_bad", action="store_true", help="skip bad records and count them; default: stop at the first one"
    )
    parser.add_argument(
        "--encoding", metavar="NAME", help="the encoding of all files, such as gb18030; default: detected per file"
    )
    parser.add_argument(
        "--template",
        metavar="TEMPLATE",
        help="plain, chatml, or a file with a Jinja template; default: the tokenizer's own, else chatml or plain",
    )
    parser.add_argument("--max_tokens", type=int, metavar="N", help=max_tokens)


default_name = text.default_name


def prepare(args: argparse.Namespace, out: Path, *, name: str, tokenizer: str | Tokenizer, source: dict) -> dict:
    """Write the dataset `out` and return its meta.json. An existing dataset is replaced when the new one is complete.

    Raises UserError for invalid options, files or records."""
    encodings = check_arguments(args)
    messages = (message for _, messages in conversations(args, encodings, skip_or_fail(args)) for message in messages)
    tokenizer = with_template(args, tokenizer, messages)
    return write_dataset(out, name, lambda folder: write_conversations(args, encodings, folder, tokenizer, source))


def check_arguments(args: argparse.Namespace) -> dict[str, str]:
    """Return the encoding of each file. Raises UserError for invalid options and for missing files."""
    settings.check_bounds(vars(args))
    if args.val_by == "end":
        raise UserError("conversations are split by their hash. Remove --val_by end.")
    for path in args.files:
        if os.path.isdir(path) or path == "-":
            kind = "a folder" if path != "-" else "standard input"
            raise UserError(
                f"{path} is {kind}, but prepare {args.corpus} reads only files. Name the files, such as chats/*.jsonl."
            )
        if not os.path.isfile(path):
            raise UserError(f"there is no file {path}. Paths are relative to the working directory {os.getcwd()}.")
    return encodings_of(args)


def with_template(args: argparse.Namespace, tokenizer: str | Tokenizer, messages: Iterator[dict]) -> Tokenizer:
    """Return the tokenizer with the chat template of --template, or with its own.

    If `tokenizer` names a kind that is trained, it learns from the text of `messages`.
    """
    if isinstance(tokenizer, str):
        tokenizer = get_tokenizer(tokenizer, (str(message.get("content", "")) for message in messages))
    tokenizer.chat_template = template_of(args.template) if args.template else chat.choose_template(tokenizer)
    chat.check_learnable(tokenizer)
    return tokenizer


def write_dataset(out: Path, name: str, write: Callable[[Path], dict]) -> dict:
    """Write the dataset `out` and return its meta.json. `write` writes the shards into a folder and returns the entries
    of meta.json. An existing dataset is replaced when the new one is complete."""
    existed, partial, lock = out.exists(), out / PARTIAL, None
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = files.lock(out, "preparing")
        files.remove(partial)  # left by a preparation that was killed
        partial.mkdir()
        write_meta(partial, {"format": 1, "name": name} | write(partial))
        return pipeline.move_in(partial, out)
    except OSError as error:
        raise UserError(pipeline.explain(error, out, partial, None)) from error
    finally:
        if lock is not None:
            shutil.rmtree(partial, ignore_errors=True)
            files.unlock(lock)
        if not existed:
            with contextlib.suppress(OSError):  # not empty if the dataset is complete
                out.rmdir()


def template_of(name: str) -> str:
    """Return the chat template for the value of --template."""
    if name in chat.TEMPLATES:
        return chat.TEMPLATES[name]
    try:
        return Path(name).read_text(encoding="utf-8-sig")  # without a byte order mark
    except (OSError, ValueError) as error:
        known = ", ".join(chat.TEMPLATES)
        raise UserError(f"--template {name} is neither {known} nor a UTF-8 file with a Jinja template.") from error


class Skipped:
    """The number of skipped records, and the error of the first one."""

    count, first = 0, ""


def skip_or_fail(args: argparse.Namespace, skipped: Skipped | None = None) -> Callable[[UserError], None]:
    """Return a handler for the error of a record: with --skip_bad it counts the error in `skipped`, else it raises."""

    def skip(error: UserError) -> None:
        if skipped is not None:
            skipped.count += 1
            skipped.first = skipped.first or str(error)

    return skip if args.skip_bad else reading.fail


def conversations(
    args: argparse.Namespace, encodings: dict[str, str], bad: Callable[[UserError], None]
) -> Iterator[tuple[str, Conversation]]:
    """Yield the location of each record, for messages, and its conversation; errors go to `bad`."""
    for path in args.files:
        for where, record in reading.objects(path, encoding.counting_handler(args.errors), bad, encodings[path]):
            try:
                messages = read_messages(record)
            except UserError as error:
                bad(UserError(f"{where} {error}"))
                continue
            yield where, messages


def encodings_of(args: argparse.Namespace) -> dict[str, str]:
    """Return the encoding of each file: that of --encoding, else the one detected from its first bytes. Prints which
    were detected. Raises UserError for a file that is not text."""
    given = encoding.check_name(args.encoding) if args.encoding else None
    found = {path: encoding.Detected(given or "utf-8") for path in args.files}
    for path in args.files:
        if reading.suffix(path) != ".parquet":
            found[path] = encoding.encoding_of(reading.head(path, encoding.SEARCHED_BYTES), path, given, args.errors)
    for note in [] if given else encoding.detection_notes(found):
        print(printable(note), file=sys.stderr)
    return {path: detected.encoding for path, detected in found.items()}


def write_conversations(
    args: argparse.Namespace,
    encodings: dict[str, str],
    folder: Path,
    tokenizer: Tokenizer,
    source: dict,
    val_from: int | None = None,
) -> dict:
    """Write the shards, masks and indices of both splits. Returns their entries of meta.json. Conversations from number
    `val_from` on are for validation; if it is None, the hash of each decides."""
    counts: dict[str, Counter] = {"train": Counter(), "val": Counter()}
    n = examples = cut = left_out = longest = 0
    unused: Counter = Counter()
    skipped = Skipped()
    bad, faults = skip_or_fail(args, skipped), encoding.Faults()
    sizes = tokenizer.token_bytes()
    with contextlib.ExitStack() as stack:
        writers = {split: open_writers(stack, folder, split, tokenizer, args) for split in counts}
        for where, messages in tqdm(
            conversations(args, encodings, bad), desc="encoding", unit=" conversations", disable=None
        ):
            try:
                conversation = chat.forms_to_learn(tokenizer, messages)
            except UserError as error:
                bad(UserError(f"{where}: {error}"))
                continue
            for message in messages:
                faults.look(str(message.get("content", "")), where)
            unused.update(chat.unused_fields(tokenizer, messages))
            fitted = [limited(forms, args.max_tokens) for forms in conversation]
            n += 1
            cut += any(
                kept and len(kept[0][0]) < len(forms[0][0]) for kept, forms in zip(fitted, conversation, strict=True)
            )
            fitted = [forms for forms in fitted if forms]
            examples += len(fitted)
            left_out += not fitted
            if val_from is None:
                split = split_of(messages, args.val_fraction)
            else:
                split = "train" if n <= val_from else "val"
            n_tokens = sum(len(forms[0][0]) for forms in fitted)
            if args.val_tokens and writers["val"][0].tokens + n_tokens > args.val_tokens:
                split = "train"
            tokens, masks, indices = writers[split]
            for forms in fitted:
                ids, learned, index = joined(forms)
                tokens.write(ids)
                masks.write(learned)
                indices.write(index.ravel())
                whole, targets = forms[0]
                longest = max(longest, len(whole))
                counts[split].update(bytes=int(sizes[whole].sum()), learned=int(targets[1:].sum()))
    if not n:
        reason = f" All {skipped.count} records are bad; the first: {skipped.first}" if skipped.count else ""
        raise UserError(f"there is no conversation in {', '.join(args.files)}. Write one JSON object per line.{reason}")
    if val_from is None and n > 1 and not all(count["learned"] for count in counts.values()):
        n_val = min(n - 1, max(1, round(n * args.val_fraction)))
        print(
            f"note: splitting {n} conversations by hash left one split empty; the last {n_val} are used as val",
            file=sys.stderr,
        )
        return write_conversations(args, encodings, folder, tokenizer, source, n - n_val)
    for note in faults.notes("--encoding NAME"):
        print(printable(note), file=sys.stderr)
    if skipped.count:
        print(printable(f"warning: skipped {skipped.count:,} bad records; the first: {skipped.first}"), file=sys.stderr)
    if unused:
        fields = ", ".join(f"{name} ({count:,} conversations)" for name, count in unused.most_common(8))
        print(printable(f"note: the chat template ignores these fields of messages: {fields}"), file=sys.stderr)
    for split, count in counts.items():
        if not count["learned"]:
            names = [name for name in ("max_tokens", "val_fraction", "val_tokens") if getattr(args, name)]
            values = ", ".join(f"{name}={getattr(args, name)}" for name in names)
            raise UserError(
                f"with {values}, {split} has none of the {n} conversations ({left_out} were left out as too long). "
                f"Use more conversations, or change {' or '.join(f'--{name}' for name in names)}."
            )
    told = {"examples": examples, "cut": cut, "left_out": left_out, "max_tokens": args.max_tokens}
    told |= {"skipped": skipped.count}
    figures = {"documents": n - left_out, "chat": told, "longest": longest}
    return entries(args, tokenizer, source, figures, counts, writers)


Writers = tuple[ShardWriter, ShardWriter, ShardWriter]  # of tokens, masks and indices, which are all shards


def open_writers(
    stack: contextlib.ExitStack, folder: Path, split: str, tokenizer: Tokenizer, args: argparse.Namespace
) -> Writers:
    """Open the writers of a split's tokens, masks and indices, which `stack` closes."""
    tokens = stack.enter_context(ShardWriter(folder, split, tokenizer.n_vocab, args.shard_tokens))
    masks = stack.enter_context(MaskWriter(folder, split, args.shard_tokens))
    return tokens, masks, stack.enter_context(IndexWriter(folder, split))


def entries(
    args: argparse.Namespace,
    tokenizer: Tokenizer,
    source: dict,
    figures: dict,
    counts: dict[str, Counter],
    writers: dict[str, Writers],
) -> dict:
    """Return the entries of meta.json: `figures` and those that conversations and pairs share."""
    hashes = [files.sha256(path) for path in args.files]
    sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    shared = {
        "tokenizer": tokenizer.to_dict(),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "vocab_size": tokenizer.n_vocab,
        "val_by": "document",
        "source": source | {"sha256": sha256},
    }
    splits = {
        split: {
            "tokens": tokens.tokens,
            "bytes": counts[split]["bytes"],
            "learned": counts[split]["learned"],
            "shards": tokens.shards,
            "masks": masks.shards,
            "index": index.shards,
        }
        for split, (tokens, masks, index) in writers.items()
    }
    return shared | figures | splits


def limited(forms: list[tuple], limit: int | None) -> list[tuple]:
    """Return the forms of a conversation (see `chat.forms_to_learn`) with at most `limit` tokens. If there are none,
    return the last form, truncated, or nothing if no learned token would remain."""
    forms = [form for form in forms if form[1][1:].any()]
    if limit is None or not forms:
        return forms
    if short := [form for form in forms if len(form[0]) <= limit]:
        return short
    ids, learned = (part[:limit] for part in forms[-1])
    return [(ids, learned)] if learned[1:].any() else []


def joined(forms: list[tuple]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the tokens of a conversation's forms as stored in a dataset, their learned mask, and their index rows. A
    form after the first is stored without the tokens that it shares with the start and end of the first form."""
    codes = [2 * ids.astype(np.int64) + learned for ids, learned in forms]
    whole, pieces, index = codes[0], [], []
    for k, code in enumerate(codes):
        head = tail = 0
        if k:
            n = min(len(whole), len(code))
            head = _equal(whole[:n], code[:n])
            tail = min(_equal(whole[::-1][:n], code[::-1][:n]), len(code) - head)
        pieces.append(code[head : len(code) - tail])
        index.append((k, head, len(pieces[-1]), tail, int(np.flatnonzero(code[1:] & 1)[0]) + 1))
    written = np.concatenate(pieces)
    return written >> 1, (written & 1).astype(bool), np.array(index)


def _equal(a: np.ndarray, b: np.ndarray) -> int:
    """Return the length of the common prefix of two arrays of equal length."""
    return int(np.argmin(np.append(a == b, False)))


def split_of(messages: list[dict], val_fraction: float) -> str:
    """Return the split of a conversation, train or val, by its hash."""
    digest = hashlib.sha256(json.dumps(messages, sort_keys=True, default=str).encode()).hexdigest()
    return "val" if int(digest[:16], 16) < val_fraction * 2**64 else "train"
