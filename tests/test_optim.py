"""Muon against the singular value decomposition, and learning-rate schedules against calculations by hand."""

import copy
import dataclasses
import math
import typing

import pytest
import torch

import train
from acorn import UserError, checkpoint
from acorn.training import optim, start
from acorn.training.optim import (
    Muon,
    learning_rate_at,
    make_optimizers,
    orthogonalize,
    rate_change,
    step_if_finite,
)
from model import GPT, GPTConfig

NAMES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")

COMMON = dict(learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warmup_is_linear_and_starts_above_zero(schedule):
    rates = [learning_rate_at(step, schedule, **COMMON) for step in range(11)]
    assert rates == pytest.approx([(step + 1) / 11 for step in range(11)])


def test_cosine_schedule_matches_nanogpt():
    at = lambda step: learning_rate_at(step, "cosine", **COMMON)  # noqa: E731
    assert at(60) == pytest.approx(0.55)  # half way
    assert at(35) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert at(110) == at(1000) == 0.1


def test_linear_schedule_decays_linearly():
    rates = [learning_rate_at(step, "linear", **COMMON) for step in (10, 35, 60, 85, 110, 500)]
    assert rates == pytest.approx([1.0, 0.775, 0.55, 0.325, 0.1, 0.1])


def test_constant_schedule_does_not_decay():
    assert {learning_rate_at(step, "constant", **COMMON) for step in (10, 60, 110, 1000)} == {1.0}


def test_wsd_schedule_decays_only_in_the_cooldown():
    rates = [learning_rate_at(step, "wsd", **COMMON, cooldown_frac=0.5) for step in (10, 55, 82.5, 110, 200)]
    assert rates == pytest.approx([1.0, 1.0, 0.55, 0.1, 0.1])


@pytest.mark.parametrize("step", [0, 9, 10, 60, 200])
def test_unknown_schedule_is_refused_at_every_step(step):
    with pytest.raises(UserError, match=r"sine.*learning_rate_at"):
        learning_rate_at(step, "sine", **COMMON)


def test_unimplemented_schedule_or_optimizer_is_refused_at_start():
    """If a name is only in the Literal, the error names the function that lacks it."""
    with pytest.raises(UserError, match="learning_rate_at"):
        start.check(train.TrainSettings(lr_schedule="sine"))
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8))
    with pytest.raises(UserError, match="make_optimizers"):
        make_optimizers(model, "lion", 1e-3, 0.02, 0.1, (0.9, 0.95), "cpu")
    model.configure_optimizers = lambda *args, **kwargs: torch.optim.SGD(model.parameters())
    with pytest.raises(UserError, match=r"SGD.*moment_kinds"):
        make_optimizers(model, "adamw", 1e-3, 0.02, 0.1, (0.9, 0.95), "cpu")


def test_every_choice_in_the_settings_is_implemented():
    choices = {name: typing.get_args(kind) for name, kind in typing.get_type_hints(train.TrainSettings).items()}
    for schedule in choices["lr_schedule"]:
        assert learning_rate_at(60, schedule, **COMMON) > 0
    shape = dict(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8)
    for name in ("pos", "norm", "mlp"):
        for choice in choices[name]:
            logits, _ = GPT(GPTConfig(**shape, **{name: choice}))(torch.zeros(1, 4, dtype=torch.long))
            assert logits.isfinite().all()
    for optimizer in choices["optimizer"]:
        assert make_optimizers(GPT(GPTConfig(**shape)), optimizer, 1e-3, 0.02, 0.1, (0.9, 0.95), "cpu")


def test_resuming_reports_a_change_of_the_learning_rate():
    before = train.TrainSettings(max_iters=100, warmup_iters=0, learning_rate=1e-3, min_lr=0.0, lr_schedule="linear")
    longer = dataclasses.replace(before, max_iters=200)
    said = rate_change(before, longer, 75)
    assert "2.50e-04 to 6.25e-04" in said and "--lr_decay_iters=100" in said and "max_iters=200" in said
    assert rate_change(before, dataclasses.replace(longer, lr_decay_iters=100), 75) is None  # as the note suggests
    assert rate_change(before, before, 75) is rate_change(before, longer, 0) is None
    constant = [dataclasses.replace(s, decay_lr=False) for s in (before, longer)]
    assert rate_change(*constant, 75) is None
    said = rate_change(before, dataclasses.replace(before, learning_rate=2e-3), 75)
    assert "2.50e-04 to 5.00e-04" in said and "lr_decay_iters" not in said


def test_warmup_may_last_until_lr_decay_iters():
    assert learning_rate_at(5, "cosine", 1.0, 0.1, warmup_iters=5, lr_decay_iters=5) == 0.1


def test_orthogonalized_matrices_have_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((3, 16, 16), (2, 48, 16), (2, 16, 64)):
        x = torch.randn(shape)
        y = orthogonalize(x.bfloat16()).float()
        u, _, vh = torch.linalg.svd(x, full_matrices=False)
        values = torch.linalg.svdvals(y)
        assert y.shape == x.shape and 0.5 < values.min() and values.max() < 1.4
        cosine = torch.nn.functional.cosine_similarity((u @ vh).flatten(1), y.flatten(1))
        assert cosine.min() > 0.95  # the direction is that of the polar factor, from the SVD


@pytest.mark.parametrize(("rows", "columns"), [(32, 128), (128, 32), (32, 64), (32, 63), (32, 32)])
def test_float32_orthogonalization_is_precise_for_all_shapes(rows, columns):
    """Compare with the plain iteration on the singular values in float64. They span six orders of magnitude."""
    torch.manual_seed(0)
    n = min(rows, columns)
    left = torch.linalg.qr(torch.randn(3, rows, n, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(3, columns, n, dtype=torch.float64))[0]
    values = 10 ** torch.linspace(0, -6, n, dtype=torch.float64)
    expected = values / values.norm()
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    update = orthogonalize(((left * values) @ right.mT).float())
    assert update.shape == (3, rows, columns)
    error = torch.linalg.matrix_norm(update.double() - (left * expected) @ right.mT, ord=2)
    assert error.max() < 3e-5


def test_muon_step_matches_the_formula():
    """Compare two updates of matrices of two shapes, which are stacked by shape, with updates of single matrices."""
    torch.manual_seed(0)
    start = [torch.randn(8, 4), torch.randn(8, 4), torch.randn(4, 8)]
    grads = [[torch.randn_like(p) for p in start] for _ in range(2)]
    params = [torch.nn.Parameter(p.clone()) for p in start]
    muon = Muon(params, lr=0.1, momentum=0.9, weight_decay=0.5)
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        muon.step()
    for i, p in enumerate(start):
        buffer = torch.zeros_like(p)
        for step in grads:
            buffer = 0.9 * buffer + 0.1 * step[i]
            update = orthogonalize((0.1 * step[i] + 0.9 * buffer)[None].bfloat16())[0].float()
            p = p * (1 - 0.1 * 0.5) - 0.1 * max(1, p.size(0) / p.size(1)) ** 0.5 * update
        torch.testing.assert_close(params[i].detach(), p, rtol=0.02, atol=2e-3)  # orthogonalized in bfloat16


@pytest.mark.parametrize("mlp", ["relu2", "swiglu"])
def test_muon_split_matches_separate_matrices(mlp):
    """Compare with separate matrices for the queries, keys and values, and for the gates and values of the MLP."""
    torch.manual_seed(0)
    shape = dict(block_size=8, vocab_size=11, n_layer=2, n_head=4, n_kv_head=2, n_embd=8, mlp=mlp, bias=False)
    model = GPT(GPTConfig(**shape))
    rows = {"attn.c_attn.weight": [8, 4, 4]} | ({"mlp.c_fc.weight": [64, 64]} if mlp == "swiglu" else {})
    apart = {}
    for name, p in model.transformer.h.named_parameters():
        if p.dim() == 2:
            p.grad = torch.randn_like(p)
            parts = rows.get(name.split(".", 1)[1], [p.size(0)])
            apart[name] = [torch.nn.Parameter(part.detach().clone()) for part in p.split(parts)]
            for part, gradient in zip(apart[name], p.grad.split(parts), strict=True):
                part.grad = gradient.clone()
    options = (1e-3, 0.02, 0.1, (0.9, 0.95), "cpu", torch.float32)
    make_optimizers(model, "muon", *options, muon_split=True)[1].step()
    Muon([p for parts in apart.values() for p in parts], 0.02, weight_decay=0.1, dtype=torch.float32).step()
    for name, parts in apart.items():
        torch.testing.assert_close(model.transformer.h.get_parameter(name), torch.cat(parts), rtol=1e-4, atol=1e-6)


def test_muon_momentum_is_an_exponential_moving_average():
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=8))
    muon = make_optimizers(model, "muon", 1e-3, 0.02, 0.0, (0.9, 0.95), "cpu", torch.float32, muon_momentum=0.75)[1]
    weight = model.transformer.h[0].attn.c_proj.weight
    first, second = torch.randn(2, 8, 8)
    for gradient in (first, second):
        before, weight.grad = weight.detach().clone(), gradient
        muon.step()
    mean = 0.75 * (0.25 * first) + 0.25 * second
    expected = orthogonalize((0.25 * second + 0.75 * mean)[None])[0]  # Nesterov
    torch.testing.assert_close((before - weight.detach()) / 0.02, expected, rtol=1e-4, atol=1e-4)


def test_muon_updates_block_matrices_and_adamw_the_rest():
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8, tie_weights=False))
    adamw, muon = make_optimizers(model, "muon", 1e-3, 0.02, 0.1, (0.9, 0.95), "cpu")
    matrices = {name for name, p in model.named_parameters() if any(p is q for q in muon.param_groups[0]["params"])}
    assert matrices == {f"transformer.h.{i}.{m}.weight" for i in (0, 1) for m in NAMES}
    count = sum(len(group["params"]) for each in (adamw, muon) for group in each.param_groups)
    assert count == len(list(model.parameters()))
    assert {group["peak_lr"] for group in adamw.param_groups} == {1e-3}
    assert {group["weight_decay"] for group in adamw.param_groups} == {0.0}
    assert [group["peak_lr"] for group in muon.param_groups] == [0.02]


def test_restored_muon_state_gives_bitwise_equal_updates():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(6, 4))
    q = torch.nn.Parameter(p.detach().clone())
    first, second = Muon([p]), Muon([q])
    p.grad = torch.randn(6, 4)
    first.step()
    q.data.copy_(p.data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    p.grad = q.grad = torch.randn(6, 4)
    first.step()
    second.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("bad, host_decides", [(float("nan"), ()), (float("inf"), ()), (float("nan"), ("cpu",))])
def test_update_with_non_finite_gradient_changes_nothing(kind, bad, host_decides, monkeypatch):
    """Compare with an optimizer that gets the same gradients and does not step if they are non-finite."""
    monkeypatch.setattr(optim, "HOST_DECIDED_DEVICES", host_decides)
    torch.manual_seed(0)
    config = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8)
    models = [GPT(config), GPT(config)]
    models[1].load_state_dict(models[0].state_dict())
    one, other = ([*make_optimizers(m, kind, 1e-2, 0.02, 0.1, (0.9, 0.95), "cpu")] for m in models)
    skipped, counts = torch.tensor([0, 3]), []
    for step in range(8):
        broken = step in (0, 3, 4, 7)
        for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            p.grad = torch.randn_like(p)
            if broken and name == "transformer.h.1.mlp.c_fc.weight":
                p.grad[0, 0] = bad
            q.grad = p.grad.clone()
        step_if_finite(one, torch.nn.utils.clip_grad_norm_(models[0].parameters(), 1.0), skipped)
        torch.nn.utils.clip_grad_norm_(models[1].parameters(), 1.0)
        for optimizer in other if not broken else ():
            optimizer.step()
        counts.append(skipped.tolist())
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(p, q)
        mine, expected = checkpoint.named_moments(models[0], one), checkpoint.named_moments(models[1], other)
        assert all(torch.equal(mine[name], value) for name, value in expected.items())
        assert expected.keys() == mine.keys() or not any(value.any() for value in mine.values())  # absent, or zero
    assert counts == [[1, 4], [0, 4], [0, 4], [1, 5], [2, 6], [0, 6], [0, 6], [1, 7]]
