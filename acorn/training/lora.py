"""Training a part of a model: low-rank adapters beside frozen weights (LoRA), or some of its own parameters.

LoRA, https://arxiv.org/abs/2106.09685: a weight W (out, in) stays as it is, and what is learned is added to it as the
product of two narrow matrices, W + alpha / rank * B @ A, with A (rank, in) and B (out, rank). B starts at zero, so that
the model starts as its base. The optimizer then remembers only A and B, a checkpoint holds only them, and once training
is over they are merged into W, so that the model is as fast as its base.
"""

import hashlib
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acorn import UserError
from model import GPT


class LoRALinear(nn.Module):
    """A Linear layer, its parameters under the names that they had, with an adapter beside its frozen weight."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(self.weight.new_zeros(rank, linear.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(linear.out_features, rank))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def choose_targets(model: GPT, pattern: str) -> list[str]:
    """The names of the Linear layers in the blocks in which the regular expression `pattern` is found. Raises UserError
    where it is found in none."""
    return matching("lora_targets", pattern, linear_layers(model))


def linear_layers(model: GPT) -> list[str]:
    """The names of the Linear layers in the blocks."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".h." in name]


def add_adapters(model: GPT, names: Iterable[str], rank: int, alpha: float) -> None:
    """Freeze the model, and give an adapter that does nothing to each Linear layer of these names."""
    model.requires_grad_(False)
    for name in names:
        model.set_submodule(name, LoRALinear(model.get_submodule(name), rank, alpha))


def initial(model: GPT, seed: int) -> dict[str, Tensor]:
    """What adapters start from, by name: A normal with a standard deviation of 1 / sqrt(in), drawn from `seed`, and B
    at zero."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=random) / p.size(1) ** 0.5 if name.endswith("A") else torch.zeros(p.shape)
        for name, p in adapters(model).items()
    }


def adapters(model: GPT) -> dict[str, Tensor]:
    """The parameters of the adapters, by name."""
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def fit_adapters(model: GPT, tensors: dict, rank: int, alpha: float, source: str) -> None:
    """Give a model adapters for what `adapters` took from one of its kind. Raises UserError where `tensors` do not
    fit."""
    names = {name.rpartition(".lora_")[0] for name in tensors}
    ranks_fit = all(rank in t.shape for t in tensors.values())  # known before memory is taken for them
    if not names or not ranks_fit or not names <= set(linear_layers(model)):
        raise UserError(f"{source} holds adapters of another rank, or for layers that this model does not have")
    add_adapters(model, sorted(names), rank, alpha)
    own = adapters(model)
    shapes = {name: list(t.shape) for name, t in tensors.items()}
    for name in sorted(own.keys() | shapes.keys()):
        expected = list(own[name].shape) if name in own else None
        if shapes.get(name) != expected:
            raise UserError(f"{source} holds no adapters for this model: {name} is {shapes.get(name)}, not {expected}")


class Merged:
    """A weight with the product of an adapter's matrices added to it; nothing is read until rows are asked for."""

    def __init__(self, weight, a, b, scale: float):
        self.weight, self.a, self.b, self.scale = weight, a, b, scale

    def __getitem__(self, rows) -> Tensor:
        return self.weight[rows].float() + self.scale * self.b[rows] @ self.a[...]


def merged(values: dict, scale: float) -> dict:
    """The parameters of the plain model that does what one with adapters does, whose parameters are `values`."""
    result = {}
    for name, value in values.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A" in values:
            result[name] = Merged(value, values[f"{layer}.lora_A"], values[f"{layer}.lora_B"], scale)
        elif ".lora_" not in name:
            result[name] = value
    return result


def freeze(model: GPT, pattern: str) -> None:
    """Keep the parameters in whose names the regular expression `pattern` is found as they are. Raises UserError where
    that is none, or all."""
    parameters = dict(model.named_parameters())
    for name in matching("freeze", pattern, list(parameters)):
        parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise UserError(f"freeze = {pattern!r} freezes all parameters, so nothing is left to train")


def matching(setting: str, pattern: str, names: list[str]) -> list[str]:
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise UserError(f"{setting} = {pattern!r} is no regular expression ({error})") from error
    if not found:
        raise UserError(f"{setting} = {pattern!r} is found in no name here; they are like {names[0]} and {names[-1]}")
    return found


def fingerprint(model: GPT, values: dict) -> str:
    """SHA-256 (hex) of a model's parameters, by which adapters know their base wherever it lies, in whatever form."""
    digest = hashlib.sha256()
    for name, _ in sorted(model.named_parameters()):
        p = values[name][...]
        digest.update(f"{name} {list(p.shape)}\n".encode())
        digest.update(p.detach().cpu().float().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
