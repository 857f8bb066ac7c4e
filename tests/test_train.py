"""train.py from the command line: output files, errors, fine-tuning, and nanoGPT's config files."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter

import pytest
import torch
from helpers import REPO, SMALL, TINY, metrics, numbers, refused, refused_here, script, script_here, train, train_here
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import train as train_script
from acorn.checkpoint import save
from acorn.training import accumulate, optim

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_training_reduces_the_loss_and_writes_the_expected_files(trained):
    lines = numbers(trained)
    updates = [m for m in lines if "loss" in m]
    evaluations = [m for m in lines if "val_loss" in m]
    assert [m["step"] for m in updates] == list(range(40))  # max_iters updates, and not one more
    assert [m["step"] for m in evaluations] == [0, 10, 20, 30, 40]
    assert updates[0]["lr"] > 0
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] - 0.5
    assert {"train_loss", "val_perplexity", "val_bits_per_byte"} <= evaluations[0].keys()
    assert {"grad_norm", "skipped"} <= updates[0].keys()
    assert metrics(trained)[1]["memory"][0] > 10**7 and metrics(trained)[1]["waited"][0] >= 0  # one value per process
    names = {f.name for f in trained.iterdir() if f.name != ".lock"}
    assert names == {"latest", "best", "loss.png", "metrics.jsonl", "step_000030", "step_000040"}
    state = json.loads((trained / "step_000040" / "state.json").read_text())
    assert state["step"] == 40 and state["position"] == 40 * 8


def test_the_last_weights_are_saved_even_if_not_the_best(dataset, tmp_path):
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
    best = min(evaluations[1:], key=lambda m: m["val_loss"])  # the initial weights are never the best
    assert (state["best_step"], state["best_loss"]) == (best["step"], best["val_loss"])
    assert (tmp_path / "o" / "best").read_text() == f"step_{best['step']:06d}\n"


class HostReads(TorchDispatchMode):
    """Counts the host's tensor reads per update, in `of_update`. On a GPU, a read waits for all queued work."""

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
def test_the_host_syncs_with_the_device_only_to_log_and_evaluate(tmp_path, monkeypatch, words, reads):
    """Count host reads on a CPU that is treated as a GPU. With `reads`, each update has one extra read."""
    monkeypatch.setattr(optim, "HOST_DECIDED_DEVICES", ())
    (tmp_path / "t.txt").write_text("this is a document. " * 200)
    assert script_here("prepare", "text", "t.txt", "--tokenizer=byte", "--out=d", cwd=tmp_path).returncode == 0
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


def test_uncompiled_scripts_do_not_import_torch_dynamo(dataset, tmp_path):
    """Importing torch._dynamo takes a second. One process runs all scripts, so the import of torch is paid once."""
    words = [*TINY, *SMALL, f"--dataset={dataset}", "--out_dir=out", "--optimizer=muon", "--ngram=2", "--max_iters=2"]
    commands = [
        ["train", *words],
        ["train", "--out_dir=out", "--init_from=resume", "--max_iters=4"],
        ["sample", "--out_dir=out", "--max_new_tokens=2"],
    ]
    code = f"""
import gc, importlib, sys
sys.path.insert(0, {str(REPO)!r})
for name, *words in {commands}:
    sys.argv = [name, *words]
    assert not importlib.import_module(name).main()
    gc.collect()  # releases the lock of the run
assert "torch" in sys.modules and "torch._dynamo" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-1000:]


def test_sampling_during_training_does_not_change_the_losses(trained, dataset, tmp_path):
    """The run uses dropout: sampling must neither leave it disabled nor advance a random generator."""
    result = train(tmp_path, dataset, "--sample_interval=3", "--max_iters=8", "--lr_decay_iters=40", "--out_dir=o")
    assert result.returncode == 0, result.stderr
    assert [m["loss"] for m in metrics(tmp_path / "o") if "loss" in m] == [
        m["loss"] for m in metrics(trained) if "loss" in m
    ][:8]


def test_training_continues_if_a_checkpoint_cannot_be_written(dataset, tmp_path, monkeypatch, capsys):
    """A checkpoint that could not be written is never the best. If it is the last, the run exits with an error."""
    write = save.write_files

    def fail(folder, parts):
        if folder.name.endswith(("4", "8")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "model.safetensors"))
        return write(folder, parts)

    monkeypatch.setattr(save, "write_files", fail)
    monkeypatch.chdir(tmp_path)
    words = "--max_iters=6 --lr_decay_iters=8 --eval_interval=2 --keep_checkpoints=9 --out_dir=o".split()
    assert train_here(monkeypatch, *TINY, f"--dataset={dataset}", *words) == 0
    said = capsys.readouterr().err
    assert "the checkpoint of step 4 could not be written into o (model.safetensors: No space left on device)" in said
    val = {m["step"]: m["val_loss"] for m in metrics(tmp_path / "o") if "val_loss" in m}
    state = json.loads((tmp_path / "o" / "step_000006" / "state.json").read_text())
    assert state["best_loss"] == min(val[2], val[6])

    assert train_here(monkeypatch, "--init_from=resume", "--out_dir=o", "--max_iters=8") == 2
    said = capsys.readouterr().err
    assert "the last updates are not saved (model.safetensors: No space left on device)" in said
    assert "--init_from=resume" in said and (tmp_path / "o" / "latest").read_text() == "step_000006\n"


def test_a_dry_run_prints_estimates_and_writes_nothing(dataset, tmp_path):
    result = train(tmp_path, dataset, "--dry_run=True", "--out_dir=o")
    assert result.returncode == 0, result.stderr
    for words in ("parameters", "epochs", "updates of 256 tokens", "memory:", "time:", "nothing was written"):
        assert words in result.stdout
    assert not (tmp_path / "o").exists()


def test_fine_tuning_starts_from_the_weights_of_another_run(trained, dataset, tmp_path, monkeypatch, capsys):
    words = [
        "--block_size=16",
        "--max_iters=2",
        "--eval_interval=1",
        "--learning_rate=0",
        "--min_lr=0",
        "--sample_interval=1",
        "--embedding_std=0.3",  # this and the next setting affect only new models
        "--zero_init=True",
    ]
    result = train(tmp_path, dataset, f"--init_from={trained}", *words, "--out_dir=o")
    assert result.returncode == 0, result.stderr
    assert "sample at step 1" in result.stdout
    old = load_file(trained / "step_000040" / "model.safetensors")
    new = load_file(tmp_path / "o" / "step_000002" / "model.safetensors")
    assert torch.equal(new["transformer.wpe.weight"], old["transformer.wpe.weight"][:16])
    assert torch.equal(new["transformer.wte.weight"], old["transformer.wte.weight"])
    words = [*TINY, f"--dataset={dataset}", f"--init_from={trained}", f"--out_dir={tmp_path}/p"]
    words += ["--block_size=64", "--n_layer=3"]
    said = "block_size = 64, n_layer = 3. Use --block_size=32 --n_layer=2,"
    refused_here(monkeypatch, capsys, train_script.main_or_advice, words, said)
    assert not (tmp_path / "p").exists()


def test_an_existing_run_is_overwritten_only_on_request(trained, dataset, tmp_path, monkeypatch):
    before = {f: f.stat().st_mtime_ns for f in trained.rglob("*")}
    refused(train(tmp_path, dataset, f"--out_dir={trained}"), "already contains a run", "--overwrite=True")
    assert before == {f: f.stat().st_mtime_ns for f in trained.rglob("*")}
    words = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}/o"]
    assert train_here(monkeypatch, *words, "--max_iters=2") == 0
    (tmp_path / "o" / "notes.txt").write_text("mine")
    assert train_here(monkeypatch, *words, "--max_iters=1", "--overwrite=True") == 0
    names = {f.name for f in (tmp_path / "o").iterdir()}
    assert "step_000001" in names and "step_000002" not in names and "notes.txt" in names


def test_an_out_dir_that_is_a_file_is_refused_before_data_and_model_are_loaded(dataset, tmp_path, monkeypatch, capsys):
    (tmp_path / "o").write_text("mine")
    for out in ("o", "o/below"):
        words = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path}/{out}", "--overwrite=True"]
        refused_here(monkeypatch, capsys, train_script.main_or_advice, words, "/o is a file. Give another --out_dir")
    assert (tmp_path / "o").read_text() == "mine"


def test_invalid_settings_print_a_one_line_error(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(train(tmp_path, dataset, "--max_itres=3"), "Did you mean 'max_iters'")
    for words, said in (
        (["--n_head=3"], "multiple of n_head"),
        (["--batch_size=0"], "at least 1"),
        (["--dataset=nowhere"], "python prepare"),
        (["--init_from=nowhere", "--out_dir=x"], "nowhere"),
        (["--init_from=resume", "--out_dir=nowhere"], "there is no folder nowhere"),
    ):
        words = [*TINY, f"--dataset={dataset}", "--out_dir=out", *words]
        refused_here(monkeypatch, capsys, train_script.main_or_advice, words, said)
    assert not list(tmp_path.iterdir())


def test_fine_tuning_refuses_data_of_another_tokenizer(trained, tmp_path):
    (tmp_path / "t.txt").write_text("quite another text with other characters: 0123456789" * 20)
    for tokenizer in ("char", "byte"):
        script_here("prepare", "text", "t.txt", f"--tokenizer={tokenizer}", f"--out={tokenizer}", cwd=tmp_path)
        result = script_here(
            "train.py", f"--init_from={trained}", "--out_dir=o", f"--dataset={tokenizer}", cwd=tmp_path
        )
        refused(result, "another tokenizer", f"({tokenizer}, ")
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_a_resumed_run_keeps_its_wandb_id(dataset, tmp_path):
    pytest.importorskip("wandb")
    result = script(
        "train.py", *TINY, f"--dataset={dataset}", "--wandb_log=True", "--max_iters=2", "--out_dir=o", cwd=tmp_path
    )
    assert result.returncode == 0, result.stdout + result.stderr
    result = script("train.py", "--init_from=resume", "--out_dir=o", "--max_iters=4", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    state = json.loads((tmp_path / "o" / "step_000004" / "state.json").read_text())
    pieces = [folder.name for folder in (tmp_path / "o" / "wandb").glob("offline-run-*")]
    assert len(pieces) == 2 and all(name.endswith(f"-{state['wandb_id']}") for name in pieces)  # the same id


def test_nanogpt_config_files_run_unchanged(dataset, tmp_path):
    """The file has the settings and `import time` of nanoGPT's files; the command line makes the model tiny."""
    (tmp_path / "config.py").write_text(
        "import time\n\nout_dir = 'out-x'\neval_interval = 5\neval_iters = 40\nwandb_log = False\n"
        "wandb_run_name = 'ft-' + str(time.time())\ndataset = 'shakespeare_char'\ninit_from = 'scratch'\n"
        "always_save_checkpoint = False\nbatch_size = 1\ngradient_accumulation_steps = 32\nlearning_rate = 3e-5\n"
        "decay_lr = False\nbackend = 'nccl'\n"
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shakespeare_char").symlink_to(dataset)
    words = "--device=cpu --compile=False --eval_iters=2 --max_iters=3 --block_size=8 --n_layer=1 --n_head=1 --n_embd=8"
    result = script_here("train.py", "config.py", *words.split(), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert {m["lr"] for m in metrics(tmp_path / "out-x") if "lr" in m} == {3e-5}


@pytest.mark.slow
def test_compiled_training_matches_eager_losses(dataset, tmp_path):
    for out, compile in (("a", False), ("b", True)):
        words = ["--dropout=0", "--max_iters=10", f"--compile={compile}", f"--out_dir={out}"]
        result = script("train.py", *TINY, f"--dataset={dataset}", *words, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "warning" not in result.stdout
    for one, other in zip(numbers(tmp_path / "a"), numbers(tmp_path / "b"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_training_on_a_gpu(dataset, tmp_path, dtype):
    words = ["--device=cuda", f"--dtype={dtype}", "--compile=True", "--sample_interval=10", "--out_dir=o"]
    result = script("train.py", *TINY, f"--dataset={dataset}", *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    evaluations = [m for m in metrics(tmp_path / "o") if "val_loss" in m]
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] - 0.5
