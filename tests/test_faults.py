"""Whatever goes wrong: kills, damage, full disks, no permission, files that vanish, and what strangers send.

The scripts run as processes of their own, forked from one that has imported torch already, so that a hundred kills take
minutes. Each loop prints how many rounds it went; the short ones are of the suite, the long ones are `slow`.
"""

import contextlib
import errno
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, TINY
from safetensors.torch import load_file, save_file
from test_checkpoint import STATE, make_older
from test_checkpoint import make_optimizers as small_optimizers
from test_checkpoint import model as small_model
from test_checkpoint import save as save_small

import prepare.__main__ as prepare_cli
import sample
import train
from acorn import UserError, checkpoint, files, report, run
from acorn.checkpoint import save
from acorn.data import shards
from acorn.data.mixture import load_mixture
from acorn.data.shards import load_dataset, open_shard
from acorn.data.tokenizer import ByteTokenizer, from_dict, tokenizer_hash

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills, limits and mounts as Linux has them")
NOBODY = 65534
MAINS = {"train.py": train.main_or_advice, "sample.py": sample.main, "prepare": prepare_cli.main}
SMALL = "--n_layer=1 --n_embd=16 --block_size=16 --max_iters=16 --eval_interval=2 --eval_iters=1".split()
RUN = [*TINY, *SMALL]  # eight checkpoints in half a second


def rounds(few: int, many: int):
    """A short loop for the suite, and a long one."""
    return pytest.mark.parametrize("rounds", [few, pytest.param(many, marks=pytest.mark.slow)])


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def child(name, argv, cwd, log, environment, file_size, memory, as_nobody) -> None:
    os.chdir(cwd)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    report.draw_curve = lambda *args: None  # it takes longer than all the rest of a tiny run
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if memory:  # so many bytes of addresses more than there are now
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + memory, taken + memory))
    if as_nobody and os.getuid() == 0:  # whom no permission stops
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    sys.argv = [str(REPO / name), *map(str, argv)]
    run(MAINS[name])


class Forked:
    """A script that runs: `process`, and the file `log` with what it says."""

    def __init__(self, context, name, *argv, cwd, environment=None, file_size=0, memory=0, as_nobody=False):
        self.log = Path(cwd).parent / f"{Path(cwd).name}-{time.monotonic_ns()}.log"
        words = (name, argv, cwd, self.log, environment or {}, file_size, memory, as_nobody)
        self.process = context.Process(target=child, args=words, daemon=True)
        self.process.start()

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for(self, text: str) -> None:
        while text not in self.said():
            assert self.process.is_alive(), self.said()
            time.sleep(0.01)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def end(self, timeout=120) -> int:
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"it hangs:\n{self.said()}"
        return self.process.exitcode


@pytest.fixture(scope="module")
def start():
    """`start("train.py", *words, cwd=...)` forks a script."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_faults", "torch._dynamo"])  # which the first optimizer imports
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{REPO}{os.pathsep}{REPO / 'tests'}")
        first = context.Process(target=time.sleep, args=(0,))
        first.start()
        first.join()
    return lambda *words, **how: Forked(context, *words, **how)


def said_in_a_sentence(forked: Forked, *codes: int) -> str:
    """Assert that a script ended with one of these codes, and, where it was not 0, with a sentence."""
    assert forked.end() in codes, forked.said()
    assert "Traceback" not in forked.said()
    if forked.end() == 2:
        assert forked.said().strip().splitlines()[-1].startswith("error: "), forked.said()
    return forked.said()


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, but for the lock, which says who held it."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != ".lock"}


def result_of(out_dir: Path) -> tuple:
    """What a run came to: its metrics but for clock and memory, and its last weights and moments to the bit."""
    clocks = ("seconds", "tokens_per_second", "mfu", "memory", "waited")
    lines = report.read_metrics(out_dir / "metrics.jsonl")
    numbers = [{k: v for k, v in line.items() if k not in clocks} for line in lines]
    last = out_dir / (out_dir / "latest").read_text().strip()
    return numbers, {f.name: f.read_bytes() for f in last.iterdir() if f.name != "state.json"}


@pytest.fixture(scope="module")
def whole_run(dataset, start, tmp_path_factory) -> Path:
    """The out_dir of the run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    assert start("train.py", *RUN, f"--dataset={dataset}", "--out_dir=out", cwd=folder).end() == 0
    return folder / "out"


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


# ---------------------------------------------------------------------------------------------------------------------
# Kills


@pytest.mark.parametrize("processes", [1, 2])
@rounds(3, 35)
def test_kills_at_random_instants_of_training_change_nothing(dataset, whole_run, start, tmp_path, processes, rounds):
    """kill -9; then the run resumes, and it ends as the run never killed. With two processes, both are killed."""

    def begin() -> list[Forked]:
        how = "--init_from=resume" if checkpoint.holds_run(tmp_path / "o") else "--overwrite=True"
        words = [*RUN, f"--dataset={dataset}", "--out_dir=o", how]
        if processes == 1:
            return [start("train.py", *words, cwd=tmp_path)]
        net = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        ranks = [{**net, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        return [start("train.py", *words, cwd=tmp_path, environment=rank) for rank in ranks]

    def finish(run_: list[Forked]) -> None:
        assert [each.end() for each in run_] == [0] * processes, [each.said() for each in run_]
        if "already made its" not in run_[0].said():
            assert result_of(tmp_path / "o") == expected
        shutil.rmtree(tmp_path / "o")

    began = time.perf_counter()
    whole = begin()
    assert [each.end() for each in whole] == [0] * processes, [each.said() for each in whole]
    longest = time.perf_counter() - began
    expected = result_of(tmp_path / "o")  # two processes add up in another order than one
    if processes == 1:
        assert expected == result_of(whole_run)
    shutil.rmtree(tmp_path / "o")

    chance, kills, ends = random.Random(processes), 0, 0
    while kills < rounds:
        run_ = begin()
        time.sleep(chance.uniform(0, longest))
        if not all(each.process.is_alive() for each in run_):  # it reached its end: once more from the start
            finish(run_)
            ends += 1
            continue
        for each in chance.sample(run_, len(run_)):
            each.process.kill()
        for each in run_:
            each.process.join()
        kills += 1
    finish(begin())
    print(f"{kills} kills of a run of {processes} processes, which reached its end {ends + 1} times")


@pytest.mark.parametrize("corpus", ["text", "chat"])
@rounds(3, 15)
def test_kills_at_random_instants_of_preparation_change_nothing(start, tmp_path, corpus, rounds):
    """kill -9; then the same command once more, and in the end the dataset has the same bytes."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefgh", k=chance.randint(1, 9))) for _ in range(5000)]
    if corpus == "text":
        (tmp_path / "c.txt").write_text(" ".join(chance.choices(words, k=1_500_000)))
        argv = ["text", "c.txt", "--tokenizer=byte", "--shard_tokens=300000"]
    else:
        pairs = [{"prompt": " ".join(chance.choices(words, k=9)), "response": "so"} for _ in range(600)]
        (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, pairs)))
        argv = ["chat", "c.jsonl", "--tokenizer=byte", "--shard_tokens=5000"]
    began = time.perf_counter()
    assert start("prepare", *argv, "--out=whole", "--name=d", cwd=tmp_path).end() == 0
    longest = time.perf_counter() - began
    expected = contents(tmp_path / "whole")

    kills = ends = went_on = 0
    while True:
        process = start("prepare", *argv, "--out=parts", "--name=d", cwd=tmp_path)
        if kills < rounds:
            time.sleep(longest * chance.uniform(0.3, 1))
        if kills < rounds and process.process.is_alive():
            process.kill()
            kills += 1
            if not (tmp_path / "parts/meta.json").exists():  # else it came too late
                continue
        else:
            assert process.end() == 0, process.said()
        went_on += "resuming after" in process.said()
        assert contents(tmp_path / "parts") == expected
        shutil.rmtree(tmp_path / "parts")
        ends += 1
        if kills >= rounds:
            break
    print(f"{kills} kills of prepare {corpus}, which reached its end {ends} times, going on {went_on} times")


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def damaged(data: bytes, chance: random.Random) -> bytes:
    """The bytes with a bit flipped, a range overwritten, cut short, or grown; half of the places are at the start."""
    at = chance.randrange(min(len(data), 2048) if chance.random() < 0.5 else len(data))
    length = chance.choice((1, 8, 512, 4096))
    kind = chance.choice(("bit", "range", "zeros", "cut", "grown"))
    if kind == "bit":
        return data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    if kind == "grown":
        return data[:at] + chance.randbytes(length) + data[at:]
    part = bytes(length) if kind == "zeros" else chance.randbytes(length)
    return (data[:at] + part + data[at + length :])[: len(data)]


def moments_of(folder: Path, state: dict) -> str:
    return str({name: stored[...] for name, stored in checkpoint.open_tensors(folder, state, "optimizer").items()})


@rounds(60, 600)
def test_a_damaged_checkpoint_is_never_taken_for_what_was_written(tmp_path, capsys, rounds):
    """What loads is one of the two that were saved, and what is loaded of the damaged one is what was written."""
    for step in (1, 2):
        save_small(tmp_path, step, best=step == 2)
    originals = {}
    for folder in checkpoint.step_folders(tmp_path):
        state = checkpoint.read_state(folder)
        parameters = dict(checkpoint.fill(*checkpoint.build_model(folder, state)).named_parameters())
        originals[folder.name] = state, parameters, moments_of(folder, state)
    newest = tmp_path / "step_000002"
    targets = [*newest.iterdir(), tmp_path / "latest", tmp_path / "best"]
    chance, fell_back = random.Random(0), 0
    for i in range(rounds):
        target = targets[i % len(targets)]
        data = target.read_bytes()
        target.write_bytes(damaged(data, chance))
        folder, state = checkpoint.find(tmp_path)
        parameters = dict(checkpoint.fill(*checkpoint.build_model(folder, state)).named_parameters())
        expected = originals[folder.name]
        assert state == expected[0] and moments_of(folder, state) == expected[2]
        assert parameters.keys() == expected[1].keys()
        assert all(torch.equal(p, expected[1][name]) for name, p in parameters.items())
        fell_back += folder.name == "step_000001"
        target.write_bytes(data)
    assert capsys.readouterr().err.count("warning") >= fell_back > rounds / 3
    print(f"{rounds} damages of a checkpoint, {fell_back} of which the one before was loaded after")


def chat_dataset(folder: Path) -> Path:
    pairs = [{"prompt": f"Say {n} times a.", "response": " ".join("a" * (n % 9 + 1))} for n in range(200)]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    prepare_cli.prepare_corpus(
        ["chat", str(folder / "p.jsonl"), "--tokenizer=byte", f"--out={folder / 'd'}", "--shard_tokens=2000"]
    )
    return folder / "d"


def read_all(dataset: shards.Dataset) -> tuple:
    streams = [dataset.train, dataset.val, dataset.train.mask, dataset.val.mask]
    tokens = [stream.read([0], len(stream))[0].tolist() for stream in streams if stream is not None]
    return tokens, tokenizer_hash(dataset.tokenizer), dataset.tokenizer.chat_template, dataset.meta


@rounds(60, 600)
def test_a_damaged_dataset_is_never_taken_for_what_was_written(tmp_path, rounds):
    folder = chat_dataset(tmp_path)
    expected, targets, refused = read_all(load_dataset(str(folder))), sorted(folder.iterdir()), 0
    chance = random.Random(0)
    for i in range(rounds):
        target = targets[i % len(targets)]
        data = target.read_bytes()
        target.write_bytes(damaged(data, chance))
        try:
            assert read_all(load_dataset(str(folder))) == expected  # as where a space of meta.json became a line break
        except UserError as error:
            assert str(folder) in str(error)
            refused += 1
        target.write_bytes(data)
    assert refused > 0.8 * rounds
    print(f"{rounds} damages of a dataset, {refused} refused")


def test_shards_beyond_what_is_hashed_at_each_start_are_said_to_be(tmp_path, monkeypatch):
    folder = chat_dataset(tmp_path)
    assert load_dataset(str(folder)).unhashed == 0
    monkeypatch.setattr(shards, "HASH_LIMIT", 5000)
    sizes = sum(
        f.stat().st_size - shards.HEADER_BYTES for f in folder.iterdir() if f.suffix in (".bin", ".mask", ".index")
    )
    assert sizes - 5000 <= load_dataset(str(folder)).unhashed < sizes
    first_val = next(f for f in sorted(folder.iterdir()) if f.name.startswith("val"))  # which every figure comes from
    first_val.write_bytes(damaged(first_val.read_bytes(), random.Random(1)))
    with pytest.raises(UserError, match="damaged"):
        load_dataset(str(folder))


def test_shards_that_change_while_they_are_read_are_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_FILES", 1)
    ids = np.arange(5000) % 50257
    for split in ("train", "val"):
        with shards.ShardWriter(tmp_path, split, 50257, shard_tokens=1000) as writer:
            writer.write(ids)
    for file in list(tmp_path.iterdir()):  # as llm.c names them
        file.rename(tmp_path / f"x_{file.name.replace('train_', 'train_00').replace('val_', 'val_00')}")
    tokens = load_dataset(str(tmp_path)).train
    first, second = (shard.path for shard in tokens.shards[:2])

    def read(shard: int) -> list[int]:
        return tokens.read([1000 * shard + 500], 400)[0].tolist()

    kept = first.read_bytes()
    assert read(0) == list(range(500, 900))
    os.truncate(first, 1500)  # a mapped file would end the process here
    with pytest.raises(UserError, match="truncated"):
        read(0)
    first.unlink()
    read(1)
    with pytest.raises(UserError, match="no longer readable"):
        read(0)
    first.write_bytes(kept[::-1])
    with pytest.raises(UserError, match="replaced"):
        read(0)
    assert read(1) == list(range(1500, 1900)) and second.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Disks, permissions, files that vanish, two at once


@contextlib.contextmanager
def small_disk(folder: Path):
    """A disk in memory at `folder`; yields a function that sets its size in bytes."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"needs the right to mount a small disk: {made.stderr.strip()}")
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@rounds(3, 30)
def test_a_disk_that_fills_up_while_training_loses_nothing(dataset, whole_run, start, tmp_path, rounds):
    """At every write there is: the disk's sizes go through those that a run comes to need."""
    chance, full = random.Random(0), 0
    words = [*RUN, f"--dataset={dataset}", "--out_dir=disk/o"]
    needed = 2 * sum(f.stat().st_size for f in whole_run.rglob("*") if f.is_file())
    with small_disk(tmp_path / "disk") as set_size:
        for i in range(rounds):
            set_size(max(1, int(needed * (i + chance.random()) / rounds)))
            run_ = start("train.py", *words, cwd=tmp_path)
            said = said_in_a_sentence(run_, 0, 2)
            full += "No space left" in said
            set_size("50m")
            how = "--init_from=resume" if checkpoint.holds_run(tmp_path / "disk/o") else "--overwrite=True"
            assert start("train.py", *words, how, cwd=tmp_path).end() == 0
            numbers, last = result_of(tmp_path / "disk/o")
            assert last == result_of(whole_run)[1]
            assert [n["step"] for n in numbers] == [n["step"] for n in result_of(whole_run)[0]] or "going on" in said
            shutil.rmtree(tmp_path / "disk/o")
    assert full >= rounds / 3
    print(f"{rounds} small disks, of which training filled {full}")


@rounds(3, 30)
def test_a_disk_that_fills_up_while_preparing_loses_nothing(start, tmp_path, rounds):
    (tmp_path / "c.txt").write_text("to be or not to be, " * 20_000)
    argv = ["text", "c.txt", "--tokenizer=byte", "--name=d", "--shard_tokens=50000"]
    assert start("prepare", *argv, "--out=whole", cwd=tmp_path).end() == 0
    needed, chance, full = sum(map(len, contents(tmp_path / "whole").values())), random.Random(0), 0
    with small_disk(tmp_path / "disk") as set_size:
        for i in range(rounds):
            set_size(max(1, int(1.1 * needed * (i + chance.random()) / rounds)))
            full += "is full" in said_in_a_sentence(start("prepare", *argv, "--out=disk/d", cwd=tmp_path), 0, 2)
            set_size("50m")
            if not (tmp_path / "disk/d/meta.json").exists():
                said_in_a_sentence(start("prepare", *argv, "--out=disk/d", cwd=tmp_path), 0)
            assert contents(tmp_path / "disk/d") == contents(tmp_path / "whole")
            shutil.rmtree(tmp_path / "disk/d")
    assert full >= rounds / 3
    print(f"{rounds} small disks, of which preparation filled {full}")


@rounds(2, 20)
def test_files_that_may_not_grow_lose_nothing(dataset, whole_run, start, tmp_path, rounds):
    """A limit on the size of a file, which needs no rights: each file in turn is the one that reaches it."""
    sizes = sorted({f.stat().st_size for f in whole_run.rglob("*") if f.is_file()})
    chance, stopped = random.Random(0), 0
    for i in range(rounds):
        limit = max(1, sizes[i % len(sizes)] - chance.randint(1, 10)) if i else sizes[-1] // 2
        words = [*RUN, f"--dataset={dataset}", f"--out_dir=o{i}"]
        run_ = start("train.py", *words, cwd=tmp_path, file_size=limit)
        run_.end()
        stopped += run_.process.exitcode != 0
        assert run_.process.exitcode in (0, 1, 2) and "core" not in run_.said()
        how = "--init_from=resume" if checkpoint.holds_run(tmp_path / f"o{i}") else "--overwrite=True"
        assert start("train.py", *words, how, cwd=tmp_path).end() == 0
        assert result_of(tmp_path / f"o{i}")[1] == result_of(whole_run)[1]
    print(f"{rounds} limits, {stopped} of which stopped the run")


def test_no_permission_is_a_sentence(dataset, start, tmp_path):
    """As a user who may not: to write out_dir, to read the data, the checkpoint, or the text; to write the dataset."""
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


def test_files_that_vanish_from_under_a_run(dataset, start, tmp_path):
    """The out_dir, and then the dataset: the run goes on, and what it saves is whole."""
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


@rounds(2, 15)
def test_of_two_runs_at_once_one_is_told_of_the_other(dataset, whole_run, start, tmp_path, rounds):
    """Begun together, on an empty out_dir: one of them trains as if alone."""
    told = 0
    for i in range(rounds):
        words = [*RUN, f"--dataset={dataset}", f"--out_dir=o{i}"]
        both = [start("train.py", *words, cwd=tmp_path) for _ in range(2)]
        codes = sorted(each.end() for each in both)
        assert codes == [0, 2], [each.said() for each in both]
        loser, winner = sorted(both, key=lambda each: each.end(), reverse=True)
        said = said_in_a_sentence(loser, 2)
        named = f"process {winner.process.pid} on {socket.gethostname()}" in said
        assert named or "another process" in said or "another run wrote" in said or "already contains a run" in said
        told += named
        assert result_of(tmp_path / f"o{i}") == result_of(whole_run)
    (tmp_path / "c.txt").write_text("to be or not to be, " * 200_000)
    argv = ["text", "c.txt", "--tokenizer=byte", "--name=d"]
    both = [start("prepare", *argv, "--out=d", cwd=tmp_path) for _ in range(2)]
    assert sorted(each.end() for each in both) == [0, 2], [each.said() for each in both]
    load_dataset(str(tmp_path / "d"))
    print(f"{rounds} times two runs at once, {told} times with the other's name")


# ---------------------------------------------------------------------------------------------------------------------
# Non-finite values


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_and_moments_that_are_no_numbers_are_refused(tmp_path, monkeypatch, bad):
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


def test_published_weights_that_are_no_numbers_are_refused(tmp_path):
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
def test_a_gradient_that_is_no_number_is_skipped_and_the_run_goes_on(dataset, tmp_path, monkeypatch, capsys, bad):
    clip, calls = torch.nn.utils.clip_grad_norm_, 0

    def poisoned(parameters, *args, **kwargs):
        nonlocal calls
        parameters, calls = list(parameters), calls + 1
        if calls in (3, 4):
            parameters[2].grad.view(-1)[0] = bad
        return clip(parameters, *args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    assert train_here(monkeypatch, f"--dataset={dataset}", f"--out_dir={tmp_path / 'o'}", "--max_iters=8") == 0
    assert capsys.readouterr().out.count("1 updates skipped") == 2
    assert report.read_metrics(tmp_path / "o" / "metrics.jsonl")[-1]["val_loss"] < 4
    checkpoint.load_model(str(tmp_path / "o"))


def test_a_run_that_went_astray_does_not_push_out_its_good_checkpoints(dataset, tmp_path, monkeypatch, capsys):
    words = [f"--dataset={dataset}", f"--out_dir={tmp_path / 'o'}", "--eval_interval=2", "--keep_checkpoints=1"]
    assert train_here(monkeypatch, *words, "--max_iters=4") == 0
    broken = [*words, "--init_from=resume", "--max_iters=30", "--learning_rate=1e30", "--decay_lr=False"]
    train_here(monkeypatch, *broken, "--grad_clip=0")
    assert "(the val loss is not finite" in capsys.readouterr().err
    assert math_is_fine(checkpoint.load_model(str(tmp_path / "o"), "latest")[0])


@pytest.mark.parametrize("ends", ["at its last update", "by a signal"])
def test_a_run_does_not_end_well_on_weights_that_are_no_numbers(dataset, tmp_path, monkeypatch, capsys, ends):
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
    assert train_here(monkeypatch, *words) == 2
    said = capsys.readouterr()
    assert "done" not in said.out and "stopped at" not in said.out
    why = "the val loss is not finite" if ends == "at its last update" else "transformer.h.0.ln_1.weight is not finite"
    assert f"error: the last updates are not saved ({why}; " in said.err.splitlines()[-1]
    assert (tmp_path / "o" / "latest").read_text() == (tmp_path / "o" / "best").read_text() == "step_000006\n"


@pytest.mark.slow
def test_memory_that_really_ends(dataset, start, tmp_path):
    """The same updates come out in smaller micro-batches; or a sentence has the settings for that."""
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


def math_is_fine(model) -> bool:
    x = torch.zeros(1, 4, dtype=torch.long)
    with torch.no_grad():
        return bool(model(x, x)[0].isfinite().all())


def train_here(monkeypatch, *words) -> int:
    """train.py in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *words])
    monkeypatch.setattr(report, "draw_curve", lambda *args: None)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        return train.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------
# Strangers' files


class Calls:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Builds(dict):
    """Runs its code when its state is set."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return dict, (), Calls(os.system, f"touch {self.path}")


def malicious(victim: Path) -> list:
    touch = f"open({str(victim)!r}, 'w')"
    return [
        Calls(open, str(victim), "w"),
        Calls(os.system, f"touch {victim}"),
        Calls(exec, touch),
        Calls(eval, touch),
        Calls(subprocess.Popen, ["touch", str(victim)]),
        Calls(getattr, Calls(__import__, "os"), "system"),
        Calls(np.save, str(victim), 0),
        Calls(torch.save, 0, str(victim)),
        Calls(pickle.loads, pickle.dumps(Calls(open, str(victim), "w"))),
        Builds(victim),
    ]


def test_malicious_pickles_create_nothing(tmp_path, monkeypatch):
    """As ckpt.pt, meta.pkl and optimizer.pt, by torch.save and as plain pickles of every protocol."""
    victim, n = tmp_path / "created", 0
    np.zeros(10, dtype=np.uint16).tofile(tmp_path / "train.bin")
    step = save_small(tmp_path / "run", 1, m := small_model(), optimizers=(optimizers := small_optimizers(m)))
    for payload in malicious(victim):
        for wrapped in (payload, {"model": {"a": payload}, "itos": {0: payload}, "optimizers": [payload]}):
            forms = [pickle.dumps(wrapped, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
            torch.save(wrapped, tmp_path / "t.pt")
            for data in [*forms, (tmp_path / "t.pt").read_bytes()]:
                for name in ("ckpt.pt", "meta.pkl"):
                    (tmp_path / name).write_bytes(data)
                make_older(step, data)  # with the hash that it should have: a stranger sees to that
                found = checkpoint.find(tmp_path / "run")
                for load in (
                    lambda: checkpoint.load_model(str(tmp_path / "ckpt.pt")),
                    lambda: load_dataset(str(tmp_path)),
                    lambda found=found: checkpoint.load_optimizers(*found, m, optimizers),
                ):
                    with pytest.raises(UserError):
                        load()
                    n += 1
                assert not victim.exists()
    print(f"{n} malicious pickles, none of which ran")


def test_tensors_that_claim_more_than_their_file_has(tmp_path):
    """Of one number, repeated a million million times; sparse; or of no number at all."""
    shape = dict(block_size=8, vocab_size=257, n_layer=1, n_head=2, n_embd=10**6, bias=False)
    one = torch.zeros(1)
    names = {name: p.shape for name, p in checkpoint.empty_model({**shape, "mlp": "gelu"}, "x").named_parameters()}
    for make in (lambda size: one.expand(size), lambda size: torch.sparse_coo_tensor(size=size), lambda size: 5):
        saved = {"model": {name: make(size) for name, size in names.items()}, "model_args": shape, "config": {}}
        torch.save(saved, tmp_path / "ckpt.pt")
        assert (tmp_path / "ckpt.pt").stat().st_size < 10**6
        with pytest.raises(UserError, match=r"broken|not tensors"):
            checkpoint.load_model(str(tmp_path / "ckpt.pt"))


def test_a_pickle_that_asks_for_all_memory(tmp_path):
    """Its memo has one entry, at a place that makes the unpickler in C fill 64 GB."""
    np.zeros(10, dtype=np.uint16).tofile(tmp_path / "train.bin")
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x02}r\xff\xff\xff\xff.")
    began = time.perf_counter()
    with pytest.raises(UserError, match=r"meta\.pkl"):
        load_dataset(str(tmp_path))
    assert time.perf_counter() - began < 1


HOSTILE = [
    "",
    "null",
    "[]",
    "3",
    '"x"',
    "[" * 100_000,
    '{"a":' * 100_000,
    "{" + ",".join(f'"{i}": 1' for i in range(1000)) + "}",
    "9" * 5000,
    "\udcff",
    "\x00" * 100,
]
HOSTILE_VALUES = [None, True, -1, 10**30, 1e308, float("inf"), float("nan"), "", "x" * 10**5, "\x00", [], [[]], {}, 0.5]


def variants(whole: dict) -> list[str]:
    """A JSON object in hostile forms: broken; with a value of its own, or of what lies in it, replaced; doubled."""
    texts = [*HOSTILE, json.dumps(whole)[:-1] + ', "format": 7, "format": 1, "step": 3}']
    for name, value in whole.items():
        for bad in HOSTILE_VALUES:
            texts.append(json.dumps({**whole, name: bad}))
            if isinstance(value, dict):
                for inner in [*value][:40]:
                    texts.append(json.dumps({**whole, name: {**value, inner: bad}}))
        texts.append(json.dumps({k: v for k, v in whole.items() if k != name}))
    return texts


def test_hostile_json_is_a_sentence(tmp_path, capsys):
    """As meta.json, as state.json with its hash right, as config.json's neighbours, and as a saved tokenizer."""
    n = refused = 0

    def load(call, *arguments) -> None:
        nonlocal n, refused
        n += 1
        try:
            call(*arguments)
        except UserError:
            refused += 1

    data = chat_dataset(tmp_path)
    meta = json.loads((data / "meta.json").read_text())
    for text in variants({k: v for k, v in meta.items() if k != "sha256"}):
        (data / "meta.json").write_text(text, errors="surrogateescape")
        load(lambda: read_all(load_dataset(str(data))))
        load(lambda: load_mixture(f"{data}:1,{data}:1"))

    step = save_small(tmp_path / "run", 1)
    state = json.loads((step / "state.json").read_text())
    for text in variants({**state, "settings": {"batch_size": 3}, "lora": None, "val_loss": 1.0, "data": "x"}):
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            stranger = json.loads(text)
            stranger["sha256"] = {**state["sha256"], "state": checkpoint.state_hash(stranger)}
            text = json.dumps(stranger)
        (step / "state.json").write_text(text, errors="surrogateescape")
        load(lambda: checkpoint.load_model(str(tmp_path / "run")))

    for whole in (ByteTokenizer().to_dict(), {"kind": "char", "vocab": ["a"]}, {"kind": "bpe", "config": bpe_config()}):
        for text in variants({**whole, "eot": None, "chat_template": "x"}):
            with contextlib.suppress(ValueError, RecursionError):
                load(from_dict, json.loads(text))
    config = bpe_config()
    for text in variants(config):
        with contextlib.suppress(ValueError, RecursionError):
            load(from_dict, {"kind": "hf", "config": json.loads(text)})
    assert refused > n / 2
    print(f"{n} hostile objects, {refused} refused")


def bpe_config() -> dict:
    from acorn.data.tokenizer import train_bpe

    return train_bpe(["to be or not to be"], 270).config


def test_headers_that_claim_absurd_sizes(tmp_path):
    shard = tmp_path / "train_000000.bin"
    for tokens in (-(2**31), -1, 2**31 - 1, 11):
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, tokens
        shard.write_bytes(header.tobytes() + bytes(20))
        with pytest.raises(UserError, match="truncated or damaged"):
            open_shard(shard)

    step = save_small(tmp_path / "run", 1)
    whole = (step / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    name = next(iter(header.keys() - {"__metadata__"}))
    headers = [{**header, name: {**header[name], "data_offsets": [0, 2**62]}}]
    headers += [{**header, name: {**header[name], "shape": [2**40, 2**40]}}, {**header, name: {"dtype": "F99"}}]
    forms = [size.to_bytes(8, "little") + whole[8:] for size in (0, 1, 2**32, 2**63, 2**64 - 1)]
    for each in headers:
        text = json.dumps(each).encode()
        forms.append(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    for data in forms:
        (step / "model.safetensors").write_bytes(data)
        state = {**STATE, **json.loads((step / "state.json").read_text())}
        state["sha256"]["model.safetensors"] = files.sha256(step / "model.safetensors")
        state["sha256"]["state"] = checkpoint.state_hash(state)
        (step / "state.json").write_text(json.dumps(state))
        with pytest.raises(UserError, match=r"model\.safetensors"):
            checkpoint.load_model(str(tmp_path / "run"))


TRICKS = [
    "../outside",
    "..",
    "/etc",
    "/dev/null",
    "/dev/stdin",
    "loop",
    "a\x00b",
    "a\nb",
    "x" * 5000,
    "\udcff\udcfe",
    "~root",
    "-rf",
    "a:1,../b:2",
    " ",
    "..\\..\\x",
    "%2e%2e",
]


@pytest.mark.parametrize("name", TRICKS, ids=range(len(TRICKS)))
def test_tricks_in_names_are_a_sentence_and_write_nothing_elsewhere(tmp_path, monkeypatch, dataset, name):
    work = tmp_path / "a" / "b"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    os.symlink("loop", "loop")
    Path("c.txt").write_text("to be or not to be, " * 50)
    before = {*tmp_path.rglob("*")}
    with pytest.raises(UserError) as error:
        load_mixture(name)
    assert len(str(error.value)) < 1000
    with pytest.raises(UserError):
        train_here(monkeypatch, f"--dataset={name}", "--out_dir=o")
    assert not Path("o").exists()
    with contextlib.suppress(UserError, OSError, ValueError):
        prepare_cli.prepare_corpus(["text", "c.txt", "--tokenizer=byte", f"--name={name}"])
    assert all((work / "data") in path.parents or path == work / "data" for path in {*tmp_path.rglob("*")} - before)
    Path("config.py").write_text(f"out_dir = {name!r}\nmax_iters = 0\n")
    with contextlib.suppress(UserError, OSError):
        train_here(monkeypatch, "config.py", f"--dataset={dataset}", "--dry_run=True")


def test_links_lead_where_they_lead_and_are_checked_there(tmp_path):
    """A shard that is a link to some other file, to a device or to nothing is no shard."""
    folder = chat_dataset(tmp_path)
    for target in ("/etc/hostname", "/dev/zero", tmp_path / "nothing", folder / "val_000000.bin"):
        moved = (folder / "train_000000.bin").rename(tmp_path / "kept")
        os.symlink(target, folder / "train_000000.bin")
        with pytest.raises(UserError, match=r"train_000000\.bin"):
            load_dataset(str(folder))
        moved.replace(folder / "train_000000.bin")
    load_dataset(str(folder))


def test_the_errors_of_a_disk_are_sentences(tmp_path, monkeypatch):
    """Whatever the system says of a read: a disk that fails, too many open files."""
    folder = chat_dataset(tmp_path)
    for number in (errno.EIO, errno.EMFILE, errno.ESTALE):

        def fails(*args, number=number, **kwargs):
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch, pytest.raises(UserError, match=os.strerror(number)):
            tokens = load_dataset(str(folder)).train
            patch.setattr("builtins.open", fails)
            tokens.read([0], 10)
