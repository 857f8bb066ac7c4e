"""acorn/training/autotune.py: a run measures which arithmetic is fastest, and keeps it on resume."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import AVX2, REPO, TINY, script_here

from acorn.distributed import runtime
from acorn.training import autotune
from model import GPT, GPTConfig

SMALL = GPTConfig(block_size=64, vocab_size=64, n_layer=2, n_head=2, n_embd=128)


def test_emulated_bfloat16_is_never_chosen():
    code = (
        "import acorn, json, dataclasses\n"
        "from acorn.training import autotune\n"
        "from model import GPTConfig\n"
        "chosen, notes = autotune.measure(GPTConfig(block_size=64, vocab_size=64, n_embd=256, n_head=4), 8, True)\n"
        "print(json.dumps([dataclasses.asdict(chosen), notes]))"
    )
    environment = {**os.environ, **AVX2, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    chosen, notes = json.loads(done.stdout)
    assert chosen["dtype"] == chosen["muon_dtype"] == "float32"
    assert "float32" in notes[-1] and "bfloat16" in notes[-1]  # the note names both dtypes


def test_fastest_choice_wins_and_state_is_restored(monkeypatch):
    """Simulate a CPU on which bfloat16 takes half the time, and one on which it takes twice as long."""
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    monkeypatch.setattr(autotune, "bfloat16_slowdown", lambda: 1.0)
    for speed, winner in ((0.5, "bfloat16"), (2.0, "float32")):
        monkeypatch.setattr(autotune, "fastest", faked(speed))
        chosen, notes = autotune.measure(SMALL, 4, muon=True)
        assert chosen.dtype == chosen.muon_dtype == winner
        assert any("2.00x" in note for note in notes)
    assert torch.equal(state, torch.get_rng_state()) and torch.get_num_threads() == threads


def faked(bfloat16: float):
    def fastest(candidates, *_, **__):
        for work in candidates.values():
            work()  # each candidate must run
        times = {name: bfloat16 if name == "bfloat16" else 1.0 for name in candidates}
        return min(times, key=times.get), times

    return fastest


def test_explicit_dtype_is_used_without_timing(monkeypatch):
    monkeypatch.setattr(autotune, "fastest", None)
    for dtype in ("float32", "bfloat16"):
        r = runtime.setup("cpu", dtype, False)
        chosen, notes = autotune.choose(dtype, SMALL, 4, True, r)
        assert chosen.dtype == chosen.muon_dtype == dtype and notes == []


def test_choice_in_a_checkpoint_is_kept_on_the_same_machine_only(monkeypatch):
    r = runtime.setup("cpu", "auto", False)
    here = autotune.machine_name(r.device)
    monkeypatch.setattr(
        autotune,
        "measure",
        lambda *_: (autotune.fix_arithmetic(torch.float32, SMALL, r.device), ["measured"]),
    )
    before = dict(dtype="bfloat16", muon_dtype="float32", attention="plain", threads=1, machine=here)
    chosen, notes = autotune.choose("auto", SMALL, 4, True, r, before)
    assert dataclasses.asdict(chosen) == before and "from the checkpoint" in notes[0]
    broken = [{"threads": 10**9}, {"dtype": "int8"}, {"more": 1}, {"threads": "2"}]
    for other in ({"machine": "cpu AVX9, 3 cores"}, *broken):
        chosen, notes = autotune.choose("auto", SMALL, 4, True, r, before | other)
        assert chosen.dtype == "float32" and notes[0] == "measured"


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_plain_and_fused_attention_give_the_same_loss_and_gradient(p):
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(SMALL, n_layer=1, attn_dropout=0.0, dropout=p))
    idx, losses = torch.randint(64, (2, 64)), []
    for attention in ("fused", "plain"):
        dataclasses.replace(autotune.fix_arithmetic(torch.float32, SMALL, idx.device), attention=attention).apply(model)
        torch.manual_seed(1)
        model.zero_grad()
        loss = model(idx, idx)[1]
        loss.backward()
        losses.append((loss.item(), model.transformer.wte.weight.grad.norm().item()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_run_prints_its_choice_and_keeps_it_on_resume(dataset, tmp_path):
    words = [word for word in TINY if "dtype" not in word]
    words += [f"--dataset={dataset}", "--out_dir=o", "--dtype=auto", "--max_iters=2", "--eval_iters=1"]
    first = script_here("train.py", *words, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "(auto: " in first.stdout.split("dtype ", 1)[1].splitlines()[0]
    saved = json.loads((tmp_path / "o/step_000002/state.json").read_text())["arithmetic"]
    again = script_here("train.py", "--init_from=resume", "--out_dir=o", "--max_iters=3", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"dtype {saved['dtype']} (from the checkpoint)" in again.stdout
