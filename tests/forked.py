"""Run scripts in processes forked from one that has imported torch, so that they start fast.

Tests limit their resources and kill them at any time. The fixture `start` of conftest.py starts them. Linux only.
"""

import os
import resource
import socket
import sys
import time
from pathlib import Path

import torch
from helpers import CLOCKS, REPO, TINY

import prepare.__main__ as prepare_cli
import sample
import train
from acorn import report, run

NOBODY = 65534
MAINS = {"train.py": train.main_or_advice, "sample.py": sample.main, "prepare": prepare_cli.main}
# saves eight checkpoints in half a second
RUN = [*TINY, *"--n_layer=1 --n_embd=16 --block_size=16 --max_iters=16 --eval_interval=2 --eval_iters=1".split()]


def child(name, argv, cwd, log, environment, file_size, memory, as_nobody) -> None:
    """Run a script in this process, with its output in the file `log`."""
    os.chdir(cwd)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    report.draw_curve = lambda *args: None  # slower than the rest of a tiny run
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if memory:  # limits the address space to its current size plus `memory` bytes
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + memory, taken + memory))
    if as_nobody and os.getuid() == 0:  # root bypasses file permissions
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    sys.argv = [str(REPO / name), *map(str, argv)]
    run(MAINS[name])


class Forked:
    """A running script: its `process`, and the file `log` with its output."""

    def __init__(self, context, name, *argv, cwd, environment=None, file_size=0, memory=0, as_nobody=False):
        self.log = Path(cwd).parent / f"{Path(cwd).name}-{time.monotonic_ns()}.log"
        words = (name, argv, cwd, self.log, environment or {}, file_size, memory, as_nobody)
        self.process = context.Process(target=child, args=words, daemon=True)
        self.process.start()

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for(self, text: str) -> None:
        while text not in self.said():
            assert self.process.is_alive(), self.said()
            time.sleep(0.01)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def end(self, timeout=120) -> int:
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"it hangs:\n{self.said()}"
        return self.process.exitcode


def said_in_a_sentence(forked: Forked, *codes: int) -> str:
    """Assert that a script exits with one of `codes` and no traceback, and for code 2 with an error message.

    Returns its output.
    """
    assert forked.end() in codes, forked.said()
    assert "Traceback" not in forked.said()
    if forked.end() == 2:
        assert forked.said().strip().splitlines()[-1].startswith("error: "), forked.said()
    return forked.said()


def result_of(out_dir: Path) -> tuple:
    """Return a run's metrics without CLOCKS, and the content of its last checkpoint's files except state.json."""
    lines = report.read_metrics(out_dir / "metrics.jsonl")
    numbers = [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]
    last = out_dir / (out_dir / "latest").read_text().strip()
    return numbers, {f.name: f.read_bytes() for f in last.iterdir() if f.name != "state.json"}


def free_port() -> str:
    """Return a free TCP port of this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])
