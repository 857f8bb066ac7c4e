"""Evaluate a model on a split: loss, perplexity and bits per byte."""

import functools
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from acorn import UserError
from acorn.data import batches
from acorn.data.loader import Batch, make_batch, prefetch
from acorn.data.mixture import Mixture
from acorn.data.shards import Dataset, Tokens
from acorn.distributed.runtime import Runtime
from acorn.inference.generate import evaluating
from model import GPT

WINDOW_SEED = 4242  # fixed seed for choosing windows, so that all evaluations of all runs use the same ones


def read_batches(
    tokens: Tokens, dist: Runtime, batch_size: int, block_size: int, max_windows: int = 0
) -> Iterator[tuple[Batch, int]]:
    """Yield this rank's batches of an evaluation, and the number of rows in each that count.

    With FSDP, a rank without rows gets a dummy window with 0 rows that count, because FSDP needs every rank in each
    forward pass. For `max_windows` see `window_sums`.
    """
    n = batches.samples_per_epoch(tokens, block_size)
    whole = not max_windows or max_windows >= n
    count = n if whole else max_windows
    windows = batches.in_order if whole else functools.partial(batches.sample, seed=WINDOW_SEED)

    def read():
        for start in range(0, count, batch_size * dist.world_size):
            first = start + batch_size * dist.rank
            n_rows = max(0, min(batch_size, count - first))
            if not n_rows and not dist.fsdp:
                break
            arrays = windows(tokens, block_size, first if n_rows else 0, n_rows or 1)
            yield make_batch(arrays, dist.device), n_rows

    return prefetch(read(), dist.device)


@torch.no_grad()
def window_sums(
    model: GPT,
    tokens: Tokens,
    dist: Runtime,
    batch_size: int,
    block_size: int,
    max_windows: int = 0,
    token_bytes: np.ndarray | None = None,
) -> torch.Tensor:
    """Return sums for each window that this rank evaluates: (windows, 4), float64.

    The columns are the number of targets, their loss in nats, the loss of the targets that have bytes, and the number
    of bytes. `token_bytes` (V,) gives the bytes of each token, 0 for control tokens; without it, the last two columns
    are 0.

    Evaluates the whole split, in adjacent windows of block_size tokens or in rows of conversations, or at most
    `max_windows` of these, the same ones every time. The windows are divided among the ranks. Attention stays inside a
    document if the split numbers its documents.
    """
    sizes = None if token_bytes is None else torch.from_numpy(token_bytes).to(dist.device)
    # one list of batches per column; on the device, so that the host does not wait
    sums: list[list[Tensor]] = [[] for _ in range(4)]
    with evaluating(model):
        for batch, n_rows in read_batches(tokens, dist, batch_size, block_size, max_windows):
            x, y, documents, _ = batch.to(dist.device)
            with dist.autocast():
                _, nats = model(x, y, reduction="none", documents=documents)  # (B, T), 0 at masked targets
            n_bytes = torch.zeros_like(y) if sizes is None else torch.where(y != -1, sizes[y.clamp(min=0)], 0)  # (B, T)
            columns = [(y != -1).sum(1), nats.sum(1), torch.where(n_bytes > 0, nats, 0).sum(1), n_bytes.sum(1)]
            for column, values in zip(sums, columns, strict=True):
                column.append(values[:n_rows])
    if not sums[0]:
        return torch.zeros(0, 4, dtype=torch.float64)
    return torch.stack([torch.cat(column).cpu().double() for column in sums], dim=1)


def evaluate(model: GPT, tokens: Tokens, *options) -> dict[str, float]:
    """Return "loss" (nats per token), "perplexity" and, if `token_bytes` is given, "bits_per_byte" of a split.

    Every target has the same weight. `options` are the arguments of `window_sums` from `dist` on.
    """
    return _figures(_mean_sums(model, tokens, *options))


def windows_to_read(dataset: Dataset, split: Literal["train", "val"], block_size: int, max_windows: int) -> int:
    """Return how many windows of a split an evaluation reads: `max_windows`, or, if that is 0, as many as the val split
    has, but no more than there are."""
    assert dataset.val is not None, "load_data (acorn/training/start.py) checks this"
    n = max_windows or batches.samples_per_epoch(dataset.val, block_size)
    return min(n, batches.samples_per_epoch(getattr(dataset, split), block_size))


def evaluate_mixture(
    model: GPT,
    data: Mixture,
    split: Literal["train", "val"],
    dist: Runtime,
    batch_size: int,
    block_size: int,
    max_windows: int = 0,
    token_bytes: np.ndarray | None = None,
) -> dict[str, float]:
    """Evaluate a split of all datasets, and return the same keys as `evaluate`.

    With several datasets, the shares weight their windows, as in training, and the result also has "loss/NAME" for
    each. Each dataset contributes `max_windows` windows, or, if that is 0, as many as its val split has.
    """
    sums = []
    for dataset in data.datasets:
        n = windows_to_read(dataset, split, block_size, max_windows)
        sums.append(_mean_sums(model, getattr(dataset, split), dist, batch_size, block_size, n, token_bytes))
    weighted = [float(share) * each for share, each in zip(data.shares, sums, strict=True)]
    result = _figures(np.sum(weighted, axis=0))
    if len(sums) > 1:
        names = [f"loss/{dataset.name}" for dataset in data.datasets]
        result |= {name: _figures(each)["loss"] for name, each in zip(names, sums, strict=True)}
    return result


def _mean_sums(model: GPT, tokens: Tokens, dist: Runtime, *options) -> np.ndarray:
    """Return the means of `window_sums` over the windows of all ranks: (4,)."""
    own = window_sums(model, tokens, dist, *options)
    n_windows, *sums = dist.sum(torch.cat((own.new_tensor([len(own)]), own.sum(0)))).tolist()
    check_targets(sums[0], tokens)
    return np.array(sums) / n_windows


def check_targets(n_tokens: float, tokens: Tokens) -> None:
    """Raise UserError if an evaluation had no unmasked targets, and therefore no loss."""
    if not n_tokens:
        raise UserError(
            f"the {tokens.name} split has no loss, because its mask excludes every token in the evaluated windows. "
            "Prepare data with learned replies; `python prepare inspect` shows how many tokens count."
        )


def _figures(sums: np.ndarray) -> dict[str, float]:
    """Return loss, perplexity and bits per byte from the columns of `window_sums`."""
    n_tokens, nats, nats_of_bytes, n_bytes = sums.tolist()
    loss = nats / n_tokens
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if n_bytes:
        result["bits_per_byte"] = nats_of_bytes / n_bytes / math.log(2)
    return result
