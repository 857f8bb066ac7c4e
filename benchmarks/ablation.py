"""Ablation of config/quickstart.py: the same run with one ingredient changed, for several seeds.

$ python prepare tinyshakespeare --name shakespeare_char
$ python benchmarks/ablation.py --seeds 3

The loss is that of the whole val split in windows of 64 tokens. The seconds are training time, without imports.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import bench
import torch
from bench import REPO, timed
from time_to_loss import whole_val_loss

from acorn import checkpoint
from acorn.data.shards import load_dataset

VARIANTS = {
    "config/quickstart.py": [],
    "without n-gram embeddings": ["ngram=1"],
    "bigrams only": ["ngram=2"],
    "AdamW (learning rate 5e-3) instead of Muon": ["optimizer=adamw", "learning_rate=5e-3"],
    "learned positions": ["pos=learned"],
    "GELU instead of squared ReLU": ["mlp=gelu_tanh"],
    "without normalized queries and keys": ["qk_norm=False"],
    "RMSNorm instead of LayerNorm": ["norm=rmsnorm"],
    "tied head": ["tie_weights=True"],
    "GPT-2's initialization": ["zero_init=False"],
    "cosine instead of wsd schedule": ["lr_schedule=cosine"],
    "logit softcap 15": ["logit_softcap=15"],
    "no gradient clipping": ["grad_clip=0"],
    "weight decay 0.1": ["weight_decay=0.1"],
    "4 layers": ["n_layer=4"],
    "GPT-2's architecture, AdamW 1e-3, cosine": (
        "ngram=1 optimizer=adamw learning_rate=1e-3 pos=learned mlp=gelu_tanh qk_norm=False tie_weights=True "
        "zero_init=False lr_schedule=cosine n_layer=4 n_head=4 weight_decay=0.1"
    ).split(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="shakespeare_char")
    parser.add_argument("--config", default="config/quickstart.py")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="only the first variant, and those whose name contains this")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which a run is stopped")
    parser.add_argument("--json", default="", help="also write the result to this file")
    args = bench.parse_args(parser)

    dataset = str(load_dataset(args.dataset).path.resolve())
    print(bench.machine(torch.device("cpu")))
    first = next(iter(VARIANTS))
    variants = {name: words for name, words in VARIANTS.items() if name == first or args.only in name}
    losses, seconds = {name: [] for name in variants}, {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(1, args.seeds + 1):
            for name, words in variants.items():
                out = Path(scratch) / "out"
                command = [sys.executable, REPO / "train.py", args.config, f"--dataset={dataset}", f"--out_dir={out}"]
                command += [f"--seed={seed}", "--overwrite=True", "--device=cpu", "--eval_interval=1000000"]
                if timed([*command, *(f"--{word}" for word in words)], limit=args.limit)[0] is None:
                    print(f"seed {seed}, {name}: stopped at its limit of {args.limit:g} s", flush=True)
                    continue
                losses[name].append(whole_val_loss(out, dataset, 64))
                seconds[name].append(checkpoint.find(out)[1]["seconds"])
                print(f"seed {seed}, {name}: {losses[name][-1]:.4f} after {seconds[name][-1]:.1f} s", flush=True)
    rows, means = [], {name: statistics.mean(found) for name, found in losses.items() if found}
    for name, found in losses.items():
        row = {"variant": name, "val loss": " ".join(f"{loss:.3f}" for loss in found), "mean": "", "worse by": ""}
        if name in means:
            row["mean"] = f"{means[name]:.3f}"
            row["worse by"] = f"{means[name] - means[first]:+.3f}" if first in means else ""
        row["seconds"] = f"{bench.median(seconds[name]):.1f}" if seconds[name] else f"over {args.limit:g}"
        rows.append(row)
    print(f"\n{bench.table(rows)}")
    bench.write(args.json, machine=bench.machine(torch.device("cpu")), losses=losses, seconds=seconds)


if __name__ == "__main__":
    main()
