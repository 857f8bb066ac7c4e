"""Time per update when programs share the cores: one quickstart run alone, and two at the same time.

$ python benchmarks/threads.py
$ python benchmarks/threads.py --updates 300 --isa avx2

A run is a whole process of train.py on a small dataset. acorn's choice of the number of threads and of how they wait is
compared with settings forced by environment variables. A good setting is close to the best one when run alone, and does
not collapse when two runs share the cores.
"""

import argparse
import itertools
import json
import math
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
    # a wait setting keeps torch's own runtime, libgomp; 300,000 is its default
    f"{CORES} threads, libgomp's default": {"OMP_NUM_THREADS": f"{CORES}", "GOMP_SPINCOUNT": "300000"},
    f"{CORES} threads, GOMP_SPINCOUNT=1000": {"OMP_NUM_THREADS": f"{CORES}", "GOMP_SPINCOUNT": "1000"},
    f"{CORES} threads, OMP_WAIT_POLICY=PASSIVE": {"OMP_NUM_THREADS": f"{CORES}", "OMP_WAIT_POLICY": "PASSIVE"},
}


def run(out: Path, words: list[str], forced: dict[str, str], limit: float) -> dict:
    """Return the seconds of a whole run, its median ms per update, and what it chose; {} if it exceeded the limit."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, REPO / "train.py", *words, f"--out_dir={out}", "--overwrite=True"]
    seconds, lines = bench.timed(command, limit=limit, env=env | forced)
    if seconds is None:
        return {}
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    ends = [(line["step"], line["seconds"]) for line in logged if "tokens_per_second" in line]
    per_update = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(ends)]
    return {"seconds": seconds, "ms": 1e3 * median(per_update), "chose": bench.choices(lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="config/quickstart.py")
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--dtype", default="auto", help="if not auto, acorn does not choose threads either")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds after which a run is stopped")
    parser.add_argument("--only", default="", help="only settings whose name contains this")
    parser.add_argument("--json", default="", help="also write the result to this file")
    args = bench.parse_args(parser)

    print(bench.machine(torch.device("cpu")))
    print(f"{args.config}, {args.updates} updates, {args.dtype}; medians of {args.rounds} rounds\n", flush=True)
    results = {name: {"alone": [], "two": []} for name in bench.chosen(SETTINGS, args.only)}  # what `run` returns
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(2) as pool:
        data = bench.tiny_dataset(Path(scratch) / "data")
        words = [args.config, f"--dataset={data}", f"--max_iters={args.updates}", f"--dtype={args.dtype}"]
        words += ["--device=cpu", "--log_interval=10", "--eval_iters=1", f"--eval_interval={args.updates}"]
        outs = [Path(scratch) / "a", Path(scratch) / "b"]
        for turn in range(args.rounds):
            for name, found in results.items():
                for case, n in ("alone", 1), ("two", 2):
                    runs = list(pool.map(lambda out, env=SETTINGS[name]: run(out, words, env, args.limit), outs[:n]))
                    found[case] += runs
                    for each in runs:
                        output = f"over {args.limit:g} s"
                        if each:
                            output = f"{each['seconds']:.1f} s, {each['ms']:.1f} ms per update; {each['chose']}"
                        print(f"round {turn + 1}, {name}, {case}: {output}", flush=True)

    rows, ms = [], {}
    for name, found in results.items():
        row = {"setting": name}
        for case, head in ("alone", "alone"), ("two", "two at once, each"):
            seconds = median([each.get("seconds", math.inf) for each in found[case]])  # inf: the run was stopped
            ms[name, case] = median([each.get("ms", math.inf) for each in found[case]])
            row[f"{head}, s"] = f"{seconds:.1f}" if seconds < math.inf else f"over {args.limit:g}"
            row[f"{head}, ms per update"] = f"{ms[name, case]:.1f}" if seconds < math.inf else ""
        rows.append(row)
    print(f"\n{bench.table(rows)}")
    if OWN in results:
        best = min(ms[name, "alone"] for name in results)
        alone, two = ms[OWN, "alone"] / best, ms[OWN, "two"] / best
        print(f"\n{OWN}, ms per update relative to the best setting alone: alone {alone:.2f}x, two at once {two:.2f}x")
    bench.write(args.json, machine=bench.machine(torch.device("cpu")), updates=args.updates, results=results)


if __name__ == "__main__":
    main()
