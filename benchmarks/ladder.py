"""The ladder of config/ladder.py: train small sizes, predict the loss of a larger one, then train it.

$ python prepare shakespeare
$ python benchmarks/ladder.py --depths 2,3,4,5 --next 6 --picture ladder.png

Each size of the fit is trained with two seeds, and the law is fitted to their mean losses, because losses of single
seeds differ by more than the error that the prediction should have. Finished runs in --folder are not repeated.
`--next 0` only predicts.
"""

import argparse
import statistics
import sys
from pathlib import Path

import bench
import torch
from bench import REPO, timed

from acorn import checkpoint, report, settings
from acorn.data.shards import load_dataset
from acorn.training import ladder
from train import TrainSettings


def train(depth: int, n_seeds: int, args: argparse.Namespace) -> dict:
    """Train a size, except for runs that are finished. Returns its row: FLOPs, and the mean loss and time of a run."""
    losses, seconds = [], 0.0
    for i in range(n_seeds):
        out = Path(args.folder) / (f"seed-{i + 1}" if i else "") / f"ladder-{depth}"
        words = [REPO / "config/ladder.py", f"--n_layer={depth}", f"--dataset={args.dataset}", f"--out_dir={out}"]
        words += [f"--seed={TrainSettings.seed + i}", *(f"--{word}" for word in args.settings)]
        if not checkpoint.holds_run(out):
            timed([sys.executable, REPO / "train.py", *words], limit=1e6)
        _, state = checkpoint.find(out)
        s = settings.build(TrainSettings, settings.checked(TrainSettings, state["settings"]))
        if state["step"] != s.max_iters:
            sys.exit(f"error: {out} holds an unfinished run. Resume or delete it.")
        print(f"{depth} layers, seed {s.seed}: loss {state['val_loss']:.4f}", flush=True)
        losses.append(state["val_loss"])
        seconds += state["seconds"] / n_seeds
    flops = ladder.training_flops(s, load_dataset(s.dataset).vocab_size)
    row = {"n_layer": depth, "updates": s.max_iters, "FLOPs": flops, "val loss": statistics.mean(losses)}
    return row | {"time": report.duration(seconds)}


def draw(rows: list[dict], law: ladder.ScalingLaw, used: int, path: str) -> None:
    """Plot losses over FLOPs, with the law; the rows from `used` on are not in the fit."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    flops = np.geomspace(rows[0]["FLOPs"], rows[-1]["FLOPs"], 100)
    label = f"{law.floor:.3f} + {law.scale:.3g} C$^{{-{law.exponent:.3f}}}$"
    axes.plot(flops, [law.loss(c) for c in flops], color="0.5", lw=1, label=label)
    for part, style, name in ((rows[:used], "o", "in the fit"), (rows[used:], "*", "not in the fit")):
        axes.plot([row["FLOPs"] for row in part], [row["val loss"] for row in part], style, label=name)
    for row in rows:
        axes.annotate(f"{row['n_layer']} layers", (row["FLOPs"], row["val loss"]), (6, 6), textcoords="offset points")
    axes.margins(x=0.15)  # room for the last annotation
    axes.set(xscale="log", xlabel="FLOPs of training", ylabel="validation loss (nats per character)")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", default="2,3,4,5", help="the sizes of the fit")
    parser.add_argument("--next", type=int, default=6, help="the size that is predicted, then trained; 0: none")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each size of the fit")
    parser.add_argument("--dataset", default="plays")
    parser.add_argument("--folder", default="out", help="where the runs are")
    parser.add_argument("--picture", default="", help="plot losses and fit into this PNG file")
    parser.add_argument("settings", nargs="*", help="more settings of all runs, such as dtype=float32")
    args = bench.parse_args(parser)

    print(bench.machine(torch.device("cpu")))
    rows = [train(int(depth), args.seeds, args) for depth in args.depths.split(",")]
    law = ladder.fit([row["FLOPs"] for row in rows], [row["val loss"] for row in rows])
    print(f"fit of {len(rows)} sizes: {law.floor:.4f} + {law.scale:.4g} * FLOPs^-{law.exponent:.4f}", flush=True)
    if args.next:
        words = [REPO / "config/ladder.py", f"--n_layer={args.next}", f"--dataset={args.dataset}"]
        s = settings.build(TrainSettings, settings.parse(TrainSettings, list(map(str, words))))
        predicted = law.loss(ladder.training_flops(s, load_dataset(args.dataset).vocab_size))
        print(f"predicted for {args.next} layers: {predicted:.4f}", flush=True)
        rows.append(train(args.next, 1, args))
    for row in rows:
        row["fit"] = f"{law.loss(row['FLOPs']):.4f}"
        row["error"] = f"{law.loss(row['FLOPs']) - row['val loss']:+.4f}"
    if args.picture:
        draw(rows, law, len(args.depths.split(",")), args.picture)
    shown = [row | {"FLOPs": f"{row['FLOPs']:.2e}", "val loss": f"{row['val loss']:.4f}"} for row in rows]
    print(bench.table(shown))


if __name__ == "__main__":
    main()
