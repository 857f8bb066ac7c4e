"""Untrusted pickles (ckpt.pt, meta.pkl, optimizer.pt): no code in them runs."""

import os
import pickle
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Calls, make_older, save_small, small_model, small_optimizers

from acorn import UserError, checkpoint
from acorn.data.shards import load_dataset


def test_malicious_checkpoint_is_rejected_and_runs_no_code(tmp_path):
    victim = tmp_path / "created"
    torch.save({"model": Calls(open, str(victim), "w"), "model_args": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="could run code"):
        checkpoint.load_model(str(tmp_path / "ckpt.pt"))
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Calls(open, str(victim), "w")))
    with pytest.raises(UserError):
        checkpoint.load_model(str(tmp_path / "plain.pt"))
    assert not victim.exists()


def test_malicious_meta_pickle_is_rejected_and_runs_no_code(tmp_path):
    np.zeros(10, dtype=np.uint16).tofile(tmp_path / "train.bin")
    for payload in (
        {"itos": Calls(open, str(tmp_path / "owned"), "w")},
        Calls(open, str(tmp_path / "owned"), "w"),
        [1],
        {"itos": {0: "ab"}},
    ):
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(payload))
        with pytest.raises(UserError, match="No code in it was run"):
            load_dataset(str(tmp_path))
    assert not (tmp_path / "owned").exists()
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x04garbage")
    with pytest.raises(UserError, match=r"meta\.pkl"):
        load_dataset(str(tmp_path))


class Builds(dict):
    """An object whose pickle runs code when its state is set."""

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


def test_malicious_pickles_create_no_files(tmp_path, monkeypatch):
    """Load each payload as ckpt.pt, meta.pkl and optimizer.pt, by torch.save and as a plain pickle of each protocol."""
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
                make_older(step, data)  # with a valid hash, as an attacker would write it
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
    print(f"none of {n} malicious pickles ran code")


def test_pickle_that_would_exhaust_memory_is_rejected(tmp_path):
    """Its memo has one entry, at an index for which the C unpickler allocates 64 GB."""
    np.zeros(10, dtype=np.uint16).tofile(tmp_path / "train.bin")
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x02}r\xff\xff\xff\xff.")
    began = time.perf_counter()
    with pytest.raises(UserError, match=r"meta\.pkl"):
        load_dataset(str(tmp_path))
    assert time.perf_counter() - began < 1
