"""Optimizers (AdamW and Muon) and learning-rate schedules."""

import inspect
import math
from collections import defaultdict
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from acorn import UserError
from acorn.distributed.sharding import is_sharded, local
from model import GATED, GPT, Block

if TYPE_CHECKING:
    from train import TrainSettings


def make_optimizers(
    model: GPT,
    optimizer: str,
    learning_rate: float,
    muon_lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    device_type: str,
    muon_dtype: torch.dtype = torch.bfloat16,
    muon_split: bool = False,
    muon_momentum: float = 0.95,
) -> list[torch.optim.Optimizer]:
    """Return the optimizers that together update the model.

    "adamw" is AdamW for everything. "muon" is Muon for the matrices in the blocks, and AdamW for embeddings, head and
    norms; for `muon_split` see `muon_groups`. The schedule scales each parameter group's "peak_lr". Raises UserError
    for another name.
    """
    optimizers: list[torch.optim.Optimizer] = []
    if optimizer == "adamw":
        optimizers = [model.configure_optimizers(weight_decay, learning_rate, betas, device_type, kind=AdamW)]
    elif optimizer == "muon":
        groups = muon_groups(model, muon_split)
        in_blocks = {p for group in groups for p in group["params"]}
        remaining = [p for p in model.parameters() if p not in in_blocks and p.requires_grad]
        if remaining:
            optimizers.append(model.configure_optimizers(0.0, learning_rate, betas, device_type, remaining, AdamW))
        if groups:  # either list may be empty, because parameters can be frozen
            optimizers.append(Muon(groups, muon_lr, muon_momentum, weight_decay, muon_dtype))
    else:
        raise UserError(f"optimizer={optimizer!r} has no branch in make_optimizers (acorn/training/optim.py). Add one.")
    for each in optimizers:
        moment_kinds(each)  # refuses an optimizer that checkpoints cannot store now, not at the first save
    for group in (group for each in optimizers for group in each.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers


def muon_groups(model: GPT, split: bool) -> list[dict]:
    """Return Muon's parameter groups: the matrices in the blocks.

    With `split`, matrices that acorn stores as one are orthogonalized separately: queries, keys and values, and the
    gates and values of a gated MLP.
    """
    groups: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for block in model.transformer.h:
        parts: dict[str, tuple[int, ...]] = {}
        if split:
            assert isinstance(block, Block)  # for mypy
            parts["attn.c_attn.weight"] = tuple(block.attn.split)
        if split and model.config.mlp in GATED:
            parts["mlp.c_fc.weight"] = (model.config.n_hidden, model.config.n_hidden)
        for name, p in block.named_parameters():
            if p.dim() == 2 and p.requires_grad:
                groups[parts.get(name, ())].append(p)
    return [{"params": params, "parts": parts} for parts, params in groups.items()]


def moment_kinds(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Return the keys of a parameter's state in this optimizer. Raises UserError for an unknown optimizer class."""
    if isinstance(optimizer, torch.optim.AdamW):
        return ("step", "exp_avg", "exp_avg_sq")
    if isinstance(optimizer, Muon):
        return ("momentum",)
    raise UserError(
        f"{type(optimizer).__name__} has no branch in moment_kinds (acorn/training/optim.py). Add its state keys."
    )


# Where the host decides whether to step: reading a CPU tensor is free, and MPS's fused AdamW ignores found_inf.
HOST_DECIDED_DEVICES = ("cpu", "mps")


def step_if_finite(optimizers: list[torch.optim.Optimizer], grad_norm: Tensor, skipped: Tensor) -> None:
    """Step the optimizers unless the norm of the gradient is non-finite.

    On a GPU, the decision is made on the device, so that the host does not wait. `skipped` (2,) counts the skipped
    updates: consecutive ones up to now, and the total.
    """
    bad = ~grad_norm.isfinite()
    skipped += bad
    skipped[0].mul_(bad)
    found_inf = None if bad.device.type in HOST_DECIDED_DEVICES else bad.float()
    if found_inf is None and bad:
        return
    for optimizer in optimizers:
        # GradScaler's protocol for fused optimizers: with 1 the step is a no-op
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # torch's stubs lack this attribute
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]  # as above


class UncompiledOptimizer(torch.optim.Optimizer):
    """A base class whose methods do not import torch's compiler, which takes a second at the start of a run.

    torch decorates them for programs that compile their optimizer.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class AdamW(UncompiledOptimizer, torch.optim.AdamW):
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Muon(UncompiledOptimizer):
    """Momentum with orthogonalized updates, for matrices: https://kellerjordan.github.io/posts/muon/

    The update moves all directions of a weight equally far, even those with a small gradient. Matrices of the same
    shape are stacked and orthogonalized together, which keeps it cheap for small models. The ranks divide the matrices
    among them. If a matrix is sharded, each rank stores the momentum of its own rows. A parameter group may have
    "parts", the numbers of rows of the parts of its matrices that are orthogonalized separately.

    `dtype` is the dtype of the orthogonalization. bfloat16 is precise enough for training, but amplifies rounding
    differences, such as those from the order in which ranks sum gradients. As with torch's fused optimizers, `step` is
    a no-op if `found_inf` is 1.
    """

    def __init__(
        self,
        params,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, parts=()))
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # torch's optional closure is not supported
        found_inf = getattr(self, "found_inf", None)
        skip = None if found_inf is None else found_inf > 0  # on the device
        for group in self.param_groups:
            same_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    same_shape[p.shape].append(p)
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
            for (rows, columns), params in same_shape.items():
                shards = [local(p) for p in params]
                grads = [local(p.grad) for p in params]
                buffers = [local(self.state[p]["momentum"]) for p in params]
                decay = 1 - group["lr"] * group["weight_decay"]
                if skip is not None:
                    grads = [torch.where(skip, *pair) for pair in zip(buffers, grads, strict=True)]  # keeps momentum
                    decay = torch.where(skip, 1.0, decay)
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                nesterov = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))
                nesterov = nesterov.to(self.dtype)  # (N, own rows, columns)
                if is_sharded(params[0]):
                    updates = orthogonalize_sharded(nesterov, rows, group["parts"])
                else:
                    updates = orthogonalize_divided(nesterov, group["parts"])
                if skip is not None:
                    updates.masked_fill_(skip, 0)
                torch._foreach_mul_(shards, decay)
                changes = updates.to(shards[0].dtype).unbind()
                scale = 1.0 if group["parts"] else size_factor(rows, columns)  # parts are scaled already
                torch._foreach_add_(shards, changes, alpha=-group["lr"] * scale)


def size_factor(rows: int, columns: int) -> float:
    """Return the factor by which Muon multiplies the update of a matrix, so that one learning rate fits all shapes."""
    return max(1, rows / columns) ** 0.5


def orthogonalize_divided(x: Tensor, parts: tuple[int, ...]) -> Tensor:
    """Orthogonalize x (N, rows, columns), equal on all ranks. Each rank computes its share of the N matrices."""
    n, world_size = len(x), dist.get_world_size() if dist.is_initialized() else 1
    if world_size == 1:
        return orthogonalize_parts(x, parts)
    share = math.ceil(n / world_size)
    first = min(share * dist.get_rank(), n)
    orthogonal = pad(orthogonalize_parts(x[first : first + share], parts), 0, share)
    result = orthogonal.new_empty(world_size * share, *x.shape[1:])
    dist.all_gather_into_tensor(result, orthogonal)
    return result[:n]


def orthogonalize_sharded(x: Tensor, rows: int, parts: tuple[int, ...]) -> Tensor:
    """Orthogonalize N sharded matrices with `rows` rows: x (N, own rows, columns) -> the same shape.

    Each matrix is gathered on one rank, orthogonalized there, and scattered back, so no rank holds more elements than
    before (up to padding).
    """
    n, own_rows, columns = x.shape
    world_size = dist.get_world_size()
    share, chunk = math.ceil(n / world_size), math.ceil(rows / world_size)  # most matrices and most rows per rank
    x = pad(pad(x, 0, world_size * share), 1, chunk)
    pieces = exchange(x.view(world_size, share, chunk, columns))  # this rank's matrices, the rows of each rank
    matrices = pieces.transpose(0, 1).reshape(share, world_size * chunk, columns)[:, :rows]
    matrices = pad(orthogonalize_parts(matrices, parts), 1, world_size * chunk)
    pieces = exchange(matrices.view(share, world_size, chunk, columns).transpose(0, 1))  # rows of all matrices
    return pieces.reshape(world_size * share, chunk, columns)[:n, :own_rows]


def exchange(x: Tensor) -> Tensor:
    """Send x[i] of x (world_size, ...) to rank i; return the same shape, where [i] came from rank i."""
    x = x.contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x)
    return received


def pad(x: Tensor, dim: int, size: int) -> Tensor:
    """Pad x with zeros at the end of dimension `dim`, to `size` elements."""
    shape = list(x.shape)
    shape[dim] = size - x.size(dim)
    return torch.cat((x, x.new_zeros(shape)), dim) if shape[dim] else x


def orthogonalize_parts(x: Tensor, parts: tuple[int, ...]) -> Tensor:
    """Orthogonalize x (N, rows, columns), or separately each of `parts`, numbers of rows, times its `size_factor`."""
    if not parts:
        return orthogonalize(x)
    pieces = list(x.split(parts, dim=1))
    for rows in set(parts):  # parts of the same shape together
        same = [i for i, n in enumerate(parts) if n == rows]
        orthogonal = orthogonalize(torch.cat([pieces[i] for i in same])) * size_factor(rows, x.size(2))
        for i, piece in zip(same, orthogonal.chunk(len(same)), strict=True):
            pieces[i] = piece
    return torch.cat(pieces, dim=1)


def orthogonalize(x: Tensor, steps: int = 5) -> Tensor:
    """Approximate the nearest orthogonal matrix to each matrix of x (N, rows, columns).

    A quintic Newton-Schulz iteration, X <- aX + b(XXᵀ)X + c(XXᵀ)²X, with the coefficients of Muon's authors. The
    singular values of the result are between about 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.size(1) > x.size(2)
    if tall:  # makes x @ x.mT the smaller product
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    wide = x.size(2) >= 2 * x.size(1)
    if wide and x.dtype == torch.float32 and x.device.type == "cpu":
        while steps > 0:
            n = min(steps, 3)
            x = gram_polynomial(x, (a, b, c), n) @ x
            steps -= n
    else:
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def gram_polynomial(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Return the matrices (N, rows, rows) by which `steps` iterations multiply x (N, rows, columns).

    An iteration multiplies x by P = aI + bG + cG², and therefore G = xxᵀ by P from both sides. Only the first G needs
    x. For four times as many columns as rows, three and two iterations take 0.67 of the usual operations.

    Rounding errors of G grow by up to a² in each iteration, so more than three would be less precise than the usual
    form, and bfloat16 or TF32 is not enough.
    """
    a, b, c = coefficients

    def factor_of(gram: Tensor) -> Tensor:  # P
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        return factor

    gram = x @ x.mT
    factor = product = factor_of(gram)
    for _ in range(steps - 1):
        gram = factor @ gram @ factor
        factor = factor_of(gram)
        product = product @ factor
    return product


def learning_rate_at(
    step: int,
    schedule: str,
    learning_rate: float,
    min_lr: float,
    warmup_iters: int,
    lr_decay_iters: int,
    cooldown_frac: float = 0.4,
) -> float:
    """Return the learning rate of update `step`, counted from 0.

    The rate rises linearly over `warmup_iters` updates, starting above 0. It then follows `schedule` down to `min_lr`
    at `lr_decay_iters`, and stays there. "cosine" and "linear" fall from the end of the warmup. "wsd" (warmup, stable,
    decay) holds `learning_rate`, and falls linearly over the last `cooldown_frac` of lr_decay_iters. "constant" does
    not fall. Raises UserError for another schedule.
    """
    start = max(warmup_iters, (1 - cooldown_frac) * lr_decay_iters) if schedule == "wsd" else warmup_iters
    if step >= lr_decay_iters:
        progress = 1.0
    else:  # from 0 to 1
        progress = (step - start) / (lr_decay_iters - start) if step > start else 0.0
    if schedule == "cosine":
        fraction = 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule in ("linear", "wsd"):
        fraction = 1 - progress
    elif schedule == "constant":
        fraction = 1.0
    else:
        raise UserError(
            f"lr_schedule={schedule!r} has no branch in learning_rate_at (acorn/training/optim.py). Add one."
        )
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    return learning_rate if fraction == 1 else min_lr + fraction * (learning_rate - min_lr)


def scheduled_rate(s: "TrainSettings", step: int) -> float:
    """Return the learning rate of update `step` under the settings of a run."""
    if not s.decay_lr:
        return s.learning_rate
    horizon = s.lr_decay_iters or s.max_iters
    return learning_rate_at(step, s.lr_schedule, s.learning_rate, s.min_lr, s.warmup_iters, horizon, s.cooldown_frac)


def set_learning_rates(s: "TrainSettings", optimizers: list[torch.optim.Optimizer], step: int) -> float:
    """Set the learning rates of update `step`. Returns the scheduled `learning_rate`; all groups scale with it."""
    lr = scheduled_rate(s, step)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["peak_lr"] * lr / s.learning_rate if s.learning_rate else 0.0
    return lr


def rate_change(saved: "TrainSettings", current: "TrainSettings", step: int) -> str | None:
    """Describe how the learning rate of update `step` changes between a run's settings and those for resuming it.

    Returns None if it does not change.
    """
    old, new = scheduled_rate(saved, step), scheduled_rate(current, step)
    if math.isclose(old, new, rel_tol=1e-3):
        return None
    jump = f"the learning rate at step {step} changes from {old:.2e} to {new:.2e}"
    if saved.lr_decay_iters or current.lr_decay_iters or saved.max_iters == current.max_iters:
        return jump
    return (
        f"max_iters={current.max_iters} instead of {saved.max_iters} stretches the schedule (lr_decay_iters=0): "
        f"{jump}. Use --lr_decay_iters={saved.max_iters} to keep the schedule."
    )
