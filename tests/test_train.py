"""train.py as a person runs it: exact resume, every split of the batch, signals, refusals, nanoGPT's commands."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import REPO, TINY, refused, script
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import train as train_script
from acorn import UserError, checkpoint, files
from acorn.data import batches
from acorn.data.shards import load_dataset
from acorn.training import accumulate, optim
from model import GPT


def metrics(out_dir):
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def numbers(out_dir):
    """All that a run measured, without what depends on the clock or the machine."""
    clocks = ("seconds", "tokens_per_second", "mfu", "memory", "waited")
    return [{k: v for k, v in line.items() if k not in clocks} for line in metrics(out_dir)]


def train(cwd, dataset, *words, **kwargs):
    return script("train.py", *TINY, f"--dataset={dataset}", *words, cwd=cwd, **kwargs)


def start(cwd, *words) -> subprocess.Popen:
    command = [sys.executable, str(REPO / "train.py"), *map(str, words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=cwd, env=env, **pipes)


def test_a_run_learns_and_leaves_what_it_promises(trained):
    lines = numbers(trained)
    updates = [m for m in lines if "loss" in m]
    evaluations = [m for m in lines if "val_loss" in m]
    assert [m["step"] for m in updates] == list(range(40))  # max_iters updates, and not one more
    assert [m["step"] for m in evaluations] == [0, 10, 20, 30, 40]
    assert updates[0]["lr"] > 0
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] - 0.5
    assert {"train_loss", "val_perplexity", "val_bits_per_byte"} <= evaluations[0].keys()
    assert {"grad_norm", "skipped"} <= updates[0].keys()
    assert metrics(trained)[1]["memory"][0] > 10**7 and metrics(trained)[1]["waited"][0] >= 0  # of each process
    names = {f.name for f in trained.iterdir() if f.name != ".lock"}
    assert names == {"latest", "best", "loss.png", "metrics.jsonl", "step_000030", "step_000040"}
    state = json.loads((trained / "step_000040" / "state.json").read_text())
    assert state["step"] == 40 and state["position"] == 40 * 8


def test_a_resumed_run_is_the_run_never_stopped_to_the_bit(trained, dataset, tmp_path):
    """Stopped by --max_iters, by SIGINT and by SIGTERM at steps of no interval, on the way to the same end."""
    process = start(tmp_path, *TINY, f"--dataset={dataset}", "--out_dir=b", "--max_iters=100000", "--lr_decay_iters=40")
    for line in process.stdout:
        if line.startswith("step 6/"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.communicate()[0]
    assert process.returncode == 130
    assert f"Resume with: python {REPO / 'train.py'} --init_from=resume --out_dir=b" in rest
    stopped_at = int((tmp_path / "b" / "latest").read_text()[5:])
    assert 6 < stopped_at < 40

    process = start(tmp_path, "--init_from=resume", "--out_dir=b")  # the settings come along
    for line in process.stdout:
        if line.startswith(f"step {stopped_at + 3}/"):
            process.send_signal(signal.SIGTERM)
            break
    process.communicate()
    assert process.returncode == 143
    stopped_again = int((tmp_path / "b" / "latest").read_text()[5:])
    assert stopped_again > stopped_at + 3

    result = script("train.py", "--init_from=resume", "--out_dir=b", "--max_iters=40", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    if stopped_again < 40:
        assert numbers(tmp_path / "b") == numbers(trained)
    else:  # a very fast machine: the runs are the same as far as both went
        assert numbers(tmp_path / "b")[:44] == numbers(trained)[:44]

    result = script("train.py", "--init_from=resume", "--out_dir=b", cwd=tmp_path)
    assert result.returncode == 0 and "already made its 40 updates" in result.stdout


def test_evaluation_only_on_resume_measures_and_writes_nothing(trained, dataset, tmp_path):
    before = {f: f.stat().st_mtime_ns for f in trained.rglob("*")}
    result = script("train.py", "--init_from=resume", f"--out_dir={trained}", "--eval_only=True", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    val = metrics(trained)[-1]["val_loss"]
    assert f"val loss {val:.4f}" in result.stdout
    assert before == {f: f.stat().st_mtime_ns for f in trained.rglob("*")}


@pytest.mark.parametrize("split", [(1, 8), (8, 1)])
def test_every_split_of_the_same_batch_gives_the_same_losses(dataset, tmp_path, split):
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


def test_only_replies_are_learned_each_token_alike_however_the_batch_is_split(tmp_path):
    """Replies of unequal length, so that the mean of the micro-batches' means would be another number."""
    pairs = [{"prompt": f"{n} a?", "response": " ".join("a" * n)} for n in range(1, 40)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    assert script("prepare", "chat", "p.jsonl", "--tokenizer=byte", "--out=d", cwd=tmp_path).returncode == 0
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


def test_a_mixture_with_documents_apart_resumes_to_the_bit(dataset, tmp_path):
    for name in ("one", "two"):
        os.mkdir(tmp_path / name)
        for i in range(20):
            (tmp_path / name / f"{i}.txt").write_text(f"{name} is document number {i} of {name}. " * (i % 7 + 1))
        assert script("prepare", "text", name, "--tokenizer=byte", cwd=tmp_path).returncode == 0
    words = ["one:0.7,two:0.3", "--document_mask=True", "--lr_decay_iters=6", "--eval_interval=3"]
    for out, more in (("a", ["--max_iters=6"]), ("b", ["--max_iters=3"])):
        result = train(tmp_path, *words, f"--out_dir={out}", *more)
        assert result.returncode == 0, result.stderr
    assert "70.0% data/one" in result.stdout and "30.0% data/two" in result.stdout
    result = script("train.py", "--init_from=resume", "--out_dir=b", "--max_iters=6", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = numbers(tmp_path / "a")
    assert numbers(tmp_path / "b") == lines
    last = lines[-1]
    assert last["val_loss"] == pytest.approx(0.7 * last["val_loss/one"] + 0.3 * last["val_loss/two"])
    assert f"(one {last['val_loss/one']:.4f}, two {last['val_loss/two']:.4f})" in result.stdout
    joint = train(tmp_path, "one:0.7,two:0.3", "--lr_decay_iters=6", "--max_iters=1", "--out_dir=c")
    assert joint.returncode == 0 and numbers(tmp_path / "c")[1]["loss"] != lines[1]["loss"]
    refused(train(tmp_path, dataset, "--document_mask=True", "--out_dir=d"), "char tokenizer", "no end-of-text token")


def test_the_last_weights_are_saved_even_where_they_are_not_the_best(dataset, tmp_path):
    words = [
        "--always_save_checkpoint=False",
        "--max_iters=7",
        "--learning_rate=0.3",
        "--warmup_iters=0",
        "--decay_lr=False",
    ]
    result = train(tmp_path, dataset, *words, "--eval_interval=2", "--out_dir=o")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "o" / "latest").read_text() == "step_000007\n"
    evaluations = [m for m in metrics(tmp_path / "o") if "val_loss" in m]
    state = json.loads((tmp_path / "o" / "step_000007" / "state.json").read_text())
    assert state["best_loss"] == min(m["val_loss"] for m in evaluations)


def test_a_gradient_that_is_not_finite_is_skipped_and_the_run_gives_up_with_a_reason(dataset, tmp_path):
    result = train(tmp_path, dataset, "--learning_rate=1e30", "--grad_clip=0", "--max_bad_steps=3", "--out_dir=o")
    assert result.returncode == 1
    assert "3 consecutive updates had a non-finite gradient" in result.stderr
    assert "NaN" not in (tmp_path / "o" / "metrics.jsonl").read_text()  # which JSON does not have
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("host_decides", [(), ("cpu",)])
def test_skipped_updates_that_no_line_showed_are_counted_and_too_many_in_a_row_end_the_run_at_once(
    dataset, tmp_path, monkeypatch, capsys, host_decides
):
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


class HostReads(TorchDispatchMode):
    """Counts the host's reads of tensors per update, in `of_update`. On a GPU, a read waits for all queued work."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.of_update, self.step = Counter(), None
        monkeypatch.setattr(train_script.heartbeat, "report_step", self.begin)
        for name in ("tolist", "numpy", "cpu", "__array__"):
            monkeypatch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))

    def begin(self, step):
        self.step = step

    def counted(self, function):
        def wrapper(tensor, *args, **kwargs):
            self.of_update[self.step] += 1
            return function(tensor, *args, **kwargs)

        return wrapper

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and isinstance(args[1], (list, tuple)) else []
        if name in ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2") or any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices
        ):
            self.of_update[self.step] += 1
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize(
    "words", [["--document_mask=True"], ["--optimizer=muon", "--grad_clip=0", "--auto_batch=True", "--ngram=2"]]
)
def test_the_host_waits_for_the_device_only_to_log_and_to_evaluate(tmp_path, monkeypatch, words, reads):
    """Count host reads on a CPU that is treated as a GPU. With `reads`, each update has one extra read."""
    monkeypatch.setattr(optim, "HOST_DECIDED_DEVICES", ())
    (tmp_path / "t.txt").write_text("this is a document. " * 200)
    assert script("prepare", "text", "t.txt", "--tokenizer=byte", "--out=d", cwd=tmp_path).returncode == 0
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # keep pytest's handlers
    if reads:
        update = accumulate.step_if_finite
        monkeypatch.setattr(accumulate, "step_if_finite", lambda o, norm, s: update(o, norm, s) or math.isnan(norm))
    always = ["--dataset=d", "--out_dir=o", "--max_iters=12", "--log_interval=4", "--eval_interval=10"]
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *always, *words])
    with HostReads(monkeypatch) as host_reads:
        assert train_script.main() == 0
    quiet = {step: host_reads.of_update[step] for step in range(12) if step not in (0, 4, 8, 9, 11)}
    assert quiet == dict.fromkeys(quiet, int(reads))
    assert all(host_reads.of_update[step] > 1 for step in (0, 4, 8, 9, 11))  # logged, or before an evaluation


def test_samples_on_the_way_change_nothing(trained, dataset, tmp_path):
    """The trained run has dropout; a sample must not switch it off, nor move any seed."""
    result = train(tmp_path, dataset, "--sample_interval=3", "--max_iters=8", "--lr_decay_iters=40", "--out_dir=o")
    assert result.returncode == 0, result.stderr
    assert [m["loss"] for m in metrics(tmp_path / "o") if "loss" in m] == [
        m["loss"] for m in metrics(trained) if "loss" in m
    ][:8]


def test_settings_given_on_resume_overrule_those_of_before(dataset, tmp_path):
    losses = {}
    for decay in ("0.1", "90"):
        out = f"--out_dir=o{decay}"
        assert train(tmp_path, dataset, "--max_iters=4", "--lr_decay_iters=40", out).returncode == 0
        words = ["--init_from=resume", out, "--max_iters=8", f"--weight_decay={decay}"]
        assert script("train.py", *words, cwd=tmp_path).returncode == 0
        losses[decay] = [m["loss"] for m in metrics(tmp_path / f"o{decay}") if "loss" in m]
    assert losses["0.1"][:5] == losses["90"][:5] and losses["0.1"][6:] != losses["90"][6:]


def test_a_resumed_run_insists_on_its_data(trained, tmp_path):
    (tmp_path / "t.txt").write_text("another text for the same tokenizer, quite unlike the first " * 20)
    words = ["--tokenizer", trained, "--name", "other"]
    text = "BORIS:\nbring the key, and bring it slowly.\n\n" * 20  # no character that the tokenizer lacks
    (tmp_path / "t.txt").write_text(text)
    assert script("prepare", "text", "t.txt", *words, cwd=tmp_path).returncode == 0
    result = script("train.py", "--init_from=resume", f"--out_dir={trained}", "--dataset=other", cwd=tmp_path)
    refused(result, "not the data", "--init_from=")
    words = [f"--init_from={trained}", "--dataset=other", "--max_iters=1", "--out_dir=o"]
    assert script("train.py", *words, "--batch_size=2", "--device=cpu", "--compile=False", cwd=tmp_path).returncode == 0


def test_an_optimizer_state_of_other_shapes_is_refused(trained, tmp_path):
    """A fused kernel that trusted it would write beyond its memory."""
    shutil.copytree(trained, tmp_path / "o")
    folder = tmp_path / "o" / "step_000040"
    saved = load_file(folder / "optimizer.safetensors")
    save_file(
        {name: torch.zeros(3) if value.dim() else value for name, value in saved.items()},
        folder / "optimizer.safetensors",
    )
    state = json.loads((folder / "state.json").read_text())
    state["sha256"]["optimizer.safetensors"] = files.sha256(folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps(state))
    result = script("train.py", "--init_from=resume", "--out_dir=o", "--max_iters=50", cwd=tmp_path)
    refused(result, "optimizer state")


def test_a_run_goes_on_where_a_checkpoint_cannot_be_written_and_saves_at_the_next_turn(dataset, tmp_path):
    """What could not be written is not the best; and where it is the last, the run ends with an error."""
    words = "--max_iters=2 --lr_decay_iters=8 --eval_interval=2 --keep_checkpoints=9 --out_dir=o".split()
    assert train(tmp_path, dataset, *words).returncode == 0
    (tmp_path / "o" / ".writing-step_000004").write_text("a file is in the way")
    result = script("train.py", "--init_from=resume", "--out_dir=o", "--max_iters=6", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "the checkpoint of step 4 could not be written into o (File exists)" in result.stderr
    val = {m["step"]: m["val_loss"] for m in metrics(tmp_path / "o") if "val_loss" in m}
    state = json.loads((tmp_path / "o" / "step_000006" / "state.json").read_text())
    assert state["best_loss"] == min(val[2], val[6])

    (tmp_path / "o" / ".writing-step_000008").write_text("a file is in the way")
    result = script("train.py", "--init_from=resume", "--out_dir=o", "--max_iters=8", cwd=tmp_path)
    refused(result, "the last updates are not saved (File exists)", "--init_from=resume")
    assert (tmp_path / "o" / "latest").read_text() == "step_000006\n"


def test_two_runs_do_not_share_an_out_dir(dataset, tmp_path):
    process = start(tmp_path, *TINY, f"--dataset={dataset}", "--out_dir=o", "--max_iters=100000")
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    refused(train(tmp_path, dataset, "--out_dir=o", "--overwrite=True"), "is in use", str(process.pid))
    process.kill()
    process.communicate()
    assert train(tmp_path, dataset, "--out_dir=o", "--overwrite=True", "--max_iters=1").returncode == 0


def test_a_dry_run_says_what_the_run_takes_and_writes_nothing(dataset, tmp_path):
    result = train(tmp_path, dataset, "--dry_run=True", "--out_dir=o")
    assert result.returncode == 0, result.stderr
    for words in ("parameters", "epochs", "updates of 256 tokens", "memory:", "time:", "nothing was written"):
        assert words in result.stdout
    assert not (tmp_path / "o").exists()


def test_where_memory_ends_the_same_updates_are_made_in_smaller_pieces(dataset, tmp_path, monkeypatch, capsys):
    """Simulate a device that after the fifth training pass has memory for batch size 1 only."""
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
    assert said.count("sample at step 2") == 2  # one per run, although this update started three times
    for one, other in zip(numbers(tmp_path / "whole"), numbers(tmp_path / "pieces"), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    with pytest.raises(UserError, match="--batch_size=2 --gradient_accumulation_steps=4"):
        run("refused")
    held[0] = 0
    with pytest.raises(UserError, match="batch size 1"):
        run("hopeless", "--auto_batch=True")


def test_fine_tuning_starts_from_the_weights_of_another_run(trained, dataset, tmp_path):
    words = [
        "--block_size=16",
        "--max_iters=2",
        "--eval_interval=1",
        "--learning_rate=0",
        "--min_lr=0",
        "--sample_interval=1",
    ]
    result = train(tmp_path, dataset, f"--init_from={trained}", *words, "--out_dir=o")
    assert result.returncode == 0, result.stderr
    assert "sample at step 1" in result.stdout
    old = load_file(trained / "step_000040" / "model.safetensors")
    new = load_file(tmp_path / "o" / "step_000002" / "model.safetensors")
    assert torch.equal(new["transformer.wpe.weight"], old["transformer.wpe.weight"][:16])
    assert torch.equal(new["transformer.wte.weight"], old["transformer.wte.weight"])
    result = train(tmp_path, dataset, f"--init_from={trained}", "--block_size=64", "--out_dir=p")
    refused(result, "block_size = 64", "32")
    result = train(tmp_path, dataset, f"--init_from={trained}", "--n_layer=3", "--out_dir=p")
    refused(result, "n_layer = 3", "train from scratch")
    assert not (tmp_path / "p").exists()


def test_another_run_is_not_written_over(trained, dataset, tmp_path):
    before = {f: f.stat().st_mtime_ns for f in trained.rglob("*")}
    refused(train(tmp_path, dataset, f"--out_dir={trained}"), "already contains a run", "--overwrite=True")
    assert before == {f: f.stat().st_mtime_ns for f in trained.rglob("*")}
    assert train(tmp_path, dataset, "--out_dir=o", "--max_iters=2").returncode == 0
    (tmp_path / "o" / "notes.txt").write_text("mine")
    assert train(tmp_path, dataset, "--out_dir=o", "--max_iters=1", "--overwrite=True").returncode == 0
    names = {f.name for f in (tmp_path / "o").iterdir()}
    assert "step_000001" in names and "step_000002" not in names and "notes.txt" in names


def test_bad_input_is_one_sentence(trained, dataset, tmp_path):
    for words, said in (
        (["--max_itres=3"], "Did you mean 'max_iters'"),
        (["--n_head=3"], "multiple of n_head"),
        (["--batch_size=0"], "at least 1"),
        (["--dataset=nowhere"], "python prepare"),
        (["--init_from=nowhere", "--out_dir=x"], "nowhere"),
        (["--init_from=resume", "--out_dir=nowhere"], "there is no folder nowhere"),
    ):
        refused(train(tmp_path, dataset, *words), said)
    assert not list(tmp_path.iterdir())


def test_data_of_another_tokenizer_is_refused(trained, tmp_path):
    (tmp_path / "t.txt").write_text("quite another text with other characters: 0123456789" * 20)
    for tokenizer in ("char", "byte"):
        script("prepare", "text", "t.txt", f"--tokenizer={tokenizer}", f"--out={tokenizer}", cwd=tmp_path)
        result = script("train.py", f"--init_from={trained}", "--out_dir=o", f"--dataset={tokenizer}", cwd=tmp_path)
        refused(result, "another tokenizer", f"({tokenizer}, ")
    assert not (tmp_path / "o").exists()


def test_wandb_offline(dataset, tmp_path):
    pytest.importorskip("wandb")
    result = train(tmp_path, dataset, "--wandb_log=True", "--max_iters=2", "--out_dir=o")
    assert result.returncode == 0, result.stdout + result.stderr
    result = script("train.py", "--init_from=resume", "--out_dir=o", "--max_iters=4", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    state = json.loads((tmp_path / "o" / "step_000004" / "state.json").read_text())
    pieces = [folder.name for folder in (tmp_path / "o" / "wandb").glob("offline-run-*")]
    assert len(pieces) == 2 and all(name.endswith(f"-{state['wandb_id']}") for name in pieces)  # of one run


def test_nanogpts_config_files_run_unchanged(dataset, tmp_path):
    """Settings as in nanoGPT's published files, at toy size by the command line, with its `import time`."""
    (tmp_path / "config.py").write_text(
        "import time\n\nout_dir = 'out-x'\neval_interval = 5\neval_iters = 40\nwandb_log = False\n"
        "wandb_run_name = 'ft-' + str(time.time())\ndataset = 'shakespeare_char'\ninit_from = 'scratch'\n"
        "always_save_checkpoint = False\nbatch_size = 1\ngradient_accumulation_steps = 32\nlearning_rate = 3e-5\n"
        "decay_lr = False\nbackend = 'nccl'\n"
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shakespeare_char").symlink_to(dataset)
    words = "--device=cpu --compile=False --eval_iters=2 --max_iters=3 --block_size=8 --n_layer=1 --n_head=1 --n_embd=8"
    result = script("train.py", "config.py", *words.split(), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert {m["lr"] for m in metrics(tmp_path / "out-x") if "lr" in m} == {3e-5}


@pytest.mark.slow
def test_compiled_training_has_the_losses_of_eager(dataset, tmp_path):
    for out, compile in (("a", False), ("b", True)):
        result = train(tmp_path, dataset, "--dropout=0", "--max_iters=10", f"--compile={compile}", f"--out_dir={out}")
        assert result.returncode == 0, result.stderr
        assert "warning" not in result.stdout
    for one, other in zip(numbers(tmp_path / "a"), numbers(tmp_path / "b"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.slow
def test_twenty_kills_at_random_instants_change_nothing(trained, dataset, tmp_path):
    """kill -9, twenty times; each time the run resumes, and its end is that of the run never killed."""
    chance, kills = random.Random(0), 0
    words = [*TINY, f"--dataset={dataset}", "--out_dir=o", "--eval_interval=2", "--eval_iters=3"]
    whole = script("train.py", *words[:-3], "--out_dir=whole", "--eval_interval=2", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    while kills < 20:
        resumable = (tmp_path / "o").exists() and list((tmp_path / "o").glob("step_*/state.json"))
        how = ["--init_from=resume"] if resumable else ["--overwrite=True"]
        process = start(tmp_path, *words, *how)
        time.sleep(chance.uniform(2.0, 5.0))
        if process.poll() is None:
            process.kill()
            kills += 1
            process.wait()
        else:
            assert process.returncode == 0, process.stdout.read()
            if (
                tmp_path / "o" / "latest"
            ).read_text() == "step_000040\n":  # it reached its end: once more from the start
                assert numbers(tmp_path / "o") == numbers(tmp_path / "whole")
                subprocess.run(["rm", "-r", tmp_path / "o"], check=True)
    resumable = (tmp_path / "o").exists() and list((tmp_path / "o").glob("step_*/state.json"))
    script("train.py", *words, "--init_from=resume" if resumable else "--overwrite=True", cwd=tmp_path)
    assert numbers(tmp_path / "o") == numbers(tmp_path / "whole")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_training_on_a_gpu(dataset, tmp_path, dtype):
    result = train(tmp_path, dataset, "--device=cuda", f"--dtype={dtype}", "--compile=True", "--out_dir=o")
    assert result.returncode == 0, result.stderr
    evaluations = [m for m in metrics(tmp_path / "o") if "val_loss" in m]
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] - 0.5
