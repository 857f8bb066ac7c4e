"""How a run computes on this machine: threads, precision and attention, chosen by timing the candidates.

A CPU that has an instruction is not always faster with it, and one that lacks it may emulate it thirty times slower.
So each candidate is timed on the shapes of the run, for some hundredths of a second.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from acorn.distributed.runtime import Runtime
from acorn.timing import fastest
from acorn.training.optim import orthogonalize
from model import GPT, GPTConfig, attend, attention_dropout

TOKENS = 512  # in a timed update; with fewer, converting the weights would count more than it does in the run
FLOP_PER_CALL = 1.5e9  # bounds a timed call to some hundredths of a second, on a slow laptop too
SECONDS = 0.05  # for each choice, beyond the first call of each candidate


@dataclass
class Arithmetic:
    """What decides the last bits of a run's losses. A checkpoint keeps it, so that a resumed run is exact."""

    dtype: str  # of matrix products, as a torch dtype's name
    muon_dtype: str  # of Muon's orthogonalization
    attention: str  # "fused": torch's kernel; "plain": model.plain_attention
    threads: int  # of one operation on a CPU
    machine: str  # what it was chosen on

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def torch_muon_dtype(self) -> torch.dtype:
        return getattr(torch, self.muon_dtype)

    def apply(self, model: GPT) -> None:
        """Make `model` and this process compute so."""
        if self.machine.startswith("cpu") and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(self.threads)
        for block in model.transformer.h:
            block.attn.plain = self.attention == "plain"


def choose(
    dtype: str, config: GPTConfig, batch_size: int, muon: bool, r: Runtime, before: dict | None = None
) -> tuple[Arithmetic, list[str]]:
    """The arithmetic of a run, and notes on it: that of `before`, a checkpoint's, where this machine is like the one
    that it was chosen on; measured on a CPU whose `dtype` is "auto"; otherwise fixed. Equal in all processes."""
    machine = machine_name(r.device)
    kept = saved(before)
    if kept and kept.machine == machine and dtype in ("auto", kept.dtype):
        return kept, [f"dtype {kept.dtype}, as before"] if dtype == "auto" else []
    if dtype != "auto" or r.device.type != "cpu":
        return fixed(r.dtype, config, r.device), []
    chosen, notes = measured(config, batch_size, muon) if r.is_main else (None, [])
    if kept:
        notes.append("chosen anew, since the run was on another machine: losses may differ in the last digits")
    if r.world_size > 1:
        chosen = r.broadcast(chosen)
    return chosen, notes


def saved(values: object) -> Arithmetic | None:
    """The Arithmetic that a checkpoint has, if it has one that makes sense."""
    try:
        found = Arithmetic(**values)
        valid = {found.dtype, found.muon_dtype} <= {"float32", "bfloat16", "float16"}
        valid = valid and found.attention in ("fused", "plain") and 1 <= found.threads <= (os.cpu_count() or 1)
    except TypeError:
        return None
    return found if valid else None


def machine_name(device: torch.device) -> str:
    """A name that is equal on machines whose arithmetic is."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"
    return device.type


def fixed(dtype: torch.dtype, config: GPTConfig, device: torch.device) -> Arithmetic:
    """The arithmetic of a run whose dtype is known, without any timing: the same in every run."""
    plain = device.type == "cpu" and (attention_dropout(config) > 0 or (dtype == torch.bfloat16 and plain_fits(config)))
    muon_dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
    threads = torch.get_num_threads()
    return Arithmetic(name(dtype), name(muon_dtype), "plain" if plain else "fused", threads, machine_name(device))


def measured(config: GPTConfig, batch_size: int, muon: bool) -> tuple[Arithmetic, list[str]]:
    """The fastest arithmetic for training `config` on this CPU in micro-batches of `batch_size` sequences, and notes
    that say what was measured. `muon`: whether Muon updates the matrices.

    Takes about 0.3 s, and leaves the random state and the number of threads as they were.
    """
    notes, threads = [], torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        narrow, tokens = reduced(config, batch_size)
        model = GPT(narrow).train()
        if "OMP_NUM_THREADS" not in os.environ:
            threads, note = choose_threads(model, tokens)
            notes.append(note)
        torch.set_num_threads(1)  # whose time the kernel counts apart from that of other programs
        slowdown = bfloat16_slowdown()
        dtypes = ["float32", "bfloat16"] if slowdown < 2 else ["float32"]  # an emulated update would take seconds
        attention = {dtype: choose_attention(config, dtype) for dtype in dtypes}
        updates = {dtype: update(model, tokens, dtype, attention[dtype]) for dtype in dtypes}
        dtype, times = fastest(updates, SECONDS, clock=time.thread_time)
        if len(dtypes) == 1:
            notes.append(f"dtype float32 (auto: bfloat16 takes {slowdown:.0f}x as long on this CPU)")
        else:
            other = "bfloat16" if dtype == "float32" else "float32"
            notes.append(f"dtype {dtype} (auto: {times[other] / times[dtype]:.2f}x as fast as {other} on this CPU)")
        muon_dtype = "float32"
        if muon and len(dtypes) > 1:
            matrix = torch.randn(2, config.n_hidden, config.n_embd)[:, :512, :512]
            products = {kind: orthogonalization(matrix.to(getattr(torch, kind))) for kind in dtypes}
            muon_dtype, times = fastest(products, SECONDS, clock=time.thread_time)
            notes.append(f"Muon in {muon_dtype}")
        torch.set_num_threads(threads)
    return Arithmetic(dtype, muon_dtype, attention[dtype], threads, machine_name(torch.device("cpu"))), notes


def reduced(config: GPTConfig, batch_size: int) -> tuple[GPTConfig, tuple[int, int]]:
    """One layer of the model, narrowed, with a micro-batch (rows, tokens) that is small enough to be timed."""
    length = min(config.block_size, TOKENS)
    rows = max(1, min(batch_size, TOKENS // length))
    widest = math.sqrt(FLOP_PER_CALL / (6 * 12 * rows * length))  # of a block, which has 12 C^2 parameters
    n_head = max(1, min(config.n_head, int(widest / config.head_dim)))
    narrow = dataclasses.replace(
        config,
        n_layer=1,
        n_head=n_head,
        n_kv_head=config.n_kv_head if n_head % config.n_kv_head == 0 else n_head,
        n_embd=n_head * config.head_dim,
        n_hidden=math.ceil(config.n_hidden * n_head / config.n_head),
        vocab_size=min(config.vocab_size, 1024),
        ngram=1,
    )
    return narrow, (rows, length)


def bfloat16_slowdown() -> float:
    """How many times as long as in float32 a matrix product takes in bfloat16."""
    operands = {kind: torch.ones(128, 256, dtype=getattr(torch, kind)) for kind in ("float32", "bfloat16")}
    products = {kind: lambda x=x: x @ x.T @ x for kind, x in operands.items()}
    _, times = fastest(products, SECONDS / 2, clock=time.thread_time)
    return times["bfloat16"] / times["float32"]


def choose_threads(model: GPT, tokens: tuple[int, int]) -> tuple[int, str]:
    """How many threads an operation should have, and a note: as many as torch would use, or fewer where that is far
    faster, as for a small model on many cores."""
    most = torch.get_num_threads()
    work = update(model, tokens, "float32", "fused")

    def with_threads(n: int) -> Callable[[], None]:
        def timed() -> None:
            torch.set_num_threads(n)
            work()

        return timed

    with_threads(1)()  # warm-up
    cpu, wall = time.thread_time(), time.perf_counter()
    work()
    if time.thread_time() - cpu < 0.8 * (time.perf_counter() - wall):
        torch.set_num_threads(most)  # they yield, and will be of use when the other programs have ended
        return most, f"{most} threads (other programs are using the cores)"
    counts = [most, *(2**n for n in reversed(range(most.bit_length())) if 2**n < most)]
    best, times = fastest({str(n): with_threads(n) for n in counts}, SECONDS, margin=1.5)
    torch.set_num_threads(most)
    if int(best) == most:
        return most, f"{most} threads"
    return int(best), f"{best} threads (auto: {times[str(most)] / times[best]:.1f}x as fast as {most})"


def choose_attention(config: GPTConfig, dtype: str) -> str:
    """The faster form of attention in training, "fused" or "plain", for whole sequences of config.block_size."""
    T, D, p = config.block_size, config.head_dim, attention_dropout(config)
    if p == 0 and not plain_fits(config):
        return "fused"
    n_head = max(1, min(16, int(FLOP_PER_CALL / (12 * T * T * D))))
    q, k, v = (torch.randn(1, n_head, T, D, dtype=getattr(torch, dtype), requires_grad=True) for _ in range(3))

    def work(plain: bool) -> None:
        attend(q, k, v, None, p, plain).sum().backward()
        q.grad = k.grad = v.grad = None

    forms = {"fused": lambda: work(False), "plain": lambda: work(True)}
    return fastest(forms, SECONDS, clock=time.thread_time)[0]


def plain_fits(config: GPTConfig) -> bool:
    """Whether the T x T weights, which plain attention keeps for the backward pass, take no more memory than the other
    activations of a block, which are some 16 numbers for each channel of each token."""
    return config.block_size <= 16 * config.head_dim


def update(model: GPT, tokens: tuple[int, int], dtype: str, attention: str) -> Callable[[], None]:
    """A forward and backward pass of `model` over (rows, tokens)."""
    idx = torch.randint(model.config.vocab_size, tokens)

    def work() -> None:
        for block in model.transformer.h:
            block.attn.plain = attention == "plain"
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(idx, idx, reduction="sum")[1]
        loss.backward()
        model.zero_grad(set_to_none=True)

    return work


def orthogonalization(matrices: torch.Tensor) -> Callable[[], torch.Tensor]:
    """One step of Muon's iteration over matrices (N, rows, columns)."""
    return lambda: orthogonalize(matrices, steps=1)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
