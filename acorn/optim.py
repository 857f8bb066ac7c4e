"""Optimizers, AdamW and Muon, and learning-rate schedules."""

import math
from collections import defaultdict

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from acorn import UserError
from model import GPT


def make_optimizers(
    model: GPT,
    optimizer: str,
    learning_rate: float,
    muon_lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    device_type: str,
) -> list[torch.optim.Optimizer]:
    """The optimizers that update the model together: AdamW for everything ("adamw"), or Muon for the matrices inside
    the blocks and AdamW for embeddings, head and norms ("muon"). Each group's "peak_lr" is what a schedule scales."""
    if optimizer == "adamw":
        optimizers = [model.configure_optimizers(weight_decay, learning_rate, betas, device_type)]
    else:
        matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2 and p.requires_grad]
        inside = set(matrices)
        others = [p for p in model.parameters() if p not in inside and p.requires_grad]
        fused = device_type in ("cuda", "cpu", "mps")
        optimizers = []
        if others:
            optimizers.append(torch.optim.AdamW(others, learning_rate, betas, weight_decay=0.0, fused=fused))
        if matrices:  # either may be frozen
            optimizers.append(Muon(matrices, muon_lr, weight_decay=weight_decay))
    for group in (group for each in optimizers for group in each.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers


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
        kinds = ("momentum",) if isinstance(optimizer, Muon) else ("step", "exp_avg", "exp_avg_sq")
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
    same shape are stacked and orthogonalized together, which is what makes it cheap for small models.
    """

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            same_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    same_shape[p.shape].append(p)
            for (rows, columns), params in same_shape.items():
                buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
                grads = [p.grad for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(grads, buffers, group["momentum"])
                updates = orthogonalize(torch.stack(nesterov)).to(params[0].dtype)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(updates.unbind()), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def own_rows(p: Tensor) -> slice:
    """The rows (dimension 0) of a parameter that this process has: of a sharded one, its share, the last ones less."""
    if not isinstance(p, DTensor):
        return slice(0, len(p))
    share = math.ceil(len(p) / p.device_mesh.size())
    first = min(share * p.device_mesh.get_local_rank(), len(p))
    return slice(first, min(first + share, len(p)))


def orthogonalize(x: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrix to each of x (N, rows, columns), roughly: singular values end up around 1, from
    0.7 to 1.2. A quintic Newton-Schulz iteration in bfloat16, with the coefficients of Muon's authors."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x.bfloat16()
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
    last `cooldown_frac` of lr_decay_iters; constant does not fall.
    """
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if schedule == "constant":
        return learning_rate
    if step >= lr_decay_iters:
        return min_lr
    start = warmup_iters if schedule != "wsd" else max(warmup_iters, (1 - cooldown_frac) * lr_decay_iters)
    if step <= start:
        return learning_rate
    progress = (step - start) / (lr_decay_iters - start)  # 0 to 1
    left = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return min_lr + left * (learning_rate - min_lr)
