"""acorn/inference/beam.py: beam search against transformers, and against all texts of a small vocabulary."""

import itertools
import math

import pytest
import torch
from hf_models import theirs

from acorn import UserError, checkpoint
from acorn.inference.beam import Rules, beam_search
from model import GPT, GPTConfig

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def pair(request, tmp_path_factory):
    """A tiny random transformers model with a context of 40 tokens, and the same model loaded by acorn."""
    length = "n_positions" if request.param == "gpt2" else "max_position_embeddings"
    other = theirs(request.param, **{length: 40})
    norm = other.transformer.ln_f if request.param == "gpt2" else other.model.norm
    with torch.no_grad():  # flat distributions make beams compete and end tokens frequent
        norm.weight *= 0.3
    folder = tmp_path_factory.mktemp(request.param)
    other.save_pretrained(folder)
    return other, checkpoint.load_model(str(folder))[0]


def expected(other, prompts, rules: Rules, **filters) -> list[list[tuple[list[int], float]]]:
    """Return the continuations and scores that transformers finds for a batch of prompts, padded on the left."""
    longest = max(map(len, prompts))
    idx = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    names = dict(num_beams=rules.num_beams, num_return_sequences=rules.num_beams, max_new_tokens=rules.max_new_tokens)
    names |= dict(length_penalty=rules.length_penalty, early_stopping=rules.early_stopping, do_sample=False)
    names |= dict(eos_token_id=sorted(rules.ends) or None, pad_token_id=0, bos_token_id=None, **filters)
    out = other.generate(idx, attention_mask=mask, return_dict_in_generate=True, output_scores=True, **names)
    lengths = (out.beam_indices >= 0).sum(1).tolist()
    rows = [
        (row[longest : longest + n], score)
        for row, n, score in zip(out.sequences.tolist(), lengths, out.sequences_scores.tolist(), strict=True)
    ]
    return [rows[i : i + rules.num_beams] for i in range(0, len(rows), rules.num_beams)]


def assert_equal(pair, prompts, rules, **filters):
    found = beam_search(pair[1], prompts, rules, **filters)
    for beams, others in zip(found, expected(pair[0], prompts, rules, **filters), strict=True):
        assert [beam.ids for beam in beams] == [ids for ids, _ in others]
        assert [beam.score for beam in beams] == pytest.approx([score for _, score in others], rel=1e-5)
    return found


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_ids_and_scores_equal_transformers(pair, early_stopping):
    random = torch.Generator().manual_seed(0)
    ended = set()
    for num_beams, penalty, places in (
        (2, 1.0, [3]),
        (3, -1.0, [1, 6]),
        (4, 0.0, []),
        (4, 2.0, [2, 4, 9]),
        (3, 1.0, [7]),
    ):
        prompts = [torch.randint(37, (n,), generator=random).tolist() for n in (3, 5, 1)]
        without_ends = beam_search(pair[1], prompts, Rules(num_beams, 12))[0][-1].ids
        ends = {without_ends[place] for place in places}  # tokens that beams contain
        found = assert_equal(pair, prompts, Rules(num_beams, 12, penalty, early_stopping, ends))
        ended |= {beam.ids[-1] in ends for beams in found for beam in beams}
    assert ended == {True, False}


def test_repetition_filters_equal_those_of_transformers(pair):
    for filters in (dict(no_repeat_ngram_size=2), dict(repetition_penalty=1.7, no_repeat_ngram_size=3)):
        prompts = [[1, 2, 3], [4, 5, 6], [8, 8, 7]]  # of equal length; transformers' filters would count padding
        assert_equal(pair, prompts, Rules(3, 12, ends={5, 11}), **filters)


def test_batch_equals_single_prompts_even_if_the_window_slides():
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=2, n_head=2, n_embd=16))
    rules = Rules(3, 12, ends={3})
    together = beam_search(model, PROMPTS, rules)
    for prompt, beams in zip(PROMPTS, together, strict=True):
        (alone,) = beam_search(model, [prompt], rules)
        assert [beam.ids for beam in beams] == [beam.ids for beam in alone]
        assert [beam.score for beam in beams] == pytest.approx([beam.score for beam in alone], abs=1e-5)


def test_batch_equals_single_prompts_if_some_end_before_others_slide():
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=2, n_head=2, n_embd=16))
    for seed in range(12):
        torch.manual_seed(seed)
        model.init_weights()
        prompts = [torch.randint(20, (n,)).tolist() for n in (3, 5, 7, 8)]
        rules = Rules(2, 14, ends=set(range(4)))
        for prompt, beams in zip(prompts, beam_search(model, prompts, rules), strict=True):
            assert [beam.ids for beam in beams] == [beam.ids for beam in beam_search(model, [prompt], rules)[0]]


@torch.no_grad()
def test_enough_beams_rank_all_texts_by_score():
    torch.manual_seed(2)
    model = GPT(GPTConfig(block_size=8, vocab_size=4, n_layer=1, n_head=2, n_embd=16, bias=True)).double().eval()
    for p in model.parameters():
        p.normal_(std=0.5)
    scores = {}
    for n in (1, 2, 3):
        for ids in itertools.product(range(4), repeat=n):
            if 0 in ids[:-1] or (n < 3 and ids[-1] != 0):  # a text ends with token 0 or after three tokens
                continue
            x = torch.tensor([[1, *ids]])
            scores[ids] = -float(model(x[:, :-1], x[:, 1:], reduction="sum")[1]) / n**0.5
    best = sorted(scores, key=scores.get, reverse=True)
    (beams,) = beam_search(model.float(), [[1]], Rules(48, 3, 0.5, "never", {0}))
    assert [tuple(beam.ids) for beam in beams] == best  # all of them, although there are fewer than 48
    assert [beam.score for beam in beams] == pytest.approx([scores[ids] for ids in best], abs=1e-4)
    assert all(math.isclose(sum(beam.logprobs), beam.total, abs_tol=1e-4) for beam in beams)


def test_stopped_beams_are_finished_and_nan_logits_are_reported():
    torch.manual_seed(3)
    model = GPT(GPTConfig(block_size=16, vocab_size=20, n_layer=1, n_head=2, n_embd=16))
    rules = Rules(3, 9, is_stopped=lambda ids: len(ids) == 4)
    assert all(len(beam.ids) == 4 for beam in beam_search(model, [[1], [2, 3]], rules)[1])
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = math.nan
    with pytest.raises(UserError, match="non-finite"):
        beam_search(model, [[1]], rules)
