"""Device, precision, compilation, and communication between ranks.

The run prints every `auto` choice with its reason.
"""

import contextlib
import ctypes
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from acorn import UserError, out_of_memory
from acorn.distributed import heartbeat
from model import HAS_TRITON

# Peak rate of dense matrix products with 16-bit inputs, in 1e12 operations per second, from the vendors' data sheets.
# The first key whose words occur in the device's name applies.
PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "GH200": 989,
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
    "L40": 181,
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
    dtype: torch.dtype  # of matrix products; parameters stay in float32 during training
    compile: bool
    notes: list[str]  # what was chosen, and why
    rank: int = 0
    world_size: int = 1
    fsdp: bool = False  # whether each rank holds a shard of the model

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that prints and writes."""
        return self.rank == 0

    @property
    def is_first_on_machine(self) -> bool:
        """Whether this is the first rank on its machine, the one that checks files on the machine's disks."""
        return os.environ.get("LOCAL_RANK", "0") == "0"

    def autocast(self):
        """Return the context for forward passes. FSDP sets the precision itself."""
        if self.dtype == torch.float32 or self.fsdp:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        """Copy an array to the device. The copy to a GPU is asynchronous."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def peak_flops(self) -> float | None:
        """Return the peak 16-bit operations per second of all devices together, or None if unknown."""
        if self.device.type != "cuda" or self.dtype == torch.float32:
            return None
        name = torch.cuda.get_device_name(self.device)
        for key, peak in PEAK_TFLOPS.items():
            if re.search(rf"\b{key}\b", name):  # whole words: L4 is not an L40, and A100 not an RTX A1000
                return 1e12 * peak * self.world_size
        return None

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `values` over all ranks in place, and return them.

        The host does not wait for a GPU. CPU tensors are exchanged between the CPUs.
        """
        if self.world_size > 1:
            torch.distributed.all_reduce(values, group=heartbeat.cpu_group if values.is_cpu else None)
        return values

    def gather(self, values: list[float]) -> list[list[float]]:
        """Return the `values` of every rank, in the order of ranks."""
        if self.world_size == 1:
            return [values]
        local_values = torch.tensor(values, dtype=torch.float64)
        gathered = [torch.empty_like(local_values) for _ in range(self.world_size)]
        torch.distributed.all_gather(gathered, local_values, group=heartbeat.cpu_group)
        return torch.stack(gathered).tolist()

    def gather_lists(self, values: list) -> list:
        """Return the concatenated lists of all ranks, in the order of ranks. The items may be any plain objects."""
        if self.world_size == 1:
            return values
        parts: list = [None] * self.world_size
        torch.distributed.all_gather_object(parts, values, group=heartbeat.cpu_group)
        return [value for part in parts for value in part]

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value` on all ranks."""
        values = [value]
        if self.world_size > 1:
            torch.distributed.broadcast_object_list(values, group=heartbeat.cpu_group)
        return values[0]

    def start_max(self, value: Callable[[], int]) -> Callable[[], int]:
        """Start an asynchronous maximum of `value()` over all ranks.

        Returns a function that waits for the other ranks (not for their GPUs) and returns the result. A single process
        calls `value` only then.
        """
        if self.world_size == 1:
            return value
        answers, largest = np.array([value()], dtype=np.int64), torch.distributed.ReduceOp.MAX
        work = torch.distributed.all_reduce(torch.from_numpy(answers), largest, heartbeat.cpu_group, async_op=True)

        def answer() -> int:
            work.wait()
            return int(answers[0])

        return answer

    def agree(self, condition: bool) -> bool:
        """Return whether `condition` is true on every rank."""
        return not self.start_max(lambda: not condition)()

    def average_gradients(self, model: torch.nn.Module) -> None:
        """Average the gradients over all ranks, as DistributedDataParallel does during the last backward pass."""
        for p in model.parameters() if self.world_size > 1 else ():
            if p.grad is not None:
                torch.distributed.all_reduce(p.grad)
                p.grad /= self.world_size

    def try_or_oom(self, work: Callable, *arguments) -> bool:
        """Run `work(*arguments)`, and return False if any rank ran out of memory.

        `work` must not contain collectives: a rank that is out of memory would leave the others waiting.
        """
        succeeded = True
        try:
            work(*arguments)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            succeeded = False
        if self.agree(succeeded):
            return True
        if self.device.type in ("cuda", "mps"):  # cached blocks of the larger size are useless now
            getattr(torch, self.device.type).empty_cache()
        return False

    def synchronize(self) -> None:
        """Wait for the device to finish, for example before reading a clock."""
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).synchronize()


class Stopwatch:
    """Adds up the time from each `start` to the next `stop`.

    On a GPU it measures the time of the stream with events, so the host does not wait.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.spans: list[tuple] = []  # not yet added to the total
        self.total = 0.0

    def start(self) -> None:
        self.began = self._now()

    def stop(self) -> None:
        self.spans.append((self.began, self._now()))
        self._add_up()

    def take(self) -> float:
        """Return the seconds added since the last call. Spans that the device has not finished count next time."""
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
    """Return the peak memory in bytes: allocated on a GPU, resident in this process on a CPU, or 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, ru_maxrss would start at the parent process's memory
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


ONE_RANK = Runtime(torch.device("cpu"), torch.float32, False, [])  # a single process on a CPU


def setup(device: str, dtype: str, compile: str | bool, backend: str = "auto", fsdp: bool = False) -> Runtime:
    """Choose device and precision, and join the process group if `torchrun` started several processes.

    `fsdp` says whether to shard the model over the ranks. On a CPU, dtype "auto" gives float32, which is exact;
    `autotune.measure` finds the fastest dtype for training.

    Raises UserError for a device that this machine or this build of torch does not have.
    """
    notes: list[str] = []
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = choose_device(device, notes)
    if chosen.type == "cuda" and chosen.index is None:  # torch.cuda.set_device needs an index
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if world_size > 1:
        if backend == "auto" or chosen.type != "cuda":
            backend = "nccl" if chosen.type == "cuda" else "gloo"
        heartbeat.join(backend, rank, world_size)
        heartbeat.start(rank, world_size)
        notes.append(f"{world_size} processes over {backend}")
    if chosen.type == "cpu":
        set_malloc(lean=fsdp and world_size > 1)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")  # TF32 in float32 products, as in nanoGPT
    precision = choose_dtype(dtype, chosen, notes)
    if fsdp and world_size == 1:
        notes.append("not sharded (fsdp has no effect with one process; start several with torchrun)")
    elif fsdp and precision == torch.float16:
        raise UserError("fsdp=True does not support float16, which needs gradient scaling. Use --dtype=float32.")
    elif fsdp:
        notes.append("model sharded over them (fsdp)")
    compiled = choose_compile(compile, chosen, notes)
    return Runtime(chosen, precision, compiled, notes, rank, world_size, fsdp and world_size > 1)


def set_malloc(lean: bool) -> None:
    """Tell glibc's malloc how much freed memory to keep. A no-op with other C libraries.

    By default it keeps blocks of up to 32 MB for reuse. Otherwise they return to the kernel, which clears their pages
    again in each update, about a twelfth of the time. With `lean` it keeps only blocks of up to 1 MB: when FSDP gathers
    and frees parameters, or blocks are recomputed, fragmentation would use up the memory that these methods save.
    """
    with contextlib.suppress(OSError, TypeError, AttributeError):  # Windows, and other C libraries
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 20 if lean else 32 << 20)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def shutdown(code: int) -> int:
    """Exit all ranks together with `code`. In a single process, only return `code`.

    A barrier makes sure that no rank exits while another still communicates with it. os._exit skips the teardown of
    the process group, in which a rank aborts if its peer is a moment earlier.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        heartbeat.stop()
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
            notes.append("device mps (auto: this Mac's GPU)")
            return torch.device("mps")
        notes.append(f"device cpu (auto: torch sees no GPU; {torch.get_num_threads()} threads)")
        return torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device={device!r} is unknown to torch. Use auto, cpu, cuda, cuda:1 or mps.") from error
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device={device!r} is not supported. Use auto, cpu, cuda, cuda:1 or mps.")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        reason = "this torch was built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        raise UserError(f"device={device!r}, but {reason}. Use --device=auto or --device=cpu.")
    if chosen.type == "cuda" and (chosen.index or 0) >= (n := torch.cuda.device_count()):
        raise UserError(
            f"device={device!r}, but this machine has {n} CUDA devices. Use --device=cuda:0 to cuda:{n - 1}."
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device='mps', but torch sees no Apple GPU. Use --device=auto or --device=cpu.")
    notes.append(f"device {chosen}")
    return chosen


def choose_dtype(dtype: str, device: torch.device, notes: list[str]) -> torch.dtype:
    if dtype == "float16" and device.type != "cuda":
        notes.append(f"dtype float32 (float16 needs gradient scaling, which only CUDA has; this is {device.type})")
        return torch.float32
    if dtype != "auto":
        notes.append(f"dtype {dtype}")
        return getattr(torch, dtype)
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            notes.append("dtype bfloat16 (auto: this GPU supports it)")
            return torch.bfloat16
        notes.append("dtype float16 (auto: this GPU does not support bfloat16)")
        return torch.float16
    if device.type != "cpu":
        notes.append(f"dtype float32 (auto: {device.type})")
    return torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as in the settings, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def choose_compile(compile: str | bool, device: torch.device, notes: list[str]) -> bool:
    if compile != "auto":
        notes.append("compiled" if compile else "not compiled")
        return bool(compile)
    if device.type == "cuda":
        notes.append("compiled (auto)" if HAS_TRITON else "not compiled (auto: triton is not installed)")
        return HAS_TRITON
    if device.type == "cpu":
        notes.append("not compiled (auto: on a CPU it gains about a tenth, and takes half a minute to start)")
        return False
    notes.append(f"not compiled (auto: {device.type})")
    return False


def compile_or_eager(
    model: torch.nn.Module, trial: Callable[[torch.nn.Module], None], runtime: Runtime
) -> torch.nn.Module:
    """Return the compiled model, or, if compiling fails on any rank, `model` itself on all ranks, with one warning.

    `trial` runs one step with the run's shapes, because torch compiles at the first call. Running out of memory does
    not count as a failure to compile; the training loop handles it. With FSDP, a failure raises UserError, because the
    other ranks wait in the middle of the pass.
    """
    compiled, failed = torch.compile(model), False
    assert isinstance(compiled, torch.nn.Module), "a compiled module is a module"
    try:
        trial(compiled)
    except Exception as error:
        model.zero_grad(set_to_none=True)
        oom = out_of_memory(error)
        if oom and runtime.fsdp:
            raise
        failed = not oom
        first_line = str(error).strip().split("\n")[0][:200]
        reason = f"torch.compile failed ({type(error).__name__}: {first_line})"
        if failed and runtime.fsdp:
            raise UserError(f"{reason}. Fix the cause, or use --compile=False.") from error
        if failed and heartbeat.first_to_report(reason):
            print(f"warning: {reason}; running uncompiled", flush=True)
    if runtime.agree(not failed):
        return compiled
    torch._dynamo.reset()
    return model
