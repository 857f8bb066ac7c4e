"""acorn/inference/cpu_decode.py: decoding kernels against torch's, and the perplexity with int8 weights."""

import copy
import math
import mmap
import os
import subprocess
import sys

import pytest
import torch
from helpers import AVX2, REPO, TEXT
from torch import nn

from acorn import checkpoint
from acorn.data import shards
from acorn.distributed import runtime
from acorn.evaluation.loss import evaluate
from acorn.inference.cpu_decode import (
    DecodingLinear,
    OneTokenCompiled,
    in_words,
    kernels,
    multiply_and_sum,
    pays_back,
    prepare_for_decoding,
    product,
)
from acorn.inference.generate import Sampling, generate
from model import GPT, GPTConfig, KVCache


@pytest.mark.parametrize("bias", [True, False])
def test_float32_layer_equals_torch_linear(bias):
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=bias)
    ours = DecodingLinear(linear.weight, linear.bias, "none")
    for shape in ((1, 1, 24), (3, 1, 24), (2, 5, 24)):
        x = torch.randn(shape)
        torch.testing.assert_close(ours(x), linear(x))


def test_int8_weights_are_within_half_a_quantization_step():
    torch.manual_seed(0)
    weight = torch.randn(40, 24) * torch.logspace(-3, 3, 40)[:, None]  # channels of very different magnitude
    ours = DecodingLinear(weight, None, "int8")
    assert ours.weight.dtype == torch.int8
    step = weight.abs().amax(1) / 127
    assert ((ours.weight * ours.scale[:, None] - weight).abs() <= 0.501 * step[:, None]).all()
    x = torch.randn(1, 1, 24)
    assert ((ours(x)[0, 0] - weight @ x[0, 0]).abs() <= 0.501 * step * x.abs().sum()).all()


def test_large_weights_move_to_huge_pages_with_values_and_ties_kept():
    model = GPT(GPTConfig(block_size=8, vocab_size=8200, n_layer=1, n_head=2, n_embd=64, norm="rmsnorm"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ready = prepare_for_decoding(model, compile=False)
    for name, value in before.items():
        assert torch.equal(ready.state_dict()[name], value)
    wte = ready.transformer.wte.weight  # 2.1 MB, shared with the head
    assert ready.lm_head.weight.data_ptr() == wte.data_ptr()
    if hasattr(mmap, "MADV_HUGEPAGE"):
        assert wte.data_ptr() % (2 << 20) == 0


def test_greedy_tokens_are_unchanged():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=50, n_layer=2, n_head=2, n_embd=32)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    call = ([[1, 2, 3]], 20, Sampling(temperature=0), [0], lambda *token: False)
    expected = generate(model, *call)
    assert generate(prepare_for_decoding(model, compile=False), *call) == expected


def test_int8_changes_perplexity_by_at_most_half_a_percent(trained, dataset):
    model, tokenizer, _ = checkpoint.load_model(str(trained))
    val, r = shards.load_dataset(str(dataset)).val, runtime.setup("cpu", "float32", False)
    before = evaluate(model, val, r, 16, 32)["perplexity"]
    after = evaluate(prepare_for_decoding(model, "int8", compile=False), val, r, 16, 32)["perplexity"]
    assert before != after and math.isclose(before, after, rel_tol=0.005)
    assert len(TEXT) > 10_000 and tokenizer.kind == "char"


@pytest.mark.parametrize("quantize", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("B", [1, 3, 70])
def test_all_kernels_give_the_same_product(quantize, B):
    torch.manual_seed(0)
    weight, x = torch.randn(48, 64), torch.randn(B, 64)
    linear = DecodingLinear(weight if quantize != "bfloat16" else weight.bfloat16(), None, quantize)
    exact = x.double() @ linear.weight.double().T
    unit = exact.abs().max()
    assert len(kernels(linear.weight)) == 2
    for kernel in kernels(linear.weight):
        error = (product(linear.weight, x, kernel).double() - exact).abs().max()
        assert error <= (1e-6 if linear.weight.dtype == torch.float32 or kernel == "columns" else 0.02) * unit


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_multiply_and_sum_is_accurate_for_each_weight_format(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    torch.manual_seed(0)
    forms = set()
    for rows, columns, B in ((48, 64, 1), (7, 64, 3), (48, 63, 2)):
        weight, x = (40 * torch.randn(rows, columns)).clamp(-128, 127).to(dtype), torch.randn(B, columns)
        words = in_words(weight)
        exact = x.double() @ weight.double().T
        for stored in (weight, words):
            if stored is not None:
                assert (multiply_and_sum(stored, x).double() - exact).abs().max() <= 1e-6 * exact.abs().max()
        forms.add(None if words is None else words.shape)
    assert None in forms  # an odd number of columns cannot be viewed as words
    assert (torch.Size((48, 16)) in forms) == (dtype == torch.int8)
    assert (torch.Size((48, 32)) in forms) == (dtype == torch.bfloat16 and capability == "AVX2")


def test_int8_logits_with_a_large_common_offset_stay_accurate():
    torch.manual_seed(0)
    weight, x, direction = torch.randn(400, 64) / 8, torch.randn(3, 1, 64), torch.randn(64)
    plain, shifted = weight @ x[:, 0].T, (weight + direction) @ x[:, 0].T
    assert (shifted - plain).abs().max() > 5
    ours = DecodingLinear(weight + direction, None, "int8", n_rows=3, centered=True)
    for kernel in kernels(ours.weight):
        ours.kernel = kernel
        assert (ours(x)[:, 0].T - shifted).abs().max() < 0.02 * plain.abs().max()


def test_compiling_pays_back_only_with_enough_gain_and_tokens():
    assert not pays_back(gain=1e-5, n_tokens=5000) and not pays_back(gain=0.02, n_tokens=45)
    assert pays_back(gain=0.02, n_tokens=1_000_000)


SLOWEST = """
import acorn, torch
from acorn.inference.cpu_decode import choose_kernels, prepare_for_decoding, product, kernels
from acorn.timing import seconds_per_call
from model import GPT, GPTConfig
torch.set_num_threads(1)
for dtype, quantize in ((torch.float32, "none"), (torch.bfloat16, "none"), (torch.float32, "int8")):
    model = GPT(GPTConfig(block_size=64, vocab_size=1024, n_layer=1, n_head=4, n_embd=256)).to(dtype).eval()
    layer = prepare_for_decoding(model, quantize, compile=False).transformer.h[0].mlp.c_fc
    for rows, chosen in ((1, layer.kernel), (64, layer.prompt_kernel)):
        x = torch.ones(rows, 256, dtype=dtype)
        work = {kernel: lambda kernel=kernel: product(layer.weight, x, kernel) for kernel in kernels(layer.weight)}
        times = {kernel: min(seconds_per_call(work[kernel]) for _ in range(7)) for kernel in work}
        print(f"{quantize} {dtype} x {rows}: {chosen} of {times}")
        assert times[chosen] < 5 * min(times.values())
"""


@pytest.mark.parametrize("isa", ["native", "avx2"])
def test_kernels_that_the_cpu_emulates_are_not_chosen(isa):
    environment = {**os.environ, **(AVX2 if isa == "avx2" else {})}
    done = subprocess.run([sys.executable, "-c", SLOWEST], cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_model_runs_uncompiled_if_compilation_fails(monkeypatch, capsys):
    def failing(*args, **kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", failing)
    model = prepare_for_decoding(GPT(GPTConfig(8, 11, 1, 1, 8)))
    assert "no compiler" in capsys.readouterr().err
    assert len(generate(model, [[1, 2]], 3, Sampling(), [0], lambda *token: False)[0]) == 5


@pytest.mark.slow
@pytest.mark.parametrize(("quantize", "n_rows"), [("none", 1), ("int8", 1), ("int8", 3)])
def test_compiled_decoding_matches_uncompiled(quantize, n_rows):
    torch.manual_seed(0)
    switches = dict(pos="rope", norm="rmsnorm", mlp="swiglu", n_kv_head=2, ngram=3, ngram_rows=64, qk_norm=True)
    switches |= dict(head_dim=12, qkv_bias=True, qk_norm_weight=True, nope_every=2, embedding_skip=True, dropout=0.5)
    model = GPT(GPTConfig(block_size=32, vocab_size=50, n_layer=2, n_head=4, n_embd=64, **switches))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))

    prompts = [[1, 2, 3], [4], [5, 6]][:n_rows]

    def logprobs(model) -> list[float]:  # of greedy tokens, beyond block_size, so that the window slides
        for layer in model.modules():
            if isinstance(layer, DecodingLinear):
                layer.kernel = layer.prompt_kernel = "columns"  # computes in float32 on every machine
        seen = []
        how, seeds = Sampling(temperature=0), [0] * n_rows
        generate(model, prompts, 40, how, seeds, lambda *token: bool(seen.append(token[2])))
        return seen

    plain = prepare_for_decoding(copy.deepcopy(model), quantize, compile=False)
    compiled = prepare_for_decoding(model, quantize, n_rows=n_rows)
    assert isinstance(compiled.lm_head, OneTokenCompiled)  # compilation did not fail
    assert logprobs(compiled) == pytest.approx(logprobs(plain), abs=1e-4)
    tokens = torch.tensor([[1, 2], [3, 4], [5, 6]][:n_rows])
    # several tokens (the head computes only the last one); one token without a cache; one token and a one-slot cache
    with torch.no_grad():
        for idx, has_cache in ((tokens, False), (tokens[:, :1], False), (tokens[:, :1], True)):
            caches = [KVCache(model.config, n_rows, 1) if has_cache else None for _ in range(2)]
            expected, actual = (m(idx, cache=cache)[0] for m, cache in zip((plain, compiled), caches, strict=True))
            assert (actual - expected).abs().max() < 1e-4
