"""Save the checkpoints of a run, and keep track of the best one."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from acorn.checkpoint.save import Writer
from model import GPT

if TYPE_CHECKING:
    from acorn.training.run import RunState


class CheckpointManager:
    """Saves the checkpoints of a run through a `Writer`, and records the best one in `state`.

    Saving is asynchronous. If a save fails, the best checkpoint in `state` is reset to the one on disk.
    `contents` returns the content of state.json, except for the model's configuration and the hashes of the files.
    """

    def __init__(
        self,
        writer: Writer,
        model: GPT,
        optimizers: list[torch.optim.Optimizer],
        state: "RunState",
        contents: Callable[[], dict],
        resumed: bool,
    ):
        self.writer, self.model, self.optimizers = writer, model, optimizers
        self.state, self.contents = state, contents
        self.saved_at = state.step if resumed else None
        self.best_before = state.best_step, state.best_loss  # without the checkpoint that is being written

    def record_evaluation(self, val_loss: float) -> tuple[bool, bool]:
        """Record the validation loss of this step.

        Returns whether it is the best one, and whether the previous checkpoint failed, so that this one is needed. The
        weights before the first update are not saved, so their loss does not count.
        """
        state = self.state
        failed = not self.wait()
        state.evaluated_at, state.val_loss = state.step, val_loss
        if state.step == 0:
            return False, failed
        self.best_before = state.best_step, state.best_loss
        best = math.isfinite(val_loss) and (state.best_loss is None or val_loss < state.best_loss)
        state.stale_evaluations = 0 if best else state.stale_evaluations + 1
        if best:
            state.best_step, state.best_loss = state.step, val_loss
        return best, failed

    def wait(self) -> bool:
        """Wait for the disk. Return whether the previous checkpoint was written; if not, reset the best checkpoint in
        `state`."""
        written = self.writer.wait()
        if not written:
            self.state.best_step, self.state.best_loss = self.best_before
        return written

    def save(self) -> None:
        """Start saving a checkpoint of this step."""
        self.writer.save(self.model, self.optimizers, self.contents())
        self.saved_at = self.state.step

    def finish(self) -> str | None:
        """Save this step if it is not saved yet, and wait for the disk. Returns the reason of a failure, or None."""
        if self.saved_at != self.state.step:
            self.wait()
            self.save()
        self.wait()
        return self.writer.failure
