"""inspect a dataset: counts, document lengths with a histogram, samples token by token; --verify checks all hashes

It reads every kind of dataset that training reads: those of `python prepare`, nanoGPT, llm.c and modded-nanogpt.
"""

# not named inspect.py, because `python prepare` searches this folder first and would shadow Python's own `inspect`

import argparse
import importlib
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from acorn import UserError, files, printable, report, visible
from acorn.data.shards import KINDS, Dataset, Tokens, load_dataset
from acorn.data.tokenizer import Tokenizer
from prepare.pipeline import Reader

PIECE_TOKENS = 1 << 22  # tokens to read at once
N_SHOWN = 3  # number of longest and shortest documents to show
SAMPLE_TOKENS = 48


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="DATASET", help="its folder, or its name in data/")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="also verify the hashes of every shard, and of the source text if it still exists",
    )
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="samples to show; default: 3")
    parser.add_argument(
        "--picture", metavar="PNG", help="the file for the histogram of lengths; default: DATASET/lengths.png"
    )


def inspect(args: argparse.Namespace) -> None:
    """Print the content of a dataset. Raises UserError if it is damaged: if `load_dataset` rejects it, for an id
    outside the vocabulary, and with --verify for a file whose hash differs from meta.json."""
    dataset = load_dataset(args.dataset)
    tokenizer = dataset.tokenizer
    splits = {name: tokens for name, tokens in (("train", dataset.train), ("val", dataset.val)) if tokens}
    with tqdm(
        total=sum(map(len, splits.values())), desc="reading", unit=" tokens", unit_scale=True, disable=None
    ) as progress:
        found = {name: survey(tokens, tokenizer, progress, dataset.document_mark) for name, tokens in splits.items()}

    print(printable(f"{'dataset':<18}{dataset.path}, {_origin(dataset)}"))
    print(f"{'tokenizer':<18}{tokenizer.kind}, vocabulary of {tokenizer.n_vocab:,}\n")
    rows = {
        "": list(found),
        "tokens": [f"{len(tokens):,}" for tokens in splits.values()],
        "bytes of text": [f"{each.bytes:,}" for each in found.values()],
        "bytes per token": [f"{each.bytes / max(len(splits[name]), 1):.3f}" for name, each in found.items()],
        "shards": [f"{len(tokens.shards):,}" for tokens in splits.values()],
    }
    if any(tokens.mask for tokens in splits.values()):
        rows["masked"] = [f"{1 - each.learned / max(len(splits[name]), 1):.1%}" for name, each in found.items()]
    is_old_chat = any(tokens.mask and tokens.conversations is None for tokens in splits.values())
    has_documents = not is_old_chat and (dataset.document_mark is not None or dataset.train.conversations is not None)
    if has_documents:
        rows["documents"] = [f"{each.lengths.total():,}" for each in found.values()]
        for name, share in (("shortest", 0), ("25% up to", 0.25), ("50% up to", 0.5), ("longest", 1)):
            rows[name] = [f"{each.length_at(share):,} tokens" for each in found.values()]
    for name, values in rows.items():
        print(f"{name:<18}" + "".join(f"{value:>20}" for value in values))

    if is_old_chat:
        print("\nAn older version prepared these conversations without marking where each begins. Prepare them again.")
    elif not has_documents:
        print(f"\nThe {tokenizer.kind} tokenizer has no end-of-text token, so document boundaries are unknown.")
    else:
        for title in ("longest", "shortest"):
            print(f"\nthe {title} documents")
            for name, each in found.items():
                for length, start in getattr(each, title):
                    begins = splits[name].read([start], min(length, SAMPLE_TOKENS))[0]
                    print(f"{length:>12,} tokens, {name:<6}{tokenizer.decode(begins)[:70]!r}")
        picture = Path(args.picture) if args.picture else dataset.path / "lengths.png"
        try:
            draw_lengths({name: each.lengths for name, each in found.items()}, str(dataset.path), picture)
            print(printable(f"\nthe histogram of document lengths is in {picture}"))
        except OSError as error:  # the dataset may be read-only
            if args.picture:
                raise UserError(
                    f"cannot write {picture}: {error.strerror or error}. Choose another --picture."
                ) from error
            print(printable(f"\nno histogram: {picture} cannot be written ({error.strerror}). Use --picture FILE.png."))

    draw = np.random.default_rng(0)
    for name, tokens in splits.items():
        for _ in range(args.samples if len(tokens) else 0):
            start = int(draw.integers(max(len(tokens) - SAMPLE_TOKENS, 0) + 1))
            print(f"\na sample of {name} from token {start:,} on, with bars between tokens")
            print(with_bars(tokenizer, tokens.read([start], min(SAMPLE_TOKENS, len(tokens)))[0]))
    if args.verify:
        print()
        verify(dataset)


@dataclass
class Survey:
    """The result of one pass over a split. Document lengths are in tokens, without the end-of-text token."""

    bytes: int = 0  # of text
    learned: int = 0  # tokens that the mask marks as learned
    lengths: Counter = field(default_factory=Counter)  # length -> number of documents: at most sqrt(2 n) keys
    longest: list[tuple[int, int]] = field(default_factory=list)  # (length, first token)
    shortest: list[tuple[int, int]] = field(default_factory=list)

    def add_documents(self, starts: np.ndarray, lengths: np.ndarray) -> None:
        values, counts = np.unique(lengths, return_counts=True)
        self.lengths.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        order = np.argsort(lengths, kind="stable")
        by_length = list(zip(lengths[order].tolist(), starts[order].tolist(), strict=True))
        self.shortest = sorted(self.shortest + by_length[:N_SHOWN])[:N_SHOWN]
        self.longest = sorted(self.longest + by_length[-N_SHOWN:], reverse=True)[:N_SHOWN]

    def length_at(self, share: float) -> int:
        """Return the length that this fraction of the documents does not exceed; 0 if there are no documents."""
        lengths = sorted(self.lengths)
        counts = np.cumsum([self.lengths[length] for length in lengths])
        return lengths[int(np.searchsorted(counts, share * counts[-1]))] if lengths else 0


def survey(tokens: Tokens, tokenizer: Tokenizer, progress: tqdm, mark: int | None) -> Survey:
    """Read the split once, piece by piece, in bounded memory. `mark` is the token between documents."""
    found, token_bytes = Survey(), tokenizer.token_bytes()
    begin = 0  # where the current document begins
    for start in range(0, len(tokens), PIECE_TOKENS):
        ids = tokens.read([start], min(PIECE_TOKENS, len(tokens) - start))[0]
        found.bytes += int(token_bytes[ids].sum(dtype=np.int64))
        if tokens.mask:
            found.learned += int(tokens.mask.read([start], len(ids)).sum())
        progress.update(len(ids))
        if tokens.mask:  # conversations, whose turns may end with the same token
            continue
        ends = start + np.flatnonzero(ids == mark) if mark is not None else ids[:0]
        if len(ends):
            starts = np.concatenate(([begin], ends[:-1] + 1))
            whole = ends > 0  # an end-of-text token at the very start does not end a document
            found.add_documents(starts[whole], (ends - starts)[whole])
            begin = int(ends[-1]) + 1
    if tokens.conversations is not None:
        found.add_documents(*tokens.conversations.spans())
    elif begin < len(tokens) and not tokens.mask:
        found.add_documents(np.array([begin]), np.array([len(tokens) - begin]))
    return found


def with_bars(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """Return the text of the ids with a bar between tokens. Unprintable and partial characters are escaped."""
    texts = [tokenizer.decode_bytes([token]).decode("utf-8", "backslashreplace") for token in ids.tolist()]
    return "│".join(map(visible, texts))


def draw_lengths(lengths: dict[str, Counter], title: str, picture: Path) -> None:
    """Draw a histogram of the document lengths of each split into the PNG file `picture`."""
    longest = max((max(counted, default=1) for counted in lengths.values()), default=1)
    edges = np.unique(np.geomspace(1, longest + 1, 60).round())
    plt = report.import_pyplot()
    (title,), fonts, note = report.drawable([visible(title)])
    with plt.rc_context({"font.family": fonts}):
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        for name, counted in lengths.items():
            positions = [max(length, 1) for length in counted]  # a logarithmic axis has no 0
            label = f"{name}, {counted.total():,} documents"
            axes.hist(positions, edges, weights=list(counted.values()), alpha=0.6, label=label)
        axes.set(xscale="log", yscale="log", xlabel="tokens in a document", ylabel="documents")
        axes.set_title("" if note else title, parse_math=False)
        axes.legend()
        report.save_picture(figure, picture, "png")


def verify(dataset: Dataset) -> None:
    """Compare the hashes of every shard, and of the source text if it still exists, with meta.json. Prints what was
    checked; raises UserError for a difference. The caller has already read all ids, which checks the vocabulary."""
    print(f"every token id is in the vocabulary of {dataset.vocab_size:,}")
    if not dataset.meta:
        print(f"{dataset.path} has no meta.json, so there are no hashes to verify")
        return
    splits = (dataset.meta["train"], dataset.meta["val"])
    listed = [entry for split in splits for entry in [*(file for key in KINDS for file in split.get(key, []))]]
    changed = [entry["file"] for entry in listed if files.sha256(dataset.path / entry["file"]) != entry["sha256"]]
    if changed:
        raise UserError(
            f"{dataset.path} is damaged: the hash of {', '.join(changed)} does not match meta.json. Prepare it again "
            "with --overwrite."
        )
    print(f"the hashes of {len(listed):,} shards match")

    source = _source(dataset)
    arguments = source.get("arguments")
    paths = arguments.get("files", []) if isinstance(arguments, dict) else None
    is_readable = isinstance(paths, list) and "-" not in paths and source.get("corpus") not in ("chat", "preferences")
    if arguments is None or paths is None or not is_readable or "streaming" in arguments:
        print("the source text was not checked: this is possible only for files that are read as documents")
        return
    try:
        if pipes := [
            path for path in paths if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))
        ]:
            raise UserError(f"{pipes[0]} is neither a file nor a folder")
        corpus = importlib.import_module(f"prepare.{source['corpus']}")
        reader = Reader(corpus.documents(argparse.Namespace(**arguments)), None, 0.5)
        for _ in tqdm(reader, desc="reading the source", unit=" pieces", disable=None):
            pass
    except (UserError, OSError, ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
        print(printable(f"the source text was not checked: it can no longer be read ({error})"))
        return
    if reader.place.sha256 != source.get("sha256"):
        raise UserError(
            f"the source text of {dataset.path} has changed since. Prepare the dataset again with --overwrite to use "
            "the new text."
        )
    print("the source text is unchanged")


def _source(dataset: Dataset) -> dict:
    source = dataset.meta.get("source")
    return source if isinstance(source, dict) else {}


def _origin(dataset: Dataset) -> str:
    if dataset.meta:
        return f"made by `python prepare {_source(dataset).get('corpus', '')}`"
    return "in the layout of llm.c" if dataset.train.shards[0].offset else "in the layout of nanoGPT"
