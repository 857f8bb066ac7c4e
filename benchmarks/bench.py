"""What the benchmarks share: the machine in words, contenders timed in turn, and results as a table and as JSON."""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))


# What makes torch, oneDNN and MKL leave AVX-512 unused; torch.compile takes its vector length from the first.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, with `--isa` added. With `--isa avx2` this process starts again with AVX2 forced by
    environment variables, since libraries read them when they load; its child processes inherit them."""
    parser.add_argument("--isa", choices=("native", "avx2"), default="native", help="avx2: leave AVX-512 unused")
    args = parser.parse_args()
    if args.isa == "avx2" and any(os.environ.get(name) != value for name, value in AVX2.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **AVX2})
    if args.isa == "avx2" and torch.backends.cpu.get_cpu_capability() != "AVX2":
        parser.error("--isa avx2: this CPU has no AVX2. Leave the option out.")
    return args


def cpu_kind() -> str:
    """The vector instructions that torch uses on this CPU, such as "AVX512 with bfloat16" or "AVX2 (forced)"."""
    kind = torch.backends.cpu.get_cpu_capability()
    if kind == "AVX512" and torch.cpu._is_avx512_bf16_supported():
        return f"{kind} with bfloat16"
    return f"{kind} (forced)" if "ATEN_CPU_CAPABILITY" in os.environ else kind


def machine(device: torch.device) -> str:
    """The machine in words: processor or GPU; of a CPU its vector instructions, cores and threads; torch; date."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = platform.processor() or platform.machine()
        if Path("/proc/cpuinfo").exists():
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
        name += f", {cpu_kind()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, {date.today()}"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(
    names: list[str], rounds: int, limit: float = 600.0, show: Callable[[dict], str] | None = None
) -> dict[str, list[dict]]:
    """What each contender measured in each round: its process is this script again, with `--alone NAME`, which calls
    `serve`. They take turns (A B C A B C), so that a machine that drifts drifts for all of them alike, and share
    nothing. One that fails is named and left out.

    A contender that has taken `limit` seconds is stopped and named. It keeps the rounds that it finished; without one,
    what it measured while warming up, if anything. `show` turns the figures of a warm-up into words, which are printed
    as soon as they are there."""
    processes, results, warm_ups, spent = {}, {}, {}, dict.fromkeys(names, 0.0)
    for turn in range(-1, rounds):  # in the first turn they only make ready, one after the other too
        for name in names if turn < 0 else list(processes):
            start = time.perf_counter()
            if turn < 0:
                command = [sys.executable, *sys.argv, "--alone", name]
                processes[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            process = processes[name]
            answer = next_answer(process, limit - spent[name])
            spent[name] += time.perf_counter() - start
            if answer is None:
                done = f"{len(results[name])} rounds" if name in results else "no round"
                print(f"{name}: stopped after {done}, at its limit of {limit:g} s", flush=True)
                processes.pop(name).wait()
                if name not in results and warm_ups.get(name):
                    results[name] = [warm_ups[name]]
            elif "failed" in answer:
                print(f"{name}: left out ({answer['failed']})", flush=True)
                processes.pop(name).kill()
                results.pop(name, None)
            elif turn >= 0:
                results.setdefault(name, []).append(answer)
            else:
                warm_ups[name] = answer
                words = f": {show(answer)}, warming up" if show and answer else ""
                print(f"{name}{words} (ready after {spent[name]:.0f} s)", flush=True)
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return results


def next_answer(process: subprocess.Popen, seconds: float) -> dict | None:
    """Let a contender take its turn; return what it measured, or None where it took more than `seconds` and was
    killed."""
    late = threading.Event()
    timer = threading.Timer(max(seconds, 0), lambda: (late.set(), process.kill()))
    timer.start()
    line = ""
    try:
        process.stdin.write("go\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:  # it ended between its turns
        pass
    timer.cancel()
    if late.is_set():
        return None
    return json.loads(line or '{"failed": "its process ended"}')


def serve(make: Callable[[], Callable[[], dict]], warm_up: int = 3) -> None:
    """Be one of the processes of `in_turn`: at the first line that comes in make the contender and call it `warm_up`
    times (but no more than once where that takes over 5 s after the first call), to compile and to settle; at each
    further line once, answering with what it measured."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes elsewhere
    try:
        sys.stdin.readline()
        work = make()
        figures = work()
        start = time.perf_counter()
        for _ in range(warm_up - 1):
            if time.perf_counter() - start < 5:
                figures = work()
        print(json.dumps(figures), file=channel, flush=True)
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


def timed(
    command: list, cwd: Path = REPO, limit: float = 3600.0, env: dict | None = None, until: str = ""
) -> tuple[float | None, list[tuple[float, str]]]:
    """Seconds of a whole process, or None where it took more than `limit` and was killed; and its lines, with the
    second at which each came. With `until`, a regular expression, the process is killed, and its time ends, at the
    first line that begins with it. A process that fails ends the benchmark with its last lines."""
    start, lines, late, found = time.perf_counter(), [], threading.Event(), None
    with subprocess.Popen(
        [str(word) for word in command], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        timer = threading.Timer(limit, lambda: (late.set(), process.kill()))
        timer.start()
        for line in process.stdout:
            lines.append((time.perf_counter() - start, line.rstrip()))
            if until and re.match(until, line):
                found = lines[-1][0]
                process.kill()
                break
        process.wait()
        timer.cancel()
    if late.is_set():
        return None, lines
    if process.returncode and found is None:
        sys.exit("\n".join(line for _, line in lines[-20:]))
    return found or time.perf_counter() - start, lines


def tiny_dataset(folder: Path, tokenizer: str = "char") -> Path:
    """Prepare a dataset of acorn's own text in `folder`, for timings that do not depend on what the text says."""
    texts = [REPO / "README.md", REPO / "model.py", REPO / "train.py"]
    words = ["--tokenizer", tokenizer, "--out", folder]
    timed([sys.executable, REPO / "prepare", "text", *texts, *words])
    return folder


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table; the keys of the first are the heads."""
    return "\n".join(table_lines(rows))


def table_lines(rows: list[dict]) -> list[str]:
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return lines + ["| " + " | ".join(str(row.get(head, "")) for head in heads) + " |" for row in rows]


def print_row(rows: list[dict]) -> None:
    """Print the last of `rows` as soon as it is there, with the heads if it is the first; all have the same keys."""
    lines = table_lines(rows)
    print("\n".join(lines if len(rows) == 1 else lines[-1:]), flush=True)


def write(path: str, **result) -> None:
    """Write the result as JSON to `path`, if one was given."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {path}")
