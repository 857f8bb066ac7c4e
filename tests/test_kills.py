"""kill -9 at random times during training and preparation: the next run gives the same result as without a kill."""

import json
import random
import shutil
import subprocess
import time

import pytest
from forked import RUN, Forked, free_port, result_of
from helpers import REPO, TINY, contents, numbers, rounds, script, start_process

from acorn import checkpoint


@pytest.mark.slow
def test_twenty_kills_do_not_change_the_result(trained, dataset, tmp_path):
    """Kill a run twenty times by kill -9, resume it each time, and compare it with an uninterrupted run."""
    chance, kills = random.Random(0), 0
    words = [*TINY, f"--dataset={dataset}", "--out_dir=o", "--eval_interval=2", "--eval_iters=3"]
    whole = script("train.py", *words[:-3], "--out_dir=whole", "--eval_interval=2", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    while kills < 20:
        resumable = (tmp_path / "o").exists() and list((tmp_path / "o").glob("step_*/state.json"))
        how = ["--init_from=resume"] if resumable else ["--overwrite=True"]
        process = start_process(REPO / "train.py", *words, *how, cwd=tmp_path)
        time.sleep(chance.uniform(2.0, 5.0))
        if process.poll() is None:
            process.kill()
            kills += 1
            process.wait()
        else:
            assert process.returncode == 0, process.stdout.read()
            if (tmp_path / "o" / "latest").read_text() == "step_000040\n":  # the run is finished, so start again
                assert numbers(tmp_path / "o") == numbers(tmp_path / "whole")
                subprocess.run(["rm", "-r", tmp_path / "o"], check=True)
    resumable = (tmp_path / "o").exists() and list((tmp_path / "o").glob("step_*/state.json"))
    script("train.py", *words, "--init_from=resume" if resumable else "--overwrite=True", cwd=tmp_path)
    assert numbers(tmp_path / "o") == numbers(tmp_path / "whole")


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
@rounds(2, 35)
def test_kills_during_training_do_not_change_the_result(dataset, whole_run, start, tmp_path, processes, rounds):
    """Kill a run by kill -9, resume it, and compare it with an uninterrupted run. With two processes, kill both."""

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
    expected = result_of(tmp_path / "o")  # two processes sum in a different order than one
    if processes == 1:
        assert expected == result_of(whole_run)
    shutil.rmtree(tmp_path / "o")

    chance, kills, ends = random.Random(processes), 0, 0
    while kills < rounds:
        run_ = begin()
        time.sleep(chance.uniform(0, longest))
        if not all(each.process.is_alive() for each in run_):  # the run is finished, so start again
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


@pytest.mark.parametrize("corpus", ["text", pytest.param("chat", marks=pytest.mark.slow)])
@rounds(2, 15)
def test_kills_during_preparation_do_not_change_the_dataset(start, tmp_path, corpus, rounds):
    """Kill a preparation by kill -9, run the same command again, and compare the bytes of the dataset."""
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
    expected = contents(tmp_path / "whole", without=[".lock"])

    kills = ends = went_on = 0
    while True:
        process = start("prepare", *argv, "--out=parts", "--name=d", cwd=tmp_path)
        if kills < rounds:
            time.sleep(longest * chance.uniform(0.3, 1))
        if kills < rounds and process.process.is_alive():
            process.kill()
            kills += 1
            if not (tmp_path / "parts/meta.json").exists():  # otherwise the kill came too late
                continue
        else:
            assert process.end() == 0, process.said()
        went_on += "resuming after" in process.said()
        assert contents(tmp_path / "parts", without=[".lock"]) == expected
        shutil.rmtree(tmp_path / "parts")
        ends += 1
        if kills >= rounds:
            break
    print(f"{kills} kills of prepare {corpus}, which reached its end {ends} times, going on {went_on} times")
