"""What the benchmarks share: the machine in words, contenders timed in turn, and results as a table and as JSON."""

import json
import platform
import statistics
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


def in_turn(contenders: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each contender in each round. They take turns (A B C A B C), so that a machine that drifts drifts
    for all of them alike; one call each before that does not count. A contender that fails is named and left out."""
    seconds = {}
    for name, call in contenders.items():
        try:
            call()
            seconds[name] = []
        except Exception as error:
            print(
                f"{name}: left out ({type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''})"
            )
    for _ in range(rounds):
        for name in seconds:
            synchronize(device)
            start = time.perf_counter()
            contenders[name]()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median(values: list[float]) -> float:
    return statistics.median(values)


def matmul_rate(device: torch.device, dtype: torch.dtype, n: int = 0) -> float:
    """Operations a second of a large matrix product: the limit that a training step runs against."""
    n = n or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = in_turn({"matmul": lambda: a @ b}, 10, device)["matmul"]
    return 2 * n**3 / min(times)


def read_rate(device: torch.device) -> float:
    """Bytes a second at which memory is read: the limit that decoding one token runs against."""
    x = torch.ones((1 << 30 if device.type == "cuda" else 1 << 28) // 4, device=device)
    times = in_turn({"sum": lambda: x.sum()}, 10, device)["sum"]
    return x.numel() * 4 / min(times)


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
