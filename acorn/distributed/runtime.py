"""The machine: which device, which precision, compiled or not, and the processes that train together.

Everything that `auto` chooses comes with its reason, in a sentence that the run prints.
"""

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from acorn import UserError
from acorn.distributed import heartbeat

# Peak rate of dense matrix products with 16-bit inputs, in 1e12 operations a second, from the makers' data sheets.
# The first name that stands in the device's own is its row.
PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "A40": 150,
    "A30": 165,
    "A10": 125,
    "L40S": 362,
    "L4": 121,
    "V100": 125,
    "T4": 65,
    "RTX 5090": 210,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "MI300X": 1307,
}


@dataclass
class Runtime:
    device: torch.device
    dtype: torch.dtype  # of matrix products; parameters stay in float32 while training
    compile: bool
    notes: list[str]  # what was chosen, and why
    rank: int = 0
    world_size: int = 1
    fsdp: bool = False  # whether the processes hold a shard of the model each

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    @property
    def is_first_here(self) -> bool:
        """Whether this process is the first on its machine, which checks what lies on that machine's disks."""
        return os.environ.get("LOCAL_RANK", "0") == "0"

    def autocast(self):
        """The context in which the model runs forward. A sharded one sees to its precision itself."""
        if self.dtype == torch.float32 or self.fsdp:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        """The array on the device; to a GPU it is copied while the work that was queued before goes on."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def peak_flops(self) -> float | None:
        """Peak operations a second of all devices together at 16 bits; None where this table does not know."""
        if self.device.type != "cuda" or self.dtype == torch.float32:
            return None
        name = torch.cuda.get_device_name(self.device)
        return next((1e12 * peak * self.world_size for key, peak in PEAK_TFLOPS.items() if key in name), None)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """`values` summed over the processes, in place. The host does not wait for a GPU, and CPU tensors do not pass
        through one."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values, group=heartbeat.hosts if values.is_cpu else None)
        return values

    def gather(self, values: list[float]) -> list[list[float]]:
        """`values` of every process, by rank."""
        if self.world_size == 1:
            return [values]
        own = torch.tensor(values, dtype=torch.float64)
        everyones = [torch.empty_like(own) for _ in range(self.world_size)]
        torch.distributed.all_gather(everyones, own, group=heartbeat.hosts)
        return torch.stack(everyones).tolist()

    def broadcast(self, value: object) -> object:
        """The `value` of the first process, in all of them."""
        values = [value]
        if self.world_size > 1:
            torch.distributed.broadcast_object_list(values, group=heartbeat.hosts)
        return values[0]

    def ask(self, holds: bool) -> Callable[[], bool]:
        """Begin to ask all processes whether it holds in any of them. The function that is returned waits for their
        answers, though not for their GPUs."""
        if self.world_size == 1:
            return lambda: holds
        answers = np.array([holds], dtype=np.int64)
        work = torch.distributed.all_reduce(torch.from_numpy(answers), group=heartbeat.hosts, async_op=True)

        def answer() -> bool:
            work.wait()
            return bool(answers[0])

        return answer

    def agree(self, holds: bool) -> bool:
        """Whether it holds in every process."""
        return not self.ask(not holds)()

    def average_gradients(self, model: torch.nn.Module) -> None:
        """What DistributedDataParallel does in the last backward pass, done after it."""
        for p in model.parameters() if self.world_size > 1 else ():
            if p.grad is not None:
                torch.distributed.all_reduce(p.grad)
                p.grad /= self.world_size

    def fits(self, work: Callable, *arguments) -> bool:
        """Do `work`, in which no process may wait for another; whether the memory of every process sufficed for it."""
        sufficed = True
        try:
            work(*arguments)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            sufficed = False
        if self.agree(sufficed):
            return True
        if self.device.type in ("cuda", "mps"):  # pieces of the larger size are of no use any more
            getattr(torch, self.device.type).empty_cache()
        return False

    def synchronize(self) -> None:
        """Wait for the device, so that a clock that is read next tells the truth."""
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).synchronize()


class Stopwatch:
    """Adds up the time from each `start` to the next `stop`: on a GPU that of its stream, for which the host does not
    wait."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.spans: list[tuple] = []  # not added up yet
        self.total = 0.0

    def start(self) -> None:
        self.began = self._now()

    def stop(self) -> None:
        self.spans.append((self.began, self._now()))
        self._add_up()

    def take(self) -> float:
        """Seconds since the last call; where the device has not come to the end of a span, the next call has it."""
        self._add_up()
        total, self.total = self.total, 0.0
        return total

    def _add_up(self) -> None:
        while self.spans and (not self.on_gpu or self.spans[0][1].query()):
            begin, end = self.spans.pop(0)
            self.total += begin.elapsed_time(end) / 1000 if self.on_gpu else end - begin

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def peak_memory(device: torch.device) -> int:
    """The most bytes that were in use: on the GPU, or resident in this process on a CPU; 0 where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose ru_maxrss begins with what the process that started this one held
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


ALONE = Runtime(torch.device("cpu"), torch.float32, False, [])  # a process that has no others


def setup(device: str, dtype: str, compile: str | bool, backend: str = "auto", fsdp: bool = False) -> Runtime:
    """Choose device and precision, and join the other processes where `torchrun` started several. `fsdp` says whether
    the model is to be sharded among the processes. The dtype that `auto` gives on a CPU is float32, the exact one;
    `autotune.measured` finds the fastest one for training.

    Raises UserError for a device that this machine or this torch does not have.
    """
    notes = []
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = choose_device(device, notes)
    if world_size > 1:
        if chosen.type == "cuda" and chosen.index is None:
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if backend == "auto" or chosen.type != "cuda":
            backend = "nccl" if chosen.type == "cuda" else "gloo"
        heartbeat.join(backend, rank, world_size)
        heartbeat.start(rank, world_size)
        notes.append(f"{world_size} processes over {backend}")
    if chosen.type == "cpu":
        set_malloc(lean=fsdp and world_size > 1)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")  # TF32 for the float32 products, as nanoGPT allows it
    precision = choose_dtype(dtype, chosen, notes)
    if fsdp and world_size == 1:
        notes.append("not sharded (fsdp: one process holds all of the model; torchrun starts several)")
    elif fsdp and precision == torch.float16:
        raise UserError("fsdp = True does not go with float16, whose gradients are scaled; give --dtype=float32")
    elif fsdp:
        notes.append("sharded among them")
    compiled = choose_compile(compile, chosen, notes)
    return Runtime(chosen, precision, compiled, notes, rank, world_size, fsdp and world_size > 1)


def set_malloc(lean: bool) -> None:
    """Say to the C library, where it is glibc, what to do with the memory of freed tensors.

    It keeps pieces of up to 32 MB for the next ones. Otherwise they go back to the kernel, which clears them anew, page
    by page, in each update: about a twelfth of the time. With `lean` only those of up to 1 MB are kept: between what a
    sharded model gathers and lets go of, or blocks recompute, gaps would stay that take up as much as that saves.
    """
    with contextlib.suppress(OSError, TypeError, AttributeError):  # Windows, and other C libraries
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 20 if lean else 32 << 20)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def out_of_memory(error: BaseException) -> bool:
    """Whether this is one of the ways in which torch, its libraries and numpy say that memory is exhausted."""
    words = ("out of memory", "allocate memory", "not enough memory", "memory object", "alloc_failed")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(w in str(error).lower() for w in words)


def leave(code: int) -> int:
    """Part from the other processes and end with `code`; alone, only return it.

    None goes while another still talks to it, and none takes its process group down piece by piece: a peer that does
    so a moment earlier would make this one abort.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        heartbeat.end()
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish()
        sys.stdout.flush()
        os._exit(code)
    return code


def choose_device(device: str, notes: list[str]) -> torch.device:
    if device == "auto":
        if torch.cuda.is_available():
            notes.append(f"device cuda (auto: {torch.cuda.get_device_name()})")
            return torch.device("cuda")
        if torch.backends.mps.is_available():
            notes.append("device mps (auto: the GPU of this Mac)")
            return torch.device("mps")
        notes.append(f"device cpu (auto: torch sees no GPU; {torch.get_num_threads()} threads)")
        return torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device = {device!r} is none that torch knows; use auto, cpu, cuda, cuda:1 or mps") from error
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device = {device!r} is not supported; use auto, cpu, cuda, cuda:1 or mps")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        raise UserError(f"device = {device!r}, but {why}; use --device=auto or --device=cpu")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device = {device!r}, but there are only {torch.cuda.device_count()} CUDA devices")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device = 'mps', but this torch sees no Apple GPU; use --device=auto or --device=cpu")
    notes.append(f"device {chosen}")
    return chosen


def choose_dtype(dtype: str, device: torch.device, notes: list[str]) -> torch.dtype:
    if dtype == "float16" and device.type != "cuda":
        notes.append(f"dtype float32 (float16 needs its gradients scaled, which only CUDA has; this is {device.type})")
        return torch.float32
    if dtype != "auto":
        notes.append(f"dtype {dtype}")
        return getattr(torch, dtype)
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            notes.append("dtype bfloat16 (auto: this GPU has it)")
            return torch.bfloat16
        notes.append("dtype float16 (auto: this GPU has no bfloat16)")
        return torch.float16
    if device.type != "cpu":
        notes.append(f"dtype float32 (auto: {device.type})")
    return torch.float32


def choose_compile(compile: str | bool, device: torch.device, notes: list[str]) -> bool:
    if compile != "auto":
        notes.append("compiled" if compile else "not compiled")
        return bool(compile)
    if device.type == "cuda":
        import importlib.util

        able = importlib.util.find_spec("triton") is not None
        notes.append("compiled (auto)" if able else "not compiled (auto: triton is not installed)")
        return able
    if device.type == "cpu":
        notes.append("not compiled (auto: on a CPU it gains a tenth, and takes half a minute to start)")
        return False
    notes.append(f"not compiled (auto: {device.type})")
    return False


def compile_or_eager(
    model: torch.nn.Module, trial: Callable[[torch.nn.Module], None], runtime: Runtime
) -> torch.nn.Module:
    """`model` compiled; or, where `trial` of that fails in any process, as it is in all of them, with one warning.

    `trial` takes the model one step through what it will do, in the shapes of the run, since torch compiles at the
    first call and not before. Memory that it runs out of is no failure to compile: the run itself will meet it, and
    has an answer. Raises UserError where the model is sharded, since then the others are in the middle of the pass.
    """
    compiled, failed = torch.compile(model), False
    try:
        trial(compiled)
    except Exception as error:
        model.zero_grad(set_to_none=True)
        short = out_of_memory(error)
        if short and runtime.fsdp:
            raise
        failed = not short
        first_line = str(error).strip().split("\n")[0][:200]
        reason = f"torch.compile failed ({type(error).__name__}: {first_line})"
        if failed and runtime.fsdp:
            raise UserError(f"{reason}; mend that, or go on without it: --compile=False") from error
        if failed and heartbeat.is_news(reason):
            print(f"warning: {reason}; going on without", flush=True)
    if runtime.agree(not failed):
        return compiled
    torch._dynamo.reset()
    return model
