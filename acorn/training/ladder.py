"""Predict the loss of a run from smaller runs of the same recipe: a scaling law.

The steps of a ladder are runs whose out_dirs differ only in a final number: out/ladder-2, out/ladder-3, ... The loss of
compute-optimal runs follows L(C) = E + A * C^-alpha, with C the FLOPs of training: https://arxiv.org/abs/2203.15556.
"""

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from acorn import UserError, checkpoint, report, settings
from acorn.training.start import check, new_model

if TYPE_CHECKING:
    from train import TrainSettings

FEWEST_RUNS = 3  # as many as the parameters of the fit


@dataclasses.dataclass
class ScalingLaw:
    """loss = floor + scale * FLOPs^-exponent."""

    floor: float
    scale: float
    exponent: float

    def loss(self, flops: float) -> float:
        return self.floor + self.scale * flops**-self.exponent


def fit(flops: list[float], losses: list[float]) -> ScalingLaw:
    """Return the law with the smallest squared error over many candidate floors.

    For a given floor, log(loss - floor) is linear in log(FLOPs), and the line's fit gives exponent and scale. Raises
    ValueError if there are fewer than three sizes, or if the losses do not fall with the FLOPs.
    """
    x, y = np.log(np.array(flops)), np.array(losses)
    if len(set(flops)) < FEWEST_RUNS:
        raise ValueError(f"a scaling law has {FEWEST_RUNS} parameters, and needs runs of {FEWEST_RUNS} sizes")
    best, smallest = None, np.inf
    for floor in np.linspace(0, y.min(), 2000, endpoint=False):
        slope, intercept = np.polyfit(x, np.log(y - floor), 1)
        law = ScalingLaw(float(floor), float(np.exp(intercept)), float(-slope))
        error = np.square([law.loss(c) - loss for c, loss in zip(flops, y, strict=True)]).sum()
        if law.exponent > 0 and error < smallest:
            best, smallest = law, error
    if best is None:
        raise ValueError("the losses do not fall with the FLOPs")
    return best


def training_flops(s: "TrainSettings", n_vocab: int) -> float:
    """Return the FLOPs of a run (see `GPT.flops_per_token`)."""
    tokens = s.max_iters * s.gradient_accumulation_steps * s.batch_size * s.block_size
    return tokens * new_model(s, n_vocab, meta=True).flops_per_token()


def finished_runs(s: "TrainSettings", identity: str) -> dict[Path, tuple["TrainSettings", float]]:
    """Return the settings and the last validation loss of the finished runs on the same ladder, by out_dir.

    A run on other data (see `Mixture.identity`) or with another objective does not count, nor does the run in s.out_dir
    itself.
    """
    out_dir, runs = Path(s.out_dir), {}
    stem = re.sub(r"\d+$", "", out_dir.name)
    if stem == out_dir.name or not out_dir.parent.is_dir():
        return {}
    for folder in sorted(out_dir.parent.iterdir()):
        if folder.name == out_dir.name or not re.fullmatch(re.escape(stem) + r"\d+", folder.name):
            continue
        if folders := checkpoint.step_folders(folder):
            try:
                state = checkpoint.read_state(folders[0])  # the newest
                saved = settings.build(type(s), settings.checked(type(s), state["settings"]))
            except (checkpoint.Damaged, UserError):  # perhaps a run that is saving
                continue
            finished = state.get("evaluated_at") == state["step"] == saved.max_iters > 0
            if finished and state.get("data") == identity and saved.objective == s.objective:
                runs[folder] = (saved, state["val_loss"])
    return runs


def forecast(s: "TrainSettings", argv: list[str], n_vocab: int, identity: str, flops_per_second: float) -> str:
    """Describe the loss that a run will reach, and what its training time is best spent on; "" without a ladder.

    `argv` are the words of the command, with which other depths are tried, and `flops_per_second` is this machine's
    rate. The budget is max_minutes, or the time that this run needs.
    """
    if s.objective != "tokens" or s.max_iters == 0:  # the law is about losses per token after training
        return ""
    runs = finished_runs(s, identity)
    if len(runs) < FEWEST_RUNS:
        return ""
    flops = [training_flops(saved, n_vocab) for saved, _ in runs.values()]
    try:
        law = fit(flops, [loss for _, loss in runs.values()])
    except ValueError as error:
        return f"forecast: none from {len(runs)} runs beside {s.out_dir}, because {error}"
    own = training_flops(s, n_vocab)
    errors = [abs(law.loss(c) - loss) for c, (_, loss) in zip(flops, runs.values(), strict=True)]
    lines = [
        f"forecast: val loss {law.loss(own):.3f}, from {len(runs)} runs beside {s.out_dir}, which the fit "
        f"{law.floor:.3f} + {law.scale:.3g} * FLOPs^-{law.exponent:.3f} meets within {max(errors):.4f}"
    ]
    if s.init_from != "scratch":  # the checkpoint fixes the depth
        return lines[0]
    seconds = 60 * s.max_minutes or own / flops_per_second
    sizes = {}
    for depth in range(1, 2 * s.n_layer + 3):
        try:
            other = settings.build(type(s), settings.parse(type(s), [*argv, f"--n_layer={depth}"]))
            check(other)
            sizes[depth] = training_flops(other, n_vocab)
        except UserError:  # the config has no such depth
            continue
    fitting = [depth for depth, c in sizes.items() if c / flops_per_second <= 1.02 * seconds]
    if fitting and len(set(sizes.values())) > 1:
        depth = max(fitting)
        lines.append(
            f"{report.duration(seconds)} of training are best spent on --n_layer={depth}: val loss "
            f"{law.loss(sizes[depth]):.3f} after {report.duration(sizes[depth] / flops_per_second)}"
        )
    return "\n".join(lines)
