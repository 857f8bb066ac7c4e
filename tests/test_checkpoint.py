"""acorn/checkpoint.py: whole or not there, safe to load, and going back to the one before where one is damaged."""

import concurrent.futures
import dataclasses
import errno
import functools
import json
import os
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from acorn import UserError, checkpoint, files
from acorn.checkpoint import save as saving
from acorn.data.tokenizer import get_tokenizer
from acorn.distributed.runtime import ONE_RANK
from acorn.evaluation import tasks
from acorn.files import sha256 as files_sha256
from acorn.training import optim
from model import GPT, GPTConfig

STATE = {"settings": {}, "tokenizer": get_tokenizer("byte").to_dict(), "val_loss": 1.5}


def model(seed=0, **changes) -> GPT:
    torch.manual_seed(seed)
    shape = dict(block_size=8, vocab_size=257, n_layer=1, n_head=2, n_embd=16)
    return GPT(GPTConfig(**{**shape, **changes}))


def make_optimizers(m: GPT, kind="adamw", updates=1) -> list[torch.optim.Optimizer]:
    """Optimizers that made so many updates of the model."""
    optimizers = optim.make_optimizers(m, kind, 1e-3, 0.02, 0.1, (0.9, 0.95), "cpu")
    idx = torch.arange(16).view(2, 8)
    for _ in range(updates):
        m(idx, idx)[1].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return optimizers


def save(folder, step, m=None, keep=2, best=False, optimizers=None):
    m, writer = m or model(step), checkpoint.Writer(folder, keep)
    writer.save(m, optimizers or make_optimizers(m), {**STATE, "step": step}, best)
    assert writer.wait()
    return folder / f"step_{step:06d}"


def same(a: GPT, b: GPT) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(name == other and torch.equal(p, q) for (name, p), (other, q) in pairs)


def test_what_is_saved_is_loaded_to_the_bit(tmp_path):
    for step, changes in enumerate(
        [{}, dict(tie_weights=False, pos="rope", mlp="swiglu", norm="rmsnorm", n_kv_head=1)]
    ):
        m = model(step, **changes)
        save(tmp_path, step, m)
        folder, state = checkpoint.find(tmp_path)
        loaded = checkpoint.fill(*checkpoint.build_model(folder, state))
        assert same(loaded, m) and loaded.config == m.config


def make_older(folder, optimizer: bytes) -> None:
    """Give a checkpoint the form of older ones, whose optimizer.pt may hold anything."""
    (folder / "optimizer.safetensors").unlink(missing_ok=True)
    (folder / "optimizer.pt").write_bytes(optimizer)
    state = json.loads((folder / "state.json").read_text()) | {"format": 1}
    state["sha256"] |= {"optimizer.pt": files.sha256(folder / "optimizer.pt"), "state": checkpoint.state_hash(state)}
    (folder / "state.json").write_text(json.dumps(state))


def older_state_dict(m: GPT, optimizer) -> dict:
    """One group in the model's order, which AdamW next to Muon had in older versions."""
    states = [optimizer.state[p] for p in m.parameters() if p in optimizer.state]
    return {"state": dict(enumerate(states)), "param_groups": [{"params": list(range(len(states)))}]}


def assert_same_moments(one: dict, other: dict):
    assert one.keys() == other.keys() and one
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("form", ["of now", "optimizer.pt"])
def test_the_optimizers_remember_to_the_bit(tmp_path, kind, form):
    m = model()
    optimizers = make_optimizers(m, kind)
    folder = save(tmp_path, 1, m, optimizers=optimizers)
    if form == "optimizer.pt":
        older = [older_state_dict(m, each) if kind == "muon" else each.state_dict() for each in optimizers]
        torch.save({"optimizers": older, "scaler": {}}, tmp_path / "moments")
        make_older(folder, (tmp_path / "moments").read_bytes())
    folder, state = checkpoint.find(tmp_path)
    again = checkpoint.fill(*checkpoint.build_model(folder, state))
    loaded = make_optimizers(again, kind, updates=0)
    checkpoint.load_optimizers(folder, state, again, loaded)
    assert_same_moments(checkpoint.named_moments(again, loaded), checkpoint.named_moments(m, optimizers))
    other = make_optimizers(again, "muon" if kind == "adamw" else "adamw", updates=0)
    with pytest.raises(UserError, match="another model or optimizer"):
        checkpoint.load_optimizers(folder, state, again, other)


def test_whoever_may_read_the_folder_may_read_its_files(tmp_path):
    folder = save(tmp_path, 1, model())
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {folder.stat().st_mode & 0o666}


def test_a_checkpoint_before_the_first_update_has_nothing_to_remember(tmp_path):
    m = model()
    save(tmp_path, 0, m, optimizers=make_optimizers(m, updates=0))
    folder, state = checkpoint.find(tmp_path)
    again = checkpoint.fill(*checkpoint.build_model(folder, state))
    checkpoint.load_optimizers(folder, state, again, optimizers := make_optimizers(again, updates=0))
    assert checkpoint.named_moments(again, optimizers) == {}


@pytest.mark.parametrize("shards", [2, 3, 40])  # some of 40 have no row of the smaller tensors
def test_what_several_processes_wrote_is_one_model(tmp_path, shards):
    m = model()
    optimizers = make_optimizers(m)
    folder = save(tmp_path, 1, m, optimizers=optimizers)
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
    loaded = make_optimizers(again, updates=0)
    checkpoint.load_optimizers(folder, state, again, loaded)
    assert same(again, m)
    assert_same_moments(checkpoint.named_moments(again, loaded), checkpoint.named_moments(m, optimizers))
    os.remove(folder / checkpoint.file_names("optimizer", shards)[-1])
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.find(tmp_path)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """What is saved is what was there when `save` returned, whatever happens to the model after that."""
    may_write = threading.Event()
    monkeypatch.setattr(saving, "save_file", lambda *args: may_write.wait() and save_file(*args))
    m = model()
    before = {name: p.clone() for name, p in m.state_dict().items()}
    writer = checkpoint.Writer(tmp_path, keep=2)
    writer.save(m, optimizers := make_optimizers(m, updates=0), {**STATE, "step": 1}, best=False)
    with torch.no_grad():
        for p in m.parameters():
            p.add_(1)
    assert not checkpoint.step_folders(tmp_path)
    may_write.set()
    writer.save(m, optimizers, {**STATE, "step": 2}, best=False)  # once the first is done
    assert writer.wait()
    first = load_file(tmp_path / "step_000001" / "model.safetensors")
    second = load_file(tmp_path / "step_000002" / "model.safetensors")
    for name, p in first.items():
        assert torch.equal(p, before[name]) and torch.equal(p + 1, second[name])


def test_a_write_that_fails_is_said_and_the_next_one_is_tried(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save(tmp_path, 1)
    m, writer = model(), checkpoint.Writer(tmp_path, keep=2)
    for module, name in ((saving, "save_file"), (files, "sync"), (os, "rename"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            writer.save(m, [], {**STATE, "step": 2}, best=True)
            assert not writer.wait() and writer.failure == os.strerror(errno.ENOSPC)
        said = capsys.readouterr().err
        assert said.startswith("warning: the checkpoint of step 2 could not be written") and said.count("\n") == 1
        assert checkpoint.find(tmp_path)[1]["step"] == 1
        shutil.rmtree(tmp_path / "step_000002", ignore_errors=True)
    writer.save(m, [], {**STATE, "step": 3}, best=True)
    assert writer.wait() and checkpoint.find(tmp_path)[1]["step"] == 3
    assert not list(tmp_path.glob(".*"))


def test_tied_weights_are_stored_once_and_are_tied_again(tmp_path):
    m = model()
    folder = save(tmp_path, 1, m)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded = checkpoint.fill(*checkpoint.build_model(*checkpoint.find(tmp_path)))
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_the_newest_and_the_best_stay(tmp_path):
    for step, best in ((1, False), (2, True), (3, False), (4, False), (5, False)):
        save(tmp_path, step, keep=2, best=best)
    assert {f.name for f in checkpoint.step_folders(tmp_path)} == {"step_000002", "step_000004", "step_000005"}
    assert checkpoint.find(tmp_path, "latest")[0].name == "step_000005"
    assert checkpoint.find(tmp_path, "best")[0].name == "step_000002"
    assert checkpoint.find(tmp_path, "step_000004")[1]["step"] == 4
    with pytest.raises(UserError, match="no step_000001"):
        checkpoint.find(tmp_path, "step_000001")


def test_what_adapters_stand_on_stays(tmp_path):
    base = save(tmp_path / "base", 1, keep=1)
    checkpoint.pin(base, tmp_path / "adapters")
    for step in (2, 3):
        save(tmp_path / "base", step, keep=1)
    assert [f.name for f in checkpoint.step_folders(tmp_path / "base")] == ["step_000003", "step_000001"]
    assert str(tmp_path / "adapters") in (base / "pinned").read_text()
    shutil.rmtree(base)
    with pytest.raises(UserError, match="was removed by its run"):
        checkpoint.pin(base, tmp_path / "adapters")


def test_processes_share_the_files_out_and_all_hear_of_a_damaged_one(tmp_path, monkeypatch, capsys):
    """Two processes, here threads: each file is hashed by one of them, and they go on from the same checkpoint."""
    for step in (1, 2):
        save(tmp_path, step)
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
        return checkpoint.find(tmp_path, r=r)[0].name

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert list(pool.map(process, range(2))) == ["step_000001"] * 2
    assert len(hashed) == len(set(hashed)) == 4
    assert capsys.readouterr().err.count("trying another") == 1


def test_a_kill_at_any_instant_of_saving_leaves_a_loadable_run(tmp_path, monkeypatch):
    """The process ends before the n-th call that touches the disk, for every n that there is."""
    save(tmp_path, 1)
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
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # a killed process tidies nothing
    for module, name in ((saving, "save_file"), (files, "sync")):
        monkeypatch.setattr(module, name, dying(getattr(module, name)))
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
    for die_at in range(1, 100):
        calls = 0
        for leftover in tmp_path.glob(".*-step_*"):
            really_remove(leftover)
        try:
            save(tmp_path, 1 + die_at)
        except Killed:
            folder, state = checkpoint.find(tmp_path)
            checkpoint.fill(*checkpoint.build_model(folder, state))
        else:
            break
    assert die_at > 8  # there were that many instants, and then the save went through
    assert checkpoint.find(tmp_path)[1]["step"] == 1 + die_at


def test_a_kill_while_a_step_is_saved_again_leaves_it(tmp_path, monkeypatch):
    save(tmp_path, 3, keep=1, best=True)
    rename = os.rename

    def dies_at_the_second(source, target):
        if ".writing" in str(source):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 3, keep=1)
    monkeypatch.undo()
    left = {path.name for path in tmp_path.iterdir()}
    for which in ("latest", "best", "step_000003"):
        assert checkpoint.find(tmp_path, which)[1]["step"] == 3
    assert {path.name for path in tmp_path.iterdir()} == left  # who reads changes nothing
    save(tmp_path, 4, keep=2)
    assert checkpoint.find(tmp_path, "best")[0].name == "step_000003"
    assert not list(tmp_path.glob(".*"))


def test_a_damaged_newer_checkpoint_does_not_push_out_the_one_that_was_resumed(tmp_path):
    save(tmp_path, 10)
    (save(tmp_path, 20, best=True) / "optimizer.safetensors").write_bytes(b"x")
    assert checkpoint.find(tmp_path)[1]["step"] == 10
    save(tmp_path, 15, keep=1)
    assert [f.name for f in checkpoint.step_folders(tmp_path)] == ["step_000015"]
    assert checkpoint.find(tmp_path)[1]["step"] == 15


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
def test_a_strangers_state_of_wrong_types_is_refused(tmp_path, name, value):
    """Whole by its hash, so made on purpose."""
    folder = save(tmp_path, 1)
    state = {**json.loads((folder / "state.json").read_text()), name: value}
    state["sha256"]["state"] = checkpoint.state_hash(state)
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.find(tmp_path)


def test_hostile_json_and_sizes_are_refused_before_they_cost_anything(tmp_path):
    folder, state = save(tmp_path, 1), None
    state = json.loads((folder / "state.json").read_text())
    for change in ({"n_embd": 10**12}, {"n_layer": 10**9}, {"norm_eps": "x"}, {"from_the_future": 1}):
        with pytest.raises(UserError, match="not a model that this version"):
            checkpoint.fill(*checkpoint.build_model(folder, {**state, "config": {**state["config"], **change}}))
    (folder / "state.json").write_text("[" * 200000)
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.find(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "empty"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, capsys, file, damage):
    save(tmp_path, 1)
    newest = save(tmp_path, 2) / file
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
def test_a_pointer_that_is_torn_or_gone_leads_to_the_newest_whole_checkpoint(tmp_path, content):
    """As filesystems leave it where a rename over a file is no single step. No clock decides what is newest."""
    for step in (1, 2):
        os.utime(save(tmp_path, step), (0, 4e9 - step * 1e9))
    (save(tmp_path, 3, keep=9) / "model.safetensors").write_bytes(b"torn")
    for name in ("latest", "best"):
        (tmp_path / name).unlink(missing_ok=True)
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert checkpoint.find(tmp_path, name)[1]["step"] == 2


def test_a_filesystem_that_syncs_no_folders_will_do(tmp_path, monkeypatch):
    really_sync = os.fsync

    def sync(descriptor):
        if os.path.isdir(f"/dev/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        really_sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    save(tmp_path, 1, best=True)
    assert checkpoint.find(tmp_path)[1]["step"] == 1


def test_where_there_is_no_checkpoint_a_sentence_says_so(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is no folder"):
        checkpoint.find(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.find(tmp_path)
    monkeypatch.chdir(tmp_path)
    save(Path("out/mine"), 1)
    with pytest.raises(UserError, match="Did you mean out/mine"):
        checkpoint.find(Path("out/mien"))
    with pytest.raises(UserError, match="out/mine"):
        checkpoint.find(Path("elsewhere/quite"))
    with pytest.raises(UserError, match=r"out/mien.*Did you mean out/mine"):
        tasks.training_dataset("out/mien", "best")


def test_a_pointer_cannot_lead_out_of_the_folder(tmp_path):
    save(tmp_path / "a", 7)
    save(tmp_path / "b", 1)
    (tmp_path / "b" / "latest").write_text("../a/step_000007\n")
    assert checkpoint.find(tmp_path / "b")[1]["step"] == 1


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    folder = save(tmp_path, 1)
    for change, word in ((dict(n_embd=32), "has shape \\["), (dict(n_layer=2), "lacks"), (dict(bias=False), "has ")):
        state = json.loads((folder / "state.json").read_text())
        state["config"] |= change | ({"n_hidden": 0} if "n_embd" in change else {})
        with pytest.raises(UserError, match=word):
            checkpoint.fill(*checkpoint.build_model(folder, state))


# ---- nanoGPT


def nanogpt_checkpoint(m: GPT, path, prefix="_orig_mod."):
    args = {
        k: getattr(m.config, k) for k in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    }
    tensors = {prefix + name: p for name, p in m.state_dict().items()}
    saved = {"model": tensors, "model_args": args, "iter_num": 5, "best_val_loss": torch.tensor(1.0), "config": {}}
    torch.save(saved, path)


def test_a_nanogpt_checkpoint_is_loaded(tmp_path):
    m = model(mlp="gelu", vocab_size=50257)
    nanogpt_checkpoint(m, tmp_path / "ckpt.pt")
    loaded, tokenizer, source = checkpoint.load_model(str(tmp_path))
    assert same(loaded, m) and loaded.config.mlp == "gelu"
    assert tokenizer.kind == "gpt2" and "step 5" in source


class Malicious:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return (open, (self.victim, "w"))


def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path):
    victim = tmp_path / "created"
    torch.save({"model": Malicious(str(victim)), "model_args": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="could run code"):
        checkpoint.load_model(str(tmp_path / "ckpt.pt"))
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious(str(victim))))
    with pytest.raises(UserError):
        checkpoint.load_model(str(tmp_path / "plain.pt"))
    assert not victim.exists()


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 truncated"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "ckpt.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"ckpt\.pt"):
        checkpoint.load_model(str(tmp_path))


def test_other_objects_in_a_ckpt_pt_are_refused(tmp_path):
    torch.save({"weights": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="not a nanoGPT checkpoint"):
        checkpoint.load_model(str(tmp_path))
    torch.save([1, 2], tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="not a nanoGPT checkpoint"):
        checkpoint.load_model(str(tmp_path))


# ---- Hugging Face


def test_a_hugging_face_folder_is_loaded(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50257, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    ).eval()
    theirs.save_pretrained(tmp_path)
    loaded, tokenizer, _ = checkpoint.load_model(str(tmp_path))
    idx = torch.tensor([[1, 2, 50256]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(idx, idx)[0], theirs(idx).logits)
    assert tokenizer.kind == "gpt2"
