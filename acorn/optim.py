"""Learning-rate schedules."""

import math


def learning_rate_at(
    step: int,
    schedule: str,
    learning_rate: float,
    min_lr: float,
    warmup_iters: int,
    lr_decay_iters: int,
    cooldown_frac: float = 0.4,
) -> float:
    """The rate of update `step`, counted from 0: a linear rise over `warmup_iters` updates, none of them at 0, then by
    `schedule` down to `min_lr` at `lr_decay_iters`, and min_lr from there on.

    cosine and linear fall all the way; wsd (warmup, stable, decay) holds `learning_rate` and falls linearly over the
    last `cooldown_frac` of lr_decay_iters; constant does not fall.
    """
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if schedule == "constant":
        return learning_rate
    if step >= lr_decay_iters:
        return min_lr
    start = warmup_iters if schedule != "wsd" else max(warmup_iters, (1 - cooldown_frac) * lr_decay_iters)
    if step <= start:
        return learning_rate
    progress = (step - start) / (lr_decay_iters - start)  # 0 to 1
    left = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return min_lr + left * (learning_rate - min_lr)
