"""Symbolic links and FIFOs: nothing is written or deleted through a link, and no read blocks on a FIFO."""

import contextlib
import json
import os
import sys

import pytest
from helpers import SMALL, TINY, chat_dataset, contents, on_linux, on_posix, save_small, stopping, train_here

import prepare.__main__ as prepare_cli
from acorn import UserError, checkpoint, examples, files, hub, report
from acorn.checkpoint import huggingface
from acorn.data import shards
from acorn.data.shards import load_dataset
from prepare import inspection, pipeline

pytestmark = [on_posix, pytest.mark.usefixtures("alarm")]


@on_linux
def test_shard_that_links_to_an_invalid_target_is_rejected(tmp_path):
    """A shard may not be a link to an unrelated file, a device, a missing file or another shard."""
    folder = chat_dataset(tmp_path)
    for target in ("/etc/hostname", "/dev/zero", tmp_path / "nothing", folder / "val_000000.bin"):
        moved = (folder / "train_000000.bin").rename(tmp_path / "kept")
        os.symlink(target, folder / "train_000000.bin")
        with pytest.raises(UserError, match=r"train_000000\.bin"):
            load_dataset(str(folder))
        moved.replace(folder / "train_000000.bin")
    load_dataset(str(folder))


@pytest.mark.parametrize("begin", ["--init_from=resume", "--overwrite=True"])
def test_training_never_writes_or_deletes_through_links(dataset, tmp_path, monkeypatch, precious, begin):
    out, words = tmp_path / "o", [*TINY, *SMALL, f"--dataset={dataset}", f"--out_dir={tmp_path / 'o'}"]
    assert train_here(monkeypatch, *words, "--max_iters=2") == 0
    before = contents(precious)
    for name in "metrics.jsonl loss.png latest best .latest.writing .best.writing .loss.writing.png".split():
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(precious / "diary")
    (out / ".metrics.jsonl.writing").symlink_to(precious / "new")  # a missing file, which must not be created
    for name in (".writing-step_000004", ".replaced-step_000004", ".writing-step_000050", "step_000001", "step_000099"):
        (out / name).symlink_to(precious)
    (out / ".writing-step_000006").mkdir()
    for name in ("model.safetensors", "optimizer.safetensors", "state.json", "other"):
        (out / ".writing-step_000006" / name).symlink_to(precious / "diary")
    (out / ".writing-step_000006" / "folder").symlink_to(precious)
    assert train_here(monkeypatch, *words, "--max_iters=6", begin) == 0
    assert contents(precious) == before
    assert checkpoint.find(out)[1]["step"] == 6 and not any(path.is_symlink() for path in out.rglob("*"))
    assert {"latest", "best", "metrics.jsonl", "loss.png"} <= {file.name for file in out.iterdir()}
    assert not list(out.glob(".*-step_*"))


def test_symlinked_lock_is_rejected(dataset, tmp_path, monkeypatch, precious, capsys):
    out = tmp_path / "o"
    out.mkdir()
    (out / ".lock").symlink_to(precious / "diary")
    with pytest.raises(OSError, match="symbolic link"):
        train_here(monkeypatch, *TINY, *SMALL, f"--dataset={dataset}", f"--out_dir={out}", "--max_iters=1")
    (tmp_path / "t.txt").write_text("to be or not to be, " * 50)
    with pytest.raises(UserError, match="symbolic link"):
        prepare_cli.prepare_corpus(["text", str(tmp_path / "t.txt"), "--tokenizer=byte", f"--out={out}"])
    assert (precious / "diary").read_text() == "my own diary\n"


def test_symlinked_pin_is_not_written(tmp_path, precious, capsys):
    step = save_small(tmp_path / "o", 1)
    (step / checkpoint.PINNED).symlink_to(precious / "diary")
    checkpoint.pin(step, tmp_path / "adapters")
    assert "symbolic link" in capsys.readouterr().err and checkpoint.is_pinned(step)
    assert (precious / "diary").read_text() == "my own diary\n"


@pytest.mark.parametrize("corpus", ["text", "chat"])
def test_preparation_never_writes_or_deletes_through_links(tmp_path, precious, corpus, monkeypatch):
    file = tmp_path / "t.jsonl"
    text = '{"prompt": "q%d", "response": "a"}\n' if corpus == "chat" else '{"text": "to be or %d not to be"}\n'
    file.write_text("".join(text % i for i in range(200)))
    before = contents(precious)
    argv = [corpus, str(file), "--tokenizer=byte", f"--out={tmp_path / 'd'}", "--shard_tokens=1000"]
    partial = tmp_path / "d" / shards.PARTIAL
    for round_ in range(3):
        if round_ == 0:  # the whole folder is a link
            partial.parent.mkdir()
            partial.symlink_to(precious)
        elif corpus == "text":  # stopped after some shards; the files to write next are links
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(pipeline, "BATCH_CHARS", 500)
                patch.setattr(pipeline, "_write", stopping(pipeline._write, 5))
                prepare_cli.prepare_corpus([*argv, "--overwrite"])
            assert (partial / "progress.json").exists()
            for temporary in (
                *partial.glob("*.tmp"),
                partial / ".progress.json.writing",
                partial / ".meta.json.writing",
            ):
                temporary.unlink(missing_ok=True)
                temporary.symlink_to(precious / "diary")
            if round_ == 2:
                (partial / "progress.json").unlink()
                (partial / "progress.json").symlink_to(precious / "progress.json")
        with contextlib.suppress(UserError):  # a shard may have a different length than recorded
            prepare_cli.prepare_corpus([*argv, "--overwrite"])
        assert contents(precious) == before
    prepare_cli.prepare_corpus([*argv, "--overwrite"])
    assert contents(precious) == before and len(load_dataset(str(tmp_path / "d")).train) > 1000


def test_exports_examples_and_plots_never_write_through_links(tmp_path, precious, monkeypatch):
    save_small(tmp_path / "o", 1, best=1)
    before = contents(precious)
    (tmp_path / ".writing-hf").symlink_to(precious)
    hub.export(str(tmp_path / "o"), tmp_path / "hf")
    (tmp_path / "nothing").symlink_to(precious / "new")
    with pytest.raises(UserError, match="already exists"):
        hub.export(str(tmp_path / "o"), tmp_path / "nothing")
    monkeypatch.setattr(
        examples, "functions", lambda _: [("json", f"f{i}", f"line {i} " * 4, "w" * 200) for i in range(90)]
    )
    folder = tmp_path / "examples"
    folder.mkdir()
    (folder / "topics").symlink_to(precious)
    for name in ("answers.jsonl", "choices.yaml"):
        (folder / name).symlink_to(precious / "diary")
    examples.write_examples(folder)
    (tmp_path / ".lengths.writing.png").symlink_to(precious / "diary")
    inspection.draw_lengths({}, "x", tmp_path / "lengths.png")
    assert contents(precious) == before and (tmp_path / "lengths.png").stat().st_size > 1000


def test_wandb_does_not_write_through_a_link(tmp_path, precious, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", type(sys)("wandb"))
    (tmp_path / "wandb").symlink_to(precious)
    with pytest.raises(UserError, match="symbolic link"):
        report.start_wandb("p", "n", {}, tmp_path, None)


def test_tensorboard_does_not_write_through_a_link(tmp_path, precious):
    (tmp_path / "tensorboard").symlink_to(precious)
    with pytest.raises(UserError, match="symbolic link"):
        report.start_tensorboard(tmp_path, 0, None)


def test_folders_and_shards_may_be_links(dataset, tmp_path, monkeypatch):
    (tmp_path / "disk" / "o").mkdir(parents=True)
    (tmp_path / "o").symlink_to(tmp_path / "disk" / "o")
    (tmp_path / "data").mkdir()
    for file in dataset.iterdir():
        (tmp_path / "data" / file.name).symlink_to(file)
    (tmp_path / "d").symlink_to(tmp_path / "data")
    words = [*TINY, *SMALL, f"--dataset={tmp_path / 'd'}", f"--out_dir={tmp_path / 'o'}"]
    assert train_here(monkeypatch, *words, "--max_iters=2") == 0
    assert train_here(monkeypatch, *words, "--max_iters=3", "--init_from=resume") == 0
    assert checkpoint.find(tmp_path / "disk" / "o")[1]["step"] == 3
    (tmp_path / "t.txt").write_text("to be or not to be, " * 50)
    prepare_cli.prepare_corpus(
        ["text", str(tmp_path / "t.txt"), "--tokenizer=byte", f"--out={tmp_path / 'd'}", "--overwrite"]
    )
    assert load_dataset(str(tmp_path / "data")).vocab_size == 257 and load_dataset(str(dataset)).vocab_size < 257


def test_fifos_do_not_block(tmp_path, capsys):
    out = tmp_path / "o"
    step = save_small(out, 1, best=1)
    for name in ("best", "latest"):
        (out / name).unlink()
        os.mkfifo(out / name)
    assert checkpoint.load_model(str(out))[2].startswith(str(step))
    os.mkfifo(out / "metrics.jsonl")
    report.Metrics(out, 0, None).write(step=0, loss=1.0)
    assert len(report.read_metrics(out / "metrics.jsonl")) == 1
    os.mkfifo(out / ".lock")
    with pytest.raises(OSError, match="not a regular file"):
        files.lock(out, "training into")
    for name in ("model.safetensors", "state.json"):
        (step / name).unlink()
        os.mkfifo(step / name)
        with pytest.raises(UserError, match="intact"):
            checkpoint.load_model(str(out))
        assert not checkpoint.launched_by(out, "x")

    hf = tmp_path / "hf"
    hf.mkdir()
    for name in ("acorn_tokenizer.json", "model.safetensors.index.json", "config.json"):
        os.mkfifo(hf / name)
        with pytest.raises(UserError, match=name):
            huggingface.load_tokenizer(str(hf)) if "token" in name else huggingface.open_tensors(
                hf, "x", "model."
            ) if "index" in name else huggingface.open_model(str(hf))

    data = tmp_path / "d"
    data.mkdir()
    (data / "train.bin").write_bytes(bytes(100))
    os.mkfifo(data / "meta.pkl")
    with pytest.raises(UserError, match=r"meta\.pkl"):
        load_dataset(str(data))
    os.mkfifo(tmp_path / "d" / "x.txt")
    with pytest.raises(UserError, match=r"x\.txt"):
        prepare_cli.prepare_corpus(["text", str(data / "*.txt"), "--tokenizer=byte", f"--out={tmp_path / 'e'}"])


def test_finishing_a_preparation_moves_no_outside_files(tmp_path, precious, monkeypatch):
    documents, command = ["to be or not to be " * 100], dict(name="d", tokenizer="byte", source={})
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(pipeline, "BATCH_CHARS", 100)
        patch.setattr(pipeline, "move_in", lambda *_: 1 / 0)
        pipeline.prepare(documents, tmp_path / "d", **command, shard_tokens=500)
    partial = tmp_path / "d" / shards.PARTIAL
    meta = json.loads((partial / "meta.json").read_text())
    meta["train"]["shards"][0]["file"] = "../../precious/diary"
    shards.write_meta(partial, {k: v for k, v in meta.items() if k != "sha256"})
    pipeline.prepare(documents, tmp_path / "d", **command, shard_tokens=500)
    assert (precious / "diary").read_text() == "my own diary\n"
    load_dataset(str(tmp_path / "d"))
