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
    first_worse = next(i for i in range(1, 7) if evaluations[i] >= min(evaluations[:i]))
    assert 0 < first_worse < 6
    said = run("part", *words, "--early_stopping=1")
    saved = state(tmp_path / "part")
    assert saved["step"] == saved["evaluated_at"] == 2 * first_worse and "early_stopping" in said
    assert saved["best_loss"] == min(evaluations[: first_worse + 1])
    if first_worse > 1:  # weights without any update are not saved
        assert state(tmp_path / "part", "best")["val_loss"] == saved["best_loss"]
    shutil.copytree(tmp_path / "part", tmp_path / "again")
    assert "early_stopping=1" in run("again", "--init_from=resume")  # it has ended, and nothing happens
    assert state(tmp_path / "again") == saved
    run("part", "--init_from=resume", "--early_stopping=0")
    assert numbers(tmp_path / "part") == numbers(tmp_path / "whole")


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
