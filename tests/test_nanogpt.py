"""acorn/checkpoint/nanogpt.py: loading nanoGPT's ckpt.pt, and refusing invalid files of this name."""

import pytest
import torch
from helpers import TEXT, prepare, same_weights, small_model

from acorn import UserError, checkpoint
from model import GPT


def nanogpt_checkpoint(m: GPT, path, prefix="_orig_mod.", **config):
    args = {
        k: getattr(m.config, k) for k in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    }
    tensors = {prefix + name: p for name, p in m.state_dict().items()}
    saved = {"model": tensors, "model_args": args, "iter_num": 5, "best_val_loss": torch.tensor(1.0), "config": config}
    torch.save(saved, path)


def test_a_nanogpt_checkpoint_is_loaded(tmp_path):
    m = small_model(mlp="gelu", vocab_size=50257)
    nanogpt_checkpoint(m, tmp_path / "ckpt.pt")
    saved = torch.load(tmp_path / "ckpt.pt")
    for layer in range(m.config.n_layer):  # nanoGPT without flash attention stores its causal mask
        saved["model"][f"_orig_mod.transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
    torch.save(saved, tmp_path / "ckpt.pt")
    loaded, tokenizer, source = checkpoint.load_model(str(tmp_path))
    assert same_weights(loaded, m) and loaded.config.mlp == "gelu"
    assert tokenizer.kind == "gpt2" and "step 5" in source


def test_the_vocabulary_is_found_beside_the_run_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text(TEXT)
    meta = prepare("text", "mine.txt", "--tokenizer=char")
    (tmp_path / "nano/out-mine").mkdir(parents=True)
    (tmp_path / "data").rename(tmp_path / "nano/data")
    file = tmp_path / "nano/out-mine/ckpt.pt"
    nanogpt_checkpoint(small_model(mlp="gelu", vocab_size=meta["vocab_size"]), file, dataset="mine")
    tokenizer = checkpoint.load_model(str(file))[1]
    assert tokenizer.kind == "char" and tokenizer.decode(tokenizer.encode("BORIS")) == "BORIS"


@pytest.mark.parametrize("content", [b"", b"junk", b"{}", b"PK\x03\x04 truncated"])
def test_a_damaged_ckpt_pt_is_refused(tmp_path, content):
    (tmp_path / "ckpt.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"ckpt\.pt (is not|cannot be read as) a nanoGPT checkpoint"):
        checkpoint.load_model(str(tmp_path))


def test_other_objects_in_a_ckpt_pt_are_refused(tmp_path):
    torch.save({"weights": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="not a nanoGPT checkpoint"):
        checkpoint.load_model(str(tmp_path))
    torch.save([1, 2], tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="not a nanoGPT checkpoint"):
        checkpoint.load_model(str(tmp_path))


def test_tensors_larger_than_their_file_are_refused(tmp_path):
    """The tensors are one number expanded to up to 4 x 10^12 elements, sparse without values, or integers instead."""
    shape = dict(block_size=8, vocab_size=257, n_layer=1, n_head=2, n_embd=10**6, bias=False)
    one = torch.zeros(1)
    names = {name: p.shape for name, p in checkpoint.empty_model({**shape, "mlp": "gelu"}, "x").named_parameters()}
    for make in (lambda size: one.expand(size), lambda size: torch.sparse_coo_tensor(size=size), lambda size: 5):
        saved = {"model": {name: make(size) for name, size in names.items()}, "model_args": shape, "config": {}}
        torch.save(saved, tmp_path / "ckpt.pt")
        assert (tmp_path / "ckpt.pt").stat().st_size < 10**6
        with pytest.raises(UserError, match=r"broken|not tensors"):
            checkpoint.load_model(str(tmp_path / "ckpt.pt"))
