"""acorn/report.py: metrics.jsonl without gaps or duplicates, plots, comparison of runs, and number formatting."""

import json
import math
import os
import random
import sys
import types
from pathlib import Path

import pytest
from helpers import SMALL, TINY, train_here

from acorn import UserError, checkpoint, report, visible


def test_resumed_run_has_no_gaps_or_duplicates_in_metrics(tmp_path):
    metrics = report.Metrics(tmp_path, 0, None)
    metrics.write(step=0, val_loss=4.0)
    for step in range(6):
        metrics.write(step=step, loss=float(step))
    metrics.write(step=4, val_loss=3.0)
    with open(metrics.path, "a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    metrics = report.Metrics(tmp_path, 4, evaluated_at=4)  # resumes from the checkpoint of step 4
    for step in (4, 5):
        metrics.write(step=step, loss=10.0 + step)
    lines = [json.loads(line) for line in metrics.path.read_text().splitlines()]
    assert [m["loss"] for m in lines if "loss" in m] == [0.0, 1.0, 2.0, 3.0, 14.0, 15.0]
    assert [(m["step"], m["val_loss"]) for m in lines if "val_loss" in m] == [(0, 4.0), (4, 3.0)]
    report.Metrics(tmp_path, 4, evaluated_at=None)  # saved before the evaluation of step 4, which is repeated
    assert [m["step"] for m in report.read_metrics(metrics.path) if "val_loss" in m] == [0]


def test_failed_metrics_write_loses_only_its_line_and_warns_once(tmp_path, capsys):
    metrics = report.Metrics(tmp_path, 0, None)
    metrics.write(step=0, loss=4.0)
    os.rename(metrics.path, tmp_path / "kept")
    metrics.path.mkdir()  # writing to a folder fails
    metrics.write(step=1, loss=3.0)
    metrics.write(step=2, loss=2.0)
    metrics.path.rmdir()
    (tmp_path / "kept").write_text('{"step": 0, "loss": 4.0}\n{"step": 1, "lo')
    os.rename(tmp_path / "kept", metrics.path)
    metrics.write(step=3, loss=1.0)
    assert [m["step"] for m in report.read_metrics(metrics.path)] == [0, 3]
    assert capsys.readouterr().err.count("Is a directory") == 1


def test_draw_curve_writes_an_image(tmp_path):
    picture = tmp_path / "loss.png"
    report.draw_curve([], picture)  # no metrics yet
    metrics = [{"step": s, "loss": 4 / (s + 1)} for s in range(50)]
    metrics += [{"step": s, "train_loss": 1.0, "val_loss": 2.0} for s in (0, 49)]
    report.draw_curve(metrics, picture)
    from matplotlib import image

    pixels = image.imread(picture)
    assert pixels.shape[0] > 400 and pixels.shape[1] > 800
    assert len({tuple(p) for p in pixels.reshape(-1, pixels.shape[2])[::7].round(1)}) > 3  # not a blank image


def test_missing_wandb_raises_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed"):
        report.start_wandb("p", "n", {}, tmp_path, None)


def test_resumed_run_continues_its_wandb_run(tmp_path, monkeypatch):
    wandb, started, logged = types.ModuleType("wandb"), [], []
    run = types.SimpleNamespace(id="abc", log=lambda values, step: logged.append((step, values)))
    wandb.init = lambda **options: started.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run_id = report.start_wandb("p", "n", {}, tmp_path, None).id
    assert (started[0]["project"], started[0]["name"]) == ("p", "n")
    metrics = report.Metrics(tmp_path, 0, None, report.start_wandb("p", "n", {}, tmp_path, run_id))
    assert [(o["id"], o["resume"]) for o in started] == [(None, None), ("abc", "allow")]
    metrics.write(step=3, loss=1.5, memory=[7, 8])
    assert logged == [(3, {"step": 3, "loss": 1.5, "memory/0": 7, "memory/1": 8})]


def test_spikes_are_found_but_falling_and_noisy_losses_are_not():
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


def test_report_compares_runs(tmp_path, monkeypatch, capsys):
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
    assert said["runs"]["a"]["tokens per second"] == 109 and said["runs"]["a"]["steps"] == 20
    from matplotlib import image

    assert image.imread("x.png").shape[1] > 1000
    assert compare(monkeypatch, "out/a", "out/c") == 0
    table = capsys.readouterr().out
    assert "c has no complete checkpoint" in table and "n_layer" not in table and "report.png" in table
    assert "comparable" not in table
    for name in ("d", "e"):
        os.makedirs(f"out/{name}")
        make_run(tmp_path / "out" / name, {"dataset": name, "objective": {"d": "tokens", "e": "grpo"}[name]}, 1.0)
    assert compare(monkeypatch, "out/d", "out/e") == 0
    assert "differ in objective and dataset, so their losses and ranks may not be comparable" in capsys.readouterr().out
    before = set(tmp_path.iterdir())
    for words, said in (
        (["out/a", "out/nowhere"], "out/nowhere has no metrics.jsonl"),
        (["out/a", "out/a"], "given twice"),
        (["out/a", "--out=x.txt"], ".png"),
        (["out/a", "--out=nowhere/x.png"], "no folder nowhere"),
    ):
        with pytest.raises(UserError, match=said):
            compare(monkeypatch, *words)
    assert set(tmp_path.iterdir()) == before


@pytest.fixture
def figures(monkeypatch):
    """Collect the drawn figures instead of writing files."""
    drawn = []

    def keep(figure, picture):
        figure.canvas.draw()  # fails if a name is parsed as a formula
        drawn.append(figure)

    monkeypatch.setattr(report, "save_picture", keep)
    return drawn


def test_legend_shows_run_names_literally(figures):
    line = [{"step": s, "loss": 2.0, "val_loss": 2.0, "seconds": s} for s in range(3)]
    names = ["a $x^$ b$", "_hidden", "50%", "back\\slash$", "plain"]
    assert report.draw_runs(dict.fromkeys(names, line), "x.png") is None
    legend = figures[0].axes[1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == names
    assert len({handle.get_color() for handle in legend.legend_handles}) == len(names)
    report.draw_curve(line, Path("_a $x^$ b$") / "loss.png")
    assert figures[1].axes[0].get_title() == "_a $x^$ b$"


def test_fallback_font_is_found_or_a_note_reports_missing_characters(monkeypatch):
    import matplotlib
    from matplotlib import font_manager

    fonts = {name: font_manager.findfont(name) for name in ("DejaVu Sans", "STIXGeneral")}
    rare = chr(min(report.characters(fonts["STIXGeneral"]) - report.characters(fonts["DejaVu Sans"])))
    with matplotlib.rc_context({"font.family": ["DejaVu Sans"]}):
        assert report.drawable(["a", "b"]) == (["a", "b"], ["DejaVu Sans"], None)
        only = [font for font in font_manager.fontManager.ttflist if font.name in ("DejaVu Sans", "STIXGeneral")]
        only.sort(key=lambda font: font.name)
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
        monkeypatch.setattr(font_manager.fontManager, "ttflist", only)
        assert report.drawable(["a", f"x{rare}"]) == (["a", f"x{rare}"], ["DejaVu Sans", "STIXGeneral"], None)
        names, _, note = report.drawable(["a", f"x\U0010fffd{rare}"])
        monkeypatch.setattr(font_manager.fontManager, "ttflist", only[:1])  # the other font is newly installed
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [fonts["STIXGeneral"], "/no/such/font.ttf"])
        assert report.drawable([rare]) == ([rare], ["DejaVu Sans", "STIXGeneral"], None)
    assert names == ["a", "run 2"] and f"run 2 is x\U0010fffd{rare}" in note
    assert visible("a\nb\x1b[31m\udcff中") == "a\\nb\\x1b[31m\\udcff中"


def test_loss_axis_is_scaled_to_losses_after_the_initial_drop(figures, tmp_path):
    metrics = [{"step": s, "loss": 2 - s / 1000 + 8 * math.exp(-s / 10) + 0.1 * (s % 2)} for s in range(1000)]
    metrics[700]["loss"] = 9.0  # an outlier, marked at the edge of the plot
    metrics += [{"step": s, "train_loss": 1.5 - s / 2000, "val_loss": 2.5 - s / 1000} for s in range(0, 1001, 250)]
    report.draw_curve(metrics, tmp_path / "mine" / "loss.png")
    axes = figures[0].axes[0]
    low, high = axes.get_ylim()
    assert 0.8 < low < 1.0 and 2.2 < high < 2.5
    assert "updates" in axes.get_xlabel() and "nats" in axes.get_ylabel() and axes.get_title().endswith("mine")
    (mark,) = (c for c in axes.collections if "spikes" in c.get_label())
    assert mark.get_offsets()[:, 1].max() == pytest.approx(high)
    report.draw_curve([{"step": 0, "loss": 4.0}], tmp_path / "loss.png")  # one point has no range
    report.draw_curve([{"step": s, "loss": 4.0} for s in range(9)], tmp_path / "loss.png")


def test_runs_with_different_tokenizers_are_ranked_by_bits_per_byte(tmp_path, monkeypatch, capsys, figures):
    monkeypatch.chdir(tmp_path)
    for name, loss, per_byte, kind in (("a", 1.0, 2.0, "char"), ("b", 3.0, 1.0, "gpt2"), ("c", 2.0, None, "char")):
        os.makedirs(f"{name}/step_000002")
        metrics = report.Metrics(tmp_path / name, 0, None)
        bits = {} if per_byte is None else {"val_bits_per_byte": per_byte}
        metrics.write(step=1, loss=loss, seconds=1.0)
        metrics.write(step=2, val_loss=loss, **bits, seconds=1.0)
        state = {"settings": {}, "tokenizer": {"kind": kind, "chat_template": name}}
        (tmp_path / name / "step_000002" / "state.json").write_text(json.dumps(state))

    def ranks(*names) -> tuple[dict, str]:
        assert compare(monkeypatch, *names, "--json") == 0
        said = json.loads(capsys.readouterr().out)
        return {name: run["rank"] for name, run in said["runs"].items()}, said["ranked_by"]

    assert ranks("a", "b", "c") == ({"a": 2, "b": 1, "c": None}, "bits per byte")
    assert ranks("a", "c") == ({"a": 1, "c": 2}, "val loss")
    assert "bits per byte" in figures[0].axes[2].get_ylabel() and "loss" in figures[1].axes[2].get_ylabel()
    compare(monkeypatch, "a", "b")
    assert "the tokenizers differ" in capsys.readouterr().out


def test_durations_and_sizes_are_human_readable():
    assert [report.duration(s) for s in (8.6, 125, 12000, 362880)] == ["9 s", "2:05 min", "3:20 h", "4.2 days"]
    assert [report.size(n) for n in (12, 5120, 1.5e6, 2.5e9, 4e13)] == ["12 B", "5.1 KB", "1.5 MB", "2.5 GB", "40 TB"]


BAD_LINES = [
    b'{"step": 3, "loss": "<script>"}',
    b'{"step": 99999999999999999999, "val_loss": 3}',
    b'{"step": true, "loss": 1.0}',
    b'{"step": -1, "loss": 1.0}',
    b'{"step": 1, "val_loss": [1.0]}',
    b'{"step": 1, "loss": 1' + b"0" * 400 + b"}",
    b'{"step": 1, "seconds": {}}',
    b"[1, 2]",
    b"null",
    b"\xff\xfe\x00",
    b'{"step": 1, "lo',
    b"[" * 20_000,
    b"\x1b[2J",
]


def test_training_resumes_despite_invalid_metrics_lines(dataset, tmp_path, monkeypatch, capsys):
    out, words = tmp_path / "o", [*TINY, *SMALL, f"--dataset={dataset}", f"--out_dir={tmp_path / 'o'}"]
    assert train_here(monkeypatch, *words, "--max_iters=2") == 0
    good = report.read_metrics(out / "metrics.jsonl")
    with open(out / "metrics.jsonl", "ab") as file:
        file.write(b"\n".join([*BAD_LINES, b'{"step": 1, "loss": NaN, "val_loss": Infinity}', b""]))
    capsys.readouterr()
    assert train_here(monkeypatch, *words, "--max_iters=4", "--init_from=resume") == 0
    said = capsys.readouterr().err
    assert said.count("warning:") == 1 and f"{len(BAD_LINES)} " in said and "\x1b" not in said
    assert checkpoint.find(out)[1]["step"] == 4
    lines = report.read_metrics(out / "metrics.jsonl")
    assert lines[: len(good)] == good and lines[len(good)] == {"step": 1, "loss": None, "val_loss": None}
    assert [line["step"] for line in lines[len(good) + 1 :]] == [2, 3, 4]


def test_training_saves_before_drawing_and_survives_plot_and_wandb_errors(dataset, tmp_path, monkeypatch, capsys):
    seen = []

    def fails(*_):
        seen.append(sorted(folder.name for folder in (tmp_path / "o").glob("*step_*")))
        raise ZeroDivisionError("\x1b[2Jno font")

    class Wandb:
        id = "x"

        def log(self, *_, **__):
            raise RuntimeError("no network")

    monkeypatch.setattr(report, "draw_losses", fails)
    monkeypatch.setattr(report, "DRAW_SECONDS", -1)
    monkeypatch.setattr(report, "start_wandb", lambda *_: Wandb())
    save, saved = checkpoint.Writer.save, []
    monkeypatch.setattr(checkpoint.Writer, "save", lambda *a: (saved.append(len(seen)), save(*a)))
    words = [*TINY, *SMALL, f"--dataset={dataset}", f"--out_dir={tmp_path / 'o'}", "--wandb_log=True", "--max_iters=4"]
    assert train_here(monkeypatch, *words) == 0
    said = capsys.readouterr().err
    assert len(seen) == 3 and saved == [1, 2]  # plots at steps 0, 2 and 4; checkpoints at 2 and 4, each before its plot
    assert said.count("the run continues") == 4 and said.count("wandb logging failed") == 1 and "\x1b" not in said
    assert checkpoint.find(tmp_path / "o")[1]["step"] == 4


def test_tensorboard_has_no_duplicates_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = report.Metrics(tmp_path, 0, None, tensorboard=report.start_tensorboard(tmp_path, 0, None))
    for step in range(4):
        metrics.write(step=step, loss=4.0 - step, mfu=None, memory=[7, 8])
    metrics.write(step=2, val_loss=2.5)  # then the run is killed, after the checkpoint of step 2
    metrics = report.Metrics(tmp_path, 2, 2, tensorboard=report.start_tensorboard(tmp_path, 2, 2))
    metrics.write(step=3, loss=0.5)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    read = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert read["loss"] == [(0, 4.0), (1, 3.0), (2, 2.0), (3, 0.5)]
    assert read["val_loss"] == [(2, 2.5)] and read["memory/1"][0] == (0, 8.0) and "mfu" not in read


def test_missing_tensorboard_raises_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        report.start_tensorboard(tmp_path, 0, None)


def test_short_run_draws_its_curve_once(dataset, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "draw_losses", lambda metrics, picture: drawn.append(metrics[-1]["step"]))
    words = [*TINY, *SMALL, f"--dataset={dataset}", f"--out_dir={tmp_path / 'o'}", "--max_iters=4"]
    assert train_here(monkeypatch, *words) == 0
    assert drawn == [4]
