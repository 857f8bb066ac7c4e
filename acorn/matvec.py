"""Linear layers for generation: one row times a matrix, as fast as memory delivers the matrix.

Decoding one token reads every weight once and does little with it, so its speed is that of reading. A product with a
single row leaves half of a CPU's memory bandwidth unused in torch's own kernels; a compiled multiply-and-sum over the
rows of the matrix does not, and reads bfloat16 or int8 weights as they are, in a half or a quarter of the bytes.
"""

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import GPT


class DecodingLinear(nn.Module):
    """A Linear layer whose weight is kept in float32, bfloat16 or int8, with a fast way for a single row.

    int8: each output channel has its own scale, the largest of its weights / 127 (symmetric, weights only).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, quantize: str, matvec):
        super().__init__()
        self.matvec = matvec
        scale = None
        if quantize == "int8":
            scale = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127  # (rows,)
            weight = (weight.float() / scale[:, None]).round().to(torch.int8)
        self.register_buffer("weight", weight.detach().contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == x.size(-1):  # one row
            y = self.matvec(self.weight, x.view(-1).float())
            y = y if self.scale is None else y * self.scale
            y = y if self.bias is None else y + self.bias
            return y.to(x.dtype).view(*x.shape[:-1], -1)
        if self.scale is not None:
            y = F.linear(x.float(), self.weight.float()) * self.scale
            return (y if self.bias is None else y + self.bias).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return F.linear(x.to(self.weight.dtype), self.weight, bias).to(x.dtype)


def prepare_for_decoding(model: GPT, quantize: str = "none", compile: bool = True) -> GPT:
    """The model with its Linear layers, head included, replaced by DecodingLinear; it can generate, but not train.

    `quantize` is "none" (weights stay in the model's dtype) or "int8". `compile` builds the fast product for single
    rows, which takes some seconds; without, or where that fails, torch's own is used.
    """
    matvec = plain
    if compile:
        try:
            matvec = torch.compile(multiply_and_sum, dynamic=True)
            matvec(torch.ones(3, 2), torch.ones(2))
        except Exception as error:
            reason = str(error).strip().split("\n")[0][:200]
            print(
                f"warning: torch.compile failed ({type(error).__name__}: {reason}); going on without", file=sys.stderr
            )
            matvec = plain
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, DecodingLinear(child.weight, child.bias, quantize, matvec))
    return model


def multiply_and_sum(weight: Tensor, x: Tensor) -> Tensor:
    """weight (rows, columns) times x (columns,) in float32, written so that the compiler reads each weight once."""
    return (weight.float() * x).sum(-1)


def pays_back(model: GPT, n_tokens: int) -> bool:
    """Whether compiling, some five seconds, gains that much over `n_tokens`: float32 weights are then read at 25
    instead of 12 GB/s, as measured on two cores by benchmarks/decode.py."""
    n_bytes = 4 * model.num_params(non_embedding=True) * n_tokens
    return n_bytes / 12e9 - n_bytes / 25e9 > 5


def plain(weight: Tensor, x: Tensor) -> Tensor:
    return weight.float() @ x
