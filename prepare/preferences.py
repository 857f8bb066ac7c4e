"""pairs of answers: .jsonl, .json, .parquet or .csv with {"prompt" or "messages", "chosen", "rejected"} records

For `objective = "dpo"` of train.py. The chat template of the checkpoint renders both conversations, and only the
answers are learned. The two conversations of a pair are stored one after the other, and training keeps them in one row:
a pair that is longer than block_size is left out. A hash of the prompt decides whether a pair is for validation.
"""

import argparse
import contextlib
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from acorn import UserError, files, printable, settings
from acorn.data import chat
from acorn.data.records import Conversation, read_pair
from acorn.data.shards import IndexWriter, MaskWriter, ShardWriter
from acorn.data.tokenizer import Tokenizer, get_tokenizer, tokenizer_hash
from prepare import encoding, reading, text
from prepare.chat import Skipped, encodings_of, skip_or_fail, split_of, template_of, write_dataset

TOKENIZER = "gpt2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument(
        "--max_tokens",
        type=int,
        metavar="N",
        help="leave out pairs whose two conversations have more than N tokens together; default: no limit",
    )


default_name = text.default_name


def prepare(args: argparse.Namespace, out: Path, *, name: str, tokenizer: str | Tokenizer, source: dict) -> dict:
    """Write the dataset `out` and return its meta.json. An existing dataset is replaced when the new one is complete.

    Raises UserError for invalid options, files or records."""
    settings.check_bounds(vars(args))
    if args.val_by == "end":
        raise UserError("pairs are split by the hash of their prompt. Remove --val_by end.")
    for path in args.files:
        if not os.path.isfile(path):
            raise UserError(f"there is no file {path}. Paths are relative to the working directory {os.getcwd()}.")
    encodings = encodings_of(args)
    if isinstance(tokenizer, str):
        texts = (
            str(message.get("content", ""))
            for _, pair in pairs(args, encodings, skip_or_fail(args))
            for messages in pair
            for message in messages
        )
        tokenizer = get_tokenizer(tokenizer, texts)
    tokenizer.chat_template = template_of(args.template) if args.template else chat.choose_template(tokenizer)
    chat.check_learnable(tokenizer)
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
    n, left_out, longest, skipped = 0, 0, 0, Skipped()
    bad, sizes = skip_or_fail(args, skipped), tokenizer.token_bytes()
    with contextlib.ExitStack() as stack:
        writers = {}
        for split in counts:
            own = [ShardWriter(folder, split, tokenizer.n_vocab, args.shard_tokens)]
            own += [MaskWriter(folder, split, args.shard_tokens), IndexWriter(folder, split)]
            writers[split] = [stack.enter_context(each) for each in own]
        for where, pair in tqdm(pairs(args, encodings, bad), desc="encoding", unit=" pairs", disable=None):
            try:
                rendered = [render(tokenizer, messages) for messages in pair]
                if np.array_equal(rendered[0][0], rendered[1][0]):
                    raise UserError("the chat template renders both answers alike. Remove this pair.")
            except UserError as error:
                bad(UserError(f"{where}: {error}"))
                continue
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
    if skipped.count:
        print(printable(f"warning: skipped {skipped.count:,} bad records; the first: {skipped.first}"), file=sys.stderr)
    if left_out:
        print(f"note: {left_out:,} pairs with more than {args.max_tokens:,} tokens are left out", file=sys.stderr)
    if n == 1:
        raise UserError("one pair cannot be split into training and validation. Add more pairs.")
    hashes = [files.sha256(path) for path in args.files]
    sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    return {
        "tokenizer": tokenizer.to_dict(),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "vocab_size": tokenizer.n_vocab,
        "documents": 2 * n,
        "preferences": {"pairs": n, "left_out": left_out, "max_tokens": args.max_tokens, "skipped": skipped.count},
        "longest": longest,
        "val_by": "document",
        "source": source | {"sha256": sha256},
    } | {
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
