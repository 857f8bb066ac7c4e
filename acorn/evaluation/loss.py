"""How well a model predicts a split: loss, perplexity and bits per byte."""

import functools
import math
from typing import Literal

import numpy as np
import torch

from acorn import UserError
from acorn.data import batches
from acorn.data.loader import make_batch, prefetch
from acorn.data.mixture import Mixture
from acorn.data.shards import Tokens
from acorn.distributed.runtime import Runtime
from model import GPT

SAME_WINDOWS = 4242  # seeds the choice of windows, so that every evaluation of every run looks at the same ones


@torch.no_grad()
def window_sums(
    model: GPT,
    tokens: Tokens,
    runtime: Runtime,
    batch_size: int,
    block_size: int,
    max_windows: int = 0,
    token_bytes: np.ndarray | None = None,
) -> torch.Tensor:
    """Of each window that this process looks at: its tokens, their nats, and, given the bytes of each token (V,), the
    nats of those that have bytes, and the bytes: (windows, 4), in float64.

    Looks at the whole split, in windows of block_size tokens side by side or rows of conversations; or at `max_windows`
    of them, the same ones every time, where that is fewer. The windows are shared out among the processes. Control
    tokens have no bytes. Attention stays inside a document where the split numbers them.
    """
    n = batches.samples_per_epoch(tokens, block_size)
    whole = not max_windows or max_windows >= n
    count = n if whole else max_windows
    windows = batches.in_order if whole else functools.partial(batches.sample, seed=SAME_WINDOWS)
    sizes = None if token_bytes is None else torch.from_numpy(token_bytes).to(runtime.device)

    def read_batches():
        for start in range(0, count, batch_size * runtime.world_size):
            first = start + batch_size * runtime.rank
            n_rows = max(0, min(batch_size, count - first))
            if not n_rows and not runtime.fsdp:
                break
            # without rows it looks at a window that does not count, since the others need its shard of the model
            arrays = windows(tokens, block_size, first if n_rows else 0, n_rows or 1)
            yield make_batch(arrays, runtime.device), n_rows

    was_training = model.training
    model.eval()
    sums = [[] for _ in range(4)]  # the columns of each batch; they stay on the device, so that it never waits
    for batch, n_rows in prefetch(read_batches(), runtime.device):
        x, y, documents = batch.to(runtime.device)
        with runtime.autocast():
            _, nats = model(x, y, reduction="none", documents=documents)  # (B, T), 0 where masked
        n_bytes = torch.zeros_like(y) if sizes is None else torch.where(y != -1, sizes[y.clamp(min=0)], 0)  # (B, T)
        columns = [(y != -1).sum(1), nats.sum(1), torch.where(n_bytes > 0, nats, 0).sum(1), n_bytes.sum(1)]
        for column, values in zip(sums, columns, strict=True):
            column.append(values[:n_rows])
    model.train(was_training)
    if not sums[0]:
        return torch.zeros(0, 4, dtype=torch.float64)
    return torch.stack([torch.cat(column).cpu().double() for column in sums], dim=1)


def evaluate(model: GPT, tokens: Tokens, *how) -> dict[str, float]:
    """Loss in nats a token, perplexity, and, given the bytes of each token, bits a byte. Every token of every window
    counts the same; `how` is what `window_sums` takes from `runtime` on."""
    return _figures(_means(model, tokens, *how))


def evaluate_mixture(
    model: GPT,
    data: Mixture,
    split: Literal["train", "val"],
    runtime: Runtime,
    batch_size: int,
    block_size: int,
    max_windows: int = 0,
    token_bytes: np.ndarray | None = None,
) -> dict[str, float]:
    """`evaluate` on a split of all datasets, each counting by its share; beside it `loss/NAME` of each, if several.

    Of each dataset it looks at `max_windows` windows, or, where that is 0, at as many as its val split has.
    """
    means = []
    for dataset in data.datasets:
        n = max_windows or batches.samples_per_epoch(dataset.val, block_size)
        means.append(_means(model, getattr(dataset, split), runtime, batch_size, block_size, n, token_bytes))
    result = _figures(sum(float(share) * mean for share, mean in zip(data.shares, means, strict=True)))
    if len(means) > 1:
        names = [f"loss/{dataset.name}" for dataset in data.datasets]
        result |= {name: float(mean[0]) for name, mean in zip(names, means, strict=True)}
    return result


def _means(model: GPT, tokens: Tokens, runtime: Runtime, *how) -> np.ndarray:
    """Means over the tokens that all processes look at: nats, nats of the tokens that have bytes, and bytes."""
    n_tokens, *sums = runtime.sum(window_sums(model, tokens, runtime, *how).sum(0)).tolist()
    refuse_none(n_tokens, tokens)
    return np.array(sums) / n_tokens


def refuse_none(n_tokens: float, tokens: Tokens) -> None:
    """Raise UserError where an evaluation saw no token that counts, so that there is no loss."""
    if not n_tokens:
        raise UserError(
            f"the {tokens.name} split has no token that counts where this evaluation looks, since its mask leaves all "
            "of them out, so there is no loss; `python prepare inspect` shows how many count"
        )


def _figures(means: np.ndarray) -> dict[str, float]:
    loss, nats_of_bytes, n_bytes = means.tolist()
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if n_bytes:
        result["bits_per_byte"] = nats_of_bytes / n_bytes / math.log(2)
    return result
