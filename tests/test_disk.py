"""Full disks, file size limits, missing permissions, deleted files and read errors lose or corrupt no saved data."""

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from forked import NOBODY, RUN, result_of, said_in_a_sentence
from helpers import TINY, chat_dataset, contents, rounds, save_small

from acorn import UserError, checkpoint
from acorn.data.shards import load_dataset


@contextlib.contextmanager
def small_disk(folder: Path):
    """Mount a tmpfs at `folder`, and yield a function that sets its size."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"needs the right to mount a small disk: {made.stderr.strip()}")
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@rounds(3, 30)
def test_training_resumes_after_the_disk_was_full(dataset, whole_run, start, tmp_path, rounds):
    """The disk size increases from round to round, so that the disk fills up at different writes of a run."""
    chance, full = random.Random(0), 0
    words = [*RUN, f"--dataset={dataset}", "--out_dir=disk/o"]
    needed = 2 * sum(f.stat().st_size for f in whole_run.rglob("*") if f.is_file())
    with small_disk(tmp_path / "disk") as set_size:
        for i in range(rounds):
            set_size(max(1, int(needed * (i + chance.random()) / rounds)))
            run_ = start("train.py", *words, cwd=tmp_path)
            said = said_in_a_sentence(run_, 0, 2)
            full += "No space left" in said
            assert "No space left" not in said or "disk/o" in said  # the error names the disk
            set_size("50m")
            how = "--init_from=resume" if checkpoint.holds_run(tmp_path / "disk/o") else "--overwrite=True"
            assert start("train.py", *words, how, cwd=tmp_path).end() == 0
            numbers, last = result_of(tmp_path / "disk/o")
            assert last == result_of(whole_run)[1]
            steps, expected = ([n["step"] for n in each] for each in (numbers, result_of(whole_run)[0]))
            assert steps == expected or "its lines are lost" in said
            shutil.rmtree(tmp_path / "disk/o")
    assert full >= rounds / 3
    print(f"training filled {full} of {rounds} small disks")


@rounds(3, 30)
def test_preparation_resumes_after_the_disk_was_full(start, tmp_path, rounds):
    (tmp_path / "c.txt").write_text("to be or not to be, " * 20_000)
    argv = ["text", "c.txt", "--tokenizer=byte", "--name=d", "--shard_tokens=50000"]
    assert start("prepare", *argv, "--out=whole", cwd=tmp_path).end() == 0
    needed, chance, full = sum(map(len, contents(tmp_path / "whole", without=[".lock"]).values())), random.Random(0), 0
    with small_disk(tmp_path / "disk") as set_size:
        for i in range(rounds):
            set_size(max(1, int(1.1 * needed * (i + chance.random()) / rounds)))
            full += "is full" in said_in_a_sentence(start("prepare", *argv, "--out=disk/d", cwd=tmp_path), 0, 2)
            set_size("50m")
            if not (tmp_path / "disk/d/meta.json").exists():
                said_in_a_sentence(start("prepare", *argv, "--out=disk/d", cwd=tmp_path), 0)
            assert contents(tmp_path / "disk/d", without=[".lock"]) == contents(tmp_path / "whole", without=[".lock"])
            shutil.rmtree(tmp_path / "disk/d")
    assert full >= rounds / 3
    print(f"preparation filled {full} of {rounds} small disks")


@rounds(2, 20)
def test_training_resumes_after_a_file_size_limit(dataset, whole_run, start, tmp_path, rounds):
    """Limit the size of files (RLIMIT_FSIZE), which needs no privileges. Each round, another file exceeds the limit."""
    sizes = sorted({f.stat().st_size for f in whole_run.rglob("*") if f.is_file()})
    chance, stopped = random.Random(0), 0
    for i in range(rounds):
        limit = max(1, sizes[i % len(sizes)] - chance.randint(1, 10)) if i else sizes[-1] // 2
        words = [*RUN, f"--dataset={dataset}", f"--out_dir=o{i}"]
        run_ = start("train.py", *words, cwd=tmp_path, file_size=limit)
        run_.end()
        stopped += run_.process.exitcode != 0
        assert run_.process.exitcode in (0, 1, 2) and "core dumped" not in run_.said()
        how = "--init_from=resume" if checkpoint.holds_run(tmp_path / f"o{i}") else "--overwrite=True"
        assert start("train.py", *words, how, cwd=tmp_path).end() == 0
        assert result_of(tmp_path / f"o{i}")[1] == result_of(whole_run)[1]
    print(f"{stopped} of {rounds} limits stopped the run")


def test_missing_permission_is_reported(dataset, start, tmp_path):
    """Run as a user without permission to write the out_dir or dataset, or to read the data, checkpoint or text."""
    work = tmp_path / "w"
    work.mkdir()
    shutil.copytree(dataset, work / "data" / "mine")
    (work / "c.txt").write_text("to be or not to be, " * 200)
    shutil.copy(work / "c.txt", work / "hidden.txt")
    save_small(work / "out", 1)
    if os.getuid() == 0:
        for path in [work, *work.rglob("*")]:
            os.chown(path, NOBODY, NOBODY)
    (work / "locked").mkdir()
    paths = {
        "locked": 0o555,
        "hidden.txt": 0,
        "out/step_000001/optimizer.safetensors": 0,
        "data/mine/train_000000.bin": 0,
    }
    words = [*TINY, "--max_iters=1", "--dataset=mine"]
    modes = {path: (work / path).stat().st_mode & 0o777 for path in paths}
    for path, name, argv, said in (
        ("locked", "train.py", [*words, "--out_dir=locked/o"], "locked"),
        ("locked", "prepare", ["text", "c.txt", "--tokenizer=byte", "--out=locked/d"], "locked"),
        ("hidden.txt", "prepare", ["text", "hidden.txt", "--tokenizer=byte"], "hidden.txt"),
        (
            "out/step_000001/optimizer.safetensors",
            "train.py",
            [*words, "--out_dir=out", "--init_from=resume"],
            "optimizer.safetensors",
        ),
        ("out/step_000001/optimizer.safetensors", "sample.py", ["--out_dir=out"], "optimizer.safetensors"),
        ("data/mine/train_000000.bin", "train.py", [*words, "--out_dir=o"], "train_000000.bin"),
    ):
        os.chmod(work / path, paths[path])
        assert said in said_in_a_sentence(start(name, *argv, cwd=work, as_nobody=True), 2)
        os.chmod(work / path, modes[path])
    assert not (work / "o").exists() and not list((work / "locked").iterdir())


def test_training_continues_after_its_files_are_deleted(dataset, start, tmp_path):
    """Delete the out_dir and then the dataset of a run: training continues, and its next checkpoint is complete."""
    shutil.copytree(dataset, tmp_path / "mine")
    words = [*RUN, "--dataset=mine", "--out_dir=o", "--max_iters=100000", "--lr_decay_iters=40"]
    run_ = start("train.py", *words, cwd=tmp_path)
    run_.wait_for("step 5/")
    shutil.rmtree(tmp_path / "o", ignore_errors=True)
    step = 5 + run_.said().count("tok/s")
    run_.wait_for(f"step {step}/")
    shutil.rmtree(tmp_path / "mine")
    run_.wait_for(f"step {step + 10}/")
    os.kill(run_.process.pid, signal.SIGTERM)
    assert run_.end() == 128 + signal.SIGTERM and "Traceback" not in run_.said(), run_.said()
    folder, state = checkpoint.find(tmp_path / "o")
    checkpoint.fill(*checkpoint.build_model(folder, state))
    assert state["step"] > step + 10
    again = start("train.py", "--init_from=resume", "--out_dir=o", cwd=tmp_path)
    assert "no dataset 'mine'" in said_in_a_sentence(again, 2)


def test_read_errors_are_reported(tmp_path, monkeypatch):
    """An OSError while reading becomes a UserError: I/O error, too many open files, stale file handle."""
    folder = chat_dataset(tmp_path)
    for number in (errno.EIO, errno.EMFILE, errno.ESTALE):

        def fails(*args, number=number, **kwargs):
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch, pytest.raises(UserError, match=os.strerror(number)):
            tokens = load_dataset(str(folder)).train
            patch.setattr("builtins.open", fails)
            tokens.read([0], 10)
