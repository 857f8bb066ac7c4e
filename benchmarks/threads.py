"""Milliseconds of an update when other programs use the same cores: the quickstart alone, and two of them at once.

$ python benchmarks/threads.py
$ python benchmarks/threads.py --updates 300 --isa avx2

Each setting is a number of OpenMP threads and a wait policy: acorn's own choice, and others that environment variables
force on it. A run is a whole process of train.py with config/quickstart.py on a small dataset. A setting is good if it
is near the best alone and collapses beside another run of the same setting in no case.
"""

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bench
import torch
from bench import REPO, median

OWN = "acorn's choice"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
SETTINGS = {
    OWN: {},
    "1 thread": {"OMP_NUM_THREADS": "1"},
    # 300,000 is what libgomp documents for a wait policy that is not set
    f"{CORES} threads, libgomp's spinning": {"OMP_NUM_THREADS": str(CORES), "GOMP_SPINCOUNT": "300000"},
    f"{CORES} threads, GOMP_SPINCOUNT=1000": {"OMP_NUM_THREADS": str(CORES), "GOMP_SPINCOUNT": "1000"},
    f"{CORES} threads, OMP_WAIT_POLICY=PASSIVE": {"OMP_NUM_THREADS": str(CORES), "OMP_WAIT_POLICY": "PASSIVE"},
}


def run(out: Path, words: list[str], forced: dict, limit: float) -> tuple[float, float] | None:
    """Seconds of a whole run into `out`, and its median milliseconds of an update; None past the limit."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, REPO / "train.py", *words, f"--out_dir={out}", "--overwrite=True"]
    seconds, _ = bench.timed(command, limit=limit, env=env | forced)
    if seconds is None:
        return None
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    settings = json.loads(next(out.glob("step_*/state.json")).read_text())["settings"]
    tokens = settings["gradient_accumulation_steps"] * settings["batch_size"] * settings["block_size"]
    return seconds, 1e3 * tokens / median(rates[1:] or rates)  # the first update warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="config/quickstart.py")
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--dtype", default="float32", help="the same for all settings")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of each run; one beyond is stopped")
    parser.add_argument("--only", default="", help="only settings whose name has this in it")
    parser.add_argument("--json", default="", help="also write the result here")
    args = bench.parse_args(parser)

    settings = {name: forced for name, forced in SETTINGS.items() if args.only in name}
    print(bench.machine(torch.device("cpu")))
    print(f"{args.config}, {args.updates} updates, {args.dtype}; medians of {args.rounds} rounds\n", flush=True)
    results = {name: {"alone": [], "two": []} for name in settings}  # lists of (seconds, ms), None past the limit
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(2) as pool:
        data = bench.tiny_dataset(Path(scratch) / "data")
        words = [args.config, f"--dataset={data}", f"--max_iters={args.updates}", "--device=cpu", "--eval_iters=1"]
        words += [f"--dtype={args.dtype}", f"--eval_interval={args.updates}", "--log_interval=10"]
        outs = [Path(scratch) / "a", Path(scratch) / "b"]
        for turn in range(args.rounds):
            for name, forced in settings.items():
                found = {"alone": [run(outs[0], words, forced, args.limit)]}
                found["two"] = list(pool.map(lambda out, env=forced: run(out, words, env, args.limit), outs))
                for how, runs in found.items():
                    results[name][how] += runs
                said = [
                    f"{how}: {', '.join(words_of(each, args.limit) for each in runs)}" for how, runs in found.items()
                ]
                print(f"round {turn + 1}, {name}: {'; '.join(said)}", flush=True)

    rows, ms = [], {}
    for name, found in results.items():
        row = {"setting": name}
        for how, head in ("alone", "alone"), ("two", "two at once, each"):
            done = [each for each in found[how] if each]
            late = len(found[how]) - len(done)
            complete = len(done) > late
            ms[name, how] = median([each[1] for each in done]) if complete else float("inf")
            row[f"{head}, s"] = f"{median([each[0] for each in done]):.1f}" if complete else f"over {args.limit:g}"
            row[f"{head}, ms an update"] = f"{ms[name, how]:.1f}" if complete else ""
        rows.append(row)
    print(f"\n{bench.table(rows)}")
    if OWN in results and len(results) > 1:
        best = min(ms[name, "alone"] for name in results)
        alone, two = ms[OWN, "alone"] / best, ms[OWN, "two"] / best
        print(f"\n{OWN}, ms an update against the best setting alone: alone {alone:.2f}x, two at once {two:.2f}x")
    bench.write(args.json, machine=bench.machine(torch.device("cpu")), updates=args.updates, results=results)


def words_of(figures: tuple[float, float] | None, limit: float) -> str:
    return f"{figures[0]:.1f} s ({figures[1]:.1f} ms an update)" if figures else f"over {limit:g} s"


if __name__ == "__main__":
    main()
