"""A run: where it stands, how it stops, and what it writes into its out_dir."""

import dataclasses
import functools
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
import torch

from acorn import UserError, checkpoint, files, printable, report
from acorn.data.batches import samples_per_epoch
from acorn.data.mixture import Mixture
from acorn.distributed import runtime, sharding
from acorn.evaluation.loss import evaluate_mixture
from acorn.training.accumulate import Accumulator
from acorn.training.optim import learning_rate_at
from model import GPT

if TYPE_CHECKING:
    from train import TrainSettings


@dataclass
class RunState:
    """Where a run stands. state.json holds all of it, so a resumed run continues exactly."""

    step: int = 0  # updates made
    position: int = 0  # sequences drawn from the data
    seconds: float = 0.0  # of training, in all of its parts
    bad_steps: int = 0  # updates in a row up to now that were skipped, since their gradient was non-finite
    skipped: int = 0  # such updates in all
    best_loss: float | None = None  # the lowest validation loss that was saved
    val_loss: float | None = None  # the validation loss at step `evaluated_at`
    evaluated_at: int | None = None
    wandb_id: str | None = None
    data: str | None = None  # the identity of the data, which `position` belongs to

    @classmethod
    def from_saved(cls, saved: dict) -> "RunState":
        """The state in the content of a state.json; the first state of a run where that is empty."""
        return cls(**{f.name: saved[f.name] for f in dataclasses.fields(cls) if f.name in saved})

    def start_clock(self) -> None:
        """Count `seconds` from now on."""
        self.began = time.perf_counter() - self.seconds

    def tick(self) -> float:
        """Bring `seconds` up to date and return it."""
        self.seconds = time.perf_counter() - self.began
        return self.seconds

    def is_finished(self, max_iters: int) -> bool:
        return self.step > max_iters or self.evaluated_at == self.step == max_iters


class SkippedUpdates:
    """Counts the updates that were skipped, on the device, so that the host waits for it only to read the counts."""

    def __init__(self, state: RunState, max_bad_steps: int, device: torch.device):
        self.state, self.max_bad_steps = state, max_bad_steps
        self.counts = torch.tensor([state.bad_steps, state.skipped], device=device)  # in a row, and in all
        self.read_at = state.step + max_bad_steps - state.bad_steps  # the first step that can have too many in a row

    def read(self) -> int:
        """Copy the counts into the state and return how many updates were skipped since the last call."""
        before = self.state.skipped
        self.state.bad_steps, self.state.skipped = self.counts.tolist()
        self.read_at = self.state.step + self.max_bad_steps - self.state.bad_steps
        return self.state.skipped - before


def say(is_main: bool, signals: list[int], text: str) -> None:
    """Print a line on the main process. If its reader went away, as in `python train.py | head`, the run stops as at
    SIGTERM; a log file on a full disk ends no run."""
    if not is_main:
        return
    try:
        print(printable(text), flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        signals.append(signal.SIGTERM)
    except OSError:
        pass


def stop_at_signals(signals: list[int]) -> None:
    """Append SIGINT, SIGTERM and SIGHUP to `signals` when they arrive; the loop then saves and stops."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), functools.partial(request_stop, signals))


def request_stop(signals: list[int], number: int, frame) -> None:
    """Ask for a checkpoint and an end after this update. A second signal ends the process at once, except under
    torchrun, which passes on signals that its processes may have received already, and kills them after 30 seconds.
    Several processes first have to agree, so the loop prints what follows."""
    signals.append(number)
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    signal.signal(signal.SIGINT, signal.SIG_IGN if launched else signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if launched else signal.SIG_DFL)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        words = "stopping after this update, with a checkpoint" + ("" if launched else "; once more to stop at once")
        os.write(2, f"\n{words}\n".encode())  # not print, which may itself be what was interrupted


def command(script: str, words: str, out_dir: str) -> str:
    """The command that goes on with `out_dir`, for a person to copy."""
    python, remark = "python", ""
    if script == "train.py" and "WORLD_SIZE" in os.environ:  # by torchrun, which calls a node a group
        processes, nodes = (int(os.environ.get(name, 1)) for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"))
        python = f"torchrun --standalone --nproc_per_node={processes}"
        if nodes > 1:
            meet = f"--rdzv_backend=c10d --rdzv_endpoint={os.environ['MASTER_ADDR']}:29500"
            python = f"torchrun --nnodes={nodes} --nproc_per_node={processes} {meet}"
            remark = " # on every node"
    where = shlex.quote(str(Path(sys.argv[0]).with_name(script)))
    return " ".join(filter(None, [python, where, words, f"--out_dir={shlex.quote(out_dir)}"])) + remark


def start_writing(
    s: "TrainSettings", folders_before: list[Path], adapters: dict | None, state: RunState
) -> tuple[report.Metrics, TextIO]:
    """Take possession of the out_dir, and open metrics.jsonl and wandb. Returns them with the lock, which is held until
    its file is closed. Raises UserError where another run came first."""
    out_dir = Path(s.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    lock = files.lock(out_dir, "training into")
    if checkpoint.step_folders(out_dir) != folders_before:
        raise UserError(f"another run wrote into {out_dir} while this one started; look at it, and start again")
    if s.init_from != "resume":
        checkpoint.remove_run(out_dir)  # only with overwrite does this find more than a run without a checkpoint
        if adapters:
            checkpoint.pin(Path(adapters["base"]), out_dir)
    wandb_run = None
    if s.wandb_log:
        wandb_run = report.start_wandb(
            s.wandb_project, s.wandb_run_name, dataclasses.asdict(s), out_dir, state.wandb_id
        )
        state.wandb_id = wandb_run.id
    return report.Metrics(out_dir, state.step, state.evaluated_at, wandb_run), lock


def set_learning_rates(s: "TrainSettings", optimizers: list[torch.optim.Optimizer], step: int) -> float:
    """Set the learning rates of update `step`, and return that of `learning_rate`; the others scale with it."""
    lr = s.learning_rate
    if s.decay_lr:
        horizon = s.lr_decay_iters or s.max_iters
        lr = learning_rate_at(step, s.lr_schedule, s.learning_rate, s.min_lr, s.warmup_iters, horizon, s.cooldown_frac)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["peak_lr"] * lr / s.learning_rate if s.learning_rate else 0.0
    return lr


def dry_run(
    s: "TrainSettings",
    accumulator: Accumulator,
    optimizers: list[torch.optim.Optimizer],
    state: RunState,
    token_bytes: np.ndarray,
) -> str:
    """Make five updates, the first one to warm up, and an evaluation of one micro-batch in each process. Returns what
    the whole run would take, for a person to read."""
    dist, data, skipped = accumulator.dist, accumulator.data, SkippedUpdates(state, 5, accumulator.dist.device)
    accumulator.raw_model.train()
    for i in range(5):
        accumulator.backward(state.step + i, state.position + i * accumulator.n_sequences)
        set_learning_rates(s, optimizers, state.step + i)
        accumulator.step(optimizers, s.grad_clip, skipped.counts)
        if i == 0:
            dist.synchronize()
            clock = time.perf_counter()
    dist.synchronize()
    per_update = (time.perf_counter() - clock) / 4
    clock, n = time.perf_counter(), accumulator.micro_batch * dist.world_size
    evaluate_mixture(accumulator.raw_model, data, "val", dist, accumulator.micro_batch, s.block_size, n, token_bytes)
    per_sequence = (time.perf_counter() - clock) / n
    return foresee(s, data, accumulator.raw_model, s.max_iters - state.step, per_update, per_sequence)


def foresee(s: "TrainSettings", data: Mixture, model: GPT, n_updates: int, dt: float, per_sequence: float) -> str:
    """What so many updates of `dt` seconds each, and their evaluations, at `per_sequence` seconds, would take, for a
    person to read."""
    whole = max(samples_per_epoch(dataset.val, s.block_size) for dataset in data.datasets)
    n_sequences = 2 * (s.eval_iters * s.batch_size or whole)  # of each dataset, in both splits
    evaluating = per_sequence * n_sequences * (math.ceil(n_updates / s.eval_interval) + 1)
    held = [(p, sharding.local(p).nbytes) for p in model.parameters()]
    fixed = sum(n_bytes * (4 if p.requires_grad else 1) for p, n_bytes in held)
    copied = sum(n_bytes * (3 if p.requires_grad else 0 if s.lora_rank else 1) for p, n_bytes in held)
    tokens = s.gradient_accumulation_steps * s.batch_size * s.block_size
    peak_memory = runtime.peak_memory(next(model.parameters()).device)
    return (
        f"memory: {report.size(fixed)} at most for parameters, gradients and optimizer moments; "
        f"at its peak the process used {report.size(peak_memory)}; each checkpoint is copied into up to "
        f"{report.size(copied)} more of main memory\n"
        f"time: {1000 * dt:.0f} ms an update, {tokens / dt:,.0f} tokens/s; about "
        f"{report.duration(n_updates * dt)} for the updates and {report.duration(evaluating)} for the evaluations\n"
        "this was a dry run: nothing was written"
    )
