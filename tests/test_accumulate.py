"""acorn/training/accumulate.py: updates do not depend on the micro-batch size, even if memory runs out."""

import json
import signal
import sys

import numpy as np
import pytest
import torch
from forked import RUN, said_in_a_sentence
from helpers import TINY, numbers, script_here, train

import train as train_script
from acorn import UserError, checkpoint, report
from acorn.data import batches
from acorn.data.shards import load_dataset
from model import GPT

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.mark.parametrize("split", [(1, 8), (8, 1)])
def test_losses_do_not_depend_on_the_micro_batch_size(dataset, tmp_path, split):
    accumulation, batch_size = split
    common = ["--max_iters=6", "--dropout=0", "--eval_interval=3", "--eval_iters=0"]
    for out, words in (
        ("a", []),
        ("b", [f"--gradient_accumulation_steps={accumulation}", f"--batch_size={batch_size}"]),
    ):
        result = train(tmp_path, dataset, *common, *words, f"--out_dir={out}")
        assert result.returncode == 0, result.stderr
    for one, other in zip(numbers(tmp_path / "a"), numbers(tmp_path / "b"), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_reply_tokens_have_equal_weight_for_any_micro_batch_size(tmp_path):
    """Replies differ in length, so averaging the means of micro-batches would give a different loss."""
    pairs = [{"prompt": f"{n} a?", "response": " ".join("a" * n)} for n in range(1, 40)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    assert script_here("prepare", "chat", "p.jsonl", "--tokenizer=byte", "--out=d", cwd=tmp_path).returncode == 0
    words = ["--max_iters=4", "--dropout=0", "--eval_interval=2", "--eval_iters=0"]
    for out, more in (("a", []), ("b", ["--gradient_accumulation_steps=8", "--batch_size=1"])):
        result = train(tmp_path, "d", *words, *more, f"--out_dir={out}")
        assert result.returncode == 0, result.stderr
    assert "rows of 32 tokens" in result.stdout and "lose the end of their reply" in result.stdout
    for one, other in zip(numbers(tmp_path / "a"), numbers(tmp_path / "b"), strict=True):
        assert one == pytest.approx(other, rel=1e-5)

    data, model = load_dataset(str(tmp_path / "d")), checkpoint.load_model(str(tmp_path / "a"), "latest")[0].eval()
    x, y, documents = batches.in_order(data.val, 32, 0, batches.samples_per_epoch(data.val, 32))
    assert set(data.tokenizer.decode(y[y != -1]).replace("<|endoftext|>", "")) == {"a", " "}
    with torch.no_grad():
        log_probabilities = model(torch.tensor(x), torch.tensor(x), documents=torch.tensor(documents))[0].log_softmax(
            -1
        )
    nats = [-log_probabilities[i, t, y[i, t]].item() for i, t in zip(*np.nonzero(y != -1), strict=True)]
    assert numbers(tmp_path / "a")[-1]["val_loss"] == pytest.approx(np.mean(nats), rel=1e-5)


def test_out_of_memory_retries_the_update_in_smaller_micro_batches(dataset, tmp_path, monkeypatch, capsys):
    """Simulate a device that has memory only for batch size 1 after the fifth training pass."""
    forward, passes, held = GPT.forward, [], [10**9]

    def forward_in_little_memory(self, idx, *arguments, **options):
        passes.append(torch.is_grad_enabled())
        if torch.is_grad_enabled() and sum(passes) > 5 and len(idx) > held[0]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes")
        return forward(self, idx, *arguments, **options)

    def run(out, *more):
        passes.clear()
        words = ["--dropout=0", "--max_iters=6", "--eval_interval=2", f"--dataset={dataset}", f"--out_dir={out}"]
        words += ["--sample_interval=2"]
        monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *words, *more])
        return train_script.main()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(GPT, "forward", forward_in_little_memory)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # keep pytest's handlers
    assert run("whole") == 0
    held[0] = 1
    assert run("pieces", "--auto_batch=True") == 0
    said = capsys.readouterr().out
    assert "--batch_size=2 --gradient_accumulation_steps=4" in said
    assert "--batch_size=1 --gradient_accumulation_steps=8" in said
    assert said.count("sample at step 2") == 2  # one per run, although this update was tried three times
    for one, other in zip(numbers(tmp_path / "whole"), numbers(tmp_path / "pieces"), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    with pytest.raises(UserError, match="--batch_size=2 --gradient_accumulation_steps=4"):
        run("refused")
    held[0] = 0
    with pytest.raises(UserError, match="batch size 1"):
        run("hopeless", "--auto_batch=True")


@pytest.mark.slow
def test_out_of_memory_under_an_address_space_limit(dataset, start, tmp_path):
    """With auto_batch, smaller micro-batches give the same losses. Without it, the error suggests auto_batch."""
    large = "--batch_size=512 --gradient_accumulation_steps=1 --block_size=128 --n_embd=64 --max_iters=2"
    words = [*RUN, *large.split(), f"--dataset={dataset}", "--dropout=0"]
    assert start("train.py", *words, "--out_dir=whole", cwd=tmp_path).end() == 0
    pieces = start("train.py", *words, "--out_dir=pieces", "--auto_batch=True", cwd=tmp_path, memory=250 * 2**20)
    assert pieces.end() == 0 and "out of memory; using --batch_size=" in pieces.said(), pieces.said()
    one, other = (report.read_metrics(tmp_path / out / "metrics.jsonl") for out in ("whole", "pieces"))
    losses = [[m.get("loss", m.get("val_loss")) for m in lines] for lines in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    plain = start("train.py", *words, "--out_dir=plain", cwd=tmp_path, memory=250 * 2**20)
    assert "--auto_batch=True" in said_in_a_sentence(plain, 2)
