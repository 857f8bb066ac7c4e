"""Batches as tensors, read by a background thread while the device works on the ones before."""

import functools
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from acorn.data.mixture import Mixture
from acorn.distributed.runtime import Runtime


class Batch(NamedTuple):
    """Sequences of tokens, all of shape (B, T) and int64."""

    x: Tensor  # inputs
    y: Tensor  # targets; -1 is masked
    documents: Tensor | None  # the document of each token, numbered within its row; None: attention sees the whole row

    def to(self, device: torch.device) -> "Batch":
        """The batch on the device. A GPU copies it from pinned memory while the host goes on."""
        non_blocking = device.type == "cuda"
        return Batch(*(None if t is None else t.to(device, non_blocking=non_blocking) for t in self))


def make_batch(arrays: tuple, device: torch.device) -> Batch:
    """A batch in host memory, pinned where `device` is a CUDA GPU, of arrays as in acorn/data/batches.py."""
    to_tensor = pinned if device.type == "cuda" else torch.from_numpy
    return Batch(*(None if array is None else to_tensor(array) for array in arrays))


def pinned(array: np.ndarray) -> Tensor:
    """A copy of the array in pinned memory. numpy makes it in the calling thread; torch would start more threads."""
    tensor = torch.empty_like(torch.from_numpy(array), pin_memory=True)
    tensor.numpy()[...] = array
    return tensor


def updates(
    data: Mixture,
    r: Runtime,
    block_size: int,
    seed: int,
    n_sequences: int,
    micro_batch: int,
    position: int,
) -> Iterator[tuple[list[Batch], int]]:
    """For each update from `position` on, without end: this process's micro-batches of `micro_batch` sequences, and
    the number of targets in them that are not masked.

    An update takes the next `n_sequences` sequences of the data. Its micro-batches go to the processes in turn.
    """
    for start in itertools.count(position, n_sequences):
        batches, n_targets = [], 0
        for first in range(start + r.rank * micro_batch, start + n_sequences, r.world_size * micro_batch):
            arrays = data.sample(block_size, first, micro_batch, seed)
            batches.append(make_batch(arrays, r.device))
            n_targets += int((arrays[1] != -1).sum())
        yield batches, n_targets


def prefetch(items: Iterator, device: torch.device) -> Iterator:
    """The items. A background thread computes the next one while the caller uses the current one, and an exception is
    raised where its item would be. If `device` is a CPU, no thread is used, since it would compete for the cores."""
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
