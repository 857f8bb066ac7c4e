"""Seconds to start: the help of train.py and sample.py against `import torch`, and the quickstart's first update.

$ python benchmarks/start.py --rounds 5

The first update counts from the start of the process to the line that reports it; reading the data, building the model
and the evaluation before it are included. The commands take turns.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import bench
import torch
from bench import REPO, median, timed

IMPORT = 'python -c "import torch"'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="config/quickstart.py")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of each command; one beyond is stopped")
    parser.add_argument("--json", default="", help="also write the result here")
    args = bench.parse_args(parser)

    print(bench.machine(torch.device("cpu")))
    print(f"medians of {args.rounds} rounds\n", flush=True)
    python, first = sys.executable, f"first update of {args.config}"
    with tempfile.TemporaryDirectory() as scratch:
        data, out = bench.tiny_dataset(Path(scratch) / "data"), Path(scratch) / "out"
        train = [python, REPO / "train.py", args.config, f"--dataset={data}", f"--out_dir={out}"]
        commands = {
            IMPORT: [python, "-c", "import torch"],
            "train.py --help": [python, REPO / "train.py", "--help"],
            "sample.py --help": [python, REPO / "sample.py", "--help"],
            first: [*train, "--overwrite=True", "--device=cpu", "--log_interval=1"],
        }
        seconds = {name: [] for name in commands}
        for turn in range(-1, args.rounds):  # the first turn fills the disk cache and does not count
            for name, command in commands.items():
                until = r"step \d+/\d+" if name == first else ""
                took, _ = timed(command, limit=args.limit, until=until)
                if turn < 0:
                    print(f"{name}: {f'{took:.2f}' if took else f'over {args.limit:g}'} s, warming up", flush=True)
                else:
                    seconds[name].append(took or args.limit)
    rows = []
    for name, each in seconds.items():
        row = {"": name, "seconds": f"{median(each):.2f}", "range": f"{min(each):.2f} to {max(each):.2f}"}
        rows.append(row | {"x import torch": f"{median(each) / median(seconds[IMPORT]):.2f}"})
    print(f"\n{bench.table(rows)}")
    bench.write(args.json, machine=bench.machine(torch.device("cpu")), seconds=seconds)


if __name__ == "__main__":
    main()
