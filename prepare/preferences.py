"""pairs of answers: .jsonl, .json, .parquet or .csv with {"prompt" or "messages", "chosen", "rejected"} records

For `objective = "dpo"` of train.py. The prompt may also be ShareGPT's "conversations", or Alpaca's "instruction" with
"input". The chat template of the checkpoint renders both conversations, and only the answers are learned. The two
conversations of a pair are stored one after the other, and training keeps them in one row: a pair that is longer than
block_size is left out. A hash of the prompt decides whether a pair is for validation.
"""

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from acorn import UserError, printable
from acorn.data import chat
from acorn.data.records import Conversation, read_pair
from acorn.data.tokenizer import Tokenizer
from prepare import encoding, reading, text
from prepare.chat import (
    Skipped,
    add_shared_arguments,
    check_arguments,
    entries,
    open_writers,
    skip_or_fail,
    split_of,
    with_template,
    write_dataset,
)

TOKENIZER = "gpt2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared_arguments(
        parser, "leave out pairs whose two conversations have more than N tokens together; default: no limit"
    )


default_name = text.default_name


def prepare(args: argparse.Namespace, out: Path, *, name: str, tokenizer: str | Tokenizer, source: dict) -> dict:
    """Write the dataset `out` and return its meta.json. An existing dataset is replaced when the new one is complete.

    Raises UserError for invalid options, files or records."""
    encodings = check_arguments(args)
    read = pairs(args, encodings, skip_or_fail(args))
    tokenizer = with_template(args, tokenizer, (message for _, pair in read for each in pair for message in each))
    return write_dataset(out, name, lambda folder: write_pairs(args, encodings, folder, tokenizer, source))


def pairs(
    args: argparse.Namespace, encodings: dict[str, str], bad: Callable[[UserError], None]
) -> Iterator[tuple[str, tuple[Conversation, Conversation]]]:
    """Yield the location of each record, for messages, and its two conversations; errors go to `bad`."""
    for path in args.files:
        for where, record in reading.objects(path, encoding.counting_handler(args.errors), bad, encodings[path]):
            try:
                pair = read_pair(record)
            except UserError as error:
                bad(UserError(f"{where} {error}"))
                continue
            yield where, pair


def render(tokenizer: Tokenizer, messages: Conversation) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of a conversation up to its last learned token, and which of them are learned."""
    (forms,) = chat.forms_to_learn(tokenizer, messages)[-1:]
    ids, learned = forms[0]
    if not learned[1:].any():
        raise UserError("the chat template leaves nothing of the answer to learn. Choose another --template.")
    return ids, learned


def write_pairs(
    args: argparse.Namespace,
    encodings: dict[str, str],
    folder: Path,
    tokenizer: Tokenizer,
    source: dict,
    val_from: int | None = None,
) -> dict:
    """Write the shards, masks and indices of both splits. Returns their entries of meta.json. Pairs from number
    `val_from` on are for validation; if it is None, the hash of each prompt decides."""
    counts: dict[str, Counter] = {"train": Counter(), "val": Counter()}
    n, left_out, longest, skipped, faults = 0, 0, 0, Skipped(), encoding.Faults()
    bad, sizes = skip_or_fail(args, skipped), tokenizer.token_bytes()
    with contextlib.ExitStack() as stack:
        writers = {split: open_writers(stack, folder, split, tokenizer, args) for split in counts}
        for where, pair in tqdm(pairs(args, encodings, bad), desc="encoding", unit=" pairs", disable=None):
            try:
                rendered = [render(tokenizer, messages) for messages in pair]
                if np.array_equal(rendered[0][0], rendered[1][0]):
                    raise UserError("the chat template renders both answers alike. Remove this pair.")
            except UserError as error:
                bad(UserError(f"{where}: {error}"))
                continue
            for message in [*pair[0], *(message for message in pair[1] if message not in pair[0])]:
                faults.look(str(message.get("content", "")), where)
            length = sum(len(ids) for ids, _ in rendered)
            if args.max_tokens and length > args.max_tokens:
                left_out += 1
                continue
            n, longest = n + 1, max(longest, length)
            shared = [message for message, other in zip(*pair, strict=False) if message == other]
            split = split_of(shared, args.val_fraction) if val_from is None else "train" if n <= val_from else "val"
            if args.val_tokens and writers["val"][0].tokens + length > args.val_tokens:
                split = "train"
            tokens, masks, index = writers[split]
            for ids, learned in rendered:
                tokens.write(ids)
                masks.write(learned)
                index.write(np.array([0, 0, len(ids), 0, int(np.flatnonzero(learned[1:])[0]) + 1]))
                counts[split].update(bytes=int(sizes[ids].sum()), learned=int(learned[1:].sum()))
    if not n:
        reason = f" All {skipped.count} records are bad; the first: {skipped.first}" if skipped.count else ""
        reason += f" {left_out} pairs are longer than --max_tokens." if left_out else ""
        raise UserError(f"there is no pair of answers in {', '.join(args.files)}.{reason}")
    if val_from is None and n > 1 and not all(count["learned"] for count in counts.values()):
        n_val = min(n - 1, max(1, round(n * args.val_fraction)))
        print(
            f"note: splitting {n} pairs by hash left one split empty; the last {n_val} are used as val", file=sys.stderr
        )
        return write_pairs(args, encodings, folder, tokenizer, source, n - n_val)
    for note in faults.notes("--encoding NAME"):
        print(printable(note), file=sys.stderr)
    if skipped.count:
        print(printable(f"warning: skipped {skipped.count:,} bad records; the first: {skipped.first}"), file=sys.stderr)
    if left_out:
        print(f"note: {left_out:,} pairs with more than {args.max_tokens:,} tokens are left out", file=sys.stderr)
    if n == 1:
        raise UserError("one pair cannot be split into training and validation. Add more pairs.")
    if not writers["val"][0].tokens:
        raise UserError(
            f"val_tokens={args.val_tokens} leaves none of {n} pairs for val. Use a larger one, or leave it out."
        )
    told = {"pairs": n, "left_out": left_out, "max_tokens": args.max_tokens, "skipped": skipped.count}
    figures = {"documents": 2 * n, "preferences": told, "longest": longest}
    return entries(args, tokenizer, source, figures, counts, writers)
