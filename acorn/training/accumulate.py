"""Compute the gradient of an update, summed over micro-batches and ranks."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from acorn import UserError, out_of_memory
from acorn.data.loader import Batch, prefetch, updates
from acorn.data.mixture import Mixture
from acorn.distributed import heartbeat, runtime, sharding
from acorn.training.objective import Objective
from acorn.training.optim import step_if_finite
from model import GPT


class Accumulator:
    """Computes gradients from sequences.

    It owns the loader, the compiled and distributed model, the micro-batch size (which `auto_batch` reduces when memory
    runs out), and the scaler of float16 gradients. The loss of the objective is summed and divided by the number of
    targets (of pairs, for preferences) in all micro-batches and on all ranks, so an update does not depend on how its
    sequences are split. `figures` are those of the last update on this rank (see `Objective.loss`).
    """

    def __init__(
        self,
        model: GPT,
        data: Mixture,
        dist: runtime.Runtime,
        micro_batch: int,
        n_sequences: int,
        block_size: int,
        seed: int,
        auto_batch: bool,
        log: Callable[[str], None],
        objective: Objective,
    ):
        self.raw_model = model
        self.model: torch.nn.Module = model  # compiled and distributed
        self.objective, self.figures = objective, objective.no_figures()
        self.data, self.dist, self.log = data, dist, log
        self.micro_batch, self.n_sequences, self.block_size = micro_batch, n_sequences, block_size
        self.seed, self.auto_batch = seed, auto_batch
        # without scaling, small float16 gradients underflow to 0
        self.scaler = torch.amp.GradScaler(dist.device.type, enabled=dist.dtype == torch.float16)
        self.waited = runtime.Stopwatch(dist.device)  # time spent waiting for slower ranks
        self.stream: Iterator | None = None  # of updates, starting at the next one

    def prepare(self, compile: bool) -> None:
        """Find a micro-batch size that fits in memory (with `auto_batch`), compile the model, and distribute it."""
        while self.auto_batch and not self.dist.try_or_oom(self._trial, self.raw_model):
            self.raw_model.zero_grad(set_to_none=True)
            self._shrink()
        if compile:
            self.log("compiling ...")
            self.model = runtime.compile_or_eager(self.model, self._trial, self.dist)
        if self.dist.world_size > 1 and not self.dist.fsdp:
            device_ids = [self.dist.device.index] if self.dist.device.type == "cuda" else None
            # gradients alias DDP's buckets, which saves one copy
            self.model = DistributedDataParallel(self.model, device_ids, gradient_as_bucket_view=True)

    def backward(self, step: int, position: int) -> tuple[Tensor, Tensor]:
        """Compute the gradient of update `step` from the sequences at `position`. The host does not wait for a GPU.

        Returns the sum of this rank's losses in nats and the number of targets on all ranks, both of shape ().
        """
        dist = self.dist
        while True:
            batches, n_own, figures = self._next_update(position)
            heartbeat.report_step(step)
            self.waited.start()
            n_targets = dist.sum(torch.full((), n_own, device=dist.device))  # torch.tensor would wait for the GPU
            self.waited.stop()
            scale = dist.world_size / n_targets.clamp(min=1)
            torch.manual_seed(hash((self.seed, step, dist.rank)))  # dropout depends only on these, so resuming is exact
            loss_sum, self.figures = torch.zeros((), device=dist.device), figures
            if not self.auto_batch:
                with advice_on_memory(self.micro_batch, self.n_sequences):
                    self._forward_backward(batches, scale, loss_sum)
                return loss_sum, n_targets
            if dist.try_or_oom(self._forward_backward, batches, scale, loss_sum):  # contains no collectives
                dist.average_gradients(self.raw_model)
                return loss_sum, n_targets
            self.raw_model.zero_grad(set_to_none=True)
            self._shrink()
            self.stream = None

    def _next_update(self, position: int) -> tuple[list[Batch], int, Tensor]:
        """Return this rank's micro-batches of the update at `position`, the number of their targets, and figures."""
        if self.objective.rollouts is not None:
            batches, n_targets, values = self.objective.rollouts.update(position, self.n_sequences, self.micro_batch)
            return batches, n_targets, self.objective.figures(values)
        if self.stream is None:
            stream = updates(
                self.data, self.dist, self.block_size, self.seed, self.n_sequences, self.micro_batch, position
            )
            self.stream = prefetch(stream, self.dist.device)
        return *next(self.stream), self.objective.no_figures()

    def step(self, optimizers: list[torch.optim.Optimizer], grad_clip: float, skipped: Tensor) -> Tensor:
        """Clip the gradient and update the parameters. Returns the gradient norm before clipping, of shape ().

        If the gradient is non-finite, the update is skipped and counted in `skipped` (see `step_if_finite`).
        """
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        parameters = self.raw_model.parameters()
        grad_norm = sharding.whole(torch.nn.utils.clip_grad_norm_(parameters, grad_clip or float("inf")))
        step_if_finite(optimizers, grad_norm, skipped)
        self.scaler.update()
        self.raw_model.zero_grad(set_to_none=True)
        return grad_norm

    def _forward_backward(self, batches: list[Batch], scale: Tensor, loss_sum: Tensor) -> None:
        """Run forward and backward passes over all micro-batches.

        DDP averages the gradients in the last backward pass. With auto_batch it does not, because another rank may be
        out of memory; `backward` averages them afterwards. FSDP averages them in every backward pass, so that no rank
        has to keep the gradients of the whole model.
        """
        for i, batch in enumerate(batches):
            if isinstance(self.model, DistributedDataParallel):
                self.model.require_backward_grad_sync = i == len(batches) - 1 and not self.auto_batch
            with self.dist.autocast():
                loss, figures = self.objective.loss(self.model, batch.to(self.dist.device))
            self.scaler.scale(loss * scale).backward()
            loss_sum += loss.detach()
            self.figures += figures

    def _trial(self, model: torch.nn.Module) -> None:
        """Run a forward and backward pass of `model` over a micro-batch of zeros."""
        batch = self.objective.trial_batch(self.micro_batch, self.block_size, self.data.has_documents)
        with self.dist.autocast():
            self.objective.loss(model, batch)[0].backward()
        self.raw_model.zero_grad(set_to_none=True)

    def _shrink(self) -> None:
        """Use smaller micro-batches, and more of them. Raises UserError at size 1."""
        if self.micro_batch == 1:
            raise UserError("out of memory at batch size 1. Reduce --block_size or the model.")
        self.micro_batch = smaller(self.micro_batch)
        self.log(
            f"out of memory; using {batch_words(self.micro_batch, self.n_sequences)}, which does not change the updates"
        )


def smaller(micro_batch: int) -> int:
    """Return the largest proper divisor of `micro_batch` (above 1): half of an even number."""
    return micro_batch // next(n for n in range(2, micro_batch + 1) if micro_batch % n == 0)


def batch_words(micro_batch: int, n_sequences: int) -> str:
    """Return the settings of an update of `n_sequences` in micro-batches of this size, for the user to copy."""
    return f"--batch_size={micro_batch} --gradient_accumulation_steps={n_sequences // micro_batch}"


@contextlib.contextmanager
def advice_on_memory(micro_batch: int, n_sequences: int):
    """Context manager that turns an out-of-memory error into a UserError with settings that need less memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error) or micro_batch == 1:
            raise
        raise UserError(
            f"out of memory at batch_size={micro_batch}. Use {batch_words(smaller(micro_batch), n_sequences)} for the "
            "same updates in less memory, or --auto_batch=True to find a size that fits."
        ) from error
