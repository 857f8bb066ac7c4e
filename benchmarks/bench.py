"""Code shared by the benchmarks: command line, contenders that take turns, timed processes, tables and JSON."""

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

# acorn's contenders use the OpenMP runtime that importing acorn selects, as in train.py; the others use torch's own
if "--alone" not in sys.argv or "acorn" in sys.argv[-1]:
    import acorn  # noqa: F401  # before torch
import torch  # noqa: E402

# Keeps torch, oneDNN, MKL and CTranslate2 from using AVX-512. torch.compile takes its vector length from the first one.
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "CT2_FORCE_CPU_ISA": "AVX2",
    # a separate cache, because torch.compile would reuse code compiled for AVX-512
    "TORCHINDUCTOR_CACHE_DIR": os.path.join(tempfile.gettempdir(), "torchinductor_avx2"),
}


def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, with `--isa` added.

    With `--isa avx2` this process restarts with environment variables that force AVX2, because libraries read them when
    they load. Child processes inherit them.
    """
    parser.add_argument("--isa", choices=("native", "avx2"), default="native", help="avx2: do not use AVX-512")
    args = parser.parse_args()
    if args.isa == "avx2" and any(os.environ.get(name) != value for name, value in AVX2.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **AVX2})
    if args.isa == "avx2" and torch.backends.cpu.get_cpu_capability() != "AVX2":
        parser.error("--isa avx2: this CPU has no AVX2. Leave the option out.")
    return args


def chosen(names: Iterable[str], only: str) -> list[str]:
    """Return the names that contain `only`. Exits if there are none."""
    matches = [name for name in names if only in name]
    if not matches:
        sys.exit(f"error: --only {only} matches no name. Use a part of one of these: {'; '.join(names)}")
    return matches


def cpu_kind() -> str:
    """Return the vector instructions that torch uses on this CPU, such as "AVX512 with bfloat16" or "AVX2 (forced)"."""
    kind = torch.backends.cpu.get_cpu_capability()
    if kind == "AVX512" and torch.cpu._is_avx512_bf16_supported():
        return f"{kind} with bfloat16"
    return f"{kind} (forced)" if "ATEN_CPU_CAPABILITY" in os.environ else kind


def machine(device: torch.device) -> str:
    """Describe the machine in one line: GPU, or CPU with vector instructions, cores and threads; torch; date."""
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


def in_turn(names: list[str], rounds: int, limit: float, show: Callable[[dict], str]) -> dict[str, list[dict]]:
    """Return what each contender measured in each round.

    Each contender is this script in a separate process, with `--alone NAME`, which calls `serve`. Contenders take turns
    (A B C A B C), so that a change in the machine's speed affects all of them. The measurement of the warm-up is
    printed at once, formatted by `show`.

    A contender that fails is reported and left out. A contender that has used `limit` seconds over all its turns is
    reported and killed. Its finished rounds count, or its warm-up if there are none.
    """
    processes, results, warm_ups, used = {}, {}, {}, dict.fromkeys(names, 0.0)
    for turn in range(-1, rounds):  # turn -1 is the warm-up
        for name in names if turn < 0 else list(processes):
            start = time.perf_counter()
            if turn < 0:
                command = [sys.executable, *sys.argv, "--alone", name]
                processes[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            answer = next_answer(processes[name], limit - used[name])
            used[name] += time.perf_counter() - start
            if answer is None:
                print(f"{name}: stopped at its limit of {limit:g} s (rounds finished: {max(turn, 0)})", flush=True)
                processes.pop(name).wait()
                if name not in results and name in warm_ups:
                    results[name] = [warm_ups[name]]
            elif "failed" in answer:
                print(f"{name}: left out ({answer['failed']})", flush=True)
                processes.pop(name).kill()
                results.pop(name, None)
            elif turn < 0:
                warm_ups[name] = answer
                print(f"{name}: {show(answer)} in the warm-up, ready after {used[name]:.0f} s", flush=True)
            else:
                results.setdefault(name, []).append(answer)
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return results


def next_answer(process: subprocess.Popen, seconds: float) -> dict | None:
    """Give a contender its turn and return what it measured; None if it took more than `seconds` and was killed."""
    late = threading.Event()
    timer = threading.Timer(max(seconds, 0), lambda: (late.set(), process.kill()))
    timer.start()
    line = ""
    with contextlib.suppress(BrokenPipeError):  # the process ended between its turns
        process.stdin.write("go\n")
        process.stdin.flush()
        line = process.stdout.readline()
    timer.cancel()
    if late.is_set():
        return None
    return json.loads(line or '{"failed": "its process ended"}')


def serve(make: Callable[[], Callable[[], dict]], warm_up: int = 3) -> None:
    """Run as a contender of `in_turn`: warm up, then call the work once per line on stdin, and print results as JSON.

    The warm-up is `warm_up` calls, or fewer if they take more than 5 s.
    """
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # redirect what libraries print to stderr
    try:
        sys.stdin.readline()
        work = make()
        measured = work()  # the first call compiles
        start = time.perf_counter()
        for _ in range(warm_up - 1):
            if time.perf_counter() - start < 5:
                measured = work()
        print(json.dumps(measured), file=channel, flush=True)
        for _ in sys.stdin:
            print(json.dumps(work()), file=channel, flush=True)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        print(json.dumps({"failed": f"{type(error).__name__}: {lines[0][:100]}"}), file=channel, flush=True)


def median(values: list[float]) -> float:
    return statistics.median(values)


def matmul_rate(device: torch.device, dtype: torch.dtype, n: int = 0) -> float:
    """Return the FLOPs per second of a large matrix product, an upper bound for a training step."""
    n = n or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / shortest(lambda: a @ b, device)


def read_rate(device: torch.device) -> float:
    """Return the bytes per second at which memory is read, an upper bound for decoding."""
    x = torch.ones((1 << 30 if device.type == "cuda" else 1 << 28) // 4, device=device)
    return x.numel() * 4 / shortest(x.sum, device)


def shortest(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of ten calls."""
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
    """Run a process. Returns its time in seconds, and its lines of output, each with the second of its arrival.

    The time is None if the process exceeded `limit` seconds and was killed. With the regular expression `until`, the
    time ends at the first line that starts with a match, and the process is killed. Raises RuntimeError with the last
    lines of output if the process fails.
    """
    start, lines, late = time.perf_counter(), [], threading.Event()
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    with subprocess.Popen([str(word) for word in command], cwd=cwd, env=env, **options) as process:

        def kill() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the process and its children

        timer = threading.Timer(limit, lambda: (late.set(), kill()))
        timer.start()
        try:
            for line in process.stdout:
                lines.append((time.perf_counter() - start, line.rstrip()))
                if until and re.match(until, line):
                    return lines[-1][0], lines
            process.wait()
        finally:
            timer.cancel()
            kill()
    if late.is_set():
        return None, lines
    if process.returncode:
        raise RuntimeError("\n".join([f"{command} failed:", *(line for _, line in lines[-20:])]))
    return time.perf_counter() - start, lines


def tiny_dataset(folder: Path, tokenizer: str = "char") -> Path:
    """Prepare a dataset of acorn's own files in `folder`, for timings that do not depend on the text."""
    texts = [REPO / "README.md", REPO / "model.py", REPO / "train.py"]
    timed([sys.executable, REPO / "prepare", "text", *texts, "--tokenizer", tokenizer, "--out", folder])
    return folder


def choices(lines: list[tuple[float, str]]) -> str:
    """Return the threads and precision that a run of train.py chose by measuring, or "" if it measured nothing."""
    note = next((line for _, line in lines if re.match(r"\d+ threads|dtype \w+ \(auto", line)), "")
    return re.sub(r"dtype |auto: | on this CPU", "", note)


def table(rows: list[dict]) -> str:
    """Format rows as a Markdown table; the keys of the first row are the heads."""
    heads = list(rows[0]) if rows else []
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(str(row.get(head, "")) for head in heads) + " |" for row in rows])


def print_row(rows: list[dict]) -> None:
    """Print the last row of a growing table, and the heads before the first row. All rows have the same keys."""
    lines = table(rows).split("\n")
    print("\n".join(lines if len(rows) == 1 else lines[-1:]), flush=True)


def write(path: str, **result) -> None:
    """Write the result as JSON to `path`, unless it is empty."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {path}")
