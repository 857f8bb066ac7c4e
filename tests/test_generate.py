"""acorn/inference/generate.py: logit filters, decoding with a KV cache against without, streaming and stop strings."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import fuzz, rounds
from hypothesis import example, given, settings
from hypothesis import strategies as st

from acorn import UserError
from acorn.data.tokenizer_json import add_tokens
from acorn.data.tokenizer_kinds import get_tokenizer
from acorn.inference.generate import (
    Sampling,
    TextStream,
    ban_repeated_ngrams,
    checked,
    context,
    draw,
    encode_prompt,
    generate,
    inverse_transform,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
)
from model import GPT, GPTConfig

GREEDY = Sampling(temperature=0)


def kept(logits: torch.Tensor) -> list[int]:
    return logits.isfinite().nonzero()[:, 0].tolist()


def logs(*probs: float) -> torch.Tensor:
    return torch.tensor(probs).log()


# ---- filters


def test_top_k_keeps_exactly_k_and_breaks_ties_by_lowest_id():
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    assert kept(keep_top_k(logits, 1)) == [1]
    assert kept(keep_top_k(logits, 2)) == [1, 2]
    assert kept(keep_top_k(logits, 3)) == [1, 2, 3]
    assert kept(keep_top_k(logits, 6)) == kept(keep_top_k(logits, 99)) == list(range(6))
    assert keep_top_k(torch.zeros(5), 2).tolist() == [0.0, 0.0] + [-math.inf] * 3


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = logs(0.1, 0.5, 0.25, 0.15)
    assert kept(keep_top_p(logits, 0.4)) == [1]
    assert kept(keep_top_p(logits, 0.6)) == [1, 2]
    assert kept(keep_top_p(logits, 0.8)) == [1, 2, 3]
    assert kept(keep_top_p(logits, 0.95)) == [0, 1, 2, 3]
    assert kept(keep_top_p(logits, 1e-9)) == [1]  # at least one
    assert kept(keep_top_p(torch.zeros(4), 0.5)) == [0, 1]  # ties: the lowest ids


def test_min_p_is_relative_to_the_most_likely_token():
    logits = logs(0.5, 0.3, 0.12, 0.08)
    assert kept(keep_min_p(logits, 0.5)) == [0, 1]
    assert kept(keep_min_p(logits, 0.2)) == [0, 1, 2]
    assert kept(keep_min_p(logits, 1.0)) == [0]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = torch.tensor([2.0, -2.0, 1.0, 0.5])
    assert penalize_repetition(logits, [0, 1, 1, 0], 2.0).tolist() == [1.0, -4.0, 1.0, 0.5]


def test_repeated_ngrams_are_banned():
    logits = torch.zeros(5)
    row = [1, 2, 3, 1, 2]  # "1 2" was followed by 3
    assert kept(ban_repeated_ngrams(logits, row, 3)) == [0, 1, 2, 4]
    assert kept(ban_repeated_ngrams(logits, row, 2)) == [0, 1, 2, 4]  # "2" was followed by 3
    assert kept(ban_repeated_ngrams(logits, row, 1)) == [0, 4]
    assert kept(ban_repeated_ngrams(logits, [1], 3)) == [0, 1, 2, 3, 4]


def draw_one(logits: torch.Tensor, row: list[int], sampling: Sampling, random: torch.Generator) -> int:
    [token] = checked(draw(logits[None], [row], sampling, [random]).tolist())
    return token


def test_samples_follow_the_probabilities():
    random = torch.Generator().manual_seed(0)
    logits = logs(0.1, 0.0, 0.6, 0.3)
    counts = [0] * 4
    for _ in range(4000):
        counts[draw_one(logits, [], Sampling(), random)] += 1
    assert counts[1] == 0  # probability 0 is never sampled
    for count, p in zip(counts, (0.1, 0.0, 0.6, 0.3), strict=True):
        assert abs(count / 4000 - p) < 4 * math.sqrt(0.25 / 4000)


def test_temperature_zero_is_greedy_and_breaks_ties_by_lowest_id():
    random = torch.Generator()
    assert draw_one(torch.tensor([1.0, 5.0, 5.0]), [], GREEDY, random) == 1
    assert draw_one(torch.tensor([1.0, 5.0, 2.0]), [], Sampling(top_k=1), random) == 1


LOGIT = st.one_of(st.just(-math.inf), st.floats(-30, 30), st.sampled_from([-3e38, 0.0, 3e38]))


@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    logits=st.lists(LOGIT, min_size=1, max_size=6).filter(lambda x: max(x) > -math.inf),
    row=st.lists(st.integers(0, 7), max_size=8),  # includes ids without a logit: vocabulary padding
    n=st.integers(0, 3),
    penalty=st.sampled_from([1.0, 1.3, 1e-300, 1e300]),
    temperature=st.sampled_from([0.0, 1e-45, 0.8, 1e30]),
    top_k=st.integers(0, 7),
    top_p=st.sampled_from([1.0, 0.5, 1e-12]),
    min_p=st.sampled_from([0.0, 0.3, 1.0]),
    uniform=st.sampled_from([0.0, 0.5, 1 - 2**-24]),
)
@example([-math.inf, 5.0], [1, 0, 1], 1, 1.0, 0.8, 0, 1.0, 0.0, 0.5)
@example([-math.inf, 5.0], [0, 1], 1, 1.3, 0.8, 0, 1.0, 0.0, 0.0)
def test_zero_probability_tokens_are_never_sampled(logits, row, n, penalty, temperature, top_k, top_p, min_p, uniform):
    possible = {i for i, logit in enumerate(logits) if logit > -math.inf}
    # find repeated n-grams by text search
    words = [f" {' '.join(map(str, row[i : i + n]))} " for i in range(len(row) - n + 1)] if n else []
    prefix = " ".join(map(str, row[len(row) - n + 1 :])) if n else ""
    banned = {i for i in possible if n and len(row) >= n and f" {f'{prefix} {i}'.strip()} " in words}
    sampling = Sampling(penalty, n, temperature, top_k, top_p, min_p)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *size, generator: torch.full(size, uniform))
        token = draw_one(torch.tensor(logits), row, sampling, torch.Generator())
    assert token in (possible - banned or possible)


@pytest.mark.parametrize("largest", [8905622741319680.0, 3e38])
def test_top_k_is_applied_before_temperature_rounds_logits_to_ties(largest):
    logits, how = torch.tensor([0.0, largest, 1.0]), Sampling(temperature=1e308, top_k=2)
    assert {draw_one(logits, [], how, torch.Generator().manual_seed(seed)) for seed in range(20)} == {1, 2}


def test_batched_sampling_matches_row_by_row_sampling():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    logits[1, ::2] = -math.inf
    rows = [[1, 2, 1], [3], [], [5, 5, 5, 5]]
    for how in (
        GREEDY,
        Sampling(),
        Sampling(temperature=0.7, top_k=5),
        Sampling(top_p=0.6, min_p=0.1),
        Sampling(repetition_penalty=1.5, no_repeat_ngram_size=2),
    ):
        seeded = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3, 4)]
        together = [draw(logits, rows, how, seeded).tolist() for _ in range(20)]
        alone = []
        for row in range(4):
            random = torch.Generator().manual_seed(row + 1)
            alone.append([draw_one(logits[row], rows[row], how, random) for _ in range(20)])
        assert together == list(map(list, zip(*alone, strict=True)))


@pytest.mark.parametrize("spread", [0.01, 3.0])  # nearly uniform, or a few likely tokens
@pytest.mark.parametrize("ties", [False, True])
def test_filters_on_a_shortlist_match_filters_on_the_full_vocabulary(spread, ties):
    for seed in range(5):
        logits = spread * torch.randn(1, 5000, generator=torch.Generator().manual_seed(seed)).double()
        logits = logits.round() if ties else logits
        for top_k, top_p, min_p in itertools.product((0, 1, 200), (1.0, 0.9, 0.05), (0.0, 0.02)):
            how, scaled = Sampling(temperature=0.5, top_k=top_k, top_p=top_p, min_p=min_p), logits / 0.5
            kept = keep_min_p(keep_top_p(keep_top_k(scaled, top_k or 5000), top_p), min_p)
            cumulative = kept.softmax(-1).cumsum(-1)
            uniform = torch.rand(1, generator=torch.Generator().manual_seed(seed)).double()
            expected = int((cumulative > uniform * cumulative[:, -1:]).int().argmax())
            assert draw_one(logits[0], [], how, torch.Generator().manual_seed(seed)) == expected


def test_decreasing_cumulative_sums_never_sample_probability_zero(monkeypatch):
    """A GPU sums in parallel, so rounding may make a cumulative sum smaller than the one before it."""
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64)
    sums = torch.tensor([[1e-17, 0.25, 0.25 + 1e-15, 1.0, 1 - 1e-15]], dtype=torch.float64)
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda *_: sums)
    for uniform, expected in ((0.0, 1), (0.25 - 1e-9, 1), (0.25, 3), (1 - 2**-24, 3)):
        share = torch.tensor([[uniform]], dtype=torch.float64)
        assert inverse_transform(probs, share, in_order=False).tolist() == [expected]


def test_both_inverse_transform_algorithms_sample_the_same_token():
    probs = torch.rand(200, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probs = probs.masked_fill(probs < 0.5, 0)
    uniform = torch.rand(200, 1, generator=torch.Generator().manual_seed(1)).double()
    drawn = [inverse_transform(probs, uniform, in_order).tolist() for in_order in (True, False)]
    assert drawn[0] == drawn[1] and all(probs[i, id] > 0 for i, id in enumerate(drawn[0]))


def test_extreme_sampling_parameters_sample_valid_tokens():
    random = torch.Generator().manual_seed(0)
    logits = torch.tensor([3.0, -2.0, 1.0])
    row = [0, 1, 2, 0, 1, 2]
    for how in (
        Sampling(temperature=1e-45),
        Sampling(temperature=1e30),
        Sampling(repetition_penalty=1e-300),
        Sampling(repetition_penalty=1e300),
        Sampling(no_repeat_ngram_size=1),
        Sampling(min_p=1.0, top_p=1e-12, top_k=1),
    ):
        assert draw_one(logits, row, how, random) in (0, 1, 2)
    with pytest.raises(UserError, match="non-finite"):
        draw_one(torch.tensor([1.0, math.nan]), [], GREEDY, random)


# ---- the generation loop


def random_model(**changes) -> GPT:
    torch.manual_seed(0)
    shape = dict(block_size=24, vocab_size=40, n_layer=2, n_head=2, n_embd=32)
    model = GPT(GPTConfig(**{**shape, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def run_generate(model, prompts, n, how=GREEDY, seeds=None, n_vocab=None, stop_id=None):
    return generate(
        model, prompts, n, how, seeds or [0] * len(prompts), lambda row, token, logprob: token == stop_id, n_vocab
    )


def greedy_without_cache(model, prompt, n):
    row = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            logits, _ = model(torch.tensor([context(row, model.config.block_size)]))
        row.append(int(logits[0, 0].argmax()))
    return row


@pytest.mark.parametrize("pos", ["learned", "sinusoidal", "rope"])
def test_greedy_decoding_with_cache_matches_without_beyond_the_block_size(pos):
    model = random_model(pos=pos, n_kv_head=1)
    for prompt in ([3], [5, 6, 7, 8, 9], list(range(30))):  # the last is longer than the block
        assert run_generate(model, [prompt], 40) == [greedy_without_cache(model, prompt, 40)]


@pytest.mark.parametrize("pos", ["learned", "rope"])
def test_batched_generation_matches_generation_one_by_one(pos):
    model = random_model(pos=pos)
    prompts = [[1], [2, 3, 4, 5, 6, 7, 8], list(range(20)), [9, 9, 9]]
    for how in (GREEDY, Sampling(temperature=1.0, top_k=10)):
        together = run_generate(model, prompts, 30, how, seeds=[7, 8, 9, 10])
        alone = [run_generate(model, [p], 30, how, seeds=[s])[0] for p, s in zip(prompts, [7, 8, 9, 10], strict=True)]
        assert together == alone


def test_stopped_row_does_not_affect_other_rows():
    model = random_model()
    how = Sampling(temperature=1.5)
    free = run_generate(model, [[1], [2]], 20, how, seeds=[1, 2])
    stop = free[0][5]
    rows = run_generate(model, [[1], [2]], 20, how, seeds=[1, 2], stop_id=stop)
    for row, whole in zip(rows, free, strict=True):
        end = whole.index(stop, 1) + 1 if stop in whole[1:] else len(whole)
        assert row == whole[:end]


@pytest.mark.parametrize("changes", [dict(pos="learned"), dict(pos="rope", ngram=2)])
def test_row_stopped_at_the_block_end_does_not_affect_sliding_rows(changes):
    model = random_model(block_size=8, **changes)
    for length in (7, 11, 15):  # with one more token, the window fills the block
        prompts = [[1] * length, [2] * 8, [3] * 5]
        rows = generate(model, prompts, 20, GREEDY, [0, 0, 0], lambda row, token, logprob: row == 0)
        assert len(rows[0]) == length + 1
        assert rows[1:] == [greedy_without_cache(model, prompt, 20) for prompt in prompts[1:]]


def test_vocabulary_padding_is_never_sampled():
    model = random_model()
    with torch.no_grad():
        model.transformer.wte.weight[30:] *= 50  # tied weights: the padding has by far the most extreme logits
    rows = run_generate(model, [[1], [2]], 50, Sampling(temperature=2.0), seeds=[0, 1], n_vocab=30)
    assert max(map(max, rows)) < 30
    with pytest.raises(UserError, match=r"token 40.*vocabulary"):
        run_generate(model, [[1], [2, 40, 3]], 1)


def test_logprobs_come_from_the_unfiltered_distribution():
    model, seen = random_model(), []
    how = Sampling(temperature=0.5, top_k=3)
    rows = generate(model, [[4, 5]], 5, how, [3], lambda row, token, logprob: bool(seen.append((token, logprob))))
    with torch.no_grad():
        idx = torch.tensor(rows)
        expected = model(idx, idx)[0].log_softmax(-1)[0, 1:-1].gather(1, idx[0, 2:, None])[:, 0]
    assert [token for token, _ in seen] == rows[0][2:]
    assert [logprob for _, logprob in seen] == pytest.approx(expected.tolist(), abs=1e-4)


def test_compiled_decoding_gives_the_same_tokens():
    model = random_model(block_size=16)
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1))
    except Exception:
        pytest.skip("this machine cannot compile")
    compiled = generate(model, [[1, 2]], 10, GREEDY, [0], lambda *token: False, compile=True)
    assert compiled == run_generate(model, [[1, 2]], 10)


@pytest.mark.gpu
def test_gpu_compiled_decoding_matches_cpu():
    model = random_model(block_size=64, pos="rope", n_kv_head=1, ngram=3)
    prompts = [[1, 2], [3, 4, 5]]
    expected = run_generate(model, prompts, 30)
    compiled = generate(model.cuda(), prompts, 30, GREEDY, [0, 0], lambda *token: False, compile=True)
    assert compiled == expected


# ---- text streams and prompts


def stream(pieces: list[str], stop: list[str]) -> tuple[list[str], str | None]:
    tokenizer = get_tokenizer("byte")
    text = TextStream(tokenizer, stop)
    shown = []
    for token in tokenizer.encode("".join(pieces)).tolist():
        shown.append(text.push(token))
        if text.stopped_by:
            return shown, text.stopped_by
    return [*shown, text.finish()], None


def test_multi_token_characters_are_streamed_whole():
    shown, _ = stream(["今天天气很好。"], [])
    assert [piece for piece in shown if piece] == list("今天天气很好。")


def test_incomplete_last_character_is_dropped():
    tokenizer = get_tokenizer("byte")
    text = TextStream(tokenizer)
    shown = [text.push(token) for token in "好".encode() + "气".encode()[:2]]
    assert "".join([*shown, text.finish()]) == "好"


def test_text_ends_before_the_stop_string():
    for stop in (["\n\n"], ["end", "\n\n"], ["\n\n", "zzz"]):
        shown, stopped_by = stream(["one\ntwo\n\nthree"], stop)
        assert "".join(shown) == "one\ntwo" and stopped_by == "\n\n"
    shown, stopped_by = stream(["aab aaab"], ["aaab"])  # a partial match that does not become the stop string
    assert "".join(shown) == "aab " and stopped_by == "aaab"
    shown, stopped_by = stream(["almost aaa"], ["aaab"])
    assert "".join(shown) == "almost aaa" and stopped_by is None


def test_end_of_text_token_stops_the_stream():
    tokenizer = get_tokenizer("byte")
    text = TextStream(tokenizer, [])
    assert text.push(ord("a")) == "a"
    assert text.push(tokenizer.eot) == "" and text.stopped_by == "end of text"


def test_control_token_names_are_plain_text_by_default():
    tokenizer = get_tokenizer("byte")
    chatting = add_tokens(get_tokenizer("bpe:257", ["ab"]), ["<|im_start|>"])
    assert encode_prompt(chatting, "<|im_start|>a<|endoftext|>", control=True) == [257, *chatting.encode("a"), 256]
    assert encode_prompt(chatting, "<|im_start|>") == chatting.encode("<|im_start|>").tolist()
    assert encode_prompt(tokenizer, "") == [256]
    assert encode_prompt(tokenizer, "<|endoftext|>a", control=True) == [256, 97]
    assert encode_prompt(tokenizer, "a<|endoftext|>", control=True) == [97, 256]
    assert encode_prompt(tokenizer, "a<|endoftext|>") == list(b"a<|endoftext|>")
    char = get_tokenizer("char", ["abc"])
    assert encode_prompt(char, "cab") == [2, 0, 1]
    with pytest.raises(UserError, match="empty"):
        encode_prompt(char, "")
    with pytest.raises(UserError, match="U\\+20AC"):
        encode_prompt(char, "€")


PROBABILITIES = st.sampled_from([0.0, 1e-320, 1e-9, 0.1, 0.5, 0.999999, 1.0])
samplings = st.builds(
    Sampling,
    repetition_penalty=st.sampled_from([1e-308, 1e-30, 0.5, 1.0, 1.3, 1e30, 1e308]),
    no_repeat_ngram_size=st.sampled_from([0, 1, 2, 3, 10**18]),
    temperature=st.sampled_from([0.0, 1e-320, 1e-9, 0.8, 1.0, 50.0, 1e308]),
    top_k=st.sampled_from([0, 1, 2, 3, 7, 10**18]),
    top_p=PROBABILITIES.filter(bool),
    min_p=PROBABILITIES,
)
any_logit = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from(
    [0.0, 1.0, -1.0, 3.4e38, -3.4e38]
)


@rounds(250, 20000)
def test_any_sampling_parameters_sample_an_allowed_token(rounds):
    def one(how: Sampling, values: list[float], row: list[int], seed: int) -> None:
        logits = torch.tensor(values, dtype=torch.float32)
        row = [i % len(values) for i in row]
        token = draw_one(logits, row, how, torch.Generator().manual_seed(seed))
        assert token == draw_one(logits, row, how, torch.Generator().manual_seed(seed))
        assert 0 <= token < len(values)
        if how.repetition_penalty == 1 and not how.no_repeat_ngram_size:
            if how.top_k:
                assert sum(value > logits[token] for value in logits) < how.top_k
            if how.temperature == 0 or how.top_k == 1:
                assert token == int(np.argmax(logits.numpy()))

    fuzz(
        one,
        rounds,
        samplings,
        st.lists(any_logit, min_size=1, max_size=9),
        st.lists(st.integers(0, 8), max_size=12),
        st.integers(0, 2**62 - 1),
    )
