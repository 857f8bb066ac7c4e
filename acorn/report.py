"""What a run says: console lines, metrics.jsonl, the loss curve loss.png, and Weights & Biases when asked."""

import json
import math
import os
import sys
from pathlib import Path

from acorn import UserError, files


class Metrics:
    """metrics.jsonl in `out_dir`, an object a line, also sent to wandb where it is on.

    A run that goes on from `step` drops what was written beyond it, so that the file has no gaps and no doubles: lines
    of updates from `step` on, of evaluations that the checkpoint does not know, and a last line that was cut off.
    """

    def __init__(self, out_dir: Path, step: int, evaluated_at: int | None, wandb_run=None):
        self.path, self.wandb_run, self.torn = out_dir / "metrics.jsonl", wandb_run, False
        kept = [
            line
            for line in read_metrics(self.path)
            if line["step"] < step or ("val_loss" in line and line["step"] == step == evaluated_at)
        ]
        files.replace(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, **values) -> None:
        """Append a line; a number that is not finite, which JSON does not have, becomes null. Where the disk does not
        take it, the line is lost, a warning says so, and the run goes on."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        try:
            with open(self.path, "a") as file:
                file.write("\n" * self.torn + json.dumps(values) + "\n")
            self.torn = False
        except OSError as error:
            if not self.torn:
                print(f"warning: {self.path} cannot be written ({error.strerror}), so lines are lost", file=sys.stderr)
            self.torn = True  # maybe in the middle of the line
        if self.wandb_run is not None:
            self.wandb_run.log(values, step=values["step"])


def read_metrics(path: Path) -> list[dict]:
    """The objects in a metrics.jsonl; lines that a kill left half-written are passed over."""
    lines = []
    if path.exists():
        for text in path.read_text(errors="replace").splitlines():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


def draw_curve(metrics: list[dict], picture: Path) -> None:
    """Draw the losses of `metrics` over the steps into the PNG file `picture`."""
    import matplotlib

    matplotlib.use("Agg")  # draws into files, needs no screen
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    updates = [m for m in metrics if m.get("loss") is not None]
    evaluations = [m for m in metrics if m.get("val_loss") is not None]
    if updates:
        axes.plot([m["step"] for m in updates], [m["loss"] for m in updates], color="0.75", lw=1, label="batch")
    for name, color in (("train", "tab:blue"), ("val", "tab:orange")):
        points = [(m["step"], m[f"{name}_loss"]) for m in evaluations if m.get(f"{name}_loss") is not None]
        if points:
            last = f"{name} {points[-1][1]:.4f}"
            axes.plot(*zip(*points, strict=True), color=color, marker=".", lw=1.5, label=last)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    beside = picture.with_name(f".{picture.stem}.writing.png")
    try:
        figure.savefig(beside, dpi=120)
        os.replace(beside, picture)
    except OSError as error:
        print(f"warning: {picture} cannot be written ({error.strerror}); the run goes on", file=sys.stderr)
        beside.unlink(missing_ok=True)
    plt.close(figure)


def start_wandb(project: str, name: str, settings: dict, out_dir: Path, run_id: str | None):
    """A wandb run; one that `run_id` names goes on. Raises UserError where wandb is absent or cannot start."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "wandb_log is on, but wandb is not installed; pip install wandb, or --wandb_log=False"
        ) from error
    try:
        return wandb.init(
            project=project, name=name, config=settings, dir=str(out_dir), id=run_id, resume="allow" if run_id else None
        )
    except Exception as error:  # wandb raises many kinds: no key, no network, no such project
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"wandb did not start ({reason}); run `wandb login`, set WANDB_MODE=offline, or use --wandb_log=False"
        ) from error


def duration(seconds: float) -> str:
    """Seconds as a person says them: 9 s, 2:05 min, 3:20 h, 4.2 days."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02d} min"
    if seconds < 48 * 3600:
        return f"{seconds // 3600}:{seconds % 3600 // 60:02d} h"
    return f"{seconds / 86400:.1f} days"


def size(n_bytes: float) -> str:
    """Bytes as a person says them: 512 KB, 1.5 GB (powers of 1000)."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if n_bytes < 1000 or unit == "TB":
            return f"{n_bytes:.0f} {unit}" if n_bytes >= 10 or unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
