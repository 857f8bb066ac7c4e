"""Startup time: --help of train.py and sample.py compared with `import torch`, and the quickstart's first update.

$ python benchmarks/start.py --rounds 5

The first update is timed from the start of the process to the line that reports it. This includes reading a small
dataset, building the model, choosing precision and threads, and the first evaluation. The commands take turns.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import bench
import torch
from bench import REPO, median, timed

IMPORT, FIRST = 'python -c "import torch"', "first update"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="config/quickstart.py", help="config whose first update is timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds after which a command is stopped")
    parser.add_argument("--json", default="", help="also write the result to this file")
    args = bench.parse_args(parser)

    print(bench.machine(torch.device("cpu")))
    print(f"{args.config}; medians of {args.rounds} rounds\n", flush=True)
    seconds = {}
    with tempfile.TemporaryDirectory() as scratch:
        data, out = bench.tiny_dataset(Path(scratch) / "data"), Path(scratch) / "out"
        settings = [f"--dataset={data}", f"--out_dir={out}", "--overwrite=True", "--device=cpu", "--log_interval=1"]
        commands = {
            IMPORT: ["-c", "import torch"],
            "train.py --help": [REPO / "train.py", "--help"],
            "sample.py --help": [REPO / "sample.py", "--help"],
            FIRST: [REPO / "train.py", args.config, *settings],
        }
        for turn in range(-1, args.rounds):  # turn -1 fills the disk cache and does not count
            for name, words in commands.items():
                until = r"step \d+/\d+" if name == FIRST else ""
                took, _ = timed([sys.executable, *words], limit=args.limit, until=until)
                print(f"round {turn + 1}, {name}: {f'{took:.2f}' if took else f'over {args.limit:g}'} s", flush=True)
                if turn >= 0:
                    seconds.setdefault(name, []).append(took or args.limit)
    rows = []
    for name, each in seconds.items():
        row = {"": name, "seconds": f"{median(each):.2f}", "range": f"{min(each):.2f} to {max(each):.2f}"}
        rows.append(row | {"x import torch": f"{median(each) / median(seconds[IMPORT]):.2f}"})
    print(f"\n{bench.table(rows)}")
    bench.write(args.json, machine=bench.machine(torch.device("cpu")), seconds=seconds)


if __name__ == "__main__":
    main()
