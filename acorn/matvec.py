"""A model made ready to generate on a CPU: one token at a time, as fast as memory delivers the weights.

Decoding one token reads every weight once and does little with it, so its speed is that of reading. Torch's own product
of a matrix with one or a few rows leaves half of a CPU's memory bandwidth unused; a compiled multiply-and-sum over the
rows of the matrix does not, and reads bfloat16 or int8 weights as they are, in a half or a quarter of the bytes. Whole
blocks are compiled, all of them as one, so that what stands between the products costs little too.
"""

import mmap
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import GPT, Block, KVCache


class DecodingLinear(nn.Module):
    """A Linear layer whose weight is kept in float32, bfloat16 or int8.

    int8: each output channel has its own scale, the largest of its weights / 127 (symmetric, weights only).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, quantize: str):
        super().__init__()
        scale = None
        if quantize == "int8":
            scale = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127  # (rows,)
            weight = in_huge_pages((weight.float() / scale[:, None]).round().to(torch.int8))
        self.register_buffer("weight", weight.detach().contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., columns) -> (..., rows), in the dtype of x."""
        rows = x.flatten(0, -2)  # (B, columns)
        if torch.compiler.is_compiling():
            # as_strided asks for x in memory; the compiler would compute what x is anew for each row of the weight
            rows = rows.float().contiguous()
            y = multiply_and_sum(self.weight, rows.as_strided(rows.shape, (rows.size(1), 1)))
        elif self.scale is None and (self.weight.dtype == torch.bfloat16 or len(rows) > 256):
            y = F.linear(rows.to(self.weight.dtype), self.weight)
        else:  # int8 becomes x's dtype in parts that stay in the cache; MKL takes few rows faster as columns
            parts = self.weight.split(max(1, 2**20 // rows.size(1)))
            y = torch.cat([part.to(x.dtype) @ rows.T for part in parts]).T.contiguous()
        y = y.view(*x.shape[:-1], -1)
        y = y if self.scale is None else y * self.scale
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype)


def multiply_and_sum(weight: Tensor, x: Tensor) -> Tensor:
    """x (B, columns) times weight (rows, columns) -> (B, rows), in float32, written so that the compiler reads each
    weight once: all sums over the columns become one loop, in which two rows of the weight share what it loads of x."""
    parts = weight.chunk(2 if len(x) > 1 else 1)
    return torch.cat([torch.stack([(part.float() * row).sum(-1) for row in x]) for part in parts], -1)


def in_huge_pages(x: Tensor) -> Tensor:
    """x in memory pages of 2 MB, where the system has them and x is that large: reading a matrix then stops less often
    for the address of the next page, of which there are usually 4 KB."""
    page = 2 << 20
    if x.nbytes < page or not hasattr(mmap, "MADV_HUGEPAGE"):  # which Linux has
        return x
    memory = mmap.mmap(-1, x.nbytes + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    pages = torch.frombuffer(memory, dtype=torch.uint8)
    start = -pages.data_ptr() % page
    return pages[start : start + x.nbytes].view(x.dtype).view(x.shape).copy_(x)


class OneTokenCompiled(nn.Module):
    """A module with `compiled`, the compiled form of its class's forward, for one token in each of `n_rows` rows. What
    has more tokens, a prompt, is bound by arithmetic, and takes the plain way."""

    def __init__(self, module: nn.Module, compiled, n_rows: int):
        super().__init__()
        self.module, self.compiled, self.n_rows = module, compiled, n_rows

    def forward(self, x: Tensor, rotary=None, cache=(), positions=None, mask=None) -> Tensor:
        rest = () if mask is None else (rotary, cache, positions, mask)  # a Linear layer takes x alone
        if x.shape[:-1] != (self.n_rows, 1):
            return self.module(x, *rest)
        for tensor in cache:
            torch._dynamo.maybe_mark_dynamic(tensor, 2)  # the size of a cache may change, and nothing else
        if mask is not None:
            torch._dynamo.maybe_mark_dynamic(mask, 3)
        return self.compiled(self.module, x, *rest)


MOST_ROWS = 8  # beyond these a CPU is bound by arithmetic, for which torch's own product is made


def prepare_for_decoding(model: GPT, quantize: str = "none", compile: bool = True, n_rows: int = 1) -> GPT:
    """The model with its Linear layers, head included, replaced by DecodingLinear; it can generate, but not train.

    `quantize` is "none" (weights stay in the model's dtype) or "int8". `compile` builds the fast way for single tokens
    of `n_rows` rows side by side, up to MOST_ROWS, which takes some seconds; where that fails, a warning says so and it
    is done without.
    """
    if quantize == "none":
        for p in model.parameters():  # a tied one stays so
            p.data = in_huge_pages(p.data)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, DecodingLinear(child.weight, child.bias, quantize))
    if not compile or n_rows > MOST_ROWS:
        return model
    blocks, head = model.transformer.h, model.lm_head
    try:
        options = {"size_asserts": False}  # checks of each tensor's shape in each call, beside those of torch.compile
        one_block, product = (torch.compile(kind.forward, options=options) for kind in (Block, DecodingLinear))
        model.transformer.h = nn.ModuleList(OneTokenCompiled(block, one_block, n_rows) for block in blocks)
        model.lm_head = OneTokenCompiled(head, product, n_rows)
        with torch.no_grad():  # torch compiles at the first call
            model(torch.zeros(n_rows, 1, dtype=torch.long), cache=KVCache(model.config, n_rows, 16))
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:200]
        print(f"warning: torch.compile failed ({type(error).__name__}: {reason}); going on without", file=sys.stderr)
        model.transformer.h, model.lm_head = blocks, head
    return model


def pays_back(model: GPT, n_tokens: int) -> bool:
    """Whether compiling, some five seconds (at the very first time more), gains that much over `n_tokens`: float32
    weights are then read at 25 instead of 12 GB/s, as measured on two cores by benchmarks/decode.py."""
    n_bytes = 4 * model.num_params(non_embedding=True) * n_tokens
    return n_bytes / 12e9 - n_bytes / 25e9 > 5
