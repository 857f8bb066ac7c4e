"""What the benchmarks share: the machine in words, contenders timed in turn, and results as a table and as JSON."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def machine(device: torch.device) -> str:
    """The machine in words: processor or GPU, threads, torch, date."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = platform.processor() or platform.machine()
        if Path("/proc/cpuinfo").exists():
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
        name += f", {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, {date.today()}"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(names: list[str], rounds: int) -> dict[str, list[dict]]:
    """What each contender measured in each round: its process is this script again, with `--alone NAME`, which calls
    `serve`. They take turns (A B C A B C), so that a machine that drifts drifts for all of them alike, and share
    nothing. One that fails is named and left out."""
    processes, results = {}, {}
    for name in names:
        command = [sys.executable, *sys.argv, "--alone", name]
        processes[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for turn in range(-1, rounds):  # in the first turn they only make ready, one after the other too
        for name, process in list(processes.items()):
            process.stdin.write("go\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline() or '{"failed": "its process ended"}')
            if "failed" in answer:
                print(f"{name}: left out ({answer['failed']})", flush=True)
                processes.pop(name).kill()
                results.pop(name, None)
            elif turn >= 0:
                results.setdefault(name, []).append(answer)
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return results


def serve(make: Callable[[], Callable[[], dict]], warm_up: int = 3) -> None:
    """Be one of the processes of `in_turn`: at the first line that comes in make the contender and call it `warm_up`
    times, to compile and to settle; at each further line once, answering with what it measured."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes elsewhere
    try:
        sys.stdin.readline()
        work = make()
        for _ in range(warm_up):
            work()
        print("{}", file=channel, flush=True)
        for _ in sys.stdin:
            print(json.dumps(work()), file=channel, flush=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100] if str(error).strip() else ''}"
        print(json.dumps({"failed": reason}), file=channel, flush=True)


def median(values: list[float]) -> float:
    return statistics.median(values)


def matmul_rate(device: torch.device, dtype: torch.dtype, n: int = 0) -> float:
    """Operations a second of a large matrix product: the limit that a training step runs against."""
    n = n or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / shortest(lambda: a @ b, device)


def read_rate(device: torch.device) -> float:
    """Bytes a second at which memory is read: the limit that decoding one token runs against."""
    x = torch.ones((1 << 30 if device.type == "cuda" else 1 << 28) // 4, device=device)
    return x.numel() * 4 / shortest(x.sum, device)


def shortest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of ten calls."""
    seconds = []
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table; the keys of the first are the heads."""
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(str(row.get(head, "")) for head in heads) + " |" for row in rows]
    return "\n".join(lines)


def write(path: str, **result) -> None:
    """Write the result as JSON to `path`, if one was given."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {path}")
