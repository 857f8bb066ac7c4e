"""Decide what is saved, and which checkpoint is the best."""

import math
from collections.abc import Callable
from typing import Protocol

import torch

from acorn.checkpoint.save import Writer
from model import GPT


class Progress(Protocol):
    """What the manager needs of the state of a run."""

    step: int
    val_loss: float | None
    best_loss: float | None
    evaluated_at: int | None


class CheckpointManager:
    """Saves the checkpoints of a run through a `Writer` and keeps track of the best one. Saving is asynchronous: if it
    fails, `state.best_loss` returns to that of the best checkpoint on the disk.

    `contents` returns what state.json should hold besides the model's configuration and the hashes of the files.
    """

    def __init__(
        self,
        writer: Writer,
        model: GPT,
        optimizers: list[torch.optim.Optimizer],
        state: Progress,
        contents: Callable[[], dict],
        resumed: bool,
    ):
        self.writer, self.model, self.optimizers = writer, model, optimizers
        self.state, self.contents = state, contents
        self.saved_at = state.step if resumed else None
        self.best_before = state.best_loss  # without the checkpoint that is being written

    def evaluated(self, val_loss: float) -> tuple[bool, bool]:
        """Note the validation loss of this step. Returns whether it is the best, and whether the checkpoint before
        could not be written, so that this one has to be."""
        failed = not self.writer.wait()
        if failed:
            self.state.best_loss = self.best_before
        self.best_before = best_loss = self.state.best_loss
        best = math.isfinite(val_loss) and (best_loss is None or val_loss < best_loss)
        self.state.evaluated_at, self.state.val_loss = self.state.step, val_loss
        if best:
            self.state.best_loss = val_loss
        return best, failed

    def save(self, best: bool = False) -> None:
        """Begin to save a checkpoint of this step."""
        self.writer.save(self.model, self.optimizers, self.contents(), best)
        self.saved_at = self.state.step

    def finish(self) -> str | None:
        """Save this step, unless it is saved, and wait for the disk. Returns why that failed, where it did."""
        if self.saved_at != self.state.step:
            if not self.writer.wait():
                self.state.best_loss = self.best_before
            self.save()
        self.writer.wait()
        return self.writer.failure
