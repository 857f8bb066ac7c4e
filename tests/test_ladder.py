"""acorn/training/ladder.py: fits of known scaling laws, and the forecast of a dry run from earlier runs."""

import re
import shutil

import numpy as np
import pytest
from helpers import REPO, TINY, metrics, train_here

import train
from acorn import settings
from acorn.training import ladder


@pytest.mark.parametrize("law", [(1.2, 300.0, 0.2), (0.0, 50.0, 0.1), (2.5, 4e4, 0.35)])
def test_fit_recovers_the_law_of_the_losses(law):
    truth = ladder.ScalingLaw(*law)
    flops = list(np.geomspace(1e11, 1e14, 4))
    found = ladder.fit(flops, [truth.loss(c) for c in flops])
    assert found.loss(1e15) == pytest.approx(truth.loss(1e15), abs=2e-3)
    assert found.floor == pytest.approx(truth.floor, abs=0.02)


def test_small_noise_changes_a_forecast_little():
    truth, flops = ladder.ScalingLaw(1.2, 300.0, 0.2), list(np.geomspace(1e12, 1e14, 5))
    noise = np.random.default_rng(0).normal(0, 0.002, 5)
    found = ladder.fit(flops, [truth.loss(c) + x for c, x in zip(flops, noise, strict=True)])
    assert found.loss(3e14) == pytest.approx(truth.loss(3e14), abs=0.01)


def test_unsuitable_losses_raise_value_error():
    with pytest.raises(ValueError, match="3 parameters"):
        ladder.fit([1e12, 1e12, 1e13], [1.5, 1.49, 1.4])
    with pytest.raises(ValueError, match="do not fall"):
        ladder.fit([1e12, 1e13, 1e14], [1.4, 1.5, 1.6])


def test_dry_run_forecasts_the_loss_from_runs_of_the_ladder(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [*TINY, f"--dataset={dataset}", "--eval_iters=0", "--dropout=0"]
    for i, n in enumerate((10, 25, 60)):
        assert train_here(monkeypatch, *words, f"--max_iters={n}", f"--out_dir=out/step-{i}") == 0
    assert train_here(monkeypatch, *words, "--max_iters=5", "--out_dir=out/other-1") == 0  # of another ladder
    capsys.readouterr()
    assert train_here(monkeypatch, *words, "--max_iters=60", "--out_dir=out/step-9", "--dry_run=True") == 0
    said = capsys.readouterr().out
    predicted = float(re.search(r"forecast: val loss ([\d.]+), from 3 runs", said)[1])
    reached = [line["val_loss"] for line in metrics(tmp_path / "out/step-2") if "val_loss" in line][-1]
    assert predicted == pytest.approx(reached, abs=0.05)  # for such short runs, the fitted floor is 0
    assert not (tmp_path / "out/step-9").exists()
    tuned = [*words, "--init_from=out/step-2", "--out_dir=out/step-9", "--dry_run=True", "--max_minutes=10"]
    assert train_here(monkeypatch, *tuned) == 0
    said = capsys.readouterr().out
    assert "from 3 runs" in said and "--n_layer" not in said  # the depth is that of the checkpoint
    student = ["--objective=distill", "--teacher=out/step-2", "--out_dir=out/step-9", "--dry_run=True"]
    assert train_here(monkeypatch, *words, *student) == 0
    assert "forecast" not in capsys.readouterr().out  # its loss is not that of the ladder
    assert train_here(monkeypatch, *words, "--max_iters=0", "--out_dir=out/step-0000") == 0  # has no FLOPs to fit
    empty = ["--max_iters=0", "--out_dir=out/step-9", "--dry_run=True"]
    assert train_here(monkeypatch, *words, *empty) == 0
    assert "forecast" not in capsys.readouterr().out
    shutil.copytree("out/step-2", "out/step-3")
    (tmp_path / "out/step-3/step_000060/state.json").write_text("{")  # a damaged run is ignored
    (tmp_path / "dial.py").write_text("n_layer = 2\nngram = n_layer - 1")  # depth 1 is invalid
    assert train_here(monkeypatch, "dial.py", *words, "--max_iters=60", "--out_dir=out/step-9", "--dry_run=True") == 0
    assert "from 3 runs" in capsys.readouterr().out
    assert train_here(monkeypatch, *words, "--out_dir=out/alone", "--dry_run=True") == 0
    assert "forecast" not in capsys.readouterr().out


def test_depth_on_the_command_line_sets_the_rest_of_the_config():
    config = str(REPO / "config/ladder.py")
    found = {depth: settings.parse(train.TrainSettings, [config, f"--n_layer={depth}"]) for depth in (2, 6)}
    assert [found[depth]["n_embd"] for depth in (2, 6)] == [64, 192]
    assert [found[depth]["out_dir"] for depth in (2, 6)] == ["out/ladder-2", "out/ladder-6"]
    assert settings.parse(train.TrainSettings, [config, "--n_layer=6", "--n_embd=96"])["n_embd"] == 96
