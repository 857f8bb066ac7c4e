"""Loss over a whole split against a hand computation in float64, and bits per byte as summed nats over summed bytes."""

import math

import numpy as np
import pytest
import torch

from acorn import runtime, shards
from acorn.evaluate import evaluate
from acorn.tokenizer import get_tokenizer
from model import GPT, GPTConfig

TEXT = "今天天气很好。 The weather is fine today, and it was fine yesterday."


@pytest.fixture
def byte_tokens(tmp_path):
    tokenizer = get_tokenizer("byte")
    ids = np.concatenate([[tokenizer.eot], tokenizer.encode(TEXT), [tokenizer.eot], tokenizer.encode(TEXT[:20])])
    with shards.ShardWriter(tmp_path, "val", tokenizer.n_vocab) as writer:
        writer.write(ids.astype(np.int32))
    return shards.Tokens([shards.open_shard(tmp_path / "val_000000.bin")], tokenizer.n_vocab, "val"), ids, tokenizer


def random_model(dropout=0.0):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=257, n_layer=1, n_head=2, n_embd=16, dropout=dropout))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def by_hand(model, ids, T=16):
    """Each token's nats from a window that starts at a multiple of T, in float64: (len(ids) - 1,)."""
    model = model.double().eval()
    nats = []
    with torch.no_grad():
        for start in range(0, len(ids) - 1, T):
            x, y = (
                torch.from_numpy(ids[start : start + T][: len(ids) - 1 - start])[None],
                ids[start + 1 : start + T + 1],
            )
            logp = model(x, x)[0][0].log_softmax(-1)
            nats += [-logp[t, target].item() for t, target in enumerate(y)]
    model.float()
    return np.array(nats)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_whole_split_is_what_hand_computation_gives(byte_tokens, batch_size):
    tokens, ids, tokenizer = byte_tokens
    model = random_model()
    nats = by_hand(model, ids)
    result = evaluate(model, tokens, runtime.setup("cpu", "float32", False), batch_size, 16, 0, tokenizer.token_bytes())
    assert len(nats) == len(ids) - 1
    assert result["loss"] == pytest.approx(nats.mean(), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nats.mean()), rel=1e-5)
    is_text = ids[1:] != tokenizer.eot
    assert result["bits_per_byte"] == pytest.approx(nats[is_text].sum() / math.log(2) / is_text.sum(), rel=1e-5)


def test_dropout_does_not_reach_evaluation_and_training_goes_on_after(byte_tokens):
    tokens, _, tokenizer = byte_tokens
    model = random_model(dropout=0.5).train()
    r = runtime.setup("cpu", "float32", False)
    first = evaluate(model, tokens, r, 2, 16, 3, tokenizer.token_bytes())
    assert first == evaluate(model, tokens, r, 2, 16, 3, tokenizer.token_bytes())  # the same windows every time
    assert model.training
    model.config.dropout = 0.0
    assert first == evaluate(model, tokens, r, 2, 16, 3, tokenizer.token_bytes())


def test_as_many_windows_as_there_are_is_the_whole_split(byte_tokens):
    tokens, _, _ = byte_tokens
    model, r = random_model(), runtime.setup("cpu", "float32", False)
    whole = evaluate(model, tokens, r, 2, 16)
    assert evaluate(model, tokens, r, 2, 16, 10**6) == whole
    assert evaluate(model, tokens, r, 2, 16, 1) != whole
    assert "bits_per_byte" not in whole
