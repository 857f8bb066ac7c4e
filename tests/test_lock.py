"""If two processes use the same out_dir or dataset at the same time, one is refused."""

import socket
from pathlib import Path

from forked import RUN, result_of, said_in_a_sentence
from helpers import REPO, TINY, refused, rounds, start_process, train

from acorn import files
from acorn.data.shards import load_dataset


def test_out_dir_of_a_running_process_is_refused(dataset, tmp_path):
    process = start_process(
        REPO / "train.py", *TINY, f"--dataset={dataset}", "--out_dir=o", "--max_iters=100000", cwd=tmp_path
    )
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    refused(train(tmp_path, dataset, "--out_dir=o", "--overwrite=True"), "is in use", str(process.pid))
    process.kill()
    process.communicate()
    assert train(tmp_path, dataset, "--out_dir=o", "--overwrite=True", "--max_iters=1").returncode == 0


@rounds(2, 15)
def test_one_of_two_simultaneous_runs_is_refused(dataset, whole_run, start, tmp_path, rounds):
    """Start two runs on an empty out_dir at the same time: one trains as if it were alone, the other is refused."""
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


def test_unlock_on_systems_that_cannot_remove_open_files(tmp_path, monkeypatch):
    """As on Windows, unlink fails while the file is open."""
    lock, unlink = files.lock(tmp_path, "preparing"), Path.unlink

    def refuse(self, missing_ok=False):
        if not lock.closed:
            raise PermissionError
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    files.unlock(lock)
    assert lock.closed and not (tmp_path / ".lock").exists()
