"""acorn/checkpoint/save.py: saving is atomic and bit-exact, and old checkpoints are removed."""

import errno
import json
import os
import shutil
import threading

import pytest
import torch
from helpers import STATE, make_older, on_posix, same_weights, save_small, small_model, small_optimizers
from safetensors.torch import load_file, save_file

from acorn import UserError, checkpoint, files
from acorn.checkpoint import save as saving


def test_saved_weights_load_bit_identical(tmp_path):
    for step, changes in enumerate(
        [{}, dict(tie_weights=False, pos="rope", mlp="swiglu", norm="rmsnorm", n_kv_head=1, head_dim=6, qkv_bias=True)]
    ):
        m = small_model(step, **changes)
        save_small(tmp_path, step, m)
        folder, state = checkpoint.find(tmp_path)
        loaded = checkpoint.fill(*checkpoint.build_model(folder, state))
        assert same_weights(loaded, m) and loaded.config == m.config


def older_state_dict(m, optimizer) -> dict:
    """Return a state dict with one group in the model's parameter order, as older versions saved AdamW next to Muon."""
    states = [optimizer.state[p] for p in m.parameters() if p in optimizer.state]
    return {"state": dict(enumerate(states)), "param_groups": [{"params": list(range(len(states)))}]}


def assert_same_moments(one: dict, other: dict):
    assert one.keys() == other.keys() and one
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("form", ["of now", "optimizer.pt"])
def test_optimizer_state_loads_bit_identical(tmp_path, kind, form):
    m = small_model()
    optimizers = small_optimizers(m, kind)
    folder = save_small(tmp_path, 1, m, optimizers=optimizers)
    if form == "optimizer.pt":
        older = [older_state_dict(m, each) if kind == "muon" else each.state_dict() for each in optimizers]
        torch.save({"optimizers": older, "scaler": {}}, tmp_path / "moments")
        make_older(folder, (tmp_path / "moments").read_bytes())
    folder, state = checkpoint.find(tmp_path)
    again = checkpoint.fill(*checkpoint.build_model(folder, state))
    loaded = small_optimizers(again, kind, updates=0)
    checkpoint.load_optimizers(folder, state, again, loaded)
    assert_same_moments(checkpoint.named_moments(again, loaded), checkpoint.named_moments(m, optimizers))
    other = small_optimizers(again, "muon" if kind == "adamw" else "adamw", updates=0)
    with pytest.raises(UserError, match="optimizer state does not fit"):
        checkpoint.load_optimizers(folder, state, again, other)


def test_checkpoint_files_have_the_permissions_of_the_folder(tmp_path):
    folder = save_small(tmp_path, 1, small_model())
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {folder.stat().st_mode & 0o666}


def test_checkpoint_before_the_first_update_has_no_moments(tmp_path):
    m = small_model()
    save_small(tmp_path, 0, m, optimizers=small_optimizers(m, updates=0))
    folder, state = checkpoint.find(tmp_path)
    again = checkpoint.fill(*checkpoint.build_model(folder, state))
    checkpoint.load_optimizers(folder, state, again, optimizers := small_optimizers(again, updates=0))
    assert checkpoint.named_moments(again, optimizers) == {}


@pytest.mark.parametrize("shards", [2, 3, 40])  # some of 40 hold no rows of the smaller tensors
def test_shards_load_as_one_model(tmp_path, shards):
    m = small_model()
    optimizers = small_optimizers(m)
    folder = save_small(tmp_path, 1, m, optimizers=optimizers)
    state = json.loads((folder / "state.json").read_text()) | {"shards": shards}
    for kind in ("model", "optimizer"):
        whole = load_file(folder / f"{kind}.safetensors")
        os.remove(folder / f"{kind}.safetensors")
        rows = {name: torch.arange(len(t)).chunk(shards) if t.dim() else [] for name, t in whole.items()}
        for i, name in enumerate(checkpoint.file_names(kind, shards)):
            own = {
                key: t[rows[key][i] if i < len(rows[key]) else slice(0, 0)] if t.dim() else t
                for key, t in whole.items()
            }
            save_file(own, folder / name)
            state["sha256"][name] = files.sha256(folder / name)
        stored = checkpoint.open_tensors(folder, state, kind)
        assert all(torch.equal(stored[name][...], t) and stored[name].shape == t.shape for name, t in whole.items())
        longest = max(whole, key=lambda name: whole[name].numel())
        for start, stop in ((0, 5), (3, 200), (100, 257), (80, 80)):
            assert torch.equal(stored[longest][start:stop], whole[longest][start:stop])
    state["sha256"]["state"] = checkpoint.state_hash(state)
    (folder / "state.json").write_text(json.dumps(state))
    again = checkpoint.fill(*checkpoint.build_model(*checkpoint.find(tmp_path)))
    loaded = small_optimizers(again, updates=0)
    checkpoint.load_optimizers(folder, state, again, loaded)
    assert same_weights(again, m)
    assert_same_moments(checkpoint.named_moments(again, loaded), checkpoint.named_moments(m, optimizers))
    os.remove(folder / checkpoint.file_names("optimizer", shards)[-1])
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.find(tmp_path)


def test_training_continues_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The checkpoint holds the weights at the time when `save` returned, even if the model changes afterwards."""
    may_write = threading.Event()
    monkeypatch.setattr(saving, "save_file", lambda *args: may_write.wait() and save_file(*args))
    m = small_model()
    before = {name: p.clone() for name, p in m.state_dict().items()}
    writer = checkpoint.Writer(tmp_path, keep=2)
    writer.save(m, optimizers := small_optimizers(m, updates=0), {**STATE, "step": 1})
    with torch.no_grad():
        for p in m.parameters():
            p.add_(1)
    assert not checkpoint.step_folders(tmp_path)
    may_write.set()
    writer.save(m, optimizers, {**STATE, "step": 2})  # waits for the first checkpoint
    assert writer.wait()
    first = load_file(tmp_path / "step_000001" / "model.safetensors")
    second = load_file(tmp_path / "step_000002" / "model.safetensors")
    for name, p in first.items():
        assert torch.equal(p, before[name]) and torch.equal(p + 1, second[name])


def test_failed_write_is_reported_and_the_next_save_succeeds(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save_small(tmp_path, 1)
    m, writer = small_model(), checkpoint.Writer(tmp_path, keep=2)
    for module, name in ((saving, "save_file"), (files, "sync"), (os, "rename"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            writer.save(m, [], {**STATE, "step": 2})
            assert not writer.wait() and writer.failure.endswith(os.strerror(errno.ENOSPC))
        said = capsys.readouterr().err
        assert said.startswith("warning: the checkpoint of step 2 could not be written") and said.count("\n") == 1
        assert checkpoint.find(tmp_path)[1]["step"] == 1
        shutil.rmtree(tmp_path / "step_000002", ignore_errors=True)
    writer.save(m, [], {**STATE, "step": 3})
    assert writer.wait() and checkpoint.find(tmp_path)[1]["step"] == 3
    assert not list(tmp_path.glob(".*"))


@on_posix
def test_names_that_are_taken_by_other_kinds_of_files(tmp_path, capsys):
    os.mkfifo(tmp_path / ".writing-step_000001")
    (tmp_path / ".writing-step_000002").write_text("a file where a folder should be\n")
    for step in (1, 2):
        save_small(tmp_path, step)
        assert checkpoint.find(tmp_path)[1]["step"] == step
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    writer = checkpoint.Writer(tmp_path, keep=2)
    writer.save(small_model(), [], {**STATE, "step": 3})
    assert not writer.wait() and "latest: Is a directory" in capsys.readouterr().err


def test_tied_weights_are_stored_once_and_loaded_tied(tmp_path):
    m = small_model()
    folder = save_small(tmp_path, 1, m)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded = checkpoint.fill(*checkpoint.build_model(*checkpoint.find(tmp_path)))
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_newest_and_best_checkpoints_are_kept(tmp_path):
    for step, best in ((1, None), (2, 2), (3, 2), (4, 2), (5, 2)):
        save_small(tmp_path, step, keep=2, best=best)
    assert {f.name for f in checkpoint.step_folders(tmp_path)} == {"step_000002", "step_000004", "step_000005"}
    assert checkpoint.find(tmp_path, "latest")[0].name == "step_000005"
    assert checkpoint.find(tmp_path, "best")[0].name == "step_000002"
    assert checkpoint.find(tmp_path, "step_000004")[1]["step"] == 4
    with pytest.raises(UserError, match="no step_000001"):
        checkpoint.find(tmp_path, "step_000001")


def test_checkpoint_that_adapters_need_is_kept(tmp_path):
    base = save_small(tmp_path / "base", 1, keep=1)
    checkpoint.pin(base, tmp_path / "adapters")
    for step in (2, 3):
        save_small(tmp_path / "base", step, keep=1)
    assert [f.name for f in checkpoint.step_folders(tmp_path / "base")] == ["step_000003", "step_000001"]
    assert str(tmp_path / "adapters") in (base / "pinned").read_text()
    shutil.rmtree(base)
    with pytest.raises(UserError, match="was removed by its run"):
        checkpoint.pin(base, tmp_path / "adapters")


def test_kill_at_any_point_of_saving_leaves_a_loadable_run(tmp_path, monkeypatch):
    """Simulates a kill before the n-th call of a function that writes, syncs or renames, for every n."""
    save_small(tmp_path, 1)
    calls = 0

    class Killed(BaseException):
        pass

    def dying(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == die_at:
                raise Killed
            return function(*args, **kwargs)

        return call

    really_remove = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # a killed process does not clean up
    for module, name in ((saving, "save_file"), (files, "sync")):
        monkeypatch.setattr(module, name, dying(getattr(module, name)))
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
    for die_at in range(1, 100):
        calls = 0
        for leftover in tmp_path.glob(".*-step_*"):
            really_remove(leftover)
        try:
            save_small(tmp_path, 1 + die_at)
        except Killed:
            folder, state = checkpoint.find(tmp_path)
            checkpoint.fill(*checkpoint.build_model(folder, state))
        else:
            break
    assert die_at > 8  # saving makes at least 8 such calls, and succeeds if none is interrupted
    assert checkpoint.find(tmp_path)[1]["step"] == 1 + die_at


def test_kill_while_a_step_is_replaced_keeps_the_old_one(tmp_path, monkeypatch):
    save_small(tmp_path, 3, keep=1, best=3)
    rename = os.rename

    def dies_at_the_second(source, target):
        if ".writing" in str(source):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        save_small(tmp_path, 3, keep=1, best=3)
    monkeypatch.undo()
    left = {path.name for path in tmp_path.iterdir()}
    for which in ("latest", "best", "step_000003"):
        assert checkpoint.find(tmp_path, which)[1]["step"] == 3
    assert {path.name for path in tmp_path.iterdir()} == left  # reading changes nothing
    save_small(tmp_path, 4, keep=2, best=3)
    assert checkpoint.find(tmp_path, "best")[0].name == "step_000003"
    assert not list(tmp_path.glob(".*"))


def test_damaged_newer_checkpoint_is_removed_by_the_next_save(tmp_path):
    save_small(tmp_path, 10)
    (save_small(tmp_path, 20, best=20) / "optimizer.safetensors").write_bytes(b"x")
    assert checkpoint.find(tmp_path)[1]["step"] == 10
    save_small(tmp_path, 15, keep=1)
    assert [f.name for f in checkpoint.step_folders(tmp_path)] == ["step_000015"]
    assert checkpoint.find(tmp_path)[1]["step"] == 15


def test_saving_works_if_folders_cannot_be_synced(tmp_path, monkeypatch):
    really_sync = os.fsync

    def sync(descriptor):
        if os.path.isdir(f"/dev/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        really_sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    save_small(tmp_path, 1, best=1)
    assert checkpoint.find(tmp_path)[1]["step"] == 1
