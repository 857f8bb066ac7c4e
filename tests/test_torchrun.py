"""Two ranks under torchrun: one is killed or suspended, all get SIGTERM, or errors occur at the start."""

import os
import signal
import subprocess
import time

import pytest
from helpers import REPO, TINY, numbers, script_here, start_process, torchrun

from acorn import files
from acorn.distributed.heartbeat import MAX_SILENT_LOOKS


def launch(cwd, dataset, *words, restarts=0) -> subprocess.Popen:
    run = [REPO / "train.py", *TINY, f"--dataset={dataset}", "--out_dir=o", *words]
    return start_process(*torchrun(2, f"--max-restarts={restarts}"), *run, cwd=cwd)


def read_until(process, beginning) -> str:
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(beginning):
            return "".join(lines)
    raise AssertionError("".join(lines))


def workers(launcher) -> list[int]:
    """Return the ids of the processes that the launcher started, in ascending order, which is that of the ranks."""
    found = subprocess.run(["pgrep", "-P", str(launcher.pid), "-f", "train.py"], capture_output=True, text=True)
    return sorted(map(int, found.stdout.split()))


@pytest.mark.parametrize("everyone", [pytest.param(False, marks=pytest.mark.slow), True])
def test_sigterm_saves_one_checkpoint_and_stops(dataset, tmp_path, everyone):
    """Some schedulers send SIGTERM to the launcher alone, others to all processes of the job."""
    process = launch(tmp_path, dataset, "--max_iters=1000000", "--eval_interval=1000000")
    read_until(process, "step 6/")
    for pid in workers(process) if everyone else []:
        os.kill(pid, signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=60)[0]
    assert rest.count("stopping after this update") == rest.count("stopped at step") == 1
    assert [folder.name for folder in (tmp_path / "o").glob("step_*")] == [
        (tmp_path / "o" / "latest").read_text().strip()
    ]
    assert 'train.py", line' not in rest  # no traceback except torchrun's own


@pytest.mark.slow
def test_errors_are_printed_once(dataset, tmp_path):
    """This covers an error of all ranks, which recurs after a restart, and an error of rank 0 alone."""
    said = launch(tmp_path, "none", restarts=1).communicate(timeout=120)[0]
    assert said.count("error: there is no dataset 'none'") == said.count("error: ") == 1
    (tmp_path / "o").mkdir()
    with files.lock(tmp_path / "o", "training into"):
        said = launch(tmp_path, dataset).communicate(timeout=120)[0]
    assert said.count("error: o is in use") == said.count("error: ") == 1


@pytest.mark.slow
def test_killed_rank_is_reported_and_torchrun_resumes(dataset, tmp_path):
    words = ["--max_iters=60", "--dropout=0"]
    whole = script_here("train.py", *TINY, f"--dataset={dataset}", *words, "--out_dir=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    old = script_here("train.py", *TINY, f"--dataset={dataset}", "--max_iters=30", "--out_dir=o", cwd=tmp_path)
    assert old.returncode == 0, old.stderr
    process = launch(tmp_path, dataset, *words, "--overwrite=True", restarts=2)
    read_until(process, "step 20:")
    victim = workers(process)[1]
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    said = read_until(process, "error: ")
    assert time.monotonic() - began < 20
    assert f"rank 1 (process {victim} on " in said.splitlines()[-1]
    assert "Traceback" not in said and "with a checkpoint" not in said  # a rank cannot save one alone
    rest = process.communicate(timeout=120)[0]
    assert process.returncode == 0, rest
    assert "from o/step_0000" in rest
    for one, other in zip(numbers(tmp_path / "whole"), numbers(tmp_path / "o"), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
def test_suspended_rank_is_reported(dataset, tmp_path):
    process = launch(tmp_path, dataset, "--max_iters=1000000", "--eval_interval=1000000")
    read_until(process, "step 6/")
    victim = workers(process)[1]
    os.kill(victim, signal.SIGSTOP)
    began = time.monotonic()
    said = read_until(process, "error: ")
    assert time.monotonic() - began < MAX_SILENT_LOOKS + 15
    assert f"rank 1 (process {victim} on " in said.splitlines()[-1] and "at step " in said.splitlines()[-1]
    process.communicate(timeout=60)
    assert process.returncode != 0
