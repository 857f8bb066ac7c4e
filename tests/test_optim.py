"""Learning-rate schedules against hand computations."""

import math

import pytest

from acorn.optim import learning_rate_at

COMMON = dict(learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warmup_rises_in_a_line_and_never_from_zero(schedule):
    rates = [learning_rate_at(step, schedule, **COMMON) for step in range(11)]
    assert rates == pytest.approx([(step + 1) / 11 for step in range(11)])


def test_cosine_is_nanogpts():
    at = lambda step: learning_rate_at(step, "cosine", **COMMON)  # noqa: E731
    assert at(60) == pytest.approx(0.55)  # half way
    assert at(35) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert at(110) == at(1000) == 0.1


def test_linear_falls_in_a_line():
    rates = [learning_rate_at(step, "linear", **COMMON) for step in (10, 35, 60, 85, 110, 500)]
    assert rates == pytest.approx([1.0, 0.775, 0.55, 0.325, 0.1, 0.1])


def test_constant_does_not_fall():
    assert {learning_rate_at(step, "constant", **COMMON) for step in (10, 60, 110, 1000)} == {1.0}


def test_wsd_holds_and_then_falls_over_the_last_part():
    rates = [learning_rate_at(step, "wsd", **COMMON, cooldown_frac=0.5) for step in (10, 55, 82.5, 110, 200)]
    assert rates == pytest.approx([1.0, 1.0, 0.55, 0.1, 0.1])


def test_a_run_of_warmup_only():
    assert learning_rate_at(5, "cosine", 1.0, 0.1, warmup_iters=5, lr_decay_iters=5) == 0.1
