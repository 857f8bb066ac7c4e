"""model.py against calculations by hand, and with a KV cache against without. (Hugging Face: test_huggingface.py.)"""

import dataclasses
import itertools
import math
import random

import pytest
import torch
from helpers import rounds

import model as model_file
from model import GPT, GPTConfig, KVCache, dropout, rotary_angles, rotate, sinusoidal_positions

SMALL = dict(block_size=16, vocab_size=37, n_layer=2, n_head=4, n_embd=32)
SWITCHES = dict(
    pos=("learned", "sinusoidal", "rope"),
    norm=("layernorm", "rmsnorm"),
    mlp=("gelu_tanh", "gelu", "relu2", "swiglu"),
    n_kv_head=(0, 2),
    qk_norm=(False, True),
    tie_weights=(True, False),
    logit_softcap=(0.0, 15.0),
    bias=(True, False),
    ngram=(1, 3),
    embedding_skip=(False, True),
)


def random_model(**changes) -> GPT:
    """Return a model with all parameters random, even biases and norms, so that omitting one changes the output."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def tokens(B=2, T=12, V=37) -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


@rounds(100, math.prod(map(len, SWITCHES.values())))
def test_kv_cache_matches_full_forward_for_combined_settings(rounds):
    """Compare a prefill of 6 tokens and 4 decoding steps with one forward pass over all 10 tokens."""
    idx = tokens(T=10)
    for values in random.Random(0).sample(list(itertools.product(*SWITCHES.values())), rounds):
        switches = dict(zip(SWITCHES, values, strict=True))
        model = random_model(**switches)
        cache = KVCache(model.config, batch_size=2, size=12)
        with torch.no_grad():
            expected, _ = model(idx, idx)
            pieces = []
            for piece in (idx[:, :6], *idx[:, 6:].split(1, dim=1)):
                pieces.append(model(piece, cache=cache)[0])
                cache.length += piece.size(1)
        assert (torch.cat(pieces, dim=1) - expected[:, 5:]).abs().max() < 1e-4, switches


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=4, beta_fast=32, beta_slow=1, truncate=True)
PUBLISHED = dict(pos="rope", head_dim=6, n_kv_head=2, qkv_bias=True, qk_norm=True, qk_norm_weight=True, nope_every=2)
PUBLISHED |= dict(bias=False, mlp="geglu", scale_embedding=True, rope_scaling=YARN | dict(attention_factor=1.1))


@pytest.mark.parametrize("norm", SWITCHES["norm"])
def test_kv_cache_matches_full_forward_for_published_settings(norm):
    idx = tokens(T=10)
    model = random_model(**PUBLISHED, norm=norm)
    cache = KVCache(model.config, batch_size=2, size=12)
    with torch.no_grad():
        expected, _ = model(idx, idx)
        pieces = []
        for piece in (idx[:, :6], *idx[:, 6:].split(1, dim=1)):
            pieces.append(model(piece, cache=cache)[0])
            cache.length += piece.size(1)
    assert (torch.cat(pieces, dim=1) - expected[:, 5:]).abs().max() < 1e-4
    # 4 query heads, 2 key heads and 2 value heads of 6 channels each
    attention, mlp = 32 * 48 + 48 + 6 + 6 + 24 * 32, 3 * 128 * 32
    assert model.config.n_hidden == 128 and sum(p.numel() for p in model.parameters() if p.dim() > 1) == (
        37 * 32 + 2 * (attention - 48 - 12 + mlp)
    )
    assert model.flops_per_token() == 6 * model.num_params() + 12 * 2 * 4 * 6 * 16


def test_block_without_rope_ignores_order_of_earlier_tokens():
    """Without rope, the logits of the last token do not depend on the order of the earlier tokens."""
    idx = tokens(B=1)
    swapped = idx[:, [3, 1, 0, 2, *range(4, 12)]]
    for nope_every, same in ((1, True), (2, False), (0, False)):
        model = random_model(pos="rope", n_layer=1, nope_every=nope_every)
        with torch.no_grad():
            assert torch.allclose(model(idx)[0], model(swapped)[0], atol=1e-5) == same


@pytest.mark.parametrize("pos", SWITCHES["pos"])
@pytest.mark.parametrize("mlp", ["gelu_tanh", "gelu", "relu", "relu2", "swiglu", "geglu"])
def test_attention_is_causal(pos, mlp):
    """The gradient of one position's logits with respect to later embeddings is exactly zero."""
    model = random_model(pos=pos, mlp=mlp, n_kv_head=2, qk_norm=True)
    idx = tokens(B=1)
    seen = []
    model.transformer.wte.register_forward_hook(lambda module, args, out: seen.append(out.retain_grad() or out))
    logits, _ = model(idx, idx)
    logits[0, 5].square().sum().backward()
    gradient = seen[0].grad[0].abs().sum(-1)  # (T,)
    assert (gradient[:6] > 0).all() and (gradient[6:] == 0).all()


ROWS = [[5, 4, 3], [1, 11]]  # lengths of the documents in two rows of 12 tokens
DOCUMENTS = torch.tensor([[n for n, length in enumerate(row) for _ in range(length)] for row in ROWS])


@pytest.mark.parametrize("pos", SWITCHES["pos"])
@pytest.mark.parametrize("n_kv_head", [0, 2])
def test_documents_in_a_row_match_separate_forward_passes(pos, n_kv_head):
    model = random_model(pos=pos, n_kv_head=n_kv_head, qk_norm=True, ngram=3)
    idx = tokens()
    with torch.no_grad():
        logits, _ = model(idx, idx, documents=DOCUMENTS)
        for row, lengths in enumerate(ROWS):
            parts = idx[row : row + 1].split(lengths, dim=1)
            alone = torch.cat([model(part, part)[0] for part in parts], dim=1)[0]
            assert (logits[row] - alone).abs().max() < 1e-5
        assert (model(idx, idx)[0] - logits).abs().max() > 0.1  # without `documents`, the logits differ


@pytest.mark.parametrize("pos", SWITCHES["pos"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_no_document_leaks_into_another(pos, dropout):
    """The gradient of one document's loss with respect to the embeddings of the others is exactly zero."""
    model = random_model(pos=pos, dropout=dropout, ngram=3).train()
    idx, documents = tokens()[:1], DOCUMENTS[:1]
    seen = []
    model.transformer.wte.register_forward_hook(lambda module, args, out: seen.append(out.retain_grad() or out))
    for n in range(3):
        _, nats = model(idx, idx.roll(-1), documents=documents, reduction="none")
        nats[documents == n].sum().backward()
        touched = seen.pop().grad[0].abs().sum(-1) > 0  # (T,)
        assert torch.equal(touched, documents[0] == n)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_matches_the_document_mask(monkeypatch):
    model = random_model(pos="rope", n_kv_head=2, n_embd=64)
    idx = tokens()
    with torch.no_grad():
        expected = model(idx, idx, documents=DOCUMENTS)[0]
        blocks = model_file.document_mask
        monkeypatch.setattr(model_file, "compiled", lambda function: function)  # compiling takes half a minute
        monkeypatch.setattr(model_file, "document_mask", lambda documents, flex: blocks(documents, flex=True))
        assert (model(idx, idx, documents=DOCUMENTS)[0] - expected).abs().max() < 1e-5


def test_plain_attention_matches_torch():
    q, k, v = torch.randn(3, 2, 4, 7, 8, generator=torch.Generator().manual_seed(0)).unbind()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(model_file.plain_attention(q, k, v, 0.0), expected)


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_one_token_attention_matches_torch(n_kv_head):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, heads, size, 8) for heads, size in ((4, 1), (n_kv_head, 20), (n_kv_head, 20)))
    k *= 30  # weights near 0 and 1
    mask = torch.arange(20) <= torch.tensor([0, 7, 19])[:, None, None, None]
    args = (q.double(), k.double(), v.double(), mask)
    expected = torch.nn.functional.scaled_dot_product_attention(*args, enable_gqa=True).float()
    torch.testing.assert_close(model_file.one_token_attention(q, k, v, mask), expected)


def test_bfloat16_loss_and_gradient_are_close_to_float32():
    """Compare the loss and a gradient under autocast on a CPU with those in float32."""
    idx = tokens()
    model = random_model(pos="rope", qk_norm=True).train()
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            _, loss = model(idx, idx.roll(-1))
        loss.backward()
        gradients.append((loss.item(), model.transformer.h[0].attn.c_attn.weight.grad.clone()))
        model.zero_grad()
    (loss, gradient), (loss_bf16, gradient_bf16) = gradients
    assert loss_bf16 == pytest.approx(loss, rel=0.02)
    assert (gradient_bf16 - gradient).norm() < 0.05 * gradient.norm()


def test_sinusoidal_positions_match_the_papers_formula():
    table = sinusoidal_positions(torch.arange(7), 6)
    for pos in range(7):
        for i in range(3):
            angle = pos / 10000 ** (2 * i / 6)
            assert table[pos, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[pos, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_rotary_scores_depend_only_on_distance():
    q, k = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = []
    for shift in (0, 3, 50):
        cos, sin = rotary_angles(torch.tensor([shift, shift + 4]), 8, 10000.0)
        scores.append((rotate(q, cos[:1], sin[:1]) * rotate(k, cos[1:], sin[1:])).sum().item())
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("at_once", [2**25, 5 * 37])  # all 24 rows at once, or chunks of five rows
def test_masked_targets_do_not_contribute_to_the_loss(at_once, monkeypatch):
    monkeypatch.setattr(model_file, "LOGITS_AT_ONCE", at_once)
    model = random_model()
    idx, targets = tokens(), tokens().roll(-1, dims=1)
    targets[0, 4:] = -1
    with torch.no_grad():
        logits, mean = model(idx, targets)
        _, total = model(idx, targets, reduction="sum")
        _, each = model(idx, targets, reduction="none")
    valid = targets != -1
    logp = logits.double().log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    assert mean.item() == pytest.approx(-logp[valid].mean().item(), rel=1e-5)
    assert total.item() == pytest.approx(-logp[valid].sum().item(), rel=1e-5)
    assert each.shape == targets.shape and (each[~valid] == 0).all()


@pytest.mark.parametrize("switches", [{}, dict(logit_softcap=3.0, tie_weights=False)])
def test_chunked_loss_has_the_same_gradients(switches, monkeypatch):
    monkeypatch.setattr(model_file, "LOGITS_AT_ONCE", 5 * 37)  # split the 24 rows into chunks of five
    targets, frozen = tokens().roll(-1, dims=1), random_model(**switches)
    targets[0, 2:8] = -1
    frozen.lm_head.weight.requires_grad_(False)
    for model in (random_model(**switches), frozen):
        logits, _ = model(tokens(), targets)
        expected = -logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0][targets != -1].sum()
        params = [p for p in model.parameters() if p.requires_grad]
        _, total = model(tokens(), targets, reduction="sum")
        assert total.item() == pytest.approx(expected.item(), rel=1e-6)
        got, wanted = (torch.autograd.grad(0.3 * loss, params) for loss in (total, expected))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_fully_masked_batch_has_zero_loss_and_gradient():
    model = random_model()
    for reduction in ("mean", "sum"):
        _, loss = model(tokens(), torch.full((2, 12), -1), reduction=reduction)
        loss.backward()
        assert loss.item() == 0
        assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_without_targets_only_one_position_has_logits():
    model = random_model()
    idx = tokens()
    with torch.no_grad():
        full, _ = model(idx, idx)
        final, loss = model(idx)
        chosen, _ = model(idx, last=torch.tensor([3, 7]))
    assert loss is None and final.shape == (2, 1, 37)
    torch.testing.assert_close(final[:, 0], full[:, -1])
    torch.testing.assert_close(chosen[:, 0], torch.stack([full[0, 3], full[1, 7]]))


def test_dropout_is_active_in_training_only():
    model = random_model(dropout=0.5)
    idx = tokens()
    assert torch.equal(model(idx, idx)[0], model(idx, idx)[0])
    model.train()
    assert not torch.equal(model(idx, idx)[0], model(idx, idx)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_rate_scaling_and_independence(dtype):
    torch.manual_seed(0)
    x = torch.full((1000, 4, 33), 2.0, dtype=dtype, requires_grad=True)
    y = dropout(x, 0.2, True)
    kept = y != 0
    assert y.dtype == dtype
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 2.5))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], y / 2)
    assert kept.float().mean().item() == pytest.approx(0.8, abs=0.005)
    neighbours = kept[:, :, 1:] & kept[:, :, :-1]
    assert neighbours.float().mean().item() == pytest.approx(0.8**2, abs=0.005)
    assert torch.equal(dropout(x, 0.2, False), x)


def test_activation_checkpointing_gradients_are_bitwise_equal():
    """Recomputation draws the same dropout masks again."""
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16, dropout=0.3, pos="rope"))
    idx = torch.randint(11, (2, 9))
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]] * 2)
    grads = []
    for model.activation_checkpointing in (False, True):
        torch.manual_seed(1)
        model(idx[:, :-1], idx[:, 1:], documents=documents)[1].backward()
        grads.append([p.grad for p in model.parameters()])
        model.zero_grad()
    assert all(torch.equal(kept, recomputed) for kept, recomputed in zip(*grads, strict=True))


def test_softcap_bounds_the_logits():
    with torch.no_grad():
        capped, _ = random_model(logit_softcap=1.0)(tokens(), tokens())
        free, _ = random_model()(tokens(), tokens())
    assert free.abs().max() > 1.0
    torch.testing.assert_close(capped, torch.tanh(free))


def test_parameter_count_and_initialization_match_gpt2():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert model.num_params() == 124_439_808  # GPT-2 small, as published
    model = GPT(GPTConfig(n_layer=8, n_head=4, n_embd=128, vocab_size=512, block_size=64))
    std = {name: p.std().item() for name, p in model.named_parameters() if p.dim() == 2}
    assert std["transformer.wte.weight"] == pytest.approx(0.02, rel=0.03)
    assert std["transformer.h.3.attn.c_attn.weight"] == pytest.approx(0.02, rel=0.03)
    assert std["transformer.h.3.mlp.c_proj.weight"] == pytest.approx(0.02 / 4, rel=0.03)  # sqrt(2 * 8) = 4


def test_embedding_std_sets_initial_token_embedding():
    wte = GPT(GPTConfig(**{**SMALL, "n_embd": 512, "embedding_std": 0.3})).transformer.wte.weight
    assert 0.29 < wte.std() < 0.31
    with pytest.raises(ValueError, match="embedding_std"):
        GPTConfig(**SMALL, embedding_std=float("nan"))


def test_zero_init_predicts_a_uniform_distribution():
    model = GPT(GPTConfig(**SMALL, zero_init=True, tie_weights=False))
    _, loss = model(tokens(), tokens())
    assert loss.item() == pytest.approx(math.log(37), rel=1e-6)


def test_embedding_skip_mixes_embeddings_into_block_inputs():
    model = random_model(pos="sinusoidal", ngram=2, embedding_skip=True)
    idx, t = tokens(), model.transformer
    embedding, ngrams, _ = model.embed(idx, torch.arange(12), None)
    x = embedding
    for layer, block in enumerate(t.h):
        mixed = t.residual_scale[layer] * x + t.embedding_scale[layer] * embedding + t.ngram_scale[layer] * ngrams
        x = block(mixed)
    torch.testing.assert_close(model.lm_head(t.ln_f(x)), model(idx, idx)[0])
    plain, skipping = (GPT(GPTConfig(**SMALL, embedding_skip=skip)) for skip in (False, True))
    skipping.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(plain(idx, idx)[0], skipping(idx, idx)[0])  # initially, embedding_skip has no effect


def test_ngram_embedding_depends_only_on_its_tokens():
    """The n-gram embedding at a position depends on the last 3 tokens only, or on fewer at the start of a sequence."""
    embedding = random_model(ngram=3, ngram_rows=4096).transformer.ngram
    idx = torch.tensor([[5, 1, 2, 3, 7, 1, 2, 3, 0, 2, 3], [1, 2, 3, 2, 3, 1, 0, 3, 1, 2, 3]])
    with torch.no_grad():
        added = embedding(idx, torch.arange(11))
    assert torch.equal(added[0, 3], added[0, 7]) and torch.equal(added[0, 3], added[1, 2])  # 1 2 3, at any position
    others = [added[0, 10], added[1, 4], added[1, 7], added[1, 0]]  # 0 2 3, 3 2 3, 1 0 3, and 1 at the start
    assert all(not torch.allclose(added[0, 3], other) for other in others)
    assert not torch.allclose(added[1, 0], added[0, 1])  # 1 at the start, and after 5
    bigrams, trigrams = (table.weight for table in embedding.tables)
    assert len(bigrams) == 37 * 38 and len(trigrams) == 4096  # a row for each bigram: a token after one of 37, or none
    product = ((3 * 38 + 3) * 38 + 2) * 11400714819323198485 % 2**64  # the factor is 2**64 / 1.618
    signed = product - 2**64 if product >= 2**63 else product
    torch.testing.assert_close(added[0, 3], bigrams[3 * 38 + 3] + trigrams[(signed >> 32) % 4096])


def test_ngram_dropout_drops_whole_embeddings_in_training_only():
    embedding = random_model(ngram=2, ngram_rows=4096, ngram_dropout=0.25).transformer.ngram
    idx = torch.randint(37, (64, 128), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(128)
    with torch.no_grad():
        torch.manual_seed(0)
        whole, dropped = embedding.eval()(idx, positions), embedding.train()(idx, positions)
    kept = dropped.abs().sum(-1) > 0  # (B, T)
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.02)
    torch.testing.assert_close(dropped, torch.where(kept[..., None], whole / 0.75, 0))


def test_bias_false_removes_all_biases():
    names = [name for name, _ in GPT(GPTConfig(**SMALL, bias=False)).named_parameters()]
    assert names and not [name for name in names if name.endswith("bias")]


def test_crop_block_size_keeps_logits_of_short_sequences():
    model = random_model()
    idx = tokens(T=8)
    with torch.no_grad():
        before = model(idx, idx)[0]
        model.crop_block_size(8)
        assert torch.equal(model(idx, idx)[0], before)
    with pytest.raises(ValueError, match="block size of 8"):
        model(tokens(T=9))
    with pytest.raises(ValueError, match="block_size = 9"):
        model.crop_block_size(9)


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("size", [35, 39])  # of 37 rows, 33 are tokens; grow within the padding, or beyond
@pytest.mark.parametrize("ngram_rows", [50, 4096])  # hashed, or one row per bigram
def test_new_tokens_start_at_the_mean_of_existing_ones(tie_weights, size, ngram_rows):
    model = random_model(tie_weights=tie_weights, ngram=3, ngram_rows=ngram_rows)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    idx = tokens(V=33)
    with torch.no_grad():
        logits = model(idx, idx)[0][..., :33]
        model.grow_vocab(33, size)
        grown = model(idx, idx)[0]
        model(torch.full((1, 3), size - 1))  # n-grams of new tokens work
    loaded = GPT(GPTConfig(**dataclasses.asdict(model.config)))
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(idx, idx)[0], grown)
    rows = max(size, 37)
    assert grown.size(-1) == rows == model.config.vocab_size
    torch.testing.assert_close(grown[..., :33], logits, rtol=0, atol=0)
    torch.testing.assert_close(grown[..., 33:size], logits.mean(-1, keepdim=True).expand(-1, -1, size - 33))
    assert (model.lm_head.weight is model.transformer.wte.weight) == tie_weights
    for name, p in model.named_parameters():
        if name in ("transformer.wte.weight", "lm_head.weight"):
            mean = before[name][:33].mean(0).expand(size - 33, -1)
            before[name] = torch.cat((before[name][:33], mean, before[name][size:]))
        assert torch.equal(p, before[name]) and p.requires_grad


def test_weight_decay_applies_to_matrices_only():
    model = random_model()
    decayed, free = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu").param_groups
    assert decayed["weight_decay"] == 0.1 and all(p.dim() == 2 for p in decayed["params"])
    assert free["weight_decay"] == 0.0 and all(p.dim() == 1 for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


def test_mfu_of_gpt2_matches_calculation_by_hand():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50304, bias=False))
    matrices = 12 * 12 * 768**2 + 50304 * 768 + 25 * 768  # blocks, head, norms
    per_token = 6 * matrices + 12 * 12 * 768 * 1024
    assert model.flops_per_token() == per_token
    mfu = model.estimate_mfu(480, 0.5, peak_flops=312e12)
    assert mfu == pytest.approx(per_token * 1024 * 480 / 0.5 / 312e12)
    assert model.estimate_mfu(480, 0.5, peak_flops=None) is None


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(n_head=5), "multiple of n_head"),
        (dict(head_dim=-1), "head_dim = -1"),
        (dict(head_dim=5, pos="rope"), "even head_dim"),
        (dict(nope_every=2), "nope_every = 2 needs pos"),
        (dict(qk_norm_weight=True), "needs qk_norm"),
        (dict(rope_scaling=dict(rope_type="linear", factor=2.0)), "needs pos"),
        (dict(pos="rope", rope_scaling=dict(rope_type="linear")), "rope_scaling"),
        (dict(pos="rope", rope_scaling=dict(rope_type="linear", factor="2")), "rope_scaling"),
        (dict(pos="rope", rope_scaling=dict(rope_type="linear", factor=math.nan)), "finite"),
        (dict(pos="rope", rope_scaling=dict(rope_type="other", factor=2.0)), "linear, llama3, yarn"),
        (dict(n_kv_head=3), "multiple of n_kv_head"),
        (dict(pos="rotary"), "not one of learned, sinusoidal, rope"),
        (dict(mlp="elu"), "not one of"),
        (dict(n_embd=12, pos="rope"), "even"),
        (dict(dropout=1.0), "below 1"),
        (dict(rope_theta=0.0), "at least 1"),
        (dict(n_layer=0), "at least 1"),
    ],
)
def test_invalid_config_raises_an_error(change, word):
    with pytest.raises(ValueError, match=word):
        GPTConfig(**{**SMALL, **change})


def test_compiled_models_use_their_own_rope_tables():
    """All models in a process share compiled code, which contains the rope tables as constants."""
    idx, graphs = tokens(), []
    torch.compiler.reset()

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    for theta, factor, block_size in ((1e4, 1.0, 24), (5e3, 1.0, 24), (5e3, 4.0, 24), (1e4, 1.0, 24), (1e4, 1.0, 16)):
        scaling = {"rope_type": "linear", "factor": factor}
        model = random_model(pos="rope", rope_theta=theta, rope_scaling=scaling, block_size=block_size)
        compiled = torch.compile(model, backend=backend)
        torch.testing.assert_close(compiled(idx, idx)[1], model(idx, idx)[1])
        model.crop_block_size(12)
        torch.testing.assert_close(compiled(idx, idx)[1], model(idx, idx)[1])
    assert "cos(" not in graphs[0]


@pytest.mark.gpu
def test_gpu_logits_match_cpu():
    model = random_model(pos="rope", n_kv_head=2, mlp="swiglu", norm="rmsnorm", bias=False)
    idx = tokens()
    with torch.no_grad():
        expected = model(idx, idx)[0]
        got = model.cuda()(idx.cuda(), idx.cuda())[0].cpu()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_flex_attention_on_gpu_matches_mask_on_cpu(compile):
    """Loss and gradients of flex attention on a GPU match the mask on a CPU, with rope, qk_norm and grouped heads."""
    model = random_model(pos="rope", n_embd=64, n_kv_head=2, qk_norm=True, block_size=300)
    idx = tokens(T=300)
    documents = (tokens(T=300, V=20) == 0).cumsum(1)
    gradients = []
    for device in ("cpu", "cuda"):
        model = model.to(device)
        model.zero_grad()
        forward = torch.compile(model) if compile and device == "cuda" else model
        _, loss = forward(idx.to(device), idx.to(device), documents=documents.to(device))
        loss.backward()
        gradients.append([loss.detach().cpu()] + [p.grad.cpu().clone() for p in model.parameters()])
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name, place", [("mlp", "MLP.forward"), ("norm", "Norm.forward"), ("pos", "GPT.embed")])
def test_error_for_an_unimplemented_choice_names_the_function(name, place):
    config = GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8)
    setattr(config, name, "new")
    with pytest.raises(NotImplementedError, match=place):
        GPT(config)(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=f"{name} = 'new'"):
        GPTConfig(**{name: "new"})
