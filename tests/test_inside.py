"""acorn/inference/inside.py against the attention weights of transformers and calculations by hand."""

import base64
import gc
import json
import math

import numpy as np
import pytest
import torch
from helpers import bpe_tokenizer, llama_tokenizer
from hf_models import MODERN, ours, theirs, tokens

from acorn import UserError, checkpoint
from acorn.data.tokenizer_kinds import get_tokenizer
from acorn.inference import inside
from acorn.inference.cpu_decode import prepare_for_decoding

BYTE = get_tokenizer("byte")
IDS = list(b"Hello, world")
FORMS = {
    "gpt2": {},
    "llama": MODERN,
    "speedrun": dict(pos="rope", norm="rmsnorm", mlp="relu2", qk_norm=True, bias=False, logit_softcap=15.0),
    "ngram": dict(pos="sinusoidal", ngram=3, ngram_rows=64, qk_norm=True, embedding_skip=True),
}


@pytest.fixture(params=FORMS)
def model(request):
    return ours(**FORMS[request.param])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_attention_weights_match_transformers(tmp_path, family):
    other = theirs(family, attn_implementation="eager")
    other.save_pretrained(tmp_path)
    model, _, _ = checkpoint.load_model(str(tmp_path))
    for ids in tokens():
        expected = torch.stack(other(ids[None], output_attentions=True).attentions)[:, 0]  # (L, H, T, T)
        weights = inside.look(model, ids.tolist()).attention
        assert weights.shape == expected.shape
        assert (weights - expected).abs().max() < 1e-5


def test_residual_stream_matches_transformers(tmp_path):
    other = theirs("llama")
    other.save_pretrained(tmp_path)
    model, _, _ = checkpoint.load_model(str(tmp_path))
    ids = tokens()[0]
    hidden = torch.stack(other(ids[None], output_hidden_states=True).hidden_states)[:, 0]  # the last one is normalized
    residual = inside.look(model, ids.tolist()).residual
    assert (residual[:-1] - hidden[:-1]).abs().max() < 1e-4
    assert (model.transformer.ln_f(residual[-1]) - hidden[-1]).abs().max() < 1e-4


def test_look_works_for_every_kind_of_model(model):
    found = inside.look(model, IDS)
    L, H, T = model.config.n_layer, model.config.n_head, len(IDS)
    assert found.attention.shape == (L, H, T, T) and found.residual.shape == (L + 1, T, model.config.n_embd)
    assert (found.attention.sum(-1) - 1).abs().max() < 1e-5 and not found.attention.triu(1).any()
    logits, loss = model(torch.tensor([IDS[:-1]]), torch.tensor([IDS[1:]]))
    assert torch.allclose(found.logits[:-1], logits[0], atol=1e-5)
    assert math.isclose(inside.token_losses(found.logits, IDS).mean(), loss.item(), rel_tol=1e-5)


def test_logit_lens_of_the_last_layer_is_the_models_output(model):
    found = inside.look(model, IDS)
    assert torch.equal(inside.logit_lens(model, found.residual[-1]), found.logits)
    assert not torch.allclose(inside.logit_lens(model, found.residual[0]), found.logits)


def test_head_ablation_matches_zeros_in_the_output_projection(model, monkeypatch):
    monkeypatch.setattr(inside, "LOGITS_AT_ONCE", 3 * len(IDS) * model.config.vocab_size)  # chunks of 3 of the 4 heads
    found = inside.head_ablation(model, IDS)
    x, y, D = torch.tensor([IDS[:-1]]), torch.tensor([IDS[1:]]), model.config.head_dim
    with torch.no_grad():
        base = model(x, y)[1]
        for layer, block in enumerate(model.transformer.h):
            for head in range(model.config.n_head):
                weight = block.attn.c_proj.weight.clone()
                block.attn.c_proj.weight[:, head * D : (head + 1) * D] = 0
                assert math.isclose(found[layer, head], model(x, y)[1] - base, abs_tol=2e-5)
                block.attn.c_proj.weight.copy_(weight)
    assert found.abs().max() > 1e-3


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_look_and_ablation_work_for_an_int8_model(compile):
    model = ours()
    exact, losses = inside.look(model, IDS).attention, inside.head_ablation(model, IDS[:2])
    quantized = prepare_for_decoding(model, "int8", compile)
    assert hasattr(quantized.lm_head, "versions") == compile  # compiling did not fail
    assert (inside.look(quantized, IDS).attention - exact).abs().max() < 0.05
    assert (inside.head_ablation(quantized, IDS[:2]) - losses).abs().max() < 0.05


def test_neighbours_match_numpy():
    model = ours()
    table = model.transformer.wte.weight.detach().double().numpy()
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    similar, nearest = inside.neighbours(model, [7, 200], 250, 3)
    for row, token in enumerate((7, 200)):
        cosine = table[:250] @ table[token]
        order = [int(i) for i in np.argsort(-cosine) if i != token][:3]
        assert nearest[row].tolist() == order
        assert np.allclose(similar[row], cosine[order], atol=1e-5)


def test_json_values_match_the_tensors():
    model = ours(n_kv_head=2, pos="rope", vocab_size=272)  # the last 15 ids are padding
    model.train()
    values = json.loads(json.dumps(inside.look_inside(model, BYTE, IDS), allow_nan=False))
    assert model.training
    model.eval()
    found = inside.look(model, IDS)
    probs = found.logits[:, :257].softmax(-1)
    assert values["tokens"] == list("Hello, world") and values["ids"] == IDS
    assert values["loss"][0] is None
    assert np.allclose(values["loss"][1:], inside.token_losses(found.logits, IDS), atol=1e-4)
    for position, alternatives in enumerate(values["next"]):
        best = probs[position].topk(6)
        assert [token for token, _, _ in alternatives] == best.indices.tolist()
        assert np.allclose([p for _, _, p in alternatives], best.values, atol=1e-4)
    last = values["lens"][-1]
    assert len(values["lens"]) == 3 and last[-1][3] is None
    assert np.allclose([p for _, _, p, _ in last], probs.max(-1).values, atol=1e-4)
    assert np.allclose([p for *_, p in last[:-1]], probs[range(11), IDS[1:]], atol=1e-4)
    T = len(IDS)
    weights = np.frombuffer(base64.b64decode(values["attention"]), np.uint8).reshape(2, 4, T * (T + 1) // 2)
    lower = np.tril_indices(T)
    assert np.allclose(weights / 255, found.attention.numpy()[..., lower[0], lower[1]], atol=0.5 / 255 + 1e-6)
    assert [token for token, _ in values["neighbours"]] == list("Helo, wrd")


def test_probabilities_are_held_for_one_layer_at_a_time(monkeypatch):
    """With a large vocabulary, the probabilities of all layers together would need gigabytes."""
    held, logit_lens = [], inside.logit_lens

    def counted(model, x):
        held.append(sum(type(each) is torch.Tensor and each.shape == (len(IDS), 257) for each in gc.get_objects()))
        return logit_lens(model, x)

    monkeypatch.setattr(inside, "logit_lens", counted)
    inside.look_inside(ours(n_layer=4, vocab_size=272).eval(), BYTE, IDS)
    assert held == [0, 0, 0, 0]


@pytest.mark.parametrize("tokenizer", [BYTE, bpe_tokenizer(), llama_tokenizer()], ids=["byte", "bpe", "llama"])
def test_labels_of_multi_token_characters_and_incomplete_bytes(tokenizer):
    ids = tokenizer.encode("a你\x1b\n\\n").tolist()
    shown = inside.labels(tokenizer, ids)
    assert len(shown) == len(ids)
    assert "…你" in shown and "\\x1b" in shown and "⏎" in shown and "".join(shown).endswith("\\n")
    assert "⟨E4⟩" in shown and "⟨BD⟩" in shown
    assert not any("\ufffd" in text for text in shown)


def test_labels_recover_after_invalid_bytes():
    ids = [0xE4, 0xBD, ord("x"), 0xFF, 0xE4, *"é".encode()]
    assert inside.labels(BYTE, ids) == ["⟨E4⟩", "⟨BD⟩", "x", "⟨FF⟩", "⟨E4⟩", "⟨C3⟩", "…é"]


def test_non_finite_logits_are_refused():
    model = ours()
    model.transformer.ln_f.weight.data[0] = math.inf
    with pytest.raises(UserError, match="non-finite"):
        inside.look(model, IDS)


@pytest.mark.parametrize("ids, word", [([5], "1 tokens"), ([5] * 17, "17 tokens"), ([5, 300], "256"), ([-1, 5], "256")])
def test_texts_of_invalid_length_or_ids_are_refused(ids, word):
    with pytest.raises(UserError, match=word):
        inside.check_text(ids, BYTE.n_vocab, block_size=16)
