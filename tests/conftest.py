"""What the tests share: a small dataset made once, and the scripts run as a person would run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # two test processes side by side on two cores
REPO = Path(__file__).resolve().parent.parent
# restricts the libraries to AVX2 on a newer CPU
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}

# a tiny run: some 30 thousand parameters, 40 updates of 256 tokens, a few seconds
TINY = (
    "--block_size=32 --batch_size=4 --gradient_accumulation_steps=2 --n_layer=2 --n_head=2 --n_embd=32 --dropout=0.1 "
    "--eval_interval=10 --eval_iters=3 --max_iters=40 --warmup_iters=5 --learning_rate=1e-3 --min_lr=1e-4 "
    "--device=cpu --dtype=float32 --compile=False"
).split()

TEXT = "".join(
    f"{name}:\n{verb} the {thing}, and {verb} it {how}.\n\n"
    for name in ("ANNA", "BORIS", "CLARA", "DMITRI")
    for verb in ("take", "bring", "leave", "forget")
    for thing in ("letter", "lantern", "horse", "key")
    for how in ("slowly", "at once", "before night", "with care")
)


def script(*words, cwd, env=None, timeout=120, **kwargs) -> subprocess.CompletedProcess:
    """Run `python SCRIPT ...` of the repo from the folder `cwd`; the result has text in stdout and stderr."""
    name, *rest = [str(word) for word in words]
    command = [sys.executable, str(REPO / name), *rest]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "NO_COLOR": "1", **(env or {})}
    return subprocess.run(command, cwd=cwd, env=env, timeout=timeout, capture_output=True, text=True, **kwargs)


def refused(result: subprocess.CompletedProcess, *words: str) -> None:
    """Assert that a script refused bad input: one sentence with these words, exit code 2, no traceback."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: "), result.stderr
    for word in words:
        assert word in last, last


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """A prepared char dataset of about 11 thousand tokens."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(TEXT)
    result = script("prepare", "text", "text.txt", "--tokenizer=char", "--out=tiny", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "tiny"


@pytest.fixture(scope="session")
def trained(dataset, tmp_path_factory) -> Path:
    """The out_dir of a finished tiny run; read it, do not change it."""
    folder = tmp_path_factory.mktemp("trained")
    result = script("train.py", *TINY, f"--dataset={dataset}", "--out_dir=out", cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "out"
