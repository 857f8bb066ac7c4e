"""Prepare a model for generation on a CPU.

Decoding one token reads every weight once and does little arithmetic, so memory bandwidth limits its speed. Torch's
matrix-vector product uses about half of the bandwidth. A compiled multiply-and-sum over the matrix rows uses most of
it. It also reads bfloat16 or int8 weights directly, which takes a half or a quarter of the bytes.

The fastest kernel depends on the CPU, the libraries and the shapes, so `prepare_for_decoding` times the candidates.
"""

import builtins
import functools
import inspect
import itertools
import mmap
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acorn.distributed.runtime import dtype_name
from acorn.timing import fastest, seconds_per_call
from model import GPT, KVCache

# The compiled product keeps one sum per batch row in a vector register. AVX2 has 16 registers, and the weights and
# inputs need half of them. With more sums, registers would spill to memory for each weight.
MAX_COMPILED_ROWS = 8
PROMPT_ROWS = 64  # prompt tokens with which the kernels for prompts are timed
# With few slots, inductor would compile attention for one thread, because it expects as many slots in each call.
COMPILED_SLOTS = 256  # in the cache with which a model is compiled
TRIED_SLOTS = 320  # in the cache for comparing it with the uncompiled model; another size, as in use
COMPILE_RATIO = 375  # time of torch.compile for a block and a head, divided by Python's compile time of model.py


class DecodingLinear(nn.Module):
    """A Linear layer for inference, with its weight in float32, bfloat16 or int8.

    int8 is symmetric and weight-only: the scale of an output channel is its largest absolute weight / 127. A `centered`
    weight, the head's, is stored without the mean of its rows, whose product is added in float32: a large value that
    all logits share would make both int8 and bfloat16, in which one of the kernels returns its results, too coarse.

    `kernel`, one of `kernels`, computes up to `n_rows` rows, and `prompt_kernel` more rows.
    """

    weight: Tensor
    scale: Tensor | None  # of each output channel, for int8
    bias: Tensor | None
    words: Tensor | None  # the same memory as weight, see in_words
    mean: Tensor | None  # of the rows of a centered int8 weight

    def __init__(self, weight: Tensor, bias: Tensor | None, quantize: str, n_rows: int = 1, centered: bool = False):
        super().__init__()
        scale: Tensor | None = None
        mean: Tensor | None = None
        if quantize == "int8":
            weight = weight.float()
            if centered:
                mean = weight.mean(dim=0)  # (columns,)
                weight = weight - mean
            scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127  # (rows,)
            weight = in_huge_pages((weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("weight", weight.detach().contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("mean", mean)
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.register_buffer("words", in_words(self.weight), persistent=False)
        self.n_rows = n_rows
        self.kernel = self.prompt_kernel = kernels(self.weight)[0]

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., columns) -> (..., rows), in the dtype of x."""
        rows = x.flatten(0, -2)  # (B, columns)
        if torch.compiler.is_compiling() and len(rows) <= MAX_COMPILED_ROWS:
            y = multiply_and_sum(self.weight if self.words is None else self.words, rows.float())
        else:
            y = product(self.weight, rows, self.kernel if len(rows) <= self.n_rows else self.prompt_kernel)
        y = y if self.scale is None else y * self.scale
        y = y if self.mean is None else y + (rows.float() @ self.mean)[:, None]
        y = y.view(*x.shape[:-1], -1)
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype)


def kernels(weight: Tensor) -> list[str]:
    """Return the names of the eager kernels that can multiply by this weight, the default first.

    linear: torch's F.linear, in the dtype of the weight
    columns: a float32 product with the inputs as columns, which MKL computes faster for few of them
    int8pack: torch's product of bfloat16 activations and int8 weights
    """
    if weight.dtype == torch.float32:
        return ["columns", "linear"]
    if weight.dtype == torch.int8:  # int8pack reads whole vectors, and crashes on other widths
        return ["int8pack", "columns"] if weight.size(1) % 32 == 0 else ["columns"]
    return ["linear", "columns"]


def product(weight: Tensor, x: Tensor, kernel: str) -> Tensor:
    """Multiply x (B, columns) by weight (rows, columns) with a kernel from `kernels` -> (B, rows)."""
    if kernel == "int8pack":
        return torch._weight_int8pack_mm(x.bfloat16(), weight, torch.ones(len(weight), dtype=torch.bfloat16)).float()
    if kernel == "linear":
        return F.linear(x.to(weight.dtype), weight)
    if weight.dtype == torch.float32:
        return (weight @ x.float().T).T.contiguous()
    parts = weight.split(max(1, 2**20 // weight.size(1)))  # so that each part, in float32, stays in the CPU cache
    return torch.cat([part.float() @ x.float().T for part in parts]).T.contiguous()


def in_words(weight: Tensor) -> Tensor | None:
    """View an int8 or bfloat16 weight (rows, columns) as 32-bit words (rows, columns / 4 or 2) for compiled code.

    Returns None if compiled code should load the weight itself. The words are float32 unless torch uses AVX-512. For
    shorter vectors, its headers copy other types into a buffer, and then load the buffer. Where the compiler copies it
    in two halves, as GCC does for Zen 3, the load waits for both, and the product takes 1.5 to 3 times as long.
    """
    n_values = 4 // weight.element_size()
    if weight.dtype not in (torch.int8, torch.bfloat16) or sys.byteorder != "little":
        return None
    if weight.size(1) % n_values or weight.storage_offset() % n_values:
        return None
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return weight.view(torch.float32)
    return weight.view(torch.int32) if weight.dtype == torch.int8 else None


def multiply_and_sum(weight: Tensor, x: Tensor) -> Tensor:
    """Multiply x (B, columns) by weight (rows, columns or words) -> (B, rows) in float32, written for torch.compile.

    Inductor fuses all sums over the columns into one loop, which reads each weight once. In this loop, two rows of the
    weight share each load of x and add to different registers, so that neither waits for the other's addition.
    """
    n_values = x.size(1) // weight.size(1)  # in a word
    B, shared = len(x), 2 if len(x) > 1 or n_values > 1 else 1
    if n_values > 1:  # value k of word j multiplies column n_values * j + k
        x = x.view(B, -1, n_values).transpose(1, 2)
    # as_strided forces x into memory; otherwise inductor recomputes x for each row of the weight
    x = x.contiguous().view(B, -1, weight.size(1))
    x = x.as_strided(x.shape, x.stride())
    return torch.cat([torch.stack([weighted_sum(part, row) for row in x]) for part in weight.chunk(shared)], -1)


def weighted_sum(weight: Tensor, x: Tensor) -> Tensor:
    """Return the dot product of each weight row with x: weight (rows, columns or words), x (1, 2 or 4, same) -> (rows,)

    With two inputs for each weight, the weights are words of two bfloat16 values, and with four, of four int8 values.
    Shifts unpack whole vectors on every CPU. For AVX2, inductor would load plain int8 through a buffer, which is 14
    times slower.
    """
    if len(x) == 1:
        return (weight.float() * x[0]).sum(-1)
    words = weight.view(torch.int32)
    if len(x) == 2:  # a bfloat16 is the upper half of a float32
        values = [(words << 16).view(torch.float32), (words & -65536).view(torch.float32)]
    else:  # the right shift keeps the sign
        values = [((words << shift) >> 24).float() for shift in (24, 16, 8, 0)]
    return functools.reduce(torch.add, [value * row for value, row in zip(values, x, strict=True)]).sum(-1)


def in_huge_pages(x: Tensor) -> Tensor:
    """Copy x into 2 MB memory pages, which cause fewer TLB misses than 4 KB pages when a matrix is read.

    Returns x itself if it is smaller than a page or the system has no huge pages.
    """
    page = 2 << 20
    if x.nbytes < page or not hasattr(mmap, "MADV_HUGEPAGE"):  # Linux only
        return x
    memory = mmap.mmap(-1, x.nbytes + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    pages = torch.frombuffer(memory, dtype=torch.uint8)
    start = -pages.data_ptr() % page
    return pages[start : start + x.nbytes].view(x.dtype).view(x.shape).copy_(x)


class OneTokenCompiled(nn.Module):
    """Wrap a module: run a compiled version for one token in each row, and the module itself for other inputs.

    A prompt is compute-bound and gains nothing from compilation. `row_counts` are the numbers of rows for which there
    are versions; the first call with each compiles it. Modules of the same structure share the dictionary `versions`.
    """

    def __init__(self, module: nn.Module, versions: dict, row_counts: tuple[int, ...]):
        super().__init__()
        self.module, self.versions, self.row_counts = module, versions, row_counts

    def forward(self, x: Tensor, rotary=None, *rest) -> Tensor:
        x = x.contiguous()  # the last token of each row has gaps
        inputs = (x, rotary, *rest) if rest else (x,)  # a Linear layer takes x alone
        without_cache = rest and rest[0] is None
        if x.size(1) != 1 or x.size(0) not in self.row_counts or without_cache:
            return self.module(*inputs)
        key = x.size(0), rotary is None  # some blocks may have no rope
        if key not in self.versions:
            self.versions[key] = compile_one_token(self.module, *inputs)
        return self.versions[key](self.module, *inputs)


def compile_one_token(module: nn.Module, x: Tensor, rotary=None, cache=(), positions=None, mask=None) -> Callable:
    """Compile the forward pass of a block or a head for inputs like these. Only the size of the cache may differ.

    The result is a function of a module of the same structure and its inputs. It omits torch.compile's checks, which
    take 0.1 ms per block, because reading the weights evicts their data from the CPU cache. The caller is responsible:
    other shapes, strides or dtypes, of weights or inputs, give wrong results without an error.
    """
    for tensor in cache:
        torch._dynamo.mark_dynamic(tensor, 2)
    if mask is not None:
        torch._dynamo.mark_dynamic(mask, 3)
    inputs = (module, x) if mask is None else (module, x, rotary, cache, positions, mask)
    # size_asserts would check each tensor's shape in each call
    options: dict = {"size_asserts": False, "cpp.enable_floating_point_contract_flag": "fast"}  # fused multiply-add
    with torch._dynamo.config.patch(enable_aot_compile=True):  # off by default in older versions of torch
        compiled: Any = torch.compile(type(module).forward, fullgraph=True, options=options, dynamic=False)
        return compiled.aot_compile((inputs, {})).fn


@torch.no_grad()
def prepare_for_decoding(
    model: GPT,
    quantize: str = "none",
    compile: bool | str = True,
    n_rows: int = 1,
    n_tokens: int = 0,
    fewer_rows: tuple[int, ...] = (),
) -> GPT:
    """Replace the Linear layers of `model`, including its head, with DecodingLinear, and return it in evaluation mode.

    The model can then generate but not train. A compiled model needs caches in float32, and its weights must keep
    their dtype. `quantize` is "none" (weights stay in the model's dtype) or "int8".
    `compile` also compiles the step of one token in each of `n_rows` rows, and in each number of rows in `fewer_rows`,
    which takes some seconds each. With "auto" this happens only if it saves time over `n_tokens` tokens, and the
    compiled model is used only if it is faster. If compiling fails, a warning is printed and the model stays
    uncompiled. Measurements and choices go to stderr.
    """
    model.eval()  # dropout would become part of the compiled step
    if quantize == "none":
        for p in model.parameters():  # tied parameters stay tied
            p.data = in_huge_pages(p.data)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                is_head = child is model.lm_head
                setattr(module, name, DecodingLinear(child.weight, child.bias, quantize, n_rows, is_head))
    seconds, reading = choose_kernels(model, n_rows)
    kind = quantize if quantize != "none" else dtype_name(model.lm_head.weight.dtype)
    auto = compile == "auto"
    if auto:
        compile = n_rows <= MAX_COMPILED_ROWS and pays_back(seconds - reading, n_tokens)
    plain = model.transformer.h, model.lm_head
    if not compile or not add_compiled(model, (n_rows, *fewer_rows)):
        if seconds > 1e-3:  # a small model has no choice worth reading
            print(f"{kind}: {1e3 * seconds:.1f} ms of matrix products per token, not compiled", file=sys.stderr)
        return model
    compiled = model.transformer.h, model.lm_head

    def one_token(blocks: nn.ModuleList, head: nn.Module) -> Tensor:
        set_layers(model, blocks, head)
        return model(torch.zeros(n_rows, 1, dtype=torch.long), cache=cache)[0]

    cache = KVCache(model.config, n_rows, min(TRIED_SLOTS, model.config.block_size))
    cache.length += cache.size // 2
    random = torch.Generator().manual_seed(0)
    for tensor in itertools.chain(*cache.layers):
        tensor.normal_(generator=random)
    expected, actual = one_token(*plain), one_token(*compiled)
    if not (actual - expected).abs().max() <= 0.05 * expected.abs().max() + 1e-6:  # "not ... <=" also catches NaN
        print(
            "warning: the compiled model's logits differ from the uncompiled model's, so it runs uncompiled. Torch's "
            "cache may hold code for another CPU. To compile again, set TORCHINDUCTOR_CACHE_DIR to a new folder.",
            file=sys.stderr,
        )
        one_token(*plain)
        return model
    candidates = {"compiled": lambda: one_token(*compiled), "uncompiled": lambda: one_token(*plain)}
    # the first calls are slow, and the compile time is already spent, so only a clear difference counts
    name, times = fastest(candidates, seconds=0.5, margin=1.2)
    name = name if auto else "compiled"
    one_token(*(compiled if name == "compiled" else plain))
    ratio = times["uncompiled"] / times["compiled"]
    choice = f"{name} ({'auto: ' if auto else ''}compiled is {ratio:.1f}x as fast as uncompiled on this CPU)"
    print(f"{kind}: {1e3 * times[name]:.1f} ms per token, {choice}", file=sys.stderr)
    return model


def set_layers(model: GPT, blocks: nn.ModuleList, head: nn.Module) -> None:
    model.transformer.h = blocks
    model.set_submodule("lm_head", head)  # not a Linear


def add_compiled(model: GPT, row_counts: tuple[int, ...]) -> bool:
    """Wrap blocks and head in OneTokenCompiled, compile them for these numbers of rows, and return True.

    If compiling fails, print a warning, leave the model unchanged, and return False.
    """
    blocks, head = model.transformer.h, model.lm_head
    versions: dict = {}
    try:
        compiled = nn.ModuleList(OneTokenCompiled(block, versions, row_counts) for block in blocks)
        set_layers(model, compiled, OneTokenCompiled(head, {}, row_counts))
        for n_rows in row_counts:  # the call compiles
            cache = KVCache(model.config, n_rows, COMPILED_SLOTS)
            model(torch.zeros(n_rows, 1, dtype=torch.long), cache=cache)
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:200]
        print(f"warning: torch.compile failed ({type(error).__name__}: {reason}); running uncompiled", file=sys.stderr)
        set_layers(model, blocks, head)
        return False
    return True


def choose_kernels(model: GPT, n_rows: int) -> tuple[float, float]:
    """Set `kernel` and `prompt_kernel` of each DecodingLinear to its fastest ones, timed once per weight shape.

    Returns two times in seconds: of all matrix products of one token, and of reading all weights once with torch. Takes
    about 0.15 s.
    """
    dtype = model.transformer.wte.weight.dtype
    groups: dict[torch.Size, list[DecodingLinear]] = {}
    for layer in model.modules():
        if isinstance(layer, DecodingLinear):
            groups.setdefault(layer.weight.shape, []).append(layer)
    total, reading = 0.0, 0.0
    for layers in groups.values():
        kernel, times, seconds = time_kernels(layers, n_rows, dtype, 0.1 / len(groups))
        for layer in layers:
            layer.kernel = kernel
        total, reading = total + times[kernel], reading + seconds
    in_blocks = [layers for layers in groups.values() if model.lm_head not in layers]
    largest = max(in_blocks or groups.values(), key=lambda layers: layers[0].weight.numel())
    prompt_kernel, _, _ = time_kernels(largest, PROMPT_ROWS, dtype, 0.05)
    for layer in itertools.chain(*groups.values()):
        layer.prompt_kernel = prompt_kernel if prompt_kernel in kernels(layer.weight) else kernels(layer.weight)[0]
    return total, reading


def time_kernels(
    layers: list[DecodingLinear], n_rows: int, dtype: torch.dtype, seconds: float
) -> tuple[str, dict[str, float], float]:
    """Return the fastest kernel for `n_rows` rows and layers of one shape, with times in seconds.

    The times, summed over these layers, are a dict with one entry per kernel, and the time of reading the weights.
    """
    pieces = [piece for layer in layers for piece in layer.weight.split(4096)]  # timing a whole head takes too long
    pieces = [piece for piece in pieces if len(piece) == len(pieces[0])]
    turn = itertools.cycle(pieces)  # as in decoding, the next weight is not in the CPU cache
    x = torch.ones(n_rows, layers[0].weight.size(1), dtype=dtype)
    candidates = {kernel: lambda kernel=kernel: product(next(turn), x, kernel) for kernel in kernels(pieces[0])}
    # kernels differ in the last bits, so noise must not decide
    kernel, times = fastest(candidates, seconds, margin=1.3)

    def read() -> Tensor:  # the sum is memory-bound; the values, reinterpreted as float32, do not matter
        piece = next(turn).flatten()
        return piece[: len(piece) // 4 * 4].view(torch.float32).sum()

    reading = min(seconds_per_call(read) for _ in range(5))
    n_pieces = len(layers) * len(layers[0].weight) / len(pieces[0])
    return kernel, {name: n_pieces * time for name, time in times.items()}, n_pieces * reading


def pays_back(gain: float, n_tokens: int) -> bool:
    """Return whether compiling saves more time than it takes, if it saves at most `gain` seconds per token.

    Python and a C++ compiler do the compiling on one core. Its time is estimated as COMPILE_RATIO times the time in
    which Python compiles model.py, which is similar work.
    """
    if gain * n_tokens < 1:
        return False
    source = Path(inspect.getfile(GPT)).read_text(encoding="utf-8")
    reference = min(seconds_per_call(lambda: builtins.compile(source, "model.py", "exec")) for _ in range(3))
    return gain * n_tokens > COMPILE_RATIO * reference
