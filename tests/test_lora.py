"""acorn/training/lora.py: gradients of adapters, frozen parameters, and saving, resuming and loading LoRA runs."""

import shutil

import pytest
import torch
from helpers import losses, refused, same_weights, script_here
from safetensors.torch import load_file
from torch.nn import functional as F

from acorn import UserError, checkpoint
from acorn.training import lora
from acorn.training.optim import make_optimizers
from model import GPT, GPTConfig

SHAPES = [{}, dict(pos="rope", norm="rmsnorm", mlp="swiglu", n_kv_head=2, bias=False, tie_weights=False)]
SHAPES[1] |= dict(head_dim=12, qkv_bias=True, qk_norm=True, qk_norm_weight=True, nope_every=2)


def small(shape) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=37, n_layer=2, n_head=4, n_embd=32, **shape)).eval()


def with_adapters(shape, pattern=".", rank=3, alpha=6.0) -> GPT:
    model = small(shape)
    lora.add_adapters(model, lora.choose_targets(model, pattern), rank, alpha)
    model.load_state_dict(lora.initial_adapters(model, seed=1), strict=False)
    return model


def merged(model: GPT, shape, scale=2.0) -> GPT:
    plain = small(shape)
    return checkpoint.fill(plain, checkpoint.merge_adapters(dict(model.named_parameters()), scale))


def test_new_adapters_and_merging_them_are_bit_exact_no_ops():
    idx = torch.randint(37, (2, 16))
    for shape in SHAPES:
        base, model = small(shape), with_adapters(shape)
        assert torch.equal(model(idx, idx)[0], base(idx, idx)[0])
        assert same_weights(merged(model, shape), base)


@pytest.mark.parametrize("shape", SHAPES)
def test_adapter_gradients_match_those_of_the_merged_weights(shape):
    """Adapter gradients follow from the gradient dW' of the merged weight W' = W + alpha / rank * B A.

    They are dA = alpha / rank * B^T dW' and dB = alpha / rank * dW' A^T. A model with merged weights provides dW'.
    """
    model = with_adapters(shape)
    for p in lora.adapters(model).values():
        p.data.normal_(std=0.1)
    plain = merged(model, shape)
    idx = torch.randint(37, (2, 16))
    loss, expected = model(idx, idx)[1], plain(idx, idx)[1]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, p in model.named_parameters():
        layer, is_adapter, matrix = name.rpartition(".lora_")
        if is_adapter:
            a, b = model.get_submodule(layer).lora_A, model.get_submodule(layer).lora_B
            dw = gradients[f"{layer}.weight"]
            torch.testing.assert_close(p.grad, 2.0 * (b.T @ dw if matrix == "A" else dw @ a.T), rtol=1e-4, atol=1e-6)
        else:
            assert p.grad is None


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_parameters_stay_and_others_are_updated(optimizer):
    for freeze in ("wte|wpe", r"\.h\.", "attn", r"h\.0\.|ln_f"):
        model = small({})
        before = {name: p.clone() for name, p in model.named_parameters()}
        lora.freeze(model, freeze)
        idx = torch.randint(37, (2, 16))
        model(idx, idx)[1].backward()
        for each in make_optimizers(model, optimizer, 1e-2, 1e-2, 0.1, (0.9, 0.95), "cpu"):
            each.step()
        stayed = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
        assert stayed == set(lora.matching("freeze", freeze, list(before)))


def test_unusable_patterns_are_refused():
    for pattern, said in (
        ("(", "not a valid regular expression"),
        ("q_proj", "transformer.wte.weight"),
        (".", "nothing is left"),
    ):
        with pytest.raises(UserError, match=said):
            lora.freeze(small({}), pattern)
    with pytest.raises(UserError, match="c_attn"):
        lora.choose_targets(small({}), "wte")


WORDS = ["--lora_rank=4", "--lora_alpha=8", "--learning_rate=3e-3", "--eval_interval=5", "--lr_decay_iters=10"]
MACHINE = "--device=cpu --dtype=float32 --compile=False --batch_size=4 --gradient_accumulation_steps=1".split()


@pytest.fixture(scope="module")
def adapted(trained, dataset, tmp_path_factory):
    """The folder of a LoRA run of ten updates (`out`) and its base (`base_run`), and the arguments of the run."""
    folder = tmp_path_factory.mktemp("adapted")
    shutil.copytree(trained, folder / "base_run")
    words = [*MACHINE, *WORDS, "--init_from=base_run", f"--dataset={dataset}", "--dropout=0.1", "--warmup_iters=0"]
    result = script_here("train.py", *words, "--max_iters=10", "--out_dir=out", cwd=folder)
    assert result.returncode == 0, result.stderr
    # 2 blocks with c_attn (96 x 32), c_proj (32 x 32), c_fc (128 x 32) and c_proj (32 x 128)
    assert f"{2 * 4 * (96 + 32 + 32 + 32 + 128 + 32 + 32 + 128):,} parameters (adapters)" in result.stdout
    return folder, words


def test_lora_run_saves_only_adapters_and_resumes_bit_exactly(adapted):
    folder, words = adapted
    assert min(losses(folder / "out")[1:]) < losses(folder / "out")[0]  # training lowers the loss
    step = folder / "out" / "step_000010"
    assert {file.name for file in step.iterdir()} == {"adapters.safetensors", "optimizer.safetensors", "state.json"}
    assert all(".lora_" in name for name in load_file(step / "adapters.safetensors"))
    assert script_here("train.py", *words, "--max_iters=5", "--out_dir=b", cwd=folder).returncode == 0
    result = script_here("train.py", "--init_from=resume", "--out_dir=b", "--max_iters=10", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert losses(folder / "b") == losses(folder / "out")
    refused(script_here("train.py", "--init_from=resume", "--out_dir=b", "--lora_rank=2", cwd=folder), "lora_rank = 2")
    anew = ["train.py", *words, "--overwrite=True"]
    refused(script_here(*anew, "--out_dir=base_run", cwd=folder), "which another run needs", "its file pinned")
    shutil.copytree(folder / "base_run", folder / "fresh", ignore=shutil.ignore_patterns("pinned"))
    refused(script_here(*anew, "--init_from=fresh", "--out_dir=fresh", cwd=folder), "the base of the adapters")


def test_loaded_lora_run_is_a_plain_model_with_merged_weights(adapted):
    folder, _ = adapted
    model, _, _ = checkpoint.load_model(str(folder / "out"))
    state = checkpoint.find(folder / "out", "best")[1]
    beside = checkpoint.fill(*checkpoint.build_model(folder / "out" / f"step_{state['step']:06d}", state)).eval()
    idx = torch.randint(model.config.vocab_size, (2, 32))
    torch.testing.assert_close(model.eval()(idx)[0], beside(idx)[0])
    assert not lora.adapters(model) and all(p.requires_grad for p in model.parameters())
    base, _, _ = checkpoint.load_model(str(folder / "base_run"))
    assert not torch.allclose(F.softmax(base.eval()(idx)[0], -1), F.softmax(model(idx)[0], -1), atol=1e-3)


@pytest.mark.slow
def test_adapters_refuse_another_base_and_accept_a_moved_one(adapted, tmp_path, monkeypatch):
    folder, words = adapted
    shutil.copytree(folder / "out", tmp_path / "out")
    sample = ["sample.py", "--out_dir=out", "--num_samples=1", "--max_new_tokens=5", "--device=cpu"]
    assert script_here(*sample, cwd=tmp_path).returncode == 0

    shutil.copytree(folder / "base_run" / "step_000030", tmp_path / "other")  # neither the best nor the newest
    (tmp_path / "out" / "base").write_text("other\n")
    refused(script_here(*sample, cwd=tmp_path), "weights of other", "write its path into the file out/base")
    monkeypatch.chdir(tmp_path)
    for text, said in (
        (b"out", "cannot be the base"),
        (b"\xff", "base is not UTF-8"),
        (b"nowhere", "no folder nowhere"),
    ):
        (tmp_path / "out" / "base").write_bytes(text)
        with pytest.raises(UserError, match=said):
            checkpoint.load_model("out")

    shutil.move(folder / "base_run", tmp_path / "moved")
    try:
        (tmp_path / "out" / "base").write_text("moved\n")
        moved = script_here(*sample, cwd=tmp_path)
        assert moved.returncode == 0, moved.stderr
    finally:
        shutil.move(tmp_path / "moved", folder / "base_run")
    again = script_here("train.py", *words, "--init_from=out", "--out_dir=c", "--max_iters=1", cwd=folder)
    refused(again, "is a LoRA run", "acorn.hub export out FOLDER")
    refused(
        script_here("train.py", *words, "--init_from=scratch", "--out_dir=c", cwd=folder), "needs weights to start from"
    )
    refused(script_here("train.py", *words, "--freeze=wte", "--out_dir=c", cwd=folder), "either lora_rank or freeze")
    refused(script_here("train.py", *words, "--lora_rank=33", "--out_dir=c", cwd=folder), "the 32 channels")
