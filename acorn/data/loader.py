"""Batches as tensors, read by a background thread while the device computes on the previous ones."""

import functools
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from acorn.data.batches import count_targets
from acorn.data.mixture import Mixture
from acorn.distributed.runtime import Runtime


class Batch(NamedTuple):
    """Token sequences; every tensor has the shape (B, T), and is int64 unless it says otherwise."""

    x: Tensor  # inputs
    y: Tensor  # targets; -1 is masked
    documents: Tensor | None  # document number of each token within its row; None: attention spans the whole row
    advantages: Tensor | None = None  # GRPO: float32, the advantage of the completion to which each target belongs

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on the device. The copy to a GPU, from pinned memory, is asynchronous."""
        non_blocking = device.type == "cuda"
        x, y = (t.to(device, non_blocking=non_blocking) for t in (self.x, self.y))
        optional = (self.documents, self.advantages)
        return Batch(x, y, *(None if t is None else t.to(device, non_blocking=non_blocking) for t in optional))


def make_batch(arrays: tuple, device: torch.device) -> Batch:
    """Return a batch in host memory, pinned for a CUDA `device`, from arrays as in acorn/data/batches.py."""
    to_tensor = pinned if device.type == "cuda" else torch.from_numpy
    x, y, documents = arrays
    return Batch(to_tensor(x), to_tensor(y), None if documents is None else to_tensor(documents))


def pinned(array: np.ndarray) -> Tensor:
    """Copy the array into pinned memory. numpy copies in the calling thread; torch would start more threads."""
    tensor = torch.empty_like(torch.from_numpy(array), pin_memory=True)
    tensor.numpy()[...] = array
    return tensor


def updates(
    data: Mixture,
    dist: Runtime,
    block_size: int,
    seed: int,
    n_sequences: int,
    micro_batch: int,
    position: int,
) -> Iterator[tuple[list[Batch], int]]:
    """Yield, for each update from `position` on, endlessly: this rank's micro-batches of `micro_batch` sequences, and
    the number of their targets (see `count_targets`).

    An update consumes the next `n_sequences` sequences of the data. Ranks take its micro-batches in turn.
    """
    for start in itertools.count(position, n_sequences):
        batches, n_targets = [], 0
        for first in range(start + dist.rank * micro_batch, start + n_sequences, dist.world_size * micro_batch):
            arrays = data.sample(block_size, first, micro_batch, seed)
            batches.append(make_batch(arrays, dist.device))
            n_targets += count_targets(arrays[1], arrays[2], data.has_pairs)
        yield batches, n_targets


def prefetch(items: Iterator, device: torch.device) -> Iterator:
    """Yield the items. A background thread computes the next item while the caller uses the current one; its exceptions
    are raised in place of the item. On a CPU `device` no thread is used, because it would compete for the cores."""
    if device.type == "cpu":
        yield from items
        return
    # the current device is per thread, and pinning memory would create a context on GPU 0
    on_device = functools.partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    with ThreadPoolExecutor(1, "loader", on_device) as thread:
        pending = thread.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = thread.submit(next, items, None)
            yield item
