"""How well a model predicts a split: loss, perplexity and bits per byte."""

import math
from typing import Literal

import numpy as np
import torch

from acorn.mixture import Mixture
from acorn.runtime import Runtime
from acorn.shards import Tokens, number_documents, sample_windows, sequential_windows, split_windows
from model import GPT

SAME_WINDOWS = 4242  # seeds the choice of windows, so that every evaluation of every run looks at the same ones


def evaluate(
    model: GPT,
    tokens: Tokens,
    runtime: Runtime,
    batch_size: int,
    block_size: int,
    max_windows: int = 0,
    token_bytes: np.ndarray | None = None,
    eot: int | None = None,
) -> dict[str, float]:
    """Loss in nats a token, perplexity, and, given the bytes of each token (V,), bits a byte.

    Looks at the whole split, in windows of block_size tokens side by side; or at `max_windows` of them, the same ones
    every time, where that is fewer. Every token of a window counts the same, and the windows are shared out among the
    processes. Control tokens, which have no bytes, are left out of the bits per byte. Given the end-of-text token
    `eot`, attention stays inside a document.
    """
    return _figures(_measure(model, tokens, runtime, batch_size, block_size, max_windows, token_bytes, eot))


def evaluate_mixture(
    model: GPT,
    data: Mixture,
    split: Literal["train", "val"],
    runtime: Runtime,
    batch_size: int,
    block_size: int,
    max_windows: int = 0,
    token_bytes: np.ndarray | None = None,
    eot: int | None = None,
) -> dict[str, float]:
    """`evaluate` on a split of all datasets, each counting by its share; beside it `loss/NAME` of each, if several.

    Of each dataset it looks at `max_windows` windows, or, where that is 0, at as many as its val split has.
    """
    means = []
    for dataset in data.datasets:
        n = max_windows or split_windows(dataset.val, block_size)
        means.append(_measure(model, getattr(dataset, split), runtime, batch_size, block_size, n, token_bytes, eot))
    result = _figures(sum(float(share) * mean for share, mean in zip(data.shares, means, strict=True)))
    if len(means) > 1:
        names = [f"loss/{dataset.name}" for dataset in data.datasets]
        result |= {name: float(mean[0]) for name, mean in zip(names, means, strict=True)}
    return result


@torch.no_grad()
def _measure(
    model: GPT,
    tokens: Tokens,
    runtime: Runtime,
    batch_size: int,
    block_size: int,
    max_windows: int,
    token_bytes: np.ndarray | None,
    eot: int | None,
) -> np.ndarray:
    """Means over the tokens that `evaluate` looks at: nats, nats of the tokens that have bytes, and bytes."""
    n = split_windows(tokens, block_size)
    whole = not max_windows or max_windows >= n
    count = n if whole else max_windows
    sizes = None if token_bytes is None else torch.from_numpy(token_bytes).to(runtime.device)
    was_training = model.training
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64)  # tokens, then the sums of what is returned
    for first in range(batch_size * runtime.rank, count, batch_size * runtime.world_size):
        n_rows = min(batch_size, count - first)
        if whole:
            x, y = sequential_windows(tokens, block_size, first, n_rows)
        else:
            x, y = sample_windows(tokens, block_size, first, n_rows, SAME_WINDOWS)
        documents = None if eot is None else runtime.to_device(number_documents(x, y, eot))
        x, y = runtime.to_device(x), runtime.to_device(y)
        with runtime.autocast():
            _, nats = model(x, y, reduction="none", documents=documents)  # (B, T), 0 where masked
        totals[0] += (y != -1).sum().cpu()
        totals[1] += nats.sum().cpu()
        if sizes is not None:
            n_bytes = torch.where(y != -1, sizes[y.clamp(min=0)], 0)  # (B, T)
            totals[2] += nats[n_bytes > 0].sum().cpu()
            totals[3] += n_bytes.sum().cpu()
    model.train(was_training)
    n_tokens, *sums = runtime.sum(totals).tolist()
    return np.array(sums) / n_tokens


def _figures(means: np.ndarray) -> dict[str, float]:
    loss, nats_of_bytes, n_bytes = means.tolist()
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if n_bytes:
        result["bits_per_byte"] = nats_of_bytes / n_bytes / math.log(2)
    return result
