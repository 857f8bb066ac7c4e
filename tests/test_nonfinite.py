"""NaN and Inf: bad gradients are skipped, and non-finite weights or moments are neither saved nor loaded."""

import json
import os
import signal
import sys

import pytest
import torch
from helpers import TINY, make_older, metrics, save_small, small_model, small_optimizers, train, train_here
from safetensors.torch import load_file, save_file

import train as train_script
from acorn import UserError, checkpoint, report
from acorn.checkpoint import save
from acorn.training import optim

pytestmark = pytest.mark.usefixtures("no_pictures")


def math_is_fine(model) -> bool:
    """Return whether the model's logits are finite."""
    x = torch.zeros(1, 4, dtype=torch.long)
    with torch.no_grad():
        return bool(model(x, x)[0].isfinite().all())


def test_training_stops_after_too_many_non_finite_gradients(dataset, tmp_path):
    result = train(tmp_path, dataset, "--learning_rate=1e30", "--grad_clip=0", "--max_bad_steps=3", "--out_dir=o")
    assert result.returncode == 1
    assert "3 consecutive updates had a non-finite gradient" in result.stderr
    assert "NaN" not in (tmp_path / "o" / "metrics.jsonl").read_text()  # JSON has no NaN
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("host_decides", [(), ("cpu",)])
def test_unlogged_skipped_updates_count_towards_max_bad_steps(dataset, tmp_path, monkeypatch, capsys, host_decides):
    monkeypatch.setattr(optim, "HOST_DECIDED_DEVICES", host_decides)
    clip, calls, broken = torch.nn.utils.clip_grad_norm_, [], {2, 3, 5, 8, 9, *range(11, 16), 18, 19, 20, 21, 22, 23}

    def poisoned(parameters, *args, **kwargs):
        parameters = list(parameters)
        if len(calls) in broken:
            parameters[2].grad.view(-1)[0] = float("nan")
        calls.append(clip(parameters, *args, **kwargs).item())
        return torch.tensor(calls[-1])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # keep pytest's handlers
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    words = ["--log_interval=7", "--eval_interval=100", f"--dataset={dataset}", "--out_dir=o", "--max_bad_steps=6"]
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *words, "--max_iters=10"])
    assert train_script.main() == 0
    state = json.loads((tmp_path / "o" / "step_000010" / "state.json").read_text())
    assert state["skipped"] == 5 and state["bad_steps"] == 2
    monkeypatch.setattr(sys, "argv", ["train.py", "--init_from=resume", "--out_dir=o", "--max_iters=40"])
    assert train_script.main() == 1
    assert "stops at step 23" in capsys.readouterr().err and len(calls) == 24
    assert [(m["step"], m["skipped"]) for m in metrics(tmp_path / "o") if "loss" in m] == [
        (step, sum(i <= step for i in broken)) for step in (0, 7, 14, 21)
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_and_moments_are_not_loaded(tmp_path, monkeypatch, bad):
    monkeypatch.setattr(save, "check_finite", lambda *_: None)  # another program may have written non-finite values
    m = small_model()
    with torch.no_grad():
        m.transformer.h[0].mlp.c_fc.weight[3, 2] = bad
    save_small(tmp_path, 1, m)
    for load in (
        lambda: checkpoint.load_model(str(tmp_path)),
        lambda: checkpoint.fill(*checkpoint.build_model(*checkpoint.find(tmp_path))),
    ):
        with pytest.raises(UserError, match=r"broken: transformer\."):
            load()

    m = small_model()
    optimizers = small_optimizers(m, "muon")
    next(iter(optimizers[1].state.values()))["momentum"][0, 0] = bad
    step = save_small(tmp_path, 2, m, optimizers=optimizers)
    torch.save({"optimizers": [optimizer.state_dict() for optimizer in optimizers]}, tmp_path / "moments")
    for older in (False, True):
        if older:
            make_older(step, (tmp_path / "moments").read_bytes())
        folder, state = checkpoint.find(tmp_path)
        with pytest.raises(UserError, match=r"broken: transformer\..*\.momentum"):
            checkpoint.load_optimizers(folder, state, m, optimizers)


def test_non_finite_hugging_face_weights_are_not_loaded(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=257, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("ln_f.bias"))
    tensors[name][0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"broken: .*ln_f\.bias"):
        checkpoint.load_model(str(tmp_path))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradients_are_skipped_and_training_continues(dataset, tmp_path, monkeypatch, capsys, bad):
    clip, calls = torch.nn.utils.clip_grad_norm_, 0

    def poisoned(parameters, *args, **kwargs):
        nonlocal calls
        parameters, calls = list(parameters), calls + 1
        if calls in (3, 4):
            parameters[2].grad.view(-1)[0] = bad
        return clip(parameters, *args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    assert train_here(monkeypatch, *TINY, f"--dataset={dataset}", f"--out_dir={tmp_path / 'o'}", "--max_iters=8") == 0
    assert capsys.readouterr().out.count("skipped updates: 1 ") == 2
    assert report.read_metrics(tmp_path / "o" / "metrics.jsonl")[-1]["val_loss"] < 4
    checkpoint.load_model(str(tmp_path / "o"))


def test_a_diverged_run_keeps_its_good_checkpoints(dataset, tmp_path, monkeypatch, capsys):
    words = [f"--dataset={dataset}", f"--out_dir={tmp_path / 'o'}", "--eval_interval=2", "--keep_checkpoints=1"]
    assert train_here(monkeypatch, *TINY, *words, "--max_iters=4") == 0
    broken = [*words, "--init_from=resume", "--max_iters=30", "--learning_rate=1e30", "--decay_lr=False"]
    train_here(monkeypatch, *TINY, *broken, "--grad_clip=0")
    assert "(the val loss is not finite" in capsys.readouterr().err
    assert math_is_fine(checkpoint.load_model(str(tmp_path / "o"), "latest")[0])


@pytest.mark.parametrize("ends", ["at its last update", "by a signal"])
def test_training_fails_if_the_last_weights_are_non_finite(dataset, tmp_path, monkeypatch, capsys, ends):
    clip, calls = torch.nn.utils.clip_grad_norm_, 0

    def poisoned(parameters, *args, **kwargs):
        nonlocal calls
        parameters, calls = list(parameters), calls + 1
        if calls == 7:
            parameters[2].data.view(-1)[0] = float("nan")
            if ends == "by a signal":
                os.kill(os.getpid(), signal.SIGTERM)
        return clip(parameters, *args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    words = [f"--dataset={dataset}", f"--out_dir={tmp_path / 'o'}", "--eval_interval=3", "--max_iters=8"]
    assert train_here(monkeypatch, *TINY, *words) == 2
    said = capsys.readouterr()
    assert "done" not in said.out and "stopped at" not in said.out
    why = "the val loss is not finite" if ends == "at its last update" else "transformer.h.0.ln_1.weight is not finite"
    assert f"error: the last updates are not saved ({why}; " in said.err.splitlines()[-1]
    assert (tmp_path / "o" / "latest").read_text() == (tmp_path / "o" / "best").read_text() == "step_000006\n"
