"""Preparation that is interrupted, killed or out of disk space resumes, and its result is byte-identical."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import FOX, RECORDS, REPO, Stopped, leftovers, prepare, prepare_fails, write_records

from acorn import UserError
from acorn.data.shards import PARTIAL, ShardWriter, load_dataset
from prepare import __main__ as cli
from prepare import pipeline

pytestmark = pytest.mark.usefixtures("in_tmp_path")


class Interrupted:
    """Documents (long ones in blocks) whose iteration raises Stopped after the first `limit`."""

    def __init__(self, limit: int | None = None):
        self.limit = limit

    def __iter__(self):
        for i, text in enumerate([*RECORDS[:150], "", FOX * 3, *RECORDS[150:]]):
            if i == self.limit:
                raise Stopped
            yield text if len(text) < 1000 else (text[j : j + 700] for j in range(0, len(text), 700))


@pytest.mark.parametrize(
    "options",
    [
        {"tokenizer": "byte", "val_by": "document"},
        {"tokenizer": "char", "val_by": "document", "val_tokens": 700},
        {"tokenizer": "byte", "val_by": "end", "val_fraction": 0.6},
        {"tokenizer": "char", "val_by": "end"},
        {"tokenizer": "byte", "val_by": "end", "val_fraction": 0.6, "val_tokens": 3000},
        {"tokenizer": "byte", "max_tokens": 17_000},
    ],
)
def test_resumed_preparation_is_byte_identical(tmp_path, small_steps, options, capsys):
    def files_of(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    options |= {"name": "d", "source": {}, "shard_tokens": 1500}
    pipeline.prepare(Interrupted(), tmp_path / "whole", **options)
    out = tmp_path / "parts"
    for limit in (*range(40, 400, 35), None):
        documents = Interrupted()
        with contextlib.suppress(Stopped):
            if options.get("val_by") != "end" and options["tokenizer"] != "char":
                documents = Interrupted(limit)
                pipeline.prepare(documents, out, **options)
            else:  # stop in the second pass over the corpus
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(pipeline, "_write_shards", stop_at(limit))
                    pipeline.prepare(documents, out, **options)
        if (out / "meta.json").exists():
            break
    assert files_of(out) == files_of(tmp_path / "whole")
    assert capsys.readouterr().err.count("resuming after") > 3


def stop(*args):
    raise Stopped


def stop_at(limit, write_shards=pipeline._write_shards):
    return lambda documents, *rest: write_shards(Interrupted(limit), *rest)


@pytest.mark.parametrize(
    ("module", "name"), [(pipeline.files, "replace"), (pipeline, "write_meta"), (pipeline.os, "replace")]
)
def test_preparation_resumes_after_an_interruption_at_any_step(tmp_path, small_steps, module, name):
    """Stop each time progress is saved, before meta.json is written, and before each file is renamed."""
    options = {"name": "d", "source": {}, "tokenizer": "byte", "shard_tokens": 1500}
    pipeline.prepare(Interrupted(), tmp_path / "whole", **options)
    attempts, call = 0, getattr(module, name)
    while not (tmp_path / "parts/meta.json").exists():
        calls = 0

        def stops(*args, allowed=attempts):
            nonlocal calls
            calls += 1
            if calls > allowed:
                raise Stopped
            return call(*args)

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stopped):
            patch.setattr(module, name, stops)
            pipeline.prepare(Interrupted(), tmp_path / "parts", **options)
        attempts += 1
    assert attempts >= (2 if name == "write_meta" else 4)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "parts" / path.name).read_bytes() == path.read_bytes()


def test_changed_command_or_input_starts_over(capsys, small_steps):
    write_records("r.jsonl")
    argv = ["text", "r.jsonl", "--tokenizer=byte", "--shard_tokens=1500"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "move_in", stop)
        for change in ([], [], ["--val_fraction=0.2"], ["--errors=replace"]):
            with pytest.raises(Stopped):
                cli.prepare_corpus(argv + change)
    said = capsys.readouterr().err
    assert said.count("resuming after") == 1 and said.count("starting over") == 2
    with pytest.raises(UserError, match="interrupted"):
        load_dataset("r")
    os.utime("r.jsonl", (1, 1))
    assert len(prepare(*argv, "--errors=replace")["train"]["shards"]) > 5
    assert "starting over" in capsys.readouterr().err and not leftovers()


def test_full_disk_keeps_complete_shards(capsys, small_steps, monkeypatch):
    write_records("r.jsonl")
    argv = ["text", "r.jsonl", "--tokenizer=byte", "--shard_tokens=1500"]
    finish, calls = ShardWriter._finish_shard, []

    def full(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        finish(*arguments)

    monkeypatch.setattr(ShardWriter, "_finish_shard", full)
    prepare_fails(r"the disk of data/r is full: .* MB are free\. Free some space", *argv)
    said = capsys.readouterr().err
    assert "complete shards are kept in data/r" in said
    prepare(*argv)
    assert "resuming after" in capsys.readouterr().err
    files = {path.name: path.read_bytes() for path in Path("data/r").iterdir()}
    prepare(*argv, "--overwrite")
    assert files == {path.name: path.read_bytes() for path in Path("data/r").iterdir()}


def test_existing_dataset_is_kept_until_the_new_one_is_complete(monkeypatch):
    Path("mine.txt").write_text(FOX)
    prepare("text", "mine.txt", "--tokenizer", "byte")
    before = {path.name: path.read_bytes() for path in Path("data/mine").iterdir()}
    prepare_fails("already holds a dataset", "text", "mine.txt")
    Path("bad.txt").write_bytes(b"\xff")
    prepare_fails("not UTF-8", "text", "bad.txt", "--name", "mine", "--overwrite")
    prepare_fails("too short", "text", "mine.txt", "--val_fraction=0.0001", "--name", "mine", "--overwrite")
    assert {path.name: path.read_bytes() for path in Path("data/mine").iterdir()} == before

    Path("data/mine/notes.txt").write_text("not ours")
    Path("data/mine/train_000001.bin").write_bytes(b"of an older dataset")
    prepare("text", "mine.txt", "--tokenizer", "char", "--overwrite")
    names = sorted(path.name for path in Path("data/mine").iterdir())
    assert names == ["meta.json", "notes.txt", "train_000000.bin", "val_000000.bin"]
    assert load_dataset("mine").tokenizer.kind == "char"


def test_leftover_files_of_an_interruption_are_replaced():
    Path("mine.txt").write_text(FOX)
    os.makedirs(f"data/mine/{PARTIAL}")
    Path(f"data/mine/{PARTIAL}/train_000005.bin.tmp").write_bytes(b"half")
    Path("data/mine/train_000007.bin").write_bytes(b"half")
    with pytest.raises(UserError, match="interrupted"):
        load_dataset("mine")
    prepare("text", "mine.txt")
    assert sorted(os.listdir("data/mine")) == ["meta.json", "train_000000.bin", "val_000000.bin"]


@pytest.mark.parametrize("step", ["write", "meta"])
def test_full_disk_is_reported_with_the_space_needed(monkeypatch, step):
    Path("mine.txt").write_text(FOX)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "write":
        monkeypatch.setattr("acorn.files.sync", full)
    else:
        monkeypatch.setattr(pipeline, "write_meta", full)
    prepare_fails(r"the disk of data/mine is full: .* MB are needed, .* MB are free", "text", "mine.txt")
    assert not Path("data/mine").exists()


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_interrupt_removes_partial_files_and_a_kill_is_detected(stop, code):
    rng = np.random.default_rng(0)
    Path("big.txt").write_bytes(rng.integers(32, 127, 20_000_000, dtype=np.uint8).tobytes())
    process = subprocess.Popen(
        [sys.executable, REPO / "prepare", "text", "big.txt"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in background jobs
    )
    deadline = time.time() + 30
    while not Path("data/big", PARTIAL).is_dir() and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(stop)
    error = process.communicate()[1]
    assert process.returncode == code and "Traceback" not in error
    assert not Path("data/big/meta.json").exists()
    if stop == signal.SIGINT:
        assert not Path("data/big").exists() and not leftovers()
    else:
        with pytest.raises(UserError, match="interrupted"):
            load_dataset("big")
