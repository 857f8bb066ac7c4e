"""How a run ends before max_iters, by time or by patience, and how it continues."""

import json
import shutil

import pytest
from helpers import SMALL, TINY, losses, metrics, numbers, train_here

from acorn import report

RUN = [*TINY, *SMALL, "--max_iters=12"]


@pytest.fixture
def run(dataset, tmp_path, monkeypatch, capsys):
    """Run train.py in this process, in the folder tmp_path / name, and return what it printed."""
    monkeypatch.setattr(report, "draw_curve", lambda *_: None)  # it takes longer than all the rest

    def call(name: str, *words, code=0) -> str:
        words = words if "--init_from=resume" in words else [*RUN, f"--dataset={dataset}", *words]
        assert train_here(monkeypatch, *words, f"--out_dir={tmp_path / name}") == code
        return capsys.readouterr().out

    return call


def state(out_dir, pointer="latest") -> dict:
    return json.loads((out_dir / (out_dir / pointer).read_text().strip() / "state.json").read_text())


def test_patience_ends_a_run_with_its_best_checkpoint_and_resuming_continues_it_to_the_bit(run, tmp_path):
    words = ["--learning_rate=1", "--warmup_iters=2", "--dropout=0.2"]  # the loss rises and falls
    run("whole", *words)
    evaluations = [line["val_loss"] for line in metrics(tmp_path / "whole") if "val_loss" in line]
    first_worse = next(i for i in range(2, 7) if evaluations[i] >= min(evaluations[1:i]))  # 0: before any update
    assert first_worse < 6
    said = run("part", *words, "--early_stopping=1")
    saved = state(tmp_path / "part")
    assert saved["step"] == saved["evaluated_at"] == 2 * first_worse and "early_stopping" in said
    assert state(tmp_path / "part", "best")["val_loss"] == saved["best_loss"] == min(evaluations[1 : first_worse + 1])
    shutil.copytree(tmp_path / "part", tmp_path / "again")
    assert "early_stopping=1" in run("again", "--init_from=resume")  # it has ended, and nothing happens
    assert state(tmp_path / "again") == saved
    run("part", "--init_from=resume", "--early_stopping=0")
    assert numbers(tmp_path / "part") == numbers(tmp_path / "whole")


def best_is_the_best(out_dir) -> float:
    """Assert that `best` is the checkpoint with the loss that the newest one calls the best, and return that loss."""
    newest, best = state(out_dir), state(out_dir, "best")
    assert (newest["best_step"], newest["best_loss"]) == (best["step"], best["val_loss"])
    return best["val_loss"]


def test_fine_tuning_that_only_gets_worse_keeps_its_best_checkpoint(run, tmp_path):
    run("base", "--max_iters=40", "--learning_rate=1e-2")
    words = ["--learning_rate=1", "--warmup_iters=30", "--max_iters=6"]
    run("out", *words, f"--init_from={tmp_path / 'base'}", "--keep_checkpoints=1")
    first, *trained = [line["val_loss"] for line in metrics(tmp_path / "out") if "val_loss" in line]
    assert best_is_the_best(tmp_path / "out") == min(trained) > first
    assert min(trained) < trained[-1]
    shutil.rmtree(tmp_path / "out" / (tmp_path / "out" / "best").read_text().strip())
    run("out", "--init_from=resume", "--max_iters=8")  # it does not compare with what is gone
    assert best_is_the_best(tmp_path / "out") == state(tmp_path / "out")["val_loss"]


def test_a_step_that_is_trained_again_is_not_the_best_by_its_name(run, tmp_path):
    """The newest checkpoint, the best, is damaged; the run continues from the one before, and gets worse."""
    run("out", "--max_iters=6", "--keep_checkpoints=3")
    assert best_is_the_best(tmp_path / "out") == state(tmp_path / "out")["val_loss"]
    (tmp_path / "out" / "step_000006" / "model.safetensors").write_bytes(b"damaged")
    run("out", "--init_from=resume", "--learning_rate=9", "--decay_lr=False", "--keep_checkpoints=1")
    assert best_is_the_best(tmp_path / "out") and state(tmp_path / "out", "best")["step"] == 4


def test_losses_that_cannot_be_compared_are_not(run, tmp_path):
    run("out", "--max_iters=4", "--pos=rope")
    before = best_is_the_best(tmp_path / "out")
    said = run("out", "--init_from=resume", "--max_iters=6", "--block_size=2", "--learning_rate=1e-9", "--min_lr=0")
    assert "something else with block_size=2" in said and "step_000004" in said
    assert best_is_the_best(tmp_path / "out") == state(tmp_path / "out")["val_loss"] != before


def test_the_time_limit_ends_a_run_as_if_it_were_finished(run, tmp_path):
    run("whole")
    said = run("part", "--max_minutes=1e-9")  # over before the first update
    saved = state(tmp_path / "part")
    assert saved["step"] == saved["evaluated_at"] == 1 and "max_minutes" in said and "done" in said
    assert "max_minutes" in run("part", "--init_from=resume")  # it has ended
    assert state(tmp_path / "part") == saved
    run("part", "--init_from=resume", "--max_minutes=9")
    own = [line for line in metrics(tmp_path / "part") if line["step"] != 1 or "val_loss" not in line]
    assert [line.get("val_loss", line.get("loss")) for line in own] == losses(tmp_path / "whole")
