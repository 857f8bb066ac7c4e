"""acorn/checkpoint.py: whole or not there, safe to load, and going back to the one before where one is damaged."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file

from acorn import UserError, checkpoint
from acorn.tokenizer import get_tokenizer
from model import GPT, GPTConfig

STATE = {"settings": {}, "tokenizer": get_tokenizer("byte").to_dict(), "val_loss": 1.5}


def model(seed=0, **changes) -> GPT:
    torch.manual_seed(seed)
    shape = dict(block_size=8, vocab_size=257, n_layer=1, n_head=2, n_embd=16)
    return GPT(GPTConfig(**{**shape, **changes}))


def save(folder, step, m=None, keep=2, best=False):
    m = m or model(step)
    optimizer = m.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    return checkpoint.save(folder, m, {"optimizer": optimizer.state_dict()}, {**STATE, "step": step}, keep, best)


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
        loaded = checkpoint.build_model(folder, state)
        assert same(loaded, m) and loaded.config == m.config


def test_tied_weights_are_stored_once_and_are_tied_again(tmp_path):
    m = model()
    folder = save(tmp_path, 1, m)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded = checkpoint.build_model(*checkpoint.find(tmp_path))
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
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *args, **kwargs: None)  # a killed process tidies nothing
    for module, name in ((checkpoint, "save_file"), (checkpoint.files, "sync"), (checkpoint.torch, "save")):
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
            checkpoint.build_model(folder, state)
            checkpoint.load_optimizer_state(folder)
        else:
            break
    assert die_at > 8  # there were that many instants, and then the save went through
    assert checkpoint.find(tmp_path)[1]["step"] == 1 + die_at


def test_a_kill_while_a_step_is_saved_again_leaves_it(tmp_path, monkeypatch):
    save(tmp_path, 3, keep=1)
    rename = os.rename

    def dies_at_the_second(source, target):
        if ".writing" in str(source):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 3, keep=1)
    monkeypatch.undo()
    assert checkpoint.find(tmp_path)[1]["step"] == 3
    save(tmp_path, 3, keep=1)
    assert checkpoint.find(tmp_path)[1]["step"] == 3


def test_a_damaged_newer_checkpoint_does_not_push_out_the_one_that_was_resumed(tmp_path):
    save(tmp_path, 10)
    (save(tmp_path, 20, best=True) / "optimizer.pt").write_bytes(b"x")
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
        with pytest.raises(UserError, match="no model of this version"):
            checkpoint.build_model(folder, {**state, "config": {**state["config"], **change}})
    (folder / "state.json").write_text("[" * 200000)
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.find(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "state.json"])
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
    assert "going back" in said
    shutil.rmtree(tmp_path / "step_000001")
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.find(tmp_path)


def test_where_there_is_no_checkpoint_a_sentence_says_so(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        checkpoint.find(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.find(tmp_path)


def test_a_pointer_cannot_lead_out_of_the_folder(tmp_path):
    save(tmp_path / "a", 7)
    save(tmp_path / "b", 1)
    (tmp_path / "b" / "latest").write_text("../a/step_000007\n")
    assert checkpoint.find(tmp_path / "b")[1]["step"] == 1


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    folder = save(tmp_path, 1)
    for change, word in ((dict(n_embd=32), "is \\["), (dict(n_layer=2), "lacks"), (dict(bias=False), "has ")):
        state = json.loads((folder / "state.json").read_text())
        state["config"] |= change | ({"n_hidden": 0} if "n_embd" in change else {})
        with pytest.raises(UserError, match=word):
            checkpoint.build_model(folder, state)


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
