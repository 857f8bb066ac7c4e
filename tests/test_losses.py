"""acorn/training/losses.py: losses against closed forms, float64 computations and TRL."""

import functools
import math

import pytest
import torch
from helpers import small_model
from torch.nn import functional as F

import model as model_module
from acorn.training import losses


def pair_batch(seed=0, B=2, T=24, V=257):
    """Return x, y and documents of rows with two pairs and padding. Each document ends with its answer."""
    torch.manual_seed(seed)
    x, y = torch.randint(V, (B, T)), torch.randint(V, (B, T))
    documents = torch.tensor([0] * 5 + [1] * 6 + [2] * 4 + [3] * 7 + [4] * 2).expand(B, T)
    answers = torch.tensor([0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0]).bool()
    return x, torch.where(answers, y, -1), documents


def test_values_and_gradients_in_chunks_match_full_logits(monkeypatch):
    """The gradients match although the backward pass recomputes each chunk."""
    gradients, m = [], small_model(block_size=24)
    x, y, documents = pair_batch()
    weights = torch.rand(2, 24)
    for at_once in (2**25, 257 * 7):  # 7 tokens per chunk
        monkeypatch.setattr(model_module, "LOGITS_AT_ONCE", at_once)
        logp = m(x, per_token=losses.log_probability, per_token_args=(y,), documents=documents)[1][..., 0]
        (logp * weights).sum().backward()
        gradients.append([p.grad.clone() for p in m.parameters()])
        m.zero_grad()
    nats = m(x, y, reduction="none", documents=documents)[1]
    assert torch.allclose(logp, -nats, atol=1e-6)
    (-nats * weights).sum().backward()
    for whole, chunks, p in zip(*gradients, m.parameters(), strict=True):
        assert torch.allclose(whole, p.grad, atol=1e-6) and torch.allclose(chunks, p.grad, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_gradient_matches_closed_form_for_two_tokens(smoothing):
    """Token 1, the chosen answer, has probability sigmoid(a), so the margin is beta * (a - a0)."""
    beta, a0 = 0.3, 0.4
    a = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    logp, reference = (torch.stack((F.logsigmoid(z), F.logsigmoid(-z)))[None] for z in (a, torch.tensor(a0).double()))
    y, documents = torch.tensor([[1, 0]]), torch.tensor([[0, 1]])
    loss, rewards, is_pair = losses.preference_loss(logp, reference, y, documents, "dpo", beta, smoothing)
    loss.sum().backward()
    margin = beta * (1.7 - a0)
    sigmoid = 1 / (1 + math.exp(-margin))
    assert a.grad.item() == pytest.approx(-beta * (1 - smoothing) * (1 - sigmoid) + beta * smoothing * sigmoid)
    assert loss.item() == pytest.approx(-(1 - smoothing) * math.log(sigmoid) - smoothing * math.log(1 - sigmoid))
    assert is_pair.tolist() == [[True]] and (rewards[..., 0] - rewards[..., 1]).item() == pytest.approx(margin)


@pytest.mark.parametrize("kind", ["dpo", "ipo", "simpo"])
def test_losses_of_packed_pairs_match_the_papers(kind):
    """Compare with a loop over answers in float64. The rows have pairs of unequal lengths and padding."""
    y, documents = pair_batch()[1:]
    logp, reference = -torch.rand(2, 24) * (y != -1), -torch.rand(2, 24) * (y != -1)
    options = (y, documents, kind, 0.7, 0.0, 0.4)
    loss, rewards, is_pair = losses.preference_loss(logp, None if kind == "simpo" else reference, *options)
    assert is_pair.sum() == 4 and loss[~is_pair].sum() == 0
    for row in range(2):
        for pair in range(2):
            h = []
            for document in (2 * pair, 2 * pair + 1):
                is_answer = (documents[row] == document) & (y[row] != -1)
                policy, ref = (values[row, is_answer].double() for values in (logp, reference))
                h.append({"dpo": (policy - ref).sum(), "ipo": (policy - ref).mean(), "simpo": policy.mean()}[kind])
            difference = float(h[0] - h[1])
            expected = {
                "dpo": math.log1p(math.exp(-0.7 * difference)),
                "ipo": (difference - 1 / 1.4) ** 2,
                "simpo": math.log1p(math.exp(-0.7 * difference + 0.4)),
            }[kind]
            assert loss[row, pair].item() == pytest.approx(expected, rel=1e-5)
            assert rewards[row, pair].tolist() == pytest.approx([0.7 * float(each) for each in h], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_preference_loss_matches_trl(kind, tmp_path):
    trl = pytest.importorskip("trl")
    import datasets
    import tokenizers
    import transformers
    from hf_models import MODERN, theirs

    from acorn import checkpoint

    models = {}
    for seed, name in enumerate(("policy", "reference")):
        models[name] = theirs("llama")
        torch.manual_seed(seed)
        for p in models[name].parameters():
            p.data += 0.1 * torch.randn_like(p)
        models[name].save_pretrained(tmp_path / name)
    ours = {name: checkpoint.load_model(str(tmp_path / name))[0].eval() for name in models}
    assert ours["policy"].config.pos == MODERN["pos"]
    pairs = [([1, 5, 9], [7, 3, 2, 11], [8, 4]), ([2, 6], [12, 5], [9, 9, 30, 1])]
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(keys, pair, strict=True)) for pair in pairs]
    options = dict(report_to=[], use_cpu=True, bf16=False, max_length=None)
    args = trl.DPOConfig(str(tmp_path / "o"), beta=0.3, loss_type=[kind], **options)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())  # required by the trainer, but not used for the loss
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")
    text = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = trl.DPOTrainer(
        models["policy"].eval(), models["reference"].eval(), args, train_dataset=text, processing_class=tokenizer
    )
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    theirs_loss = trainer.compute_loss(trainer.model.eval(), DataCollatorForPreference(0).torch_call(rows))

    x, y, documents = (torch.full((2, 12), fill) for fill in (0, -1, 2))
    for row, (prompt, *answers) in enumerate(pairs):
        start = 0
        for number, answer in enumerate(answers):
            ids, end = torch.tensor(prompt + answer), start + len(prompt) + len(answer) - 1
            x[row, start:end], y[row, end - len(answer) : end] = ids[:-1], torch.tensor(answer)
            documents[row, start:end] = number
            start = end
    logp, reference = (
        ours[name](x, per_token=losses.log_probability, per_token_args=(y,), documents=documents)[1][..., 0]
        for name in models
    )
    own = losses.preference_loss(logp, reference, y, documents, {"sigmoid": "dpo"}.get(kind, kind), 0.3)[0]
    assert own.sum().item() / 2 == pytest.approx(theirs_loss.item(), rel=1e-5)


def test_distillation_loss_matches_float64_divergence(monkeypatch):
    """Compare values and gradients with float64 computations.

    The teacher has another width than the student, and a padded vocabulary.
    """
    monkeypatch.setattr(model_module, "LOGITS_AT_ONCE", 257 * 7)
    student, teacher = small_model(1, block_size=24), small_model(2, block_size=24, vocab_size=320, n_embd=32)
    for p in (*student.parameters(), *teacher.parameters()):
        p.data.mul_(5)
    x, y, documents = pair_batch()
    hidden = teacher(x, per_token=losses.hidden, documents=documents)[1].detach()
    per_token = functools.partial(losses.divergence, teacher, 257, 1.5)
    values = student(x, per_token=per_token, per_token_args=(hidden, y), documents=documents)[1]
    values[..., 0].sum().backward()
    kept = y != -1
    logits = student(x, y, documents=documents)[0].double()
    p = (teacher(x, x, documents=documents)[0].double()[..., :257] / 1.5).softmax(-1).detach()
    q = (logits / 1.5).softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    assert torch.allclose(values[..., 0][kept].double(), kl[kept], atol=1e-6) and not values[~kept].any()
    nats = -logits.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None])[..., 0]
    assert torch.allclose(values[..., 1][kept].double(), nats[kept], rtol=1e-5)
    gradient = student.lm_head.weight.grad.clone()
    student.zero_grad()
    kl[kept].sum().backward()
    assert torch.allclose(gradient, student.lm_head.weight.grad, atol=1e-5)


def test_log_probabilities_and_entropies_match_float64_at_a_temperature():
    """Vocabulary padding is never sampled, so neither value includes it."""
    m = small_model(3, block_size=24, vocab_size=320)
    x, y, _ = pair_batch()
    values = m(x, per_token=functools.partial(losses.log_probability_and_entropy, 257, 0.7), per_token_args=(y,))[1]
    p = (m(x, x)[0][..., :257].double() / 0.7).softmax(-1)
    for row, column in (y != -1).nonzero().tolist():
        logp, entropy = values[row, column].tolist()
        assert logp == pytest.approx(p[row, column, y[row, column]].log().item(), rel=1e-5)
        assert entropy == pytest.approx(-(p[row, column] * p[row, column].log()).sum().item(), rel=1e-5)
    assert not values[y == -1].any()


def test_grpo_advantages_and_loss_match_hand_computation():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
    plain = losses.advantages(rewards, std=False)
    assert plain.tolist() == [[0.0, -1.0, -1.0, 2.0], [0.0] * 4]
    scaled = losses.advantages(rewards, std=True)
    assert scaled[0].tolist() == pytest.approx([0, -1 / 2**0.5, -1 / 2**0.5, 2 / 2**0.5], rel=1e-3)
    assert not scaled[1].any()
    logp = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    reference, advantage = torch.tensor([[-1.5, -1.0]]), torch.tensor([[0.5, -2.0]])
    loss = losses.grpo_loss(logp, advantage, reference, kl_beta=0.1)
    expected = [0.5 + 0.1 * (math.exp(-0.5) + 0.5 - 1), -4 + 0.1 * (math.exp(1) - 1 - 1)]
    assert loss[0].tolist() == pytest.approx(expected)
    losses.grpo_loss(logp, advantage).sum().backward()
    assert logp.grad.tolist() == [[-0.5, 2.0]]
