"""Train GPT-2's size on a GPU for an equal time: config/gpt2_speedrun.py, and nanoGPT with its own settings.

$ python prepare text FILES --name mine
$ python benchmarks/gpt2.py --nanogpt PATH_OF_A_CHECKOUT --dataset mine --seconds 480 --picture gpt2.png

Each contender first runs a few updates, whose speed says how many updates fit into the time. Its schedule then ends
there. Start, compilation, evaluation and saving are not part of the time. Also measured: the speed of acorn with
nanoGPT's architecture and optimizer (config/train_gpt2.py). Losses are in nats per token, of --eval_iters batches of
val. MFU counts the operations of GPT-2's matrices and attention, and 989 TFLOP/s as the peak of an H100.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import bench
import numpy as np
import torch
from bench import REPO, timed

from acorn.data.shards import load_dataset
from acorn.distributed import runtime
from model import GPT, GPTConfig

SPEEDRUN = "config/gpt2_speedrun.py"
BASELINE = "config/train_gpt2.py"
PROBE = 40  # updates that measure the speed


def nanogpt_folder(checkout: Path, dataset, scratch: Path) -> Path:
    """Return a folder from which nanoGPT's train.py runs with `dataset`, in its own format: uint16 without a header."""
    folder = scratch / "nanogpt"
    (folder / "data/x").mkdir(parents=True)
    for name in ("train.py", "model.py", "configurator.py", "config"):
        (folder / name).symlink_to((checkout / name).resolve())
    for split, stream in (("train", dataset.train), ("val", dataset.val)):
        with (folder / f"data/x/{split}.bin").open("wb") as file:
            for start in range(0, len(stream), 1 << 24):
                tokens = stream.read([start], min(1 << 24, len(stream) - start))
                file.write(tokens.astype(np.uint16).tobytes())
    return folder


def updates_per_second(seconds: list[float], steps: list[int]) -> float:
    """Return the speed between the lines of the second half of a run."""
    middle = len(steps) // 2
    return (steps[-1] - steps[middle]) / (seconds[-1] - seconds[middle])


class Run:
    """What a training run printed: updates, their seconds, and their losses. `val` is None if it was stopped."""

    def __init__(
        self, name: str, n: int, steps: list[int], seconds: list[float], losses: list[float], val: float | None
    ):
        self.name, self.n, self.steps, self.losses, self.val = name, n, steps, losses, val
        self.seconds = [each - seconds[0] for each in seconds]
        self.rate = updates_per_second(seconds, steps)


def run_nanogpt(name: str, n: int, folder: Path, words: list[str], limit: float) -> Run:
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    words = ["config/train_gpt2.py", "--wandb_log=False", "--dataset=x", f"--out_dir={folder}/out", *words]
    _, lines = timed([sys.executable, "train.py", *words], folder, limit, env)
    steps, seconds, losses, evaluations = [], [], [], []
    for second, line in lines:
        if match := re.match(r"iter (\d+): loss ([\d.]+)", line):
            steps.append(int(match[1]))
            seconds.append(second)
            losses.append(float(match[2]))
        elif "val loss" in line:
            evaluations.append(float(line.split("val loss ")[1]))
    val = evaluations[-1] if len(evaluations) > 1 else None
    # without the lines beside evaluations
    kept = [i for i, step in enumerate(steps) if 0 < step < n]
    return Run(name, n, *([values[i] for i in kept] for values in (steps, seconds, losses)), val)


def run_acorn(name: str, n: int, config: str, dataset: Path, out: Path, words: list[str], limit: float) -> Run:
    words = [config, f"--dataset={dataset}", f"--out_dir={out}", "--overwrite=True", "--wandb_log=False", *words]
    timed([sys.executable, REPO / "train.py", *words], limit=limit)
    figures = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    updates = [each for each in figures if "loss" in each][1:]
    evaluations = [each["val_loss"] for each in figures if "val_loss" in each]
    val = evaluations[-1] if len(evaluations) > 1 else None
    return Run(name, n, *([each[key] for each in updates] for key in ("step", "seconds", "loss")), val)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", required=True, help="folder of a nanoGPT checkout")
    parser.add_argument("--dataset", default="openwebtext", help="dataset with GPT-2's tokens")
    parser.add_argument("--seconds", type=float, default=480.0, help="training time of each contender")
    parser.add_argument("--batch_size", type=int, default=32, help="sequences per micro-batch")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=2, help="micro-batches per update")
    parser.add_argument("--eval_iters", type=int, default=32)
    parser.add_argument("--device", default="cuda", help="cpu: test this script with toy sizes")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds per run")
    parser.add_argument("--picture", default="", help="plot loss over time into this PNG file")
    parser.add_argument("--json", default="", help="also write the result to this file")
    parser.add_argument("settings", nargs="*", help="more settings for acorn's speedrun, such as muon_momentum=0.9")
    args = bench.parse_args(parser)

    toy = args.device == "cpu"
    layers, width, block = (2, 96, 64) if toy else (12, 768, 1024)
    shape = [f"--n_layer={layers}", f"--n_embd={width}", f"--block_size={block}", f"--device={args.device}"]
    batch = [f"--{name}={getattr(args, name)}" for name in ("batch_size", "gradient_accumulation_steps", "eval_iters")]
    common = [*shape, *batch, f"--compile={not toy}", "--log_interval=5"]
    tokens = args.batch_size * args.gradient_accumulation_steps * block
    dataset = load_dataset(args.dataset)
    device = runtime.setup(args.device, "auto", False)
    print(bench.machine(device.device))
    with torch.device("meta"):
        flops = GPT(GPTConfig(block, 50304, layers, 12, width, bias=False)).flops_per_token()
    rows, curves = [], []

    def record(run: Run, training: bool) -> None:
        row = {"contender": run.name, "tokens/s": f"{run.rate * tokens:,.0f}"}
        peak = device.peak_flops()
        row["MFU"] = f"{run.rate * tokens * flops / peak:.1%}" if peak else "n/a"
        row |= {"updates": "", "seconds": "", "val loss": ""}
        if training:
            row |= {"updates": run.n, "seconds": f"{run.n / run.rate:.0f}"}
            row["val loss"] = f"stopped at {args.limit:g} s" if run.val is None else f"{run.val:.4f}"
            curves.append(run)
        rows.append(row)
        bench.print_row(rows)
        runs = [{key: getattr(each, key) for key in ("name", "steps", "seconds", "losses", "val")} for each in curves]
        bench.write(args.json, machine=bench.machine(device.device), rows=rows, runs=runs)

    with tempfile.TemporaryDirectory() as scratch:
        folder, out = nanogpt_folder(Path(args.nanogpt), dataset, Path(scratch)), Path(scratch) / "acorn"

        def schedule(n: int) -> list[str]:
            horizon = [f"--{name}={n}" for name in ("max_iters", "lr_decay_iters", "eval_interval")]
            return [*common, *horizon, f"--warmup_iters={n // 10}"]

        def nanogpt(n: int, name: str) -> Run:
            return run_nanogpt(name, n, folder, schedule(n), args.limit)

        def acorn(n: int, name: str, config: str, *more: str) -> Run:
            return run_acorn(name, n, config, dataset.path.resolve(), out, [*schedule(n), *more], args.limit)

        more = [f"--{setting}" for setting in args.settings] + (["--n_head=2"] if toy else [])
        probe = nanogpt(PROBE, "nanoGPT, short run")
        record(probe, False)
        n_nanogpt = int(args.seconds * probe.rate)
        record(acorn(PROBE, f"acorn, {BASELINE}, short run", BASELINE, "--mlp=gelu"), False)
        probe = acorn(PROBE, f"acorn, {SPEEDRUN}, short run", SPEEDRUN, *more)
        record(probe, False)
        n_acorn = int(args.seconds * probe.rate)
        record(nanogpt(n_nanogpt, "nanoGPT"), True)
        record(acorn(n_acorn, f"acorn, {SPEEDRUN}", SPEEDRUN, *more), True)

    if args.picture:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        for run in curves:
            weights = np.ones(min(5, len(run.losses))) / min(5, len(run.losses))
            smooth = np.convolve(run.losses, weights, "valid")
            val = "" if run.val is None else f": {run.val:.3f} on val"
            axes.plot(run.seconds[-len(smooth) :], smooth, label=run.name + val)
        axes.set(xlabel="seconds of training", ylabel="training loss, mean of 5 lines", title=args.dataset)
        axes.set_ylim(top=np.percentile([loss for run in curves for loss in run.losses], 90))
        axes.legend()
        figure.savefig(args.picture, dpi=120)


if __name__ == "__main__":
    main()
