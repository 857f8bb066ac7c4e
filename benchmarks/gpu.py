"""Run everything that needs a GPU: the tests marked gpu, then the benchmarks at GPU sizes.

$ make gpu                                # or: python benchmarks/gpu.py --nanogpt PATH_OF_A_CHECKOUT

Needs a CUDA device and torch 2.11 or later, but no network. Packages that are not installed are reported and left out.
Ends within --minutes, with one table and one JSON file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench
import torch
from bench import REPO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", default="", help="folder of a nanoGPT checkout")
    parser.add_argument("--minutes", type=float, default=8.5, help="time limit; parts beyond it are left out")
    parser.add_argument("--device", default="cuda", help="cpu: test this script with toy sizes")
    parser.add_argument("--json", default="out/gpu.json", help="file for the results")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch sees no CUDA device. Use --device=cpu to test this script with toy sizes.")

    toy = args.device == "cpu"
    small, large = ("2,64,2,2,64",) * 2 if toy else ("6,384,6,64,256", "12,768,12,12,1024")  # train_step.py's --shape
    common = [f"--device={args.device}", *([f"--nanogpt={args.nanogpt}"] if args.nanogpt else [])]
    step = [sys.executable, "benchmarks/train_step.py", *common, "--rounds=10", "--dtypes=bf16"]
    decode = [sys.executable, "benchmarks/decode.py", *common, "--rounds=2", f"--new={8 if toy else 200}"]
    parts = {  # the most important first, because time may run out
        "tests": [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"],
        "step, 124M": [*step, f"--shape={large}", f"--vocab={512 if toy else 50304}"],
        "decode, 1 prompt of 16": [*decode, "--prompt=16"],
        "decode, 1 prompt of 512": [*decode, "--prompt=512"],
        "decode, 32 prompts of 16": [*decode, "--prompt=16", "--batch=32"],
        "step, 10M": [*step, f"--shape={small}"],
    }
    ends = time.monotonic() + 60 * args.minutes
    rows, results = [], {"machine": bench.machine(torch.device(args.device))}
    with tempfile.TemporaryDirectory() as scratch:
        for name, command in parts.items():
            print(f"\n=== {name}: {' '.join(command[1:])}", flush=True)
            out = Path(scratch) / "result.json"
            out.unlink(missing_ok=True)
            start, json_option = time.monotonic(), [] if name == "tests" else [f"--json={out}"]
            try:
                code = subprocess.run([*command, *json_option], cwd=REPO, timeout=max(ends - start, 0)).returncode
                outcome = "passed" if code == 0 else "no tests" if name == "tests" and code == 5 else f"failed, {code}"
            except subprocess.TimeoutExpired:
                outcome = "left out: no time"
            result = json.loads(out.read_text()) if out.exists() else {}
            results[name] = {"outcome": outcome, **result}
            row = {"part": name, "contender": "", "tokens/s": "", "note": outcome}
            rows.append({**row, "note": f"{outcome}, {time.monotonic() - start:.0f} s"})
            for contender, figures in result.get("results", {}).items():
                rows.append({**row, "contender": contender, "tokens/s": f"{figures['tokens_per_second']:,.0f}"})
                rows[-1]["note"] = figures.get("note", "")
    print(f"\n{results['machine']}\n\n{bench.table(rows)}")
    bench.write(args.json, **results)


if __name__ == "__main__":
    main()
