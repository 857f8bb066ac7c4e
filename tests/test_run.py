"""Runs that end before max_iters because of early_stopping or max_minutes, and their best checkpoints."""

import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from helpers import SMALL, TINY, losses, metrics, numbers, train_here

from acorn import report
from acorn.training.progress import Console
from acorn.training.run import TIME_IS_UP, RunState, finish
from train import TrainSettings

RUN = [*TINY, *SMALL, "--max_iters=12"]


@pytest.fixture
def run(dataset, tmp_path, monkeypatch, capsys):
    """Return a function that runs train.py in this process, with out_dir tmp_path / name, and returns its stdout."""
    monkeypatch.setattr(report, "draw_curve", lambda *_: None)  # slower than the rest of the run

    def call(name: str, *words, code=0) -> str:
        words = words if "--init_from=resume" in words else [*RUN, f"--dataset={dataset}", *words]
        assert train_here(monkeypatch, *words, f"--out_dir={tmp_path / name}") == code
        return capsys.readouterr().out

    return call


def state(out_dir, pointer="latest") -> dict:
    return json.loads((out_dir / (out_dir / pointer).read_text().strip() / "state.json").read_text())


def test_early_stopping_ends_a_run_and_resuming_continues_it_exactly(run, tmp_path):
    words = ["--learning_rate=1", "--warmup_iters=2", "--dropout=0.2"]  # makes the loss rise and fall
    run("whole", *words)
    evaluations = [line["val_loss"] for line in metrics(tmp_path / "whole") if "val_loss" in line]
    first_worse = next(i for i in range(2, 7) if evaluations[i] >= min(evaluations[1:i]))  # 0: before any update
    assert first_worse < 6
    said = run("part", *words, "--early_stopping=1")
    saved = state(tmp_path / "part")
    assert saved["step"] == saved["evaluated_at"] == 2 * first_worse and "early_stopping" in said
    assert state(tmp_path / "part", "best")["val_loss"] == saved["best_loss"] == min(evaluations[1 : first_worse + 1])
    shutil.copytree(tmp_path / "part", tmp_path / "again")
    assert "early_stopping=1" in run("again", "--init_from=resume")  # no-op: the run has ended
    assert state(tmp_path / "again") == saved
    run("part", "--init_from=resume", "--early_stopping=0")
    assert numbers(tmp_path / "part") == numbers(tmp_path / "whole")


def best_is_the_best(out_dir) -> float:
    """Assert that `best` points to the checkpoint that the newest one records as the best, and return its loss."""
    newest, best = state(out_dir), state(out_dir, "best")
    assert (newest["best_step"], newest["best_loss"]) == (best["step"], best["val_loss"])
    return best["val_loss"]


def test_fine_tuning_that_gets_worse_keeps_its_best_checkpoint(run, tmp_path):
    run("base", "--max_iters=40", "--learning_rate=1e-2")
    words = ["--learning_rate=1", "--warmup_iters=30", "--max_iters=6"]
    run("out", *words, f"--init_from={tmp_path / 'base'}", "--keep_checkpoints=1")
    first, *trained = [line["val_loss"] for line in metrics(tmp_path / "out") if "val_loss" in line]
    assert best_is_the_best(tmp_path / "out") == min(trained) > first
    assert min(trained) < trained[-1]
    shutil.rmtree(tmp_path / "out" / (tmp_path / "out" / "best").read_text().strip())
    run("out", "--init_from=resume", "--max_iters=8")  # the deleted best checkpoint does not count
    assert best_is_the_best(tmp_path / "out") == state(tmp_path / "out")["val_loss"]


def test_retrained_step_is_not_mistaken_for_the_best(run, tmp_path):
    """The newest checkpoint is the best one, and damaged. The run resumes from the previous one, and gets worse."""
    run("out", "--max_iters=6", "--keep_checkpoints=3")
    assert best_is_the_best(tmp_path / "out") == state(tmp_path / "out")["val_loss"]
    (tmp_path / "out" / "step_000006" / "model.safetensors").write_bytes(b"damaged")
    run("out", "--init_from=resume", "--learning_rate=9", "--decay_lr=False", "--keep_checkpoints=1")
    assert best_is_the_best(tmp_path / "out") and state(tmp_path / "out", "best")["step"] == 4


def test_best_loss_is_reset_if_the_loss_changes_its_meaning(run, tmp_path):
    run("out", "--max_iters=4", "--pos=rope")
    before = best_is_the_best(tmp_path / "out")
    said = run("out", "--init_from=resume", "--max_iters=6", "--block_size=2", "--learning_rate=1e-9", "--min_lr=0")
    assert "something else with block_size=2" in said and "step_000004" in said
    assert best_is_the_best(tmp_path / "out") == state(tmp_path / "out")["val_loss"] != before


def test_resuming_with_larger_evaluations_is_noted(run, tmp_path):
    run("out", "--max_iters=4", "--eval_iters=2", "--batch_size=2")
    assert "measure" not in run("out", "--init_from=resume", "--max_iters=5")
    said = run("out", "--init_from=resume", "--max_iters=6", "--eval_iters=3")
    assert "now measure 6 sequences of a split, earlier ones 4:" in said


def test_time_limit_ends_a_run_and_resuming_continues_it(run, tmp_path):
    run("whole")
    said = run("part", "--max_minutes=1e-9")  # ends after the first update
    saved = state(tmp_path / "part")
    assert saved["step"] == saved["evaluated_at"] == 1 and "max_minutes" in said and "done" in said
    assert "max_minutes" in run("part", "--init_from=resume")  # no-op
    assert state(tmp_path / "part") == saved
    run("part", "--init_from=resume", "--max_minutes=9")
    own = [line for line in metrics(tmp_path / "part") if line["step"] != 1 or "val_loss" not in line]
    assert [line.get("val_loss", line.get("loss")) for line in own] == losses(tmp_path / "whole")


def test_signal_ends_a_run_after_the_current_update(run, tmp_path, monkeypatch):
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def interrupted(*args, **kwargs):
        calls.append(clip(*args, **kwargs))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return calls[-1]

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)
    assert "stopped at step 3, saved" in run("out", code=128 + signal.SIGTERM)


def test_warmup_longer_than_the_run_is_noted(run):
    assert "rises only to 1.00e-02, because warmup_iters=99 exceeds max_iters=1" in run(
        "out", "--warmup_iters=99", "--max_iters=1", "--learning_rate=1", "--dry_run=True"
    )
    assert "rises only" not in run("out", "--warmup_iters=1", "--max_iters=1", "--dry_run=True")


def test_last_message_gives_a_command_that_works(tmp_path, capsys):
    """A run with the reward of a file resumes only with --reward, and a run without a checkpoint not at all."""
    s = TrainSettings(out_dir=str(tmp_path), reward="my reward.py", max_minutes=5)

    def end(failure: str | None) -> int:
        checkpoints = SimpleNamespace(finish=lambda: failure)
        return finish(s, RunState(step=1), checkpoints, Console(True, []), TIME_IS_UP, chat=True)

    assert end(None) == 0
    assert "--reward='my reward.py' --init_from=resume --max_minutes=0" in capsys.readouterr().out
    assert end("disk full") == 2
    assert "Fix the cause, and start again." in capsys.readouterr().err
    (tmp_path / "step_000001").mkdir()
    assert end("disk full") == 2
    assert "resume with: " in capsys.readouterr().err
