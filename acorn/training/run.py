"""The state of a run, how it stops, and what it writes into its out_dir."""

import dataclasses
import functools
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

import numpy as np
import torch

from acorn import UserError, checkpoint, files, report, settings
from acorn.data.mixture import Mixture
from acorn.distributed import heartbeat, runtime, sharding
from acorn.distributed.runtime import Runtime
from acorn.evaluation.loss import windows_to_read
from acorn.evaluation.monitor import Tasks, seconds_to_measure
from acorn.inference.generate import sample_text
from acorn.training import ladder
from acorn.training.accumulate import Accumulator
from acorn.training.autotune import Arithmetic
from acorn.training.optim import rate_change, set_learning_rates
from acorn.training.progress import Console
from model import GPT

if TYPE_CHECKING:
    from train import TrainSettings


TIME_IS_UP, SIGNALED = 1, 2  # reasons to stop; the larger one prevails


@dataclass
class RunState:
    """The progress of a run. It is stored in state.json, so that a resumed run continues exactly."""

    step: int = 0  # updates made
    position: int = 0  # sequences drawn from the data
    seconds: float = 0.0  # training time, including earlier parts of the run
    bad_steps: int = 0  # consecutive updates, up to now, that were skipped because of a non-finite gradient
    skipped: int = 0  # total number of skipped updates
    best_step: int | None = None  # the step of the best checkpoint
    best_loss: float | None = None  # its validation loss
    val_loss: float | None = None  # the validation loss at step `evaluated_at`
    evaluated_at: int | None = None
    stale_evaluations: int = 0  # consecutive evaluations, up to the last one, that were not the best so far
    wandb_id: str | None = None
    data: str | None = None  # identity of the data that `position` refers to

    def start_clock(self) -> None:
        """Start counting `seconds`."""
        self.began = time.perf_counter() - self.seconds

    def tick(self) -> float:
        """Update `seconds`, and return it."""
        self.seconds = time.perf_counter() - self.began
        return self.seconds

    def reason_to_stop(self, max_minutes: float, signals: list[int]) -> int:
        """Return SIGNALED, TIME_IS_UP (0 minutes: no limit), or 0 if the run continues."""
        if signals:
            return SIGNALED
        return TIME_IS_UP if max_minutes and self.tick() >= 60 * max_minutes else 0

    def is_evaluation_due(self, s: "TrainSettings", stop: int) -> bool:
        """Return whether the run evaluates now, with `stop` the reason to stop here, or 0.

        A resumed run does not repeat its evaluation.
        """
        due = self.step % s.eval_interval == 0 or self.step == s.max_iters or stop == TIME_IS_UP
        return s.eval_only or (due and stop != SIGNALED and self.evaluated_at != self.step)

    def is_out_of_patience(self, early_stopping: int) -> bool:
        """Return whether the val loss has not improved for `early_stopping` evaluations (0: no limit)."""
        return 0 < early_stopping <= self.stale_evaluations and self.evaluated_at == self.step

    def ended(self, s: "TrainSettings") -> str | None:
        """Return why a resumed run has nothing left to do, and the setting that continues it; else None."""
        evaluated = self.evaluated_at == self.step
        if self.step > s.max_iters or (evaluated and self.step == s.max_iters):
            return f"has already made its {self.step} updates. Use a larger --max_iters to continue."
        if self.is_out_of_patience(s.early_stopping):
            return f"was ended by early_stopping={s.early_stopping}. Use a larger one, or 0, to continue."
        if evaluated and s.max_minutes and self.seconds >= 60 * s.max_minutes:
            return f"has already trained for max_minutes={s.max_minutes:g}. Use a larger one, or 0, to continue."
        return None


# by objective, the settings that change what the validation loss measures; eval_iters only changes its precision
LOSS_SETTINGS = {
    "tokens": [],
    "dpo": ["preference_loss", "dpo_beta", "label_smoothing", "simpo_gamma"],
    "distill": ["distill_temperature", "distill_weight"],
    "grpo": ["max_new_tokens"],
}


def resume(s: "TrainSettings", saved: dict, dist: Runtime) -> tuple[RunState, list[str]]:
    """Return the state of a run that resumes from a state.json, and notes on changed settings.

    The best checkpoint is forgotten if it no longer exists, or if its loss cannot be compared with those to come.
    """
    before = settings.build(type(s), settings.checked(type(s), saved["settings"]))
    state = RunState(**{f.name: saved[f.name] for f in dataclasses.fields(RunState) if f.name in saved})
    change = rate_change(before, s, state.step)
    notes = [] if change is None else [change]
    out_dir = Path(s.out_dir)
    if "best_step" not in saved and (best := checkpoint.read_pointer(out_dir / "best")):  # saved by an older version
        state.best_step = checkpoint.step_of(best)
    exists = state.best_step in [checkpoint.step_of(folder) for folder in checkpoint.step_folders(out_dir)]
    names = ["objective", "block_size", "document_mask", *LOSS_SETTINGS[s.objective]]
    changed = [name for name in names if getattr(before, name) != getattr(s, name)]
    if changed and state.best_loss is not None:
        notes.append(
            f"the val loss measures something else with {', '.join(f'{name}={getattr(s, name)}' for name in changed)}, "
            "so the best checkpoint is chosen anew"
            + (f". To keep the old one, copy {out_dir / f'step_{state.best_step:06d}'}." if exists else "")
        )
        state.stale_evaluations = 0
    n_before, n_now = (each.eval_iters * each.batch_size for each in (before, s))  # 0: the whole val split
    if n_now != n_before and not changed and state.best_loss is not None:
        now, earlier = (n or "all" for n in (n_now, n_before))
        notes.append(f"evaluations now measure {now} sequences of a split, earlier ones {earlier}: losses may differ")
    if changed or not dist.broadcast(exists):  # the ranks must agree
        state.best_step = state.best_loss = None
    return state, notes


class SkippedUpdates:
    """Counts skipped updates on the device, so that the host waits for the device only when it reads the counts."""

    def __init__(self, state: RunState, max_bad_steps: int, device: torch.device, log: Callable[[str], None]):
        self.state, self.max_bad_steps, self.log = state, max_bad_steps, log
        self.counts = torch.tensor([state.bad_steps, state.skipped], device=device)  # consecutive, total
        # the first step at which max_bad_steps can be reached
        self.read_at = state.step + max_bad_steps - state.bad_steps

    def read(self) -> None:
        """Copy the counts into the state, and log the updates that were skipped since the last call."""
        before = self.state.skipped
        self.state.bad_steps, self.state.skipped = self.counts.tolist()
        self.read_at = self.state.step + self.max_bad_steps - self.state.bad_steps
        if n_new := self.state.skipped - before:
            step = self.state.step - 1
            self.log(f"step {step}: non-finite gradient, skipped updates: {n_new} ({self.state.skipped} so far)")


def stop_at_signals(signals: list[int]) -> None:
    """Append SIGINT, SIGTERM and SIGHUP to `signals` when they arrive. The loop then saves and stops."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), functools.partial(request_stop, signals))


def request_stop(signals: list[int], number: int, frame) -> None:
    """Signal handler: request a checkpoint and a stop after this update.

    A second signal ends the process at once, but not under torchrun, which may deliver a signal twice and kills the
    ranks after 30 seconds. With several ranks, the loop prints the message after they have agreed.
    """
    signals.append(number)
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    signal.signal(signal.SIGINT, signal.SIG_IGN if launched else signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if launched else signal.SIG_DFL)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        text = "stopping after this update, with a checkpoint" + ("" if launched else "; a second signal stops at once")
        os.write(2, f"\n{text}\n".encode())  # not print, because the signal may have interrupted a print


def command(script: str, words: str, out_dir: str) -> str:
    """Return the command that runs `script` with `words` and `out_dir`, for the user to copy."""
    python, remark = "python", ""
    if script == "train.py" and "WORLD_SIZE" in os.environ:  # started by torchrun, which calls a node a group
        processes, nodes = (int(os.environ.get(name, 1)) for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"))
        python = f"torchrun --standalone --nproc_per_node={processes}"
        if nodes > 1:
            rendezvous = f"--rdzv_backend=c10d --rdzv_endpoint={os.environ['MASTER_ADDR']}:29500"
            python = f"torchrun --nnodes={nodes} --nproc_per_node={processes} {rendezvous}"
            remark = " # on every node"
    path = shlex.quote(str(Path(sys.argv[0]).with_name(script)))
    return " ".join(filter(None, [python, path, words, f"--out_dir={shlex.quote(out_dir)}"])) + remark


def start_writing(
    s: "TrainSettings", folders_before: list[Path], adapters: dict | None, state: RunState
) -> tuple[report.Metrics, TextIO]:
    """Lock the out_dir, and open metrics.jsonl and wandb.

    Returns the metrics and the lock file; closing the file releases the lock. Raises UserError if another run has
    locked the out_dir or has written into it in the meantime.
    """
    out_dir = Path(s.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    lock = files.lock(out_dir, "training into")
    if checkpoint.step_folders(out_dir) != folders_before:
        raise UserError(f"another run wrote into {out_dir} while this run was starting. Check it, and start again.")
    if s.init_from != "resume":
        checkpoint.remove_run(out_dir)  # without overwrite, there can only be a run without a checkpoint
        for needed in (adapters["base"] if adapters else "", s.reference, s.teacher):
            if needed:
                checkpoint.pin(Path(needed), out_dir)
    wandb_run = tensorboard = None
    if s.tensorboard_log:
        tensorboard = report.start_tensorboard(out_dir, state.step, state.evaluated_at)
    if s.wandb_log:
        wandb_run = report.start_wandb(
            s.wandb_project, s.wandb_run_name, dataclasses.asdict(s), out_dir, state.wandb_id
        )
        state.wandb_id = wandb_run.id
    return report.Metrics(out_dir, state.step, state.evaluated_at, wandb_run, tensorboard), lock


def saved_state(
    s: "TrainSettings",
    state: RunState,
    data: Mixture,
    adapters: dict | None,
    arithmetic: Arithmetic,
    accumulator: Accumulator,
    skipped: SkippedUpdates,
) -> dict:
    """Return the content of state.json, except for the model's configuration and the hashes of the files."""
    skipped.read()
    state.tick()
    return {
        "settings": dataclasses.asdict(s),
        "tokenizer": data.tokenizer.to_dict(),
        "lora": adapters,
        "arithmetic": dataclasses.asdict(arithmetic),
        "scaler": accumulator.scaler.state_dict(),
        "objective": accumulator.objective.hashes,
        **dataclasses.asdict(state),
        "launch": heartbeat.launch_id(),
    }


def sample(model: GPT, tokenizer, seed: int) -> str:
    """Return a text that the model continues from the start of a document, with lines around it."""
    try:
        text = sample_text(model, tokenizer, 200, seed)
    except UserError as error:  # non-finite logits must not end a run here
        text = f"none: {error}"
    return f"{text}\n---"


def finish(
    s: "TrainSettings",
    state: RunState,
    checkpoints: checkpoint.CheckpointManager,
    console: Console,
    stop: int,
    chat: bool,
) -> int:
    """Save the last update if it is not saved yet, and say how the run ended. Returns the exit code.

    `stop` is the reason to stop, or 0. `chat`: the data has conversations.
    """
    failure = checkpoints.finish()
    console.close()
    words = f"--reward={shlex.quote(s.reward)} " if s.reward.endswith(".py") else ""
    words += "--init_from=resume"
    resuming = command("train.py", words, s.out_dir)
    if failure is not None:
        advice = f"resume with: {resuming}" if checkpoint.step_folders(Path(s.out_dir)) else "start again."
        return console.fail(f"the last updates are not saved ({failure}). Fix the cause, and {advice}", 2)
    if stop == SIGNALED:
        console.log(f"stopped at step {state.step}, saved. Resume with: {resuming}")
        return 128 + (console.signals[0] if console.signals else signal.SIGTERM)
    if state.step < s.max_iters:
        reason, option = f"it has trained for max_minutes={s.max_minutes:g}", "--max_minutes=0"
        if stop != TIME_IS_UP:
            reason = f"the val loss has not improved for {state.stale_evaluations} evaluations (early_stopping)"
            option = "--early_stopping=0"
        continuing = command("train.py", f"{words} {option}", s.out_dir)
        console.log(f"ended at step {state.step}: {reason}. Continue with: {continuing}")
    best = "none" if state.best_loss is None else f"{state.best_loss:.4f}"
    sampling = command("sample.py", "--chat=True" if chat else "", s.out_dir)
    console.log(f"done, best val loss {best}. Sample with: {sampling}")
    return 0


def dry_run(
    s: "TrainSettings",
    accumulator: Accumulator,
    optimizers: list[torch.optim.Optimizer],
    state: RunState,
    token_bytes: np.ndarray,
    tasks: Tasks,
) -> str:
    """Time four updates after one for warm-up, and an evaluation of one micro-batch per rank and dataset.

    Returns a description of the memory and time that the whole run would take.
    """
    dist, data = accumulator.dist, accumulator.data
    skipped = torch.zeros(2, dtype=torch.long, device=dist.device)  # not reported
    accumulator.raw_model.train()
    for i in range(5):
        accumulator.backward(state.step + i, state.position + i * accumulator.n_sequences)
        set_learning_rates(s, optimizers, state.step + i)
        accumulator.step(optimizers, s.grad_clip, skipped)
        if i == 0:
            dist.synchronize()
            clock = time.perf_counter()
    dist.synchronize()
    per_update = (time.perf_counter() - clock) / 4
    clock, n = time.perf_counter(), accumulator.micro_batch * dist.world_size
    accumulator.objective.evaluate(data, "val", accumulator.micro_batch, s.block_size, n, token_bytes)
    per_sequence = (time.perf_counter() - clock) / rows_to_read(data, "val", s.block_size, n)
    measuring = seconds_to_measure(tasks, accumulator.raw_model, data.tokenizer, dist, accumulator.micro_batch)
    frozen = accumulator.objective.frozen_bytes()
    tokens = accumulator.n_sequences * s.block_size
    rate = accumulator.raw_model.flops_per_token() * tokens / per_update
    predicted = ladder.forecast(s, sys.argv[1:], data.vocab_size, data.identity(), rate)
    n_updates = s.max_iters - state.step
    if s.max_minutes:
        n_updates = min(n_updates, math.ceil(max(0, 60 * s.max_minutes - state.seconds) / per_update))
    text = estimate(s, data, accumulator.raw_model, n_updates, per_update, per_sequence, measuring, frozen)
    return "\n".join(filter(None, [text, predicted, "this was a dry run: nothing was written"]))


def rows_to_read(data: Mixture, split: Literal["train", "val"], block_size: int, most: int) -> int:
    """Return how many rows of all datasets an evaluation of a split reads, see `windows_to_read`."""
    return sum(windows_to_read(dataset, split, block_size, most) for dataset in data.datasets)


def estimate(
    s: "TrainSettings",
    data: Mixture,
    model: GPT,
    n_updates: int,
    dt: float,
    per_sequence: float,
    measuring: float,
    frozen: int,
) -> str:
    """Describe the memory and time of `n_updates` updates and their evaluations.

    An update takes `dt` seconds, the evaluation of a sequence `per_sequence` seconds, and all records of eval_choices
    and eval_pairs `measuring` seconds. The reference or the teacher takes `frozen` bytes.
    """
    most = s.eval_iters * s.batch_size
    n_sequences = rows_to_read(data, "train", s.block_size, most) + rows_to_read(data, "val", s.block_size, most)
    evaluating = (per_sequence * n_sequences + measuring) * (math.ceil(n_updates / s.eval_interval) + 1)
    held = [(p, sharding.local(p).nbytes) for p in model.parameters()]
    # a trained parameter has a gradient and up to two moments; the moments are saved, and with LoRA no frozen weights
    fixed = sum(n_bytes * (4 if p.requires_grad else 1) for p, n_bytes in held) + frozen
    copied = sum(n_bytes * (3 if p.requires_grad else 0 if s.lora_rank else 1) for p, n_bytes in held)
    tokens = s.gradient_accumulation_steps * s.batch_size * s.block_size
    peak_memory = runtime.peak_memory(next(model.parameters()).device)
    # with rewards, most of the time is spent on sampling completions, whose lengths differ
    rate = "" if s.objective == "grpo" else f", {tokens / dt:,.0f} tokens/s"
    included = f", including {report.size(frozen)} for the {'teacher' if s.teacher else 'reference'}" if frozen else ""
    return (
        f"memory: up to {report.size(fixed)} for parameters, gradients and optimizer moments{included}; "
        f"the process used {report.size(peak_memory)} at its peak; saving a checkpoint needs up to "
        f"{report.size(copied)} more host memory\n"
        f"time: {1000 * dt:.0f} ms per update{rate}; about {report.duration(n_updates * dt)} for the updates and "
        f"{report.duration(evaluating)} for the evaluations"
    )
