"""Time to reach a loss: whole processes of acorn and nanoGPT, both evaluated on the whole val split.

$ python prepare tinyshakespeare --name shakespeare_char
$ python benchmarks/time_to_loss.py --nanogpt PATH_OF_A_CHECKOUT --seeds 3

nanoGPT does the CPU run of its README. The target is the final loss of that run, measured here over the whole val split
in windows of 64 tokens. acorn then runs config/quickstart.py on the same text, once per seed. Import, compilation,
evaluation and saving all count. Without --nanogpt, the target is --target.

On another text, or for the losses after an equal time: --dataset PATH_OF_A_CHECKOUT/data/NAME max_iters=3000.
"""

import argparse
import json
import shutil
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

README_RUN = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
).split()


def whole_val_loss(out_dir: Path, dataset: str, block_size: int) -> float:
    """Return the loss of the last checkpoint in `out_dir` over the whole val split, in float32."""
    model, _, _ = checkpoint.load_model(str(out_dir), "latest")
    r = runtime.setup("cpu", "float32", False)
    return evaluate(model, load_dataset(dataset).val, r, 64, block_size)["loss"]


def curve(lines: list[tuple[float, str]]) -> list[tuple[float, float]]:
    """Return (second, val loss) of each evaluation that a run printed. Both projects use the same format."""
    return [
        (second, float(line.split("val loss ")[1].split()[0].strip(",")))
        for second, line in lines
        if line.startswith("step ") and "val loss" in line
    ]


def row_of(name: str, seconds: float | None, loss: float | None, limit: float) -> dict:
    """Return a row of the table. `seconds` and `loss` are None if the run was stopped at `limit`."""
    figures = {"seconds": f"{seconds:.1f}", "val loss": f"{loss:.4f}"} if seconds else {"seconds": f"over {limit:g}"}
    return {"run": name, "seconds": "", "val loss": "", "reached": "", "of nanoGPT's time": ""} | figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", help="folder of a nanoGPT checkout with prepared data")
    parser.add_argument("--target", type=float, default=0.0, help="loss to reach if there is no --nanogpt")
    parser.add_argument("--config", default="config/quickstart.py")
    parser.add_argument("--dataset", default="shakespeare_char")
    parser.add_argument("--block_size", type=int, default=64, help="window size for evaluating the val split")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--first_seed", type=int, default=1)
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds after which a run is stopped")
    parser.add_argument("--picture", default="", help="plot loss over time into this PNG file")
    parser.add_argument("--json", default="", help="also write the result to this file")
    parser.add_argument("settings", nargs="*", help="more settings for acorn's run, such as max_iters=500")
    args = bench.parse_args(parser)

    dataset = str(load_dataset(args.dataset).path.resolve())
    print(bench.machine(torch.device("cpu")))
    rows, curves, runs = [], {}, []
    target, peer_seconds = args.target, None
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            if args.nanogpt and seed == args.first_seed:  # here, so that both see the same machine
                out = Path(scratch) / "nanogpt"
                words = [*README_RUN, f"--dataset={Path(dataset).name}", f"--out_dir={out}"]
                command = [sys.executable, "train.py", *words]
                peer_seconds, lines = timed(command, Path(args.nanogpt), args.limit)
                curves["nanoGPT"] = curve(lines)
                target = whole_val_loss(out, dataset, args.block_size) if peer_seconds else args.target
                rows.append(row_of("nanoGPT", peer_seconds, target, args.limit))
                bench.print_row(rows)
            out = Path(scratch) / "acorn"
            words = [args.config, f"--dataset={dataset}", f"--out_dir={out}", f"--seed={seed}", "--device=cpu"]
            words += [f"--{setting}" for setting in args.settings]
            seconds, lines = timed([sys.executable, REPO / "train.py", *words], limit=args.limit)
            loss = whole_val_loss(out, dataset, args.block_size) if seconds else None
            curves[f"acorn, seed {seed}"] = curve(lines)
            rows.append(row_of(f"acorn, seed {seed}", seconds, loss, args.limit))
            if seconds and target:
                rows[-1]["reached"] = "yes" if loss <= target else "no"
            if seconds and peer_seconds:
                rows[-1]["of nanoGPT's time"] = f"1/{peer_seconds / seconds:.1f}"
            bench.print_row(rows)
            runs.append({"seed": seed, "seconds": seconds, "loss": loss})
            shutil.rmtree(out, ignore_errors=True)  # a run that was stopped early has none
    if args.picture:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker=".", label=name)
        if target:
            axes.axhline(target, color="0.6", ls="--", lw=1)
        axes.set(xlabel="seconds since the process started", ylabel="val loss, as printed by the run")
        axes.legend()
        figure.savefig(args.picture, dpi=120)
    result = {"machine": bench.machine(torch.device("cpu")), "target": target, "nanogpt_seconds": peer_seconds}
    bench.write(args.json, **result, runs=json.loads(json.dumps(runs)))


if __name__ == "__main__":
    main()
