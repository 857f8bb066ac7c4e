"""metrics.jsonl without gaps or doubles, the picture, and how numbers are said."""

import json
import os
import sys

import pytest

from acorn import UserError, report


def test_a_resumed_run_continues_without_gaps_or_doubles(tmp_path):
    metrics = report.Metrics(tmp_path, 0, None)
    metrics.write(step=0, val_loss=4.0)
    for step in range(6):
        metrics.write(step=step, loss=float(step))
    metrics.write(step=4, val_loss=3.0)
    with open(metrics.path, "a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    metrics = report.Metrics(tmp_path, 4, evaluated_at=4)  # goes on from the checkpoint of step 4
    for step in (4, 5):
        metrics.write(step=step, loss=10.0 + step)
    lines = [json.loads(line) for line in metrics.path.read_text().splitlines()]
    assert [m["loss"] for m in lines if "loss" in m] == [0.0, 1.0, 2.0, 3.0, 14.0, 15.0]
    assert [(m["step"], m["val_loss"]) for m in lines if "val_loss" in m] == [(0, 4.0), (4, 3.0)]
    report.Metrics(tmp_path, 4, evaluated_at=None)  # a checkpoint before the evaluation of step 4, which comes again
    assert [m["step"] for m in report.read_metrics(metrics.path) if "val_loss" in m] == [0]


def test_a_line_that_the_disk_does_not_take_is_lost_and_the_run_goes_on(tmp_path, capsys):
    metrics = report.Metrics(tmp_path, 0, None)
    metrics.write(step=0, loss=4.0)
    os.rename(metrics.path, tmp_path / "kept")
    metrics.path.mkdir()  # nothing can be written there
    metrics.write(step=1, loss=3.0)
    metrics.write(step=2, loss=2.0)
    metrics.path.rmdir()
    (tmp_path / "kept").write_text('{"step": 0, "loss": 4.0}\n{"step": 1, "lo')
    os.rename(tmp_path / "kept", metrics.path)
    metrics.write(step=3, loss=1.0)
    assert [m["step"] for m in report.read_metrics(metrics.path)] == [0, 3]
    assert capsys.readouterr().err.count("cannot be written (Is a directory)") == 1


def test_the_curve_is_a_picture(tmp_path):
    picture = tmp_path / "loss.png"
    report.draw_curve([], picture)  # nothing yet
    metrics = [{"step": s, "loss": 4 / (s + 1)} for s in range(50)]
    metrics += [{"step": s, "train_loss": 1.0, "val_loss": 2.0} for s in (0, 49)]
    report.draw_curve(metrics, picture)
    from matplotlib import image

    pixels = image.imread(picture)
    assert pixels.shape[0] > 400 and pixels.shape[1] > 800
    assert len({tuple(p) for p in pixels.reshape(-1, pixels.shape[2])[::7].round(1)}) > 3  # not one blank sheet


def test_absent_wandb_is_one_clear_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed"):
        report.start_wandb("p", "n", {}, tmp_path, None)


def test_numbers_as_a_person_says_them():
    assert [report.duration(s) for s in (8.6, 125, 12000, 362880)] == ["9 s", "2:05 min", "3:20 h", "4.2 days"]
    assert [report.size(n) for n in (12, 5120, 1.5e6, 2.5e9, 4e13)] == ["12 B", "5.1 KB", "1.5 MB", "2.5 GB", "40 TB"]
