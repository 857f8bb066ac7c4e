"""acorn/evaluation/loss.py: the loss of a split and its bits per byte against a reference in float64."""

import itertools
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from acorn import UserError
from acorn.data import shards
from acorn.data.mixture import Mixture
from acorn.data.tokenizer_kinds import get_tokenizer
from acorn.distributed import runtime
from acorn.evaluation.loss import evaluate, evaluate_mixture
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
    """Return the loss of each token in nats, from windows that start at multiples of T: (len(ids) - 1,), float64."""
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


def test_split_without_learned_tokens_is_refused(byte_tokens, tmp_path):
    tokens, ids, _ = byte_tokens
    with shards.MaskWriter(tmp_path, "val") as writer:
        writer.write(np.zeros(len(ids), dtype=np.int64))
    tokens.mask = shards.Tokens([shards.open_shard(tmp_path / "val_000000.mask")], 2, "mask")
    with pytest.raises(UserError, match="the val split has no loss"):
        evaluate(random_model(), tokens, runtime.ONE_RANK, 2, 16)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_loss_of_the_whole_split_matches_the_reference(byte_tokens, batch_size):
    tokens, ids, tokenizer = byte_tokens
    model = random_model()
    nats = by_hand(model, ids)
    result = evaluate(model, tokens, runtime.setup("cpu", "float32", False), batch_size, 16, 0, tokenizer.token_bytes())
    assert len(nats) == len(ids) - 1
    assert result["loss"] == pytest.approx(nats.mean(), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nats.mean()), rel=1e-5)
    is_text = ids[1:] != tokenizer.eot
    assert result["bits_per_byte"] == pytest.approx(nats[is_text].sum() / math.log(2) / is_text.sum(), rel=1e-5)


def test_evaluation_disables_dropout_and_restores_training_mode(byte_tokens):
    tokens, _, tokenizer = byte_tokens
    model = random_model(dropout=0.5).train()
    r = runtime.setup("cpu", "float32", False)
    first = evaluate(model, tokens, r, 2, 16, 3, tokenizer.token_bytes())
    assert first == evaluate(model, tokens, r, 2, 16, 3, tokenizer.token_bytes())  # the same windows every time
    assert model.training
    model.config.dropout = 0.0
    assert first == evaluate(model, tokens, r, 2, 16, 3, tokenizer.token_bytes())


def test_max_windows_above_the_total_evaluates_the_whole_split(byte_tokens):
    tokens, _, _ = byte_tokens
    model, r = random_model(), runtime.setup("cpu", "float32", False)
    whole = evaluate(model, tokens, r, 2, 16)
    assert evaluate(model, tokens, r, 2, 16, 10**6) == whole
    assert evaluate(model, tokens, r, 2, 16, 1) != whole
    assert "bits_per_byte" not in whole


def test_no_loss_depends_on_an_earlier_document(byte_tokens):
    """The reference evaluates each piece of a document alone, cut at multiples of 16 as the windows are."""
    tokens, ids, tokenizer = byte_tokens
    model, nats = random_model(), []
    cuts = sorted({0, *range(0, len(ids) - 1, 16), *np.flatnonzero(ids == tokenizer.eot).tolist(), len(ids) - 1})
    for begin, end in itertools.pairwise(cuts):
        nats += by_hand(model, ids[begin : end + 1]).tolist()
    r = runtime.setup("cpu", "float32", False)
    joined = evaluate(model, tokens, r, 3, 16)
    tokens.document_mark = tokenizer.eot
    result = evaluate(model, tokens, r, 3, 16, 0, tokenizer.token_bytes())
    assert result["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert result["loss"] != pytest.approx(joined["loss"], rel=1e-4)


def test_mixture_weights_its_datasets_by_their_shares(byte_tokens, tmp_path):
    tokens, ids, tokenizer = byte_tokens
    other = np.concatenate([[tokenizer.eot], tokenizer.encode(TEXT[30:])])
    with shards.ShardWriter(tmp_path, "train", tokenizer.n_vocab) as writer:
        writer.write(other)
    others = shards.Tokens([shards.open_shard(tmp_path / "train_000000.bin")], tokenizer.n_vocab)
    model = random_model()
    datasets = [SimpleNamespace(name="a", val=tokens), SimpleNamespace(name="b", val=others)]
    mixture = Mixture(datasets, [Fraction(3, 4), Fraction(1, 4)])
    r = runtime.setup("cpu", "float32", False)
    result = evaluate_mixture(model, mixture, "val", r, 3, 16, 0, tokenizer.token_bytes())
    nats = [by_hand(model, ids), by_hand(model, other)]
    is_text = [ids[1:] != tokenizer.eot, other[1:] != tokenizer.eot]
    means = [each.mean() for each in nats]
    assert [result["loss/a"], result["loss/b"]] == pytest.approx(means, rel=1e-5)
    # as in training, shares weight windows, whose numbers of targets differ
    weights = [share / math.ceil(len(each) / 16) for share, each in zip((0.75, 0.25), nats, strict=True)]

    def weighted(sums: list) -> float:
        return sum(weight * float(each) for weight, each in zip(weights, sums, strict=True))

    targets = weighted([len(each) for each in nats])
    assert result["loss"] == pytest.approx(weighted([each.sum() for each in nats]) / targets, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    bits = weighted([each[text].sum() for each, text in zip(nats, is_text, strict=True)]) / math.log(2)
    assert result["bits_per_byte"] == pytest.approx(bits / weighted([text.sum() for text in is_text]), rel=1e-5)
