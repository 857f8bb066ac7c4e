"""Choose threads, precision and attention for a run by timing the candidates on this machine.

A CPU that supports an instruction is not always faster with it, and a CPU without it may emulate it, thirty times
slower. Each candidate is therefore timed on the run's own shapes, for a few tens of milliseconds.
"""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from acorn.distributed.runtime import Runtime, dtype_name
from acorn.timing import fastest
from acorn.training.optim import orthogonalize
from model import GPT, CausalSelfAttention, GPTConfig, attend, attention_dropout

TIMED_TOKENS = 512  # per timed update; with fewer tokens, converting the weights would weigh more than in the run
FLOP_PER_CALL = 0.8e9  # keeps a timed call within tens of milliseconds, even on a slow laptop
TIMING_SECONDS = 0.03  # timing budget per choice, not counting the first call of each candidate


@dataclass
class Arithmetic:
    """The choices that determine the last bits of a run's losses. Checkpoints store them, so that resuming is exact."""

    dtype: str  # name of the torch dtype of matrix products
    muon_dtype: str  # name of the torch dtype of Muon's orthogonalization
    attention: str  # "fused": torch's kernel; "plain": model.plain_attention
    threads: int  # CPU threads per operation
    machine: str  # the machine on which this was chosen, from `machine_name`

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def torch_muon_dtype(self) -> torch.dtype:
        return getattr(torch, self.muon_dtype)

    def apply(self, model: GPT) -> None:
        """Configure `model` and this process accordingly."""
        if self.machine.startswith("cpu") and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(self.threads)
        set_attention(model, self.attention)


def set_attention(model: GPT, attention: str) -> None:
    """Let all blocks of `model` train with the "fused" or the "plain" attention."""
    for module in model.modules():
        if isinstance(module, CausalSelfAttention):
            module.plain = attention == "plain"


def choose(
    dtype: str, config: GPTConfig, batch_size: int, muon: bool, dist: Runtime, saved_values: dict | None = None
) -> tuple[Arithmetic, list[str]]:
    """Return the arithmetic of a run and notes about it, equal on all ranks.

    `saved_values`, the arithmetic in a checkpoint, is kept if it was chosen on the same kind of machine. Otherwise it
    is measured if `dtype` is "auto" on a CPU, and fixed in all other cases.
    """
    machine = machine_name(dist.device)
    kept = read_saved(saved_values)
    if kept and kept.machine == machine and dtype in ("auto", kept.dtype):
        return kept, [f"dtype {kept.dtype} (from the checkpoint)"] if dtype == "auto" else []
    if dtype != "auto" or dist.device.type != "cpu":
        return fix_arithmetic(dist.dtype, config, dist.device), []
    chosen, notes = measure(config, batch_size, muon) if dist.is_main else (None, [])
    if kept:
        notes.append("measured again because the machine has changed: losses may differ in the last digits")
    return dist.broadcast(chosen), notes


def read_saved(values: object) -> Arithmetic | None:
    """Return the Arithmetic stored in a checkpoint, or None if it is missing or invalid."""
    if not isinstance(values, dict):
        return None
    try:
        arithmetic = Arithmetic(**values)
        valid = {arithmetic.dtype, arithmetic.muon_dtype} <= {"float32", "bfloat16", "float16"}
        valid = valid and arithmetic.attention in ("fused", "plain")
        valid = valid and 1 <= arithmetic.threads <= (os.cpu_count() or 1)
    except TypeError:
        return None
    return arithmetic if valid else None


def machine_name(device: torch.device) -> str:
    """Return a name shared by all machines with the same arithmetic."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"
    return device.type


def fix_arithmetic(dtype: torch.dtype, config: GPTConfig, device: torch.device) -> Arithmetic:
    """Return the arithmetic for a known dtype. Nothing is timed, so the result is the same in every run."""
    attention = usual_attention(config, dtype_name(dtype)) if device.type == "cpu" else "fused"
    muon_dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
    threads = torch.get_num_threads()
    return Arithmetic(dtype_name(dtype), dtype_name(muon_dtype), attention, threads, machine_name(device))


def measure(config: GPTConfig, batch_size: int, muon: bool) -> tuple[Arithmetic, list[str]]:
    """Return the fastest arithmetic for training `config` on this CPU in micro-batches of `batch_size` sequences.

    Also returns notes that say what was measured. `muon` says whether Muon updates the matrices. Takes about 0.3 s. The
    random state does not change, and the number of threads is set to the chosen one.
    """
    notes, threads = [], torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        narrow, shape = reduce_config(config, batch_size)
        model = GPT(narrow).train()
        if "OMP_NUM_THREADS" not in os.environ:
            threads, note = choose_threads(model, shape)
            notes.append(note)
        torch.set_num_threads(1)  # thread_time counts one thread, without the time of other programs
        slowdown = bfloat16_slowdown()
        dtypes = ["float32", "bfloat16"] if slowdown < 2 else ["float32"]  # emulated updates would take seconds
        updates = {dtype: make_update(model, shape, dtype, usual_attention(config, dtype)) for dtype in dtypes}
        dtype, times = fastest(updates, TIMING_SECONDS, clock=time.thread_time)
        if len(dtypes) == 1:
            notes.append(f"dtype float32 (auto: bfloat16 takes {slowdown:.0f}x as long on this CPU)")
        else:
            other = "bfloat16" if dtype == "float32" else "float32"
            notes.append(f"dtype {dtype} (auto: {times[other] / times[dtype]:.2f}x as fast as {other} on this CPU)")
        muon_dtype = "float32"
        if muon and len(dtypes) > 1:
            matrix = torch.randn(2, config.n_hidden, config.n_embd)[:, :512, :512]
            products = {kind: functools.partial(orthogonalize, matrix.to(getattr(torch, kind)), 1) for kind in dtypes}
            muon_dtype, times = fastest(products, TIMING_SECONDS, clock=time.thread_time)
            notes.append(f"Muon dtype {muon_dtype} (auto)")
        attention = choose_attention(config, dtype)
        torch.set_num_threads(threads)
    return Arithmetic(dtype, muon_dtype, attention, threads, machine_name(torch.device("cpu"))), notes


def reduce_config(config: GPTConfig, batch_size: int) -> tuple[GPTConfig, tuple[int, int]]:
    """Return a one-layer, narrower model and a micro-batch shape (rows, tokens) that are small enough to time."""
    length = min(config.block_size, TIMED_TOKENS)
    rows = max(1, min(batch_size, TIMED_TOKENS // length))
    max_width = math.sqrt(FLOP_PER_CALL / (6 * 12 * rows * length))  # a block has 12 C^2 parameters
    n_head = max(1, min(config.n_head, int(max_width / config.head_dim)))
    narrow = dataclasses.replace(
        config,
        n_layer=1,
        n_head=n_head,
        n_kv_head=config.n_kv_head if n_head % config.n_kv_head == 0 else n_head,
        n_embd=2 * math.ceil(config.n_embd * n_head / config.n_head / 2),
        n_hidden=math.ceil(config.n_hidden * n_head / config.n_head),
        vocab_size=min(config.vocab_size, 1024),
        ngram=1,
    )
    return narrow, (rows, length)


def bfloat16_slowdown() -> float:
    """Return the time of a bfloat16 matrix product divided by its time in float32."""
    operands = {kind: torch.ones(128, 256, dtype=getattr(torch, kind)) for kind in ("float32", "bfloat16")}
    products = {kind: lambda x=x: x @ x.T @ x for kind, x in operands.items()}
    _, times = fastest(products, TIMING_SECONDS / 2, clock=time.thread_time)
    return times["bfloat16"] / times["float32"]


def choose_threads(model: GPT, shape: tuple[int, int]) -> tuple[int, str]:
    """Return the number of threads per operation for batches of `shape` (rows, tokens), and a note about the choice.

    It is torch's own number, unless fewer threads are at least 1.5 times as fast, as for a small model on many cores.
    """
    max_threads = torch.get_num_threads()
    work = make_update(model, shape, "float32", "fused")

    def with_threads(n: int) -> Callable[[], None]:
        def timed() -> None:
            torch.set_num_threads(n)
            work()

        return timed

    with_threads(1)()  # warm-up
    cpu, wall = time.thread_time(), time.perf_counter()
    work()
    if time.thread_time() - cpu < 0.8 * (time.perf_counter() - wall):
        torch.set_num_threads(max_threads)  # LLVM's threads yield now, and help once the other programs have ended
        return max_threads, f"{max_threads} threads (not measured: other programs are using the cores)"
    counts = [max_threads, *(2**n for n in reversed(range(max_threads.bit_length())) if 2**n < max_threads)]
    best, times = fastest({str(n): with_threads(n) for n in counts}, TIMING_SECONDS, margin=1.5)
    torch.set_num_threads(max_threads)
    if int(best) == max_threads:
        return max_threads, f"{max_threads} threads"
    unit = "thread" if best == "1" else "threads"
    return int(best), f"{best} {unit} (auto: {times[str(max_threads)] / times[best]:.1f}x as fast as {max_threads})"


def usual_attention(config: GPTConfig, dtype: str) -> str:
    """Return the attention that is faster on most CPUs."""
    plain = attention_dropout(config) > 0 or (dtype == "bfloat16" and plain_fits(config))
    return "plain" if plain else "fused"


def choose_attention(config: GPTConfig, dtype: str) -> str:
    """Return the faster attention in training, "fused" or "plain", for sequences of config.block_size tokens."""
    T, D, p = config.block_size, config.head_dim, attention_dropout(config)
    if p == 0 and not plain_fits(config):
        return "fused"
    n_head = max(1, min(16, int(FLOP_PER_CALL / (12 * T * T * D))))
    q, k, v = (torch.randn(1, n_head, T, D, dtype=getattr(torch, dtype), requires_grad=True) for _ in range(3))

    def work(plain: bool) -> None:
        attend(q, k, v, None, p, plain).sum().backward()
        q.grad = k.grad = v.grad = None

    forms = {"fused": lambda: work(False), "plain": lambda: work(True)}
    return fastest(forms, TIMING_SECONDS, clock=time.thread_time)[0]


def plain_fits(config: GPTConfig) -> bool:
    """Return whether plain attention's T x T weights need no more memory than a block's other activations.

    Plain attention keeps these weights for the backward pass. The other activations are about 16 values per channel
    and token.
    """
    return config.block_size * config.n_head <= 16 * config.n_embd


def make_update(model: GPT, shape: tuple[int, int], dtype: str, attention: str) -> Callable[[], None]:
    """Return a function that runs a forward and backward pass of `model` over a batch of `shape` (rows, tokens)."""
    idx = torch.randint(model.config.vocab_size, shape)

    def work() -> None:
        set_attention(model, attention)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(idx, idx, reduction="sum")[1]
        loss.backward()
        model.zero_grad(set_to_none=True)

    return work
