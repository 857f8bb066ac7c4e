"""metrics.jsonl without gaps or doubles, the picture, and how numbers are said."""

import json
import math
import os
import random
import sys
import types

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


def test_a_run_that_goes_on_is_the_same_run_in_wandb(tmp_path, monkeypatch):
    wandb, started, logged = types.ModuleType("wandb"), [], []
    run = types.SimpleNamespace(id="abc", log=lambda values, step: logged.append((step, values)))
    wandb.init = lambda **options: started.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run_id = report.start_wandb("p", "n", {}, tmp_path, None).id
    metrics = report.Metrics(tmp_path, 0, None, report.start_wandb("p", "n", {}, tmp_path, run_id))
    assert [(o["id"], o["resume"]) for o in started] == [(None, None), ("abc", "allow")]
    metrics.write(step=3, loss=1.5, memory=[7, 8])
    assert logged == [(3, {"step": 3, "loss": 1.5, "memory/0": 7, "memory/1": 8})]


def test_a_loss_that_spikes_is_found_and_one_that_falls_or_shakes_is_not():
    chance = random.Random(0)
    losses = [1 + 3 * math.exp(-i / 40) + chance.gauss(0, 0.03) for i in range(400)]
    assert report.spikes(losses) == []
    losses[200] += 1
    losses[300:304] = [5.0, 6.0, 4.0, 3.0]
    assert report.spikes(losses) == [200, 300, 301, 302, 303]


def make_run(out_dir, settings, loss, **more):
    metrics = report.Metrics(out_dir, 0, None)
    for step in range(0, 20, 2):  # logged at every second update
        if step % 10 == 0:
            metrics.write(step=step, val_loss=loss + 1 / (step + 1), seconds=float(step))
        metrics.write(step=step, loss=loss + 2 / (step + 1), seconds=step + 0.5, tokens_per_second=100.0 + step, **more)
    metrics.write(step=20, val_loss=loss + 1 / 21, seconds=20.0)
    if settings:
        (out_dir / "step_000020").mkdir()
        (out_dir / "step_000020" / "state.json").write_text(json.dumps({"settings": settings}))


def compare(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, words)])
    return report.main()


def test_runs_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c"):
        os.makedirs(f"out/{name}")
    make_run(tmp_path / "out" / "a", {"n_layer": 2, "learning_rate": 0.01, "out_dir": "out/a"}, 1.0)
    make_run(tmp_path / "out" / "b", {"n_layer": 4, "learning_rate": 0.01, "out_dir": "out/b"}, 0.5, skipped=3)
    make_run(tmp_path / "out" / "c", None, 0.7)
    assert compare(monkeypatch, "out/a", "out/b", "--json", "--out=x.png") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["differ"] == {"n_layer": {"a": 2, "b": 4}}
    assert said["runs"]["b"]["best val loss"] == pytest.approx(0.5 + 1 / 21)
    assert said["runs"]["b"]["at step"] == 20 and said["runs"]["b"]["skipped updates"] == 3
    assert said["runs"]["a"]["tokens a second"] == 109 and said["runs"]["a"]["steps"] == 20
    from matplotlib import image

    assert image.imread("x.png").shape[1] > 1000
    assert compare(monkeypatch, "out/a", "out/c") == 0
    table = capsys.readouterr().out
    assert "c has no whole checkpoint" in table and "n_layer" not in table and "report.png" in table
    before = set(tmp_path.iterdir())
    for words, said in (
        (["out/a", "out/nowhere"], "out/nowhere holds no metrics.jsonl"),
        (["out/a", "out/a"], "given twice"),
        (["out/a", "--out=x.txt"], "should end in"),
        (["out/a", "--out=nowhere/x.png"], "no folder nowhere"),
    ):
        with pytest.raises(UserError, match=said):
            compare(monkeypatch, *words)
    assert set(tmp_path.iterdir()) == before


def test_numbers_as_a_person_says_them():
    assert [report.duration(s) for s in (8.6, 125, 12000, 362880)] == ["9 s", "2:05 min", "3:20 h", "4.2 days"]
    assert [report.size(n) for n in (12, 5120, 1.5e6, 2.5e9, 4e13)] == ["12 B", "5.1 KB", "1.5 MB", "2.5 GB", "40 TB"]
