"""Train part of a model: low-rank adapters on frozen weights (LoRA), or a subset of its parameters.

LoRA, https://arxiv.org/abs/2106.09685: a weight W (out, in) is frozen, and a low-rank update is learned: the layer uses
W + alpha / rank * B @ A, with A (rank, in) and B (out, rank). B starts at zero, so training starts from the base model.
Optimizer state and checkpoints hold only A and B. After training they are merged into W, so inference is as fast as
with the base.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acorn import UserError
from model import GPT


class LoRALinear(nn.Module):
    """A Linear layer with an adapter. Its frozen weight and bias keep their parameter names."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(self.weight.new_zeros(rank, linear.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(linear.out_features, rank))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        if not self.scale:  # see `adapters_off`
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def choose_targets(model: GPT, pattern: str) -> list[str]:
    """Return the names of the Linear layers in the blocks that match the regular expression `pattern`. Raises UserError
    if none matches."""
    return matching("lora_targets", pattern, linear_layers(model))


def linear_layers(model: GPT) -> list[str]:
    """Return the names of the Linear layers in the blocks."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".h." in name]


def add_adapters(model: GPT, names: Iterable[str], rank: int, alpha: float) -> None:
    """Freeze the model, and add an adapter of zeros to each of the named Linear layers."""
    model.requires_grad_(False)
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear), name
        model.set_submodule(name, LoRALinear(layer, rank, alpha))


def initial_adapters(model: GPT, seed: int) -> dict[str, Tensor]:
    """Return the initial values of the adapters by name: A is normal with standard deviation 1 / sqrt(in), drawn with
    `seed`; B is zero."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=random) / p.size(1) ** 0.5 if name.endswith("A") else torch.zeros(p.shape)
        for name, p in adapters(model).items()
    }


def adapters(model: GPT) -> dict[str, Tensor]:
    """Return the parameters of the adapters by name."""
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


@contextlib.contextmanager
def adapters_off(model: GPT):
    """Context manager in which the model computes what its base computes."""
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    scales = [layer.scale for layer in layers]
    try:
        for layer in layers:
            layer.scale = 0.0
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scale = scale


def fit_adapters(model: GPT, tensors: dict, rank: int, alpha: float, source: str) -> None:
    """Add adapters to a model that match `tensors`, the saved parameters of adapters. Raises UserError if `tensors` do
    not fit the model."""
    names = {name.rpartition(".lora_")[0] for name in tensors}
    ranks_fit = all(rank in t.shape for t in tensors.values())  # checked before memory is allocated
    if not names or not ranks_fit or not names <= set(linear_layers(model)):
        raise UserError(
            f"{source} holds adapters of a rank other than {rank}, or for layers that this model does not have. Use "
            "another checkpoint."
        )
    add_adapters(model, sorted(names), rank, alpha)
    parameters = adapters(model)
    shapes = {name: list(t.shape) for name, t in tensors.items()}
    for name in sorted(parameters.keys() | shapes.keys()):
        expected = list(parameters[name].shape) if name in parameters else None
        if shapes.get(name) != expected:
            raise UserError(
                f"{source} does not hold adapters for this model: {name} has shape {shapes.get(name)}, not {expected}. "
                "Use another checkpoint."
            )


def freeze(model: GPT, pattern: str) -> None:
    """Freeze the parameters whose names match the regular expression `pattern`. Raises UserError if none or all
    match."""
    parameters = dict(model.named_parameters())
    for name in matching("freeze", pattern, list(parameters)):
        parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise UserError(f"freeze={pattern!r} freezes all parameters, so nothing is left to train. Match fewer names.")


def matching(setting: str, pattern: str, names: list[str]) -> list[str]:
    """Return the names in which the regular expression `pattern`, the value of `setting`, is found. Raises UserError if
    it is invalid or found in none."""
    try:
        matches = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise UserError(f"{setting}={pattern!r} is not a valid regular expression ({error}). Correct it.") from error
    if not matches:
        raise UserError(f"{setting}={pattern!r} matches no name. Names are such as {names[0]} and {names[-1]}.")
    return matches


def fingerprint(model: GPT, values: dict) -> str:
    """Return the SHA-256 (hex) of a model's parameters. It identifies the base of adapters, independent of its path and
    file format."""
    digest = hashlib.sha256()
    for name, _ in sorted(model.named_parameters()):
        p = values[name][...]
        digest.update(f"{name} {list(p.shape)}\n".encode())
        digest.update(p.detach().cpu().float().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
