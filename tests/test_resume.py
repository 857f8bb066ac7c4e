"""Resuming is bit-exact, keeps the saved settings unless they are overridden, and requires the same data."""

import json
import os
import shutil
import signal

import pytest
import torch
from helpers import REPO, TINY, metrics, numbers, refused, script_here, start_process, train, train_here
from safetensors.torch import load_file, save_file

from acorn import files

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_resuming_is_bit_exact(trained, dataset, tmp_path):
    """Stop a run by SIGINT and by SIGTERM, resume it each time, and compare it with an uninterrupted run."""
    process = start_process(
        REPO / "train.py",
        *TINY,
        f"--dataset={dataset}",
        "--out_dir=b",
        "--max_iters=100000",
        "--lr_decay_iters=40",
        cwd=tmp_path,
    )
    for line in process.stdout:
        if line.startswith("step 6/"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.communicate()[0]
    assert process.returncode == 130
    assert f"Resume with: python {REPO / 'train.py'} --init_from=resume --out_dir=b" in rest
    stopped_at = int((tmp_path / "b" / "latest").read_text()[5:])
    assert 6 < stopped_at < 40

    process = start_process(
        REPO / "train.py", "--init_from=resume", "--out_dir=b", cwd=tmp_path
    )  # the settings come from the checkpoint
    for line in process.stdout:
        if line.startswith(f"step {stopped_at + 3}/"):
            process.send_signal(signal.SIGTERM)
            break
    process.communicate()
    assert process.returncode == 143
    stopped_again = int((tmp_path / "b" / "latest").read_text()[5:])
    assert stopped_again > stopped_at + 3

    result = script_here("train.py", "--init_from=resume", "--out_dir=b", "--max_iters=40", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    if stopped_again < 40:
        assert numbers(tmp_path / "b") == numbers(trained)
    else:  # a very fast machine: compare up to the end of the shorter run
        assert numbers(tmp_path / "b")[:44] == numbers(trained)[:44]

    result = script_here("train.py", "--init_from=resume", "--out_dir=b", cwd=tmp_path)
    assert result.returncode == 0 and "already made its 40 updates" in result.stdout


def test_eval_only_on_resume_evaluates_and_writes_nothing(trained, dataset, tmp_path):
    before = {f: f.stat().st_mtime_ns for f in trained.rglob("*")}
    result = script_here("train.py", "--init_from=resume", f"--out_dir={trained}", "--eval_only=True", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    val = metrics(trained)[-1]["val_loss"]
    assert f"val loss {val:.4f}" in result.stdout
    assert before == {f: f.stat().st_mtime_ns for f in trained.rglob("*")}


@pytest.mark.slow
def test_mixture_with_document_mask_resumes_bit_exactly(dataset, tmp_path):
    for name in ("one", "two"):
        os.mkdir(tmp_path / name)
        for i in range(20):
            (tmp_path / name / f"{i}.txt").write_text(f"{name} is document number {i} of {name}. " * (i % 7 + 1))
        assert script_here("prepare", "text", name, "--tokenizer=byte", cwd=tmp_path).returncode == 0
    words = ["one:0.7,two:0.3", "--document_mask=True", "--lr_decay_iters=6", "--eval_interval=3"]
    for out, more in (("a", ["--max_iters=6"]), ("b", ["--max_iters=3"])):
        result = train(tmp_path, *words, f"--out_dir={out}", *more)
        assert result.returncode == 0, result.stderr
    assert "70.0% data/one" in result.stdout and "30.0% data/two" in result.stdout
    result = script_here("train.py", "--init_from=resume", "--out_dir=b", "--max_iters=6", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = numbers(tmp_path / "a")
    assert numbers(tmp_path / "b") == lines
    last = lines[-1]
    assert last["val_loss"] == pytest.approx(0.7 * last["val_loss/one"] + 0.3 * last["val_loss/two"])
    assert f"(one {last['val_loss/one']:.4f}, two {last['val_loss/two']:.4f})" in result.stdout
    joint = train(tmp_path, "one:0.7,two:0.3", "--lr_decay_iters=6", "--max_iters=1", "--out_dir=c")
    assert joint.returncode == 0 and numbers(tmp_path / "c")[1]["loss"] != lines[1]["loss"]
    refused(train(tmp_path, dataset, "--document_mask=True", "--out_dir=d"), "char tokenizer", "no end-of-text token")


def test_settings_given_on_resume_override_saved_settings(dataset, tmp_path, monkeypatch):
    losses = {}
    for decay in ("0.1", "90"):
        out = f"--out_dir={tmp_path}/o{decay}"
        first = [*TINY, f"--dataset={dataset}", "--max_iters=4", "--lr_decay_iters=40", out]
        assert train_here(monkeypatch, *first) == 0
        words = ["--init_from=resume", out, "--max_iters=8", f"--weight_decay={decay}"]
        assert train_here(monkeypatch, *words) == 0
        losses[decay] = [m["loss"] for m in metrics(tmp_path / f"o{decay}") if "loss" in m]
    assert losses["0.1"][:5] == losses["90"][:5] and losses["0.1"][6:] != losses["90"][6:]


def test_resuming_requires_the_same_data(trained, tmp_path):
    (tmp_path / "t.txt").write_text("another text for the same tokenizer, quite unlike the first " * 20)
    words = ["--tokenizer", trained, "--name", "other"]
    text = "BORIS:\nbring the key, and bring it slowly.\n\n" * 20  # has only characters of the tokenizer's vocabulary
    (tmp_path / "t.txt").write_text(text)
    assert script_here("prepare", "text", "t.txt", *words, cwd=tmp_path).returncode == 0
    result = script_here("train.py", "--init_from=resume", f"--out_dir={trained}", "--dataset=other", cwd=tmp_path)
    refused(result, "dataset=other is not the data", "--init_from=")
    words = [f"--init_from={trained}", "--dataset=other", "--max_iters=1", "--eval_iters=1", "--out_dir=o"]
    words += ["--batch_size=2", "--gradient_accumulation_steps=1", "--device=cpu", "--compile=False"]
    assert script_here("train.py", *words, cwd=tmp_path).returncode == 0


def test_optimizer_state_with_wrong_shapes_is_rejected(trained, tmp_path):
    """Otherwise, a fused optimizer kernel would write out of bounds."""
    shutil.copytree(trained, tmp_path / "o")
    folder = tmp_path / "o" / "step_000040"
    saved = load_file(folder / "optimizer.safetensors")
    save_file(
        {name: torch.zeros(3) if value.dim() else value for name, value in saved.items()},
        folder / "optimizer.safetensors",
    )
    state = json.loads((folder / "state.json").read_text())
    state["sha256"]["optimizer.safetensors"] = files.sha256(folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(state))
    result = script_here("train.py", "--init_from=resume", "--out_dir=o", "--max_iters=50", cwd=tmp_path)
    refused(result, "optimizer state")
