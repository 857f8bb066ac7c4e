"""How well a model predicts a split: loss, perplexity and bits per byte."""

import math

import numpy as np
import torch

from acorn.runtime import Runtime
from acorn.shards import Tokens, sample_windows, sequential_windows, split_windows
from model import GPT

SAME_WINDOWS = 4242  # seeds the choice of windows, so that every evaluation of every run looks at the same ones


@torch.no_grad()
def evaluate(
    model: GPT,
    tokens: Tokens,
    runtime: Runtime,
    batch_size: int,
    block_size: int,
    max_windows: int = 0,
    token_bytes: np.ndarray | None = None,
) -> dict[str, float]:
    """Loss in nats a token, perplexity, and, given the bytes of each token (V,), bits a byte.

    Looks at the whole split, in windows of block_size tokens side by side; or at `max_windows` of them, the same ones
    every time, where that is fewer. Every token of a window counts the same, and the windows are shared out among the
    processes. Control tokens, which have no bytes, are left out of the bits per byte.
    """
    n = split_windows(tokens, block_size)
    whole = not max_windows or max_windows >= n
    count = n if whole else max_windows
    sizes = None if token_bytes is None else torch.from_numpy(token_bytes).to(runtime.device)
    was_training = model.training
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64)  # nats, tokens, nats of the tokens that have bytes, bytes
    for first in range(batch_size * runtime.rank, count, batch_size * runtime.world_size):
        n_rows = min(batch_size, count - first)
        if whole:
            x, y = sequential_windows(tokens, block_size, first, n_rows)
        else:
            x, y = sample_windows(tokens, block_size, first, n_rows, SAME_WINDOWS)
        x, y = runtime.to_device(x), runtime.to_device(y)
        with runtime.autocast():
            _, nats = model(x, y, reduction="none")  # (B, T), 0 where masked
        totals[0] += nats.sum().cpu()
        totals[1] += (y != -1).sum().cpu()
        if sizes is not None:
            n_bytes = torch.where(y != -1, sizes[y.clamp(min=0)], 0)  # (B, T)
            totals[2] += nats[n_bytes > 0].sum().cpu()
            totals[3] += n_bytes.sum().cpu()
    model.train(was_training)
    nats, n_tokens, nats_of_bytes, n_bytes = runtime.sum(totals).tolist()
    loss = nats / n_tokens
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if n_bytes:
        result["bits_per_byte"] = nats_of_bytes / n_bytes / math.log(2)
    return result
