"""The gradient of an update, summed over micro-batches and processes."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from acorn import UserError
from acorn.data.loader import Batch, prefetch, updates
from acorn.data.mixture import Mixture
from acorn.distributed import heartbeat, runtime, sharding
from acorn.training.optim import step_if_finite
from model import GPT


class Accumulator:
    """Turns sequences into a gradient. It owns the loader, the compiled and distributed form of the model, the size of
    the micro-batches, which `auto_batch` reduces when memory runs out, and the scaler of float16 gradients.

    The gradient is that of the sum of the losses, divided by the number of targets of all micro-batches and processes.
    So an update is the same however its sequences are split.
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
        say: Callable[[str], None],
    ):
        self.raw_model = self.model = model
        self.data, self.dist, self.say = data, dist, say
        self.micro_batch, self.n_sequences, self.block_size = micro_batch, n_sequences, block_size
        self.seed, self.auto_batch = seed, auto_batch
        # without scaling, small gradients of float16 become 0
        self.scaler = torch.amp.GradScaler(dist.device.type, enabled=dist.dtype == torch.float16)
        self.waited = runtime.Stopwatch(dist.device)  # for processes that came later to their updates
        self.stream = None  # of updates, from the next one on

    def prepare(self, compile: bool) -> None:
        """Find micro-batches that fit in memory if `auto_batch` is on, compile the model, and distribute it."""
        while self.auto_batch and not self.dist.fits(self._trial, self.raw_model):
            self.raw_model.zero_grad(set_to_none=True)
            self._shrink()
        if compile:
            self.say("compiling ...")
            self.model = runtime.compile_or_eager(self.model, self._trial, self.dist)
        if self.dist.world_size > 1 and not self.dist.fsdp:
            device_ids = [self.dist.device.index] if self.dist.device.type == "cuda" else None
            # gradients alias DDP's buckets, which saves one copy of them
            self.model = DistributedDataParallel(self.model, device_ids, gradient_as_bucket_view=True)

    def backward(self, step: int, position: int) -> tuple[Tensor, Tensor]:
        """Compute the gradient of update `step` from the sequences from `position` on. On a GPU the host does not wait.

        Returns the sum of this process's losses in nats, and the number of targets of all processes; both of shape ().
        """
        dist = self.dist
        while True:
            if self.stream is None:
                following = updates(
                    self.data, dist, self.block_size, self.seed, self.n_sequences, self.micro_batch, position
                )
                self.stream = prefetch(following, dist.device)
            batches, n_targets = next(self.stream)
            heartbeat.note(step)
            self.waited.start()
            n_targets = dist.sum(torch.full((), n_targets, device=dist.device))  # torch.tensor would wait for the GPU
            self.waited.stop()
            scale = dist.world_size / n_targets.clamp(min=1)
            torch.manual_seed(hash((self.seed, step, dist.rank)))  # dropout depends on the step alone: exact to resume
            loss_sum = torch.zeros((), device=dist.device)
            if not self.auto_batch:
                with advice_on_memory(self.micro_batch, self.n_sequences):
                    self._passes(batches, scale, loss_sum)
                return loss_sum, n_targets
            if dist.fits(self._passes, batches, scale, loss_sum):  # in which no process waits for another
                dist.average_gradients(self.raw_model)
                return loss_sum, n_targets
            self.raw_model.zero_grad(set_to_none=True)
            self._shrink()
            self.stream = None

    def step(self, optimizers: list[torch.optim.Optimizer], grad_clip: float, skipped: Tensor) -> Tensor:
        """Clip the gradient and update the parameters, unless the gradient is non-finite: then `skipped` counts it (see
        `step_if_finite`). Returns the norm of the gradient before clipping, ()."""
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        parameters = self.raw_model.parameters()
        grad_norm = sharding.whole(torch.nn.utils.clip_grad_norm_(parameters, grad_clip or float("inf")))
        step_if_finite(optimizers, grad_norm, skipped)
        self.scaler.update()
        self.raw_model.zero_grad(set_to_none=True)
        return grad_norm

    def _passes(self, batches: list[Batch], scale: Tensor, loss_sum: Tensor) -> None:
        """Forward and backward through each micro-batch. DistributedDataParallel averages the gradients in the last
        backward pass, or, with auto_batch, not at all, since another process may be out of memory."""
        for i, batch in enumerate(batches):
            # FSDP averages in each pass: otherwise the gradients of the whole model would stay in every process
            if isinstance(self.model, DistributedDataParallel):
                self.model.require_backward_grad_sync = i == len(batches) - 1 and not self.auto_batch
            x, y, documents = batch.to(self.dist.device)
            with self.dist.autocast():
                loss = self.model(x, y, reduction="sum", documents=documents)[1]
            self.scaler.scale(loss * scale).backward()
            loss_sum += loss.detach()

    def _trial(self, model: torch.nn.Module) -> None:
        """A forward and backward pass of `model` over a micro-batch of zeros."""
        x = torch.zeros(self.micro_batch, self.block_size, dtype=torch.long, device=self.dist.device)
        documents = x.clone() if self.data.has_documents else None
        with self.dist.autocast():
            model(x, x.clone(), reduction="sum", documents=documents)[1].backward()
        self.raw_model.zero_grad(set_to_none=True)

    def _shrink(self) -> None:
        """Use smaller micro-batches, and more of them."""
        if self.micro_batch == 1:
            raise UserError("out of memory at batch size 1; reduce --block_size or the model")
        self.micro_batch = smaller(self.micro_batch)
        self.say(f"out of memory; using {batch_words(self.micro_batch, self.n_sequences)}, which changes no update")


def smaller(micro_batch: int) -> int:
    """Half of it; or, of an odd number above 1, the largest part that it can be divided into."""
    return micro_batch // next(n for n in range(2, micro_batch + 1) if micro_batch % n == 0)


def batch_words(micro_batch: int, n_sequences: int) -> str:
    """The settings of an update of so many sequences, for a person to copy."""
    return f"--batch_size={micro_batch} --gradient_accumulation_steps={n_sequences // micro_batch}"


@contextlib.contextmanager
def advice_on_memory(micro_batch: int, n_sequences: int):
    """Raise UserError with the settings that need less memory where it runs out inside."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not runtime.out_of_memory(error) or micro_batch == 1:
            raise
        raise UserError(
            f"out of memory with micro-batches of {micro_batch}; {batch_words(smaller(micro_batch), n_sequences)} "
            "makes the same updates in smaller ones, and --auto_batch=True finds a size that fits"
        ) from error
