"""acorn/checkpoint: finding a checkpoint, falling back from a damaged one, and refusing invalid files."""

import concurrent.futures
import dataclasses
import functools
import json
import os
import random
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import STATE, damaged, rounds, save_small

import sample
from acorn import UserError, checkpoint, files, serve
from acorn.distributed.runtime import ONE_RANK
from acorn.evaluation import tasks
from acorn.files import sha256 as files_sha256


def test_ranks_divide_the_hashing_and_agree_on_a_checkpoint(tmp_path, monkeypatch, capsys):
    """Two ranks, simulated by threads: each file is hashed by only one of them, and both find the same checkpoint."""
    for step in (1, 2):
        save_small(tmp_path, step)
    (tmp_path / "step_000002" / "optimizer.safetensors").write_bytes(b"x")
    hashed, told, meet = [], [None, None], threading.Barrier(2)
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path) or files_sha256(path))

    def gather(rank, values):
        told[rank] = values
        meet.wait()
        both = list(told)
        meet.wait()
        return both

    def process(rank):
        r = dataclasses.replace(ONE_RANK, rank=rank, world_size=2)
        r.gather = functools.partial(gather, rank)
        return checkpoint.find(tmp_path, dist=r)[0].name

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert list(pool.map(process, range(2))) == ["step_000001"] * 2
    assert len(hashed) == len(set(hashed)) == 4
    assert capsys.readouterr().err.count("trying another") == 1


@pytest.mark.parametrize(
    "name, value",
    [
        ("step", -1),
        ("step", 5.5),
        ("step", "5"),
        ("position", 10**30),
        ("best_loss", "abc"),
        ("val_loss", [1]),
        ("settings", None),
        ("config", []),
        ("format", 99),
    ],
)
def test_state_with_invalid_values_is_refused(tmp_path, name, value):
    """The hash of the state is correct, so only the check of its values can refuse it."""
    folder = save_small(tmp_path, 1)
    state = {**json.loads((folder / "state.json").read_text()), name: value}
    state["sha256"]["state"] = checkpoint.state_hash(state)
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.find(tmp_path)


def test_absurd_configs_and_deeply_nested_json_are_refused(tmp_path):
    folder, state = save_small(tmp_path, 1), None
    state = json.loads((folder / "state.json").read_text())
    for change in ({"n_embd": 10**12}, {"n_layer": 10**9}, {"norm_eps": "x"}, {"from_the_future": 1}):
        with pytest.raises(UserError, match="not a model that this version"):
            checkpoint.fill(*checkpoint.build_model(folder, {**state, "config": {**state["config"], **change}}))
    (folder / "state.json").write_text("[" * 200000)
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.find(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "empty"])
def test_a_damaged_checkpoint_falls_back_to_the_previous_one(tmp_path, capsys, file, damage):
    save_small(tmp_path, 1)
    newest = save_small(tmp_path, 2) / file
    data = newest.read_bytes()
    if damage == "truncate":
        newest.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        newest.write_bytes(data[:-40] + bytes([data[-40] ^ 255]) + data[-39:])
    elif damage == "remove":
        newest.unlink()
    else:
        newest.write_bytes(b"")
    folder, state = checkpoint.find(tmp_path)
    assert folder.name == "step_000001" and state["step"] == 1
    said = capsys.readouterr().err
    assert str(newest) in said or "step_000002" in said
    assert "trying another" in said
    shutil.rmtree(tmp_path / "step_000001")
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.find(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"step_0000", b"\xff\x00", b"step_000009\n"])
def test_a_damaged_pointer_falls_back_to_the_newest_intact_checkpoint(tmp_path, content):
    """Filesystems without an atomic rename can leave such pointers. The newest checkpoint is the one with the highest
    step, whatever its modification time."""
    for step in (1, 2):
        os.utime(save_small(tmp_path, step), (0, 4e9 - step * 1e9))
    (save_small(tmp_path, 3, keep=9) / "model.safetensors").write_bytes(b"torn")
    for name in ("latest", "best"):
        (tmp_path / name).unlink(missing_ok=True)
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert checkpoint.find(tmp_path, name)[1]["step"] == 2


def test_errors_for_a_missing_checkpoint(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is no folder"):
        checkpoint.find(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.find(tmp_path)
    monkeypatch.chdir(tmp_path)
    save_small(Path("out/mine"), 1)
    with pytest.raises(UserError, match="Did you mean out/mine"):
        checkpoint.find(Path("out/mien"))
    with pytest.raises(UserError, match="out/mine"):
        checkpoint.find(Path("elsewhere/quite"))
    with pytest.raises(UserError, match="there is no step_000009"):
        checkpoint.load_model("out/mine", "step_000009")
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "config.json").write_text("{}")
    (tmp_path / "ckpt.pt").write_bytes(b"")
    for single in ("out/mine/step_000001", "published", "ckpt.pt", "gpt2"):
        with pytest.raises(UserError, match=r"single checkpoint.*Leave out --checkpoint"):
            checkpoint.load_model(single, "step_000009")
    with pytest.raises(UserError, match=r"out/mien.*Did you mean out/mine"):
        tasks.training_dataset("out/mien", "best")
    with pytest.raises(UserError, match=r"there is no folder none/mine, and a published model does not record its"):
        tasks.training_dataset("none/mine", "best")  # could be a name on the hub


@pytest.mark.parametrize("script", [sample, serve])
def test_a_missing_out_dir_is_not_looked_up_on_the_hub(tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script", "--out_dir=none/mine", "--device=cpu"])
    with pytest.raises(UserError, match=r"there is no folder none/mine\. Train first"):
        script.main()


def test_a_pointer_cannot_leave_the_folder(tmp_path):
    save_small(tmp_path / "a", 7)
    save_small(tmp_path / "b", 1)
    (tmp_path / "b" / "latest").write_text("../a/step_000007\n")
    assert checkpoint.find(tmp_path / "b")[1]["step"] == 1


def test_weights_that_do_not_match_the_config_are_refused(tmp_path):
    folder = save_small(tmp_path, 1)
    for change, word in ((dict(n_embd=32), "has shape \\["), (dict(n_layer=2), "lacks"), (dict(bias=False), "has ")):
        state = json.loads((folder / "state.json").read_text())
        state["config"] |= change | ({"n_hidden": 0} if "n_embd" in change else {})
        with pytest.raises(UserError, match=word):
            checkpoint.fill(*checkpoint.build_model(folder, state))


def moments_of(folder: Path, state: dict) -> str:
    return str({name: stored[...] for name, stored in checkpoint.open_tensors(folder, state, "optimizer").items()})


@rounds(30, 600)
def test_damaged_data_is_never_loaded(tmp_path, capsys, rounds):
    """After random damage to one file, the loaded checkpoint equals one of the two that were saved."""
    for step in (1, 2):
        save_small(tmp_path, step, best=2)
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
    print(f"{fell_back} of {rounds} damaged checkpoints fell back to the previous one")


def test_safetensors_headers_with_absurd_sizes_are_refused(tmp_path):
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
