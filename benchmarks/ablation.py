"""What each ingredient of a recipe gains in a fixed training time, on two corpora.

$ python benchmarks/ablation.py --minutes 5 --seeds 3 --picture ablation.png
$ python benchmarks/ablation.py --minutes 1 --only "without QK-norm" --also "two layers: n_layer=2"

A variant is BASE with other settings. Variants first take turns at a few updates each, and the best rate of each says
how many updates fit into the budget: a slower variant gets fewer, and no other program can disturb a result. Variants
that cost the same per update, such as those with other rates, get as many as the recipe. Then each is trained on
Shakespeare's plays (characters) and on Python's standard library (BPE), once per seed. Variants with the same seed see
the same data, so their losses are compared in pairs; p is that of a two-sided paired t-test.

Losses are nats per token over 1,024 windows. Validation is for choosing. The test part, whole documents that are in no
other part, is for reporting. Results are appended to --results, and a second call continues there: with more --seeds it
adds pairs. Two calls with --threads 1 and different --first_seed can share two cores.
"""

import argparse
import hashlib
import importlib
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import bench
import torch
from bench import REPO, timed

from acorn import checkpoint
from acorn.data.shards import load_dataset
from acorn.distributed import runtime
from acorn.evaluation.loss import evaluate

BASE = (
    "config/quickstart.py n_layer=4 block_size=128 batch_size=8 warmup_iters=20 cooldown_frac=0.7 device=cpu "
    "dtype=float32 compile=False eval_iters=1 eval_interval=1000000000"
)
CORPORA = {"plays": ("shakespeare", "char"), "stdlib": ("stdlib", "bpe:2048")}  # dataset -> corpus, tokenizer
TEST_SHARE = 0.06  # of the text
WINDOWS = 1024
VARIANTS = {
    "the recipe": "",
    "q, k and v orthogonalized as one matrix": "muon_split=False",
    "usual momentum (muon_momentum 0.95, beta1 0.9)": "muon_momentum=0.95 beta1=0.9",
    "embedding_std 0.02": "embedding_std=0.02",
    "AdamW (learning rate 5e-3, beta1 0.9) instead of Muon": "optimizer=adamw learning_rate=5e-3 beta1=0.9",
    "embedding_skip": "embedding_skip=True",
    "SwiGLU instead of squared ReLU": "mlp=swiglu",
    "other rates (muon_lr 0.014, learning_rate 0.03)": "muon_lr=0.014 learning_rate=0.03",
    "without n-gram embeddings": "ngram=1",
    "learned positions": "pos=learned",
    "GELU instead of squared ReLU": "mlp=gelu_tanh",
    "without QK-norm": "qk_norm=False",
    "RMSNorm instead of LayerNorm": "norm=rmsnorm",
    "tied head": "tie_weights=True",
    "GPT-2's initialization": "zero_init=False",
    "cosine instead of wsd schedule": "lr_schedule=cosine",
    "no gradient clipping": "grad_clip=0",
    "weight decay 0.05": "weight_decay=0.05",
    "GPT-2's architecture, AdamW 1e-3, cosine": (
        "ngram=1 optimizer=adamw learning_rate=1e-3 pos=learned mlp=gelu_tanh qk_norm=False tie_weights=True "
        "zero_init=False lr_schedule=cosine n_head=4 weight_decay=0.1 beta1=0.9 embedding_std=0.02"
    ),
}
RECIPE = next(iter(VARIANTS))
SAME_COST = set(  # settings that do not change the time of an update
    "muon_lr muon_momentum learning_rate beta1 beta2 embedding_std zero_init weight_decay lr_schedule".split()
)


def split_corpus(dataset: str, data: Path) -> None:
    """Prepare `dataset` (train and val) and `dataset`_test in the folder `data`, unless they are there.

    Documents are in the order of a hash of their text. The first ones that contain no character that is only in one of
    them are the test part, and the last ones are val.
    """
    if (data / f"{dataset}_test/meta.json").exists():
        return
    name, tokenizer = CORPORA[dataset]
    texts = importlib.import_module(f"prepare.{name}").documents(argparse.Namespace(file=None))
    texts.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
    n_with = {}  # character -> number of documents that contain it
    for character in (character for text in texts for character in set(text)):
        n_with[character] = n_with.get(character, 0) + 1
    size, total, parts = 0, sum(map(len, texts)), {dataset: [], f"{dataset}_test": []}
    for text in texts:
        tests = size < TEST_SHARE * total and all(n_with[character] > 2 for character in set(text))
        size += len(text) * tests
        parts[f"{dataset}_test" if tests else dataset].append(text)
    for part, documents in parts.items():
        file = data / f"{part}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        words = ["--tokenizer", tokenizer if part == dataset else data / dataset, "--val_by=end", "--overwrite"]
        words += [f"--val_fraction={0.06 if part == dataset else 0.99}", "--out", data / part]
        timed([sys.executable, REPO / "prepare", "text", file, *words])


def command(words: str, dataset: Path, out: Path, *more: str) -> list:
    """Return the command that trains a variant."""
    config, *settings = BASE.split()
    words = [*settings, *words.split(), f"dataset={dataset}", f"out_dir={out}", "overwrite=True", *more]
    return [sys.executable, REPO / "train.py", REPO / config, *(f"--{word}" for word in words)]


def tokens_per_second(words: str, dataset: Path, out: Path, env: dict) -> float:
    """Return the best rate of a short run: of the fastest 5 of 20 updates, after 5 for warm-up."""
    timed(command(words, dataset, out, "max_iters=25", "log_interval=5"), env=env)
    rates = [line.get("tokens_per_second", 0) for line in map(json.loads, (out / "metrics.jsonl").open())]
    return max(rates[1:])


def is_as_fast(words: str) -> bool:
    """Return whether a variant with these settings takes as long per update as the recipe."""
    return all(word.split("=")[0] in SAME_COST for word in words.split())


def updates_in(seconds: float, tokens_per_second: float, words: str) -> int:
    """Return the number of updates of a variant that fit into the budget."""
    settings = dict(word.split("=") for word in (BASE + " " + words).split() if "=" in word)
    tokens = int(settings["batch_size"]) * int(settings["block_size"])
    return int(seconds * tokens_per_second / tokens)


def losses_of(out: Path, dataset: Path) -> dict[str, float]:
    """Return the loss of a run's last checkpoint on the val and on the test part."""
    model, _, _ = checkpoint.load_model(str(out), "latest")
    r, size = runtime.setup("cpu", "float32", False), model.config.block_size
    parts = {"val": load_dataset(str(dataset)).val, "test": load_dataset(f"{dataset}_test").val}
    return {name: evaluate(model, part, r, 64, size, WINDOWS)["loss"] for name, part in parts.items()}


def compared(results: list[dict], dataset: str, variant: str, part: str) -> dict:
    """Return the mean of a variant's losses, and of the differences from the recipe's with their standard error and p.

    Only seeds that both have count. The error and p are None for fewer than two.
    """
    import scipy.stats

    losses = {
        name: {row["seed"]: row[part] for row in results if (row["variant"], row["dataset"]) == (name, dataset)}
        for name in (RECIPE, variant)
    }
    seeds = sorted(set(losses[RECIPE]) & set(losses[variant]))
    differences = [losses[variant][seed] - losses[RECIPE][seed] for seed in seeds]
    row = {"n": len(seeds), "loss": None, "difference": None, "error": None, "p": None}
    if seeds:
        row["loss"] = statistics.mean(losses[variant][seed] for seed in seeds)
        row["difference"] = statistics.mean(differences)
    if len(seeds) > 1 and variant != RECIPE:
        row["error"] = statistics.stdev(differences) / len(seeds) ** 0.5
        row["p"] = float(scipy.stats.ttest_1samp(differences, 0).pvalue)
    return row


def show(results: list[dict], variants: dict[str, str], part: str) -> None:
    """Print the table of a part. A finding counts if p < 0.01 on both corpora, with the same sign."""
    rows = []
    for variant in variants:
        row, found = {"variant": variant}, []
        for dataset in CORPORA:
            figures = compared(results, dataset, variant, part)
            if figures["loss"] is None:
                row |= {dataset: "", f"{dataset}: worse by": "", f"{dataset}: p": ""}
                continue
            error = "" if figures["error"] is None else f" ± {figures['error']:.4f}"
            row[dataset] = f"{figures['loss']:.4f}"
            row[f"{dataset}: worse by"] = "" if variant == RECIPE else f"{figures['difference']:+.4f}{error}"
            row[f"{dataset}: p"] = "" if figures["p"] is None else f"{figures['p']:.2g}"
            found.append(figures)
        certain = len(found) == len(CORPORA) and all(x["p"] is not None and x["p"] < 0.01 for x in found)
        signs = {x["difference"] > 0 for x in found}
        row["seeds"] = "/".join(str(x["n"]) for x in found)
        row["finding"] = {True: "worse", False: "better"}[signs.pop()] if certain and len(signs) == 1 else ""
        rows.append(row)
    print(f"\n{part}: nats per token, mean over seeds ± standard error of the paired difference\n{bench.table(rows)}")


def draw(results: list[dict], variants: dict[str, str], path: str) -> None:
    """Plot the differences on the test part, with 95% confidence intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import scipy.stats
    from matplotlib import pyplot as plt

    names = [name for name in variants if name != RECIPE]
    figure, axes = plt.subplots(figsize=(8, 0.35 * len(names) + 1.2), layout="constrained")
    for shift, dataset in zip((-0.12, 0.12), CORPORA, strict=True):
        found = [(i, compared(results, dataset, name, "test")) for i, name in enumerate(names)]
        found = [(i, x) for i, x in found if x["error"] is not None]
        widths = [x["error"] * scipy.stats.t.ppf(0.975, x["n"] - 1) for _, x in found]
        places = [i + shift for i, _ in found]
        axes.errorbar([x["difference"] for _, x in found], places, xerr=widths, fmt="o", ms=4, lw=1, label=dataset)
    axes.axvline(0, color="0.6", lw=1)
    axes.set_xscale("symlog", linthresh=0.02)
    axes.set(xlabel="loss on the test part minus the recipe's (nats per token)", yticks=range(len(names)))
    axes.set_yticklabels(names)
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="training time of each run")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--first_seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--only", default="", help="only the recipe, and variants whose name matches this regular expression"
    )
    parser.add_argument("--also", action="append", default=[], metavar="NAME: SETTINGS", help="another variant")
    parser.add_argument("--data", default="data/ablation", help="folder for the prepared corpora")
    parser.add_argument("--results", default="ablation.jsonl", help="file of results, continued if it exists")
    parser.add_argument("--picture", default="", help="plot the differences into this PNG file")
    args = bench.parse_args(parser)

    variants = {name: words for name, words in VARIANTS.items() if name == RECIPE or re.search(args.only, name)}
    variants |= dict(text.split(": ", 1) for text in args.also)
    file, data = Path(args.results), Path(args.data).resolve()
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    rows = [json.loads(line) for line in file.open()] if file.exists() else []
    if any(row["minutes"] != args.minutes for row in rows):
        parser.error(f"{file} has runs of {rows[0]['minutes']:g} minutes. Give the same --minutes, or other --results.")
    print(f"{bench.machine(torch.device('cpu'))}; runs with {args.threads} threads")

    def record(row: dict) -> None:
        rows.append(row | {"minutes": args.minutes})
        with file.open("a") as stream:
            stream.write(json.dumps(rows[-1]) + "\n")
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        for dataset in CORPORA:
            split_corpus(dataset, data)
            known = {row["variant"]: row["updates"] for row in rows if row["dataset"] == dataset and "updates" in row}
            rates = {name: 0.0 for name, words in variants.items() if name not in known and not is_as_fast(words)}
            if rates or RECIPE not in known:
                rates[RECIPE] = 0.0
            for _ in range(5):  # in turn, so that a change in the machine's speed affects all variants
                for name in rates:
                    rates[name] = max(rates[name], tokens_per_second(variants[name], data / dataset, out, env))
            seconds = 60 * args.minutes
            if rates and RECIPE in known:  # the machine may be faster or slower than in the call that timed the recipe
                seconds *= known[RECIPE] / updates_in(seconds, rates.pop(RECIPE), variants[RECIPE])
            for name, rate in rates.items():
                n = updates_in(seconds, rate, variants[name])
                record({"variant": name, "settings": variants[name], "dataset": dataset, "updates": n})
        updates = {(row["variant"], row["dataset"]): row["updates"] for row in rows if "updates" in row}
        for name, dataset in [(name, dataset) for name in variants for dataset in CORPORA]:
            if is_as_fast(variants[name]):
                updates[name, dataset] = updates[RECIPE, dataset]
        done = {(row["variant"], row["dataset"], row["seed"]) for row in rows if "seed" in row}
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for name, dataset in [(name, dataset) for name in variants for dataset in CORPORA]:
                if (name, dataset, seed) in done:
                    continue
                words = f"max_iters={updates[name, dataset]}", f"seed={seed}"
                timed(command(variants[name], data / dataset, out, *words), limit=1e6, env=env)
                record({"variant": name, "dataset": dataset, "seed": seed, **losses_of(out, data / dataset)})
                shutil.rmtree(out)
    results = [row for row in map(json.loads, file.open()) if "seed" in row]  # also those of another call
    for part in ("val", "test"):
        show(results, variants, part)
    if args.picture:
        draw(results, variants, args.picture)


if __name__ == "__main__":
    main()
