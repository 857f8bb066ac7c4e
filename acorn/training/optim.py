"""Optimizers, AdamW and Muon, and learning-rate schedules."""

import math
from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor

from acorn import UserError
from acorn.distributed.sharding import is_sharded, local, own_rows
from model import GPT


def make_optimizers(
    model: GPT,
    optimizer: str,
    learning_rate: float,
    muon_lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    device_type: str,
    muon_dtype: torch.dtype = torch.bfloat16,
) -> list[torch.optim.Optimizer]:
    """The optimizers that update the model together: AdamW for everything ("adamw"), or Muon for the matrices inside
    the blocks and AdamW for embeddings, head and norms ("muon"). Each group's "peak_lr" is what a schedule scales.
    Raises UserError for another name."""
    if optimizer == "adamw":
        optimizers = [model.configure_optimizers(weight_decay, learning_rate, betas, device_type)]
    elif optimizer == "muon":
        matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2 and p.requires_grad]
        inside = set(matrices)
        others = [p for p in model.parameters() if p not in inside and p.requires_grad]
        fused = device_type in ("cuda", "cpu", "mps")
        optimizers = []
        if others:
            optimizers.append(torch.optim.AdamW(others, learning_rate, betas, weight_decay=0.0, fused=fused))
        if matrices:  # either may be frozen
            optimizers.append(Muon(matrices, muon_lr, weight_decay=weight_decay, dtype=muon_dtype))
    else:
        raise UserError(f"optimizer={optimizer!r} has no branch in make_optimizers (acorn/training/optim.py); add one")
    for each in optimizers:
        moment_kinds(each)  # one that a checkpoint cannot hold is refused here, not at the first save
    for group in (group for each in optimizers for group in each.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers


def moment_kinds(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The names in the optimizer's state of each parameter. Raises UserError for an optimizer of another class."""
    if isinstance(optimizer, torch.optim.AdamW):
        return ("step", "exp_avg", "exp_avg_sq")
    if isinstance(optimizer, Muon):
        return ("momentum",)
    raise UserError(
        f"{type(optimizer).__name__} has no branch in moment_kinds (acorn/training/optim.py); add its state's names"
    )


# Where the host decides whether to step: on a CPU that is free, and the fused AdamW of MPS ignores found_inf.
HOST_DECIDES = ("cpu", "mps")


def step_if_finite(optimizers: list[torch.optim.Optimizer], grad_norm: Tensor, skipped: Tensor) -> None:
    """Step the optimizers unless the norm of the gradient is non-finite. A GPU decides that itself, so that the host
    does not wait for it. `skipped` (2,) counts the updates without a step: in a row up to now, and in all."""
    bad = ~grad_norm.isfinite()
    skipped += bad
    skipped[0].mul_(bad)
    found_inf = None if bad.device.type in HOST_DECIDES else bad.float()
    if found_inf is None and bad:
        return
    for optimizer in optimizers:
        optimizer.found_inf = found_inf  # as GradScaler tells fused optimizers; with 1 they change nothing
        optimizer.step()
        del optimizer.found_inf


def named_moments(model: GPT, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """What the optimizers remember, after the names of parameters: wte.weight.exp_avg, wte.weight.step and so on; only
    numbers of steps are numbers, all else has the parameter's shape. Nothing before the first update."""
    names = {p: name for name, p in model.named_parameters()}
    remembered = [(p, moments) for optimizer in optimizers for p, moments in optimizer.state.items()]
    return {f"{names[p]}.{kind}": value for p, moments in remembered for kind, value in moments.items()}


def load_moments(model: GPT, optimizers: list[torch.optim.Optimizer], saved: dict) -> None:
    """Give the optimizers what `named_moments` had. The values of `saved` are tensors, or what has a `shape` and gives
    its rows when indexed like one: of a sharded parameter only those of this process are asked for.

    They may come from a stranger, and a fused kernel trusts their shapes: others than the parameters', and other names
    than those of these optimizers, raise UserError.
    """
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in optimizers if saved else ():
        kinds = moment_kinds(optimizer)
        for p, kind in [(p, kind) for group in optimizer.param_groups for p in group["params"] for kind in kinds]:
            value, shape = saved.pop(f"{names[p]}.{kind}", None), () if kind == "step" else p.shape
            if value is None or value.shape != shape:
                raise UserError(OTHER_OPTIMIZER)
            if kind == "step":  # beside the parameter, as fused kernels want it
                optimizer.state[p][kind] = value[...].to(p.device, torch.float32)
            else:
                optimizer.state[p][kind] = torch.zeros_like(p)
                local(optimizer.state[p][kind]).copy_(value[own_rows(p)])
    if saved:
        raise UserError(OTHER_OPTIMIZER)


OTHER_OPTIMIZER = (
    "the saved optimizer state is of another model or optimizer; start from the weights alone with "
    "--init_from=OUT_DIR into a new --out_dir"
)


def name_moments(model: GPT, optimizers: list[torch.optim.Optimizer], saved: list[dict]) -> dict[str, Tensor]:
    """What `named_moments` would have given for the optimizers whose state_dicts `saved` are, as older checkpoints have
    them: they number the parameters. Raises UserError where they do not belong to these optimizers."""
    names, named = {p: name for name, p in model.named_parameters()}, {}
    try:
        for optimizer, state in zip(optimizers, saved, strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            order = [i for group in state["param_groups"] for i in group["params"]]
            for i, moments in state["state"].items():
                for kind, value in moments.items():
                    if not isinstance(value, Tensor) or value.layout != torch.strided:
                        raise TypeError("no tensor")
                    named[f"{names[params[order.index(i)]]}.{kind}"] = value
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(OTHER_OPTIMIZER) from error
    return named


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for matrices: https://kellerjordan.github.io/posts/muon/

    Every direction of the weight then moves equally far, also those in which the gradient is small. Matrices of the
    same shape are stacked and orthogonalized together, which is what makes it cheap for small models. Several processes
    divide the matrices among them; of sharded ones each remembers the momentum of its own rows. `dtype` is that in
    which they are orthogonalized: bfloat16 serves, but makes visible in the losses what float32 keeps in the last
    digits, such as the order in which processes sum up a gradient. Where `found_inf` is 1, as for fused optimizers of
    torch, `step` changes nothing.
    """

    def __init__(
        self,
        params,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
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
                momenta = [self.state[p]["momentum"] for p in params]
                own, grads, buffers = ([local(x) for x in xs] for xs in (params, [p.grad for p in params], momenta))
                decay = 1 - group["lr"] * group["weight_decay"]
                if skip is not None:
                    grads = [torch.where(skip, *pair) for pair in zip(buffers, grads, strict=True)]  # momentum stays
                    decay = torch.where(skip, 1.0, decay)
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                nesterov = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))
                nesterov = nesterov.to(self.dtype)  # (N, own rows, columns)
                if is_sharded(params[0]):
                    updates = orthogonalize_sharded(nesterov, rows)
                else:
                    updates = orthogonalize_divided(nesterov)
                if skip is not None:
                    updates.masked_fill_(skip, 0)
                torch._foreach_mul_(own, decay)
                updates = updates.to(own[0].dtype).unbind()
                torch._foreach_add_(own, updates, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalize_divided(x: Tensor) -> Tensor:
    """`orthogonalize` of x (N, rows, columns), which all processes have: each takes its share of the N matrices."""
    n, world_size = len(x), dist.get_world_size() if dist.is_initialized() else 1
    if world_size == 1:
        return orthogonalize(x)
    share = math.ceil(n / world_size)
    first = min(share * dist.get_rank(), n)
    mine = pad(orthogonalize(x[first : first + share]), 0, share)
    result = mine.new_empty(world_size * share, *x.shape[1:])
    dist.all_gather_into_tensor(result, mine)
    return result[:n]


def orthogonalize_sharded(x: Tensor, rows: int) -> Tensor:
    """`orthogonalize` of N matrices of so many `rows`, of which this process has its own: x (N, own rows, columns),
    and so the result. Each matrix is put together in one process only, which orthogonalizes it and hands the rows back,
    so none holds more elements than before."""
    n, own_rows, columns = x.shape
    world_size = dist.get_world_size()
    share, chunk = math.ceil(n / world_size), math.ceil(rows / world_size)  # of matrices and of rows, at the most
    x = pad(pad(x, 0, world_size * share), 1, chunk)
    pieces = exchange(x.view(world_size, share, chunk, columns))  # my share of the matrices, the rows of each process
    mine = pieces.transpose(0, 1).reshape(share, world_size * chunk, columns)[:, :rows]
    mine = pad(orthogonalize(mine), 1, world_size * chunk)
    pieces = exchange(mine.view(share, world_size, chunk, columns).transpose(0, 1))  # my rows of all the matrices
    return pieces.reshape(world_size * share, chunk, columns)[:n, :own_rows]


def exchange(x: Tensor) -> Tensor:
    """x (world_size, ...), of which x[i] goes to process i -> the same shape, of which [i] came from process i."""
    x = x.contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x)
    return received


def pad(x: Tensor, dim: int, size: int) -> Tensor:
    """x with zeros at its end, so that dimension `dim` has `size` elements."""
    shape = list(x.shape)
    shape[dim] = size - x.size(dim)
    return torch.cat((x, x.new_zeros(shape)), dim) if shape[dim] else x


def orthogonalize(x: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrix to each of x (N, rows, columns), roughly: singular values end up around 1, from
    0.7 to 1.2. A quintic Newton-Schulz iteration, with the coefficients of Muon's authors."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.size(1) > x.size(2)
    if tall:  # so that x @ x.mT is the smaller product
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def learning_rate_at(
    step: int,
    schedule: str,
    learning_rate: float,
    min_lr: float,
    warmup_iters: int,
    lr_decay_iters: int,
    cooldown_frac: float = 0.4,
) -> float:
    """The rate of update `step`, counted from 0: a linear rise over `warmup_iters` updates, none of them at 0, then by
    `schedule` down to `min_lr` at `lr_decay_iters`, and min_lr from there on.

    cosine and linear fall all the way; wsd (warmup, stable, decay) holds `learning_rate` and falls linearly over the
    last `cooldown_frac` of lr_decay_iters; constant does not fall. Raises UserError for another schedule.
    """
    start = max(warmup_iters, (1 - cooldown_frac) * lr_decay_iters) if schedule == "wsd" else warmup_iters
    if step >= lr_decay_iters:
        progress = 1.0
    else:  # from 0 to 1
        progress = (step - start) / (lr_decay_iters - start) if step > start else 0.0
    if schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule in ("linear", "wsd"):
        left = 1 - progress
    elif schedule == "constant":
        left = 1.0
    else:
        raise UserError(
            f"lr_schedule={schedule!r} has no branch in learning_rate_at (acorn/training/optim.py); add one"
        )
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    return learning_rate if left == 1 else min_lr + left * (learning_rate - min_lr)


def rate_change(before, after, step: int) -> str | None:
    """A sentence on how the learning rate of update `step` differs between two TrainSettings, those of a run and those
    that it is resumed with; None where it does not."""

    def rate(s) -> float:
        if not s.decay_lr:
            return s.learning_rate
        decay = (s.min_lr, s.warmup_iters, s.lr_decay_iters or s.max_iters, s.cooldown_frac)
        return learning_rate_at(step, s.lr_schedule, s.learning_rate, *decay)

    old, new = rate(before), rate(after)
    if math.isclose(old, new, rel_tol=1e-3):
        return None
    jump = f"the learning rate at step {step} goes from {old:.2e} to {new:.2e}"
    if before.lr_decay_iters or after.lr_decay_iters or before.max_iters == after.max_iters:
        return jump
    return (
        f"max_iters={after.max_iters} instead of {before.max_iters} stretches the schedule (lr_decay_iters=0): {jump}; "
        f"--lr_decay_iters={before.max_iters} keeps the schedule"
    )
