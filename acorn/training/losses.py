"""The losses of the objectives, as functions of tensors. docs/preferences.md explains them.

Shapes: B rows of T tokens, V tokens in the vocabulary, P pairs in a row. Losses are sums; the caller divides them by
the number of pairs or targets on all ranks.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from acorn import UserError
from model import GPT, token_loss

# ---------------------------------------------------------------------------------------------------------------------
# Functions for `GPT.in_chunks`: they get some n tokens at a time


def log_probability(model: GPT, x: Tensor, y: Tensor) -> Tensor:
    """Return the log-probabilities (n, 1) in nats of the targets y (n,) after x (n, C); 0 if a target is masked."""
    return -token_loss(model, x, y)


def log_probability_and_entropy(n_vocab: int, temperature: float, model: GPT, x: Tensor, y: Tensor) -> Tensor:
    """Return the log-probability of each target and the entropy of its distribution in nats: (n, 2); 0 if masked.

    Both are those of sampling: over the first `n_vocab` ids, at the `temperature`."""
    logp = (model.logits(x)[:, :n_vocab].float() / temperature).log_softmax(-1)
    values = torch.stack((logp.gather(1, y.clamp(min=0)[:, None])[:, 0], -(logp.exp() * logp).sum(1)), dim=1)
    return values * (y != -1)[:, None]


def hidden(model: GPT, x: Tensor) -> Tensor:
    """Return x (n, C) itself, the input of the head."""
    return x


def divergence(
    teacher: GPT, n_vocab: int, temperature: float, model: GPT, x: Tensor, hidden: Tensor, y: Tensor
) -> Tensor:
    """Return, for n tokens, KL(teacher || model) and the token loss, both in nats: (n, 2); 0 if masked.

    Distillation, https://arxiv.org/abs/1503.02531: the `temperature` softens both distributions, which are those over
    the first `n_vocab` ids. `hidden` (n, C of the teacher) is the input of the teacher's head.
    """
    logits = model.logits(x).float()  # (n, V)
    student = (logits[:, :n_vocab] / temperature).log_softmax(-1)
    with torch.no_grad():
        target = (teacher.logits(hidden)[:, :n_vocab].float() / temperature).log_softmax(-1)
    kl = (target.exp() * (target - student)).sum(1)
    nats = F.cross_entropy(logits, y, ignore_index=-1, reduction="none")
    return torch.stack((kl * (y != -1), nats), dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Preferences


def sums_of_pairs(values: Tensor, documents: Tensor) -> Tensor:
    """Return the sums of values (B, T) over documents 2p and 2p + 1 of each row: (B, P, 2), with P = ceil(T / 2)."""
    B, T = documents.shape
    return values.new_zeros(B, T + T % 2).scatter_add(1, documents, values).view(B, -1, 2)


def preference_loss(
    logp: Tensor,
    reference: Tensor | None,
    y: Tensor,
    documents: Tensor,
    kind: str,
    beta: float,
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of each pair (B, P), the implicit rewards of its two answers (B, P, 2), and whether there is such
    a pair (B, P).

    `logp` and `reference` (B, T) are the log-probabilities of the targets y under the model and under the reference,
    which is None for "simpo".
    Document 2p of a row holds the chosen answer, document 2p + 1 the rejected one. `kind` is "dpo", "ipo" or "simpo".
    IPO uses means over an answer's tokens, as its authors advise for answers of different lengths.
    """
    lengths = sums_of_pairs((y != -1).float(), documents)  # (B, P, 2)
    is_pair = (lengths > 0).all(-1)
    scores = sums_of_pairs(logp if reference is None else logp - reference, documents)
    if kind != "dpo":
        scores = scores / lengths.clamp(min=1)
    chosen, rejected = scores.unbind(-1)
    if kind == "dpo":
        loss = dpo_loss(chosen, rejected, beta, label_smoothing)
    elif kind == "ipo":
        loss = ipo_loss(chosen, rejected, beta)
    elif kind == "simpo":
        loss = simpo_loss(chosen, rejected, beta, gamma)
    else:
        raise UserError(
            f"preference_loss={kind!r} has no branch in preference_loss (acorn/training/losses.py). Add one."
        )
    return torch.where(is_pair, loss, 0), beta * scores.detach(), is_pair


def dpo_loss(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Direct preference optimization, https://arxiv.org/abs/2305.18290, equation 7.

    `chosen` and `rejected` are log(policy / reference) of the answers. `label_smoothing` is the assumed probability
    that a label is wrong (conservative DPO, https://ericmitchell.ai/cdpo.pdf).
    """
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def ipo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Identity preference optimization, https://arxiv.org/abs/2310.12036, equation 17; `beta` is its tau."""
    return (chosen - rejected - 1 / (2 * beta)).square()


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """Simple preference optimization, https://arxiv.org/abs/2405.14734, equation 6, which needs no reference.

    `chosen` and `rejected` are mean log-probabilities per token.
    """
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


# ---------------------------------------------------------------------------------------------------------------------
# Rewards


def advantages(rewards: Tensor, std: bool) -> Tensor:
    """Return the advantage of each completion: its reward minus the mean of its group. rewards: (groups, completions).

    With `std` it is divided by the standard deviation of the group, as in section 4.1.2 of GRPO,
    https://arxiv.org/abs/2402.03300. Then very easy and very hard questions weigh more than others, which
    https://arxiv.org/abs/2503.20783 advises against.
    """
    result = rewards - rewards.mean(1, keepdim=True)
    return result / (rewards.std(1, keepdim=True) + 1e-4) if std else result


def grpo_loss(logp: Tensor, advantage: Tensor, reference: Tensor | None = None, kl_beta: float = 0.0) -> Tensor:
    """Return the policy-gradient loss of each token of sampled completions, with the shape of the arguments (B, T).

    Each update samples with the current weights (on-policy), so the ratio to the sampling policy is 1, and clipping it
    would have no effect. With `reference`, `kl_beta` weighs an estimate of the divergence from it (equation 4 of GRPO).
    """
    loss = -advantage * logp
    if reference is not None:
        ratio = reference - logp
        loss = loss + kl_beta * (ratio.exp() - ratio - 1)
    return loss
