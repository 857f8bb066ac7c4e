"""A run that resumes with another number of ranks, sharded or not, gives the same losses."""

import json
import os
import subprocess
import sys

import pytest
from helpers import REPO, TINY, losses, refused, script_here, torchrun

LAST = 12  # updates
WORDS = [*TINY, "--dropout=0", "--batch_size=2", "--gradient_accumulation_steps=6", f"--lr_decay_iters={LAST}"]


def train(cwd, n_processes: int, *words) -> subprocess.CompletedProcess:
    """Run train.py on `n_processes` ranks; a single one is started without torchrun."""
    command = [sys.executable, *(torchrun(n_processes) if n_processes > 1 else []), REPO / "train.py", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=env, timeout=200, capture_output=True, text=True)


SHORT = [(2, True), (1, False)]  # processes, sharded or not
LONG = [(1, False), (2, True), (4, True), (2, False), (3, True), (1, False)]


@pytest.mark.parametrize(
    "optimizer, chain",
    [
        pytest.param("muon", SHORT, marks=pytest.mark.slow),
        pytest.param("adamw", LONG, marks=pytest.mark.slow),
        pytest.param("muon", LONG, marks=pytest.mark.slow),
    ],
)
def test_run_resumes_with_any_number_of_ranks(dataset, tmp_path, optimizer, chain):
    """An update has 12 sequences, which 1 to 4 ranks can divide evenly."""
    words = [*WORDS, f"--dataset={dataset}", f"--optimizer={optimizer}"]
    each = LAST // len(chain)
    words.append(f"--eval_interval={each}")
    assert script_here("train.py", *words, f"--max_iters={LAST}", "--out_dir=whole", cwd=tmp_path).returncode == 0
    for i, (n_processes, fsdp) in enumerate(chain, start=1):
        how = ["--out_dir=o", f"--max_iters={i * each}", f"--fsdp={fsdp}"]
        result = train(tmp_path, n_processes, *(words if i == 1 else ["--init_from=resume"]), *how)
        assert result.returncode == 0, result.stdout + result.stderr
        folder = tmp_path / "o" / f"step_{i * each:06d}"
        assert len(list(folder.glob("*.safetensors"))) == (2 * n_processes if fsdp else 2)
        if fsdp and i == 1:
            read_by_the_other_commands(tmp_path)
    assert losses(tmp_path / "o") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def read_by_the_other_commands(cwd):
    """Assert that sample.py and init_from can read a sharded checkpoint."""
    result = script_here("sample.py", "--out_dir=o", "--num_samples=1", "--max_new_tokens=5", cwd=cwd)
    assert result.returncode == 0, result.stderr
    words = ["--init_from=o", "--max_iters=1", "--out_dir=p", "--eval_only=True", "--eval_iters=0"]
    state = json.loads(next((cwd / "o").glob("step_*/state.json")).read_text())
    result = script_here("train.py", *TINY, f"--dataset={state['settings']['dataset']}", *words, cwd=cwd)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_failed_write_is_reported_once_and_known_to_all_ranks(dataset, tmp_path):
    """If a checkpoint cannot be written, the run continues; if it is the last one, the run fails."""
    words = [*WORDS, f"--dataset={dataset}", "--fsdp=True", "--max_iters=2", "--eval_interval=2", "--out_dir=o"]
    assert train(tmp_path, 2, *words).returncode == 0
    (tmp_path / "o" / ".writing-step_000004").write_text("a file is in the way")
    result = train(tmp_path, 2, "--init_from=resume", "--out_dir=o", "--max_iters=6")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr.count("the checkpoint of step 4 could not be written into o (File exists)") == 1
    (tmp_path / "o" / ".writing-step_000008").write_text("a file is in the way")
    result = train(tmp_path, 2, "--init_from=resume", "--out_dir=o", "--max_iters=8")
    assert result.returncode != 0
    assert result.stderr.count("error: the last updates are not saved (File exists)") == 1
    assert f'File "{REPO}/train.py' not in result.stderr  # no traceback from train.py
    assert (tmp_path / "o" / "latest").read_text() == "step_000006\n"


@pytest.mark.slow
def test_missing_shard_is_reported(dataset, tmp_path):
    words = [*WORDS, f"--dataset={dataset}", "--fsdp=True", "--max_iters=2", "--eval_interval=2", "--out_dir=o"]
    assert train(tmp_path, 2, *words).returncode == 0
    lost = tmp_path / "o" / "step_000002" / "optimizer-00002-of-00002.safetensors"
    lost.unlink()
    result = script_here("train.py", "--init_from=resume", "--out_dir=o", "--max_iters=4", cwd=tmp_path)
    refused(result, "no checkpoint")
    assert f"{lost.relative_to(tmp_path)} is missing" in result.stderr
