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
    """Saves the checkpoints of a run through a `Writer`, and keeps `state.best_loss` up to date.

    Saving is asynchronous. If it fails, `state.best_loss` returns to that of the best checkpoint on the disk.
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
        self.best_before = state.best_loss  # without the checkpoint that is being written

    def evaluated(self, val_loss: float) -> tuple[bool, bool]:
        """Record the validation loss of this step.

        Returns whether it is the best one, and whether the previous checkpoint failed, so that this one is needed.
        """
        failed = not self.writer.wait()
        if failed:
            self.state.best_loss = self.best_before
        self.best_before = best_loss = self.state.best_loss
        best = math.isfinite(val_loss) and (best_loss is None or val_loss < best_loss)
        self.state.evaluated_at, self.state.val_loss = self.state.step, val_loss
        self.state.stale_evaluations = 0 if best else self.state.stale_evaluations + 1
        if best:
            self.state.best_loss = val_loss
        return best, failed

    def save(self, best: bool = False) -> None:
        """Start saving a checkpoint of this step."""
        self.writer.save(self.model, self.optimizers, self.contents(), best)
        self.saved_at = self.state.step

    def finish(self) -> str | None:
        """Save this step if it is not saved yet, and wait for the disk. Returns the reason of a failure, or None."""
        if self.saved_at != self.state.step:
            if not self.writer.wait():
                self.state.best_loss = self.best_before
            self.save()
        self.writer.wait()
        return self.writer.failure
