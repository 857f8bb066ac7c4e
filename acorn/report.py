"""What a run says: console lines, metrics.jsonl, the loss curve loss.png, and Weights & Biases when asked; and runs
compared: how their losses fell, and what differs in their settings.

    python -m acorn.report out/a out/b
"""

import argparse
import json
import math
import os
import statistics
import sys
from pathlib import Path

import numpy as np

from acorn import UserError, files, printable

MOST = 1 << 31  # bytes of a metrics.jsonl
FIGURES = {"loss", "train_loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "mfu", "skipped", "seconds"}
FIGURES |= {"val_perplexity", "val_bits_per_byte"}

ASIDE = ("out_dir", "overwrite", "dry_run", "eval_only", "wandb_run_name")  # settings that tell runs apart by name only


class Metrics:
    """metrics.jsonl in `out_dir`, an object a line, also sent to wandb where it is on.

    A run that goes on from `step` drops what was written beyond it, so that the file has no doubles: lines of updates
    from `step` on, of evaluations that the checkpoint does not know, and a last line that was cut off.
    """

    def __init__(self, out_dir: Path, step: int, evaluated_at: int | None, wandb_run=None):
        self.path, self.wandb_run, self.torn = out_dir / "metrics.jsonl", wandb_run, False
        kept = [
            line
            for line in read_metrics(self.path, warn=True)
            if line["step"] < step or ("val_loss" in line and line["step"] == step == evaluated_at)
        ]
        files.replace(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, **values) -> None:
        """Append a line; a number that is not finite, which JSON does not have, becomes null. Where the disk does not
        take it, as when it is full, the line is lost, a warning says so once, and the run goes on."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        try:
            with files.open_own(self.path, "a") as file:
                file.write("\n" * self.torn + json.dumps(values) + "\n")
            self.torn = False
        except OSError as error:
            if not self.torn:
                print(f"warning: {self.path} cannot be written ({error.strerror}), so lines are lost", file=sys.stderr)
            self.torn = True  # maybe in the middle of the line
        if self.wandb_run is not None:  # which draws no lists, so what each process has, as memory/0, memory/1, ...
            lists = {k: v for k, v in values.items() if isinstance(v, list)}
            each = {f"{k}/{rank}": value for k, v in lists.items() for rank, value in enumerate(v)}
            try:
                self.wandb_run.log({k: v for k, v in values.items() if k not in lists} | each, step=values["step"])
            except Exception as error:  # wandb raises many kinds
                reason = printable(f"{error!s:.200}")
                print(f"warning: wandb takes no more metrics ({reason}); the run goes on without it", file=sys.stderr)
                self.wandb_run = None


def read_metrics(path: Path, warn: bool = False) -> list[dict]:
    """The objects in a metrics.jsonl, with None for figures that are not finite. Lines that `Metrics` did not write are
    left out, such as one that a kill cut off; `warn` prints how many. A file that cannot be read gives no lines."""
    lines, bad, content = [], [], b""
    try:
        content = files.read_bytes(path, MOST)
    except FileNotFoundError:
        pass
    except OSError as error:
        print(f"warning: {path} cannot be read ({error.strerror})", file=sys.stderr)
    for number, text in enumerate(content.splitlines(), 1):
        try:
            line = json.loads(text)
            if not isinstance(line["step"], int) or not 0 <= line["step"] < 2**53 or line["step"] is True:
                raise ValueError("its step is not a count")
            for name in FIGURES & line.keys():
                line[name] = None if line[name] is None or not math.isfinite(line[name]) else line[name]
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            bad += [number] if text.strip() else []
        else:
            lines.append(line)
    if warn and bad:
        count = f"{len(bad)} lines that are" if len(bad) > 1 else "a line that is"
        print(f"warning: {path} has {count} not metrics (line {bad[0]}); left out", file=sys.stderr)
    return lines


def spikes(losses: list[float]) -> list[int]:
    """Where a loss stands out above the 50 before it: by more than 6 of their usual deviations from their median, and
    by a twentieth of it. The deviation is the median one, which a spike among the 50 does not move."""
    values, found = np.array(losses, dtype=float), []
    for first in range(50, len(values), 10_000):  # piece by piece, as each value is looked at 50 times
        piece = values[first - 50 : first + 10_000]
        before = np.lib.stride_tricks.sliding_window_view(piece, 50)[:-1]  # (n, 50)
        middle = np.median(before, axis=1)  # (n,)
        deviation = 1.4826 * np.median(abs(before - middle[:, None]), axis=1)  # sigma, for normal noise
        above = piece[50:] > middle + np.maximum(6 * deviation, 0.05 * abs(middle))
        found += (first + np.flatnonzero(above)).tolist()
    return found


def running_mean(values: list[float], width: int) -> np.ndarray:
    """The mean of each value and the width - 1 before it, or as many as there are."""
    sums = np.cumsum([0.0, *values])
    first = np.maximum(np.arange(len(values)) - width + 1, 0)
    return (sums[1:] - sums[first]) / (np.arange(len(values)) + 1 - first)


def draw_curve(metrics: list[dict], picture: Path) -> None:
    """Draw the losses of `metrics` over the steps into the PNG file `picture`, with marks where a loss spikes. Where
    that fails, a warning says why: a picture never ends a run."""
    try:
        draw_losses(metrics, picture)
    except Exception as error:  # of the disk, or of the library that draws
        reason = printable(f"{getattr(error, 'strerror', None) or error!s:.200}")
        print(f"warning: {picture} cannot be written ({reason}); the run goes on", file=sys.stderr)


def draw_losses(metrics: list[dict], picture: Path) -> None:
    plt = import_pyplot()
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
    if marks := [updates[i] for i in spikes([m["loss"] for m in updates])]:
        where = [m["step"] for m in marks], [m["loss"] for m in marks]
        axes.scatter(*where, color="tab:red", marker="v", s=24, zorder=3, label=f"spikes: {len(marks)}")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    save_picture(figure, picture)


def draw_runs(runs: dict[str, list[dict]], picture: Path) -> None:
    """Draw runs, by name their metrics, over each other: the loss of their updates, smoothed, and their validation
    loss, against steps and against time."""
    plt = import_pyplot()
    timed = {name: [m for m in metrics if isinstance(m.get("seconds"), (int, float))] for name, metrics in runs.items()}
    longest = max((m["seconds"] for metrics in timed.values() for m in metrics), default=0)
    unit, word = (3600, "hours") if longest > 7200 else (60, "minutes") if longest > 120 else (1, "seconds")
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), sharex="col", sharey="row", layout="constrained")
    colors = plt.get_cmap("tab10") if len(runs) <= 10 else plt.get_cmap("turbo", len(runs))
    for number, (name, metrics) in enumerate(timed.items()):
        for column, (across, scale) in enumerate((("step", 1), ("seconds", unit))):
            for panel, key in zip(axes[:, column], ("loss", "val_loss"), strict=True):
                lines = [m for m in metrics if isinstance(m.get(key), (int, float))]
                x, y, how = [m[across] / scale for m in lines], [m[key] for m in lines], dict(color=colors(number))
                if key == "val_loss":
                    panel.plot(x, y, marker=".", lw=1.5, label=name, **how)
                else:  # noisy: faint, and its running mean over a fiftieth of the run
                    panel.plot(x, y, alpha=0.2, lw=0.8, **how)
                    panel.plot(x, running_mean(y, max(1, len(y) // 50)), lw=1.5, label=name, **how)
    for row, what in zip(axes, ("training loss", "validation loss"), strict=True):
        row[0].set_ylabel(f"{what} (nats a token)")
        for panel in row:
            panel.grid(alpha=0.3)
    axes[1, 0].set_xlabel("step")
    axes[1, 1].set_xlabel(f"{word} of training")
    axes[0, 1].legend()
    save_picture(figure, picture)


def import_pyplot():
    import matplotlib

    matplotlib.use("Agg")  # draws into files, needs no screen
    from matplotlib import pyplot

    return pyplot


def save_picture(figure, picture: Path) -> None:
    """Write a matplotlib figure, whole or not at all, and close it."""
    beside = picture.with_name(f".{picture.stem}.writing{picture.suffix}")
    try:
        with files.create(beside) as file:
            figure.savefig(file, dpi=120, format=picture.suffix[1:])
        os.replace(beside, picture)
    finally:
        beside.unlink(missing_ok=True)
        import_pyplot().close(figure)


def start_wandb(project: str, name: str, settings: dict, out_dir: Path, run_id: str | None):
    """A wandb run; one that `run_id` names goes on. Raises UserError where wandb is absent or cannot start."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "wandb_log is on, but wandb is not installed; pip install wandb, or --wandb_log=False"
        ) from error
    for name in ("wandb", ".wandb"):
        if (out_dir / name).is_symlink():
            raise UserError(f"{out_dir / name} is a symbolic link, which wandb would write through; remove it")
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


def read_run(out_dir: Path) -> dict:
    """What a run left in its out_dir: `metrics`, `settings` (empty before its first checkpoint), and the figures of the
    table. Raises UserError where no run is."""
    metrics = read_metrics(out_dir / "metrics.jsonl", warn=True)
    if not metrics:
        raise UserError(f"{out_dir} holds no metrics.jsonl with the steps of a run; give the out_dir of a training run")
    settings = {}
    for state in sorted(out_dir.glob("step_*/state.json"), key=lambda file: (len(file.parent.name), file)):
        try:
            settings = dict(files.read_json(state)["settings"])
        except (OSError, ValueError, KeyError, TypeError):
            print(printable(f"warning: {state} is not whole; passing it over"), file=sys.stderr)

    def numbers(name: str) -> list[float]:
        return [m[name] for m in metrics if isinstance(m.get(name), (int, float))]

    evaluations = [m for m in metrics if isinstance(m.get("val_loss"), (int, float))]
    best = min(evaluations, key=lambda m: m["val_loss"], default={})
    figures = {
        "steps": max(m["step"] + ("loss" in m) for m in metrics),  # updates made; of a line of one, its own as well
        "best val loss": best.get("val_loss"),
        "at step": best.get("step"),
        "tokens a second": statistics.median(numbers("tokens_per_second") or [0]),
        "mfu": statistics.median(numbers("mfu")) if numbers("mfu") else None,
        "seconds": max(numbers("seconds"), default=None),
        "skipped updates": max(numbers("skipped"), default=0),
        "spikes": len(spikes(numbers("loss"))),
    }
    return {"metrics": metrics, "settings": settings, "figures": figures}


def differences(runs: list[dict]) -> dict[str, list]:
    """The settings that are not the same in all runs that have any, each with its value in every run, or None."""
    names = dict.fromkeys(name for settings in runs for name in settings if name not in ASIDE)
    differ = {}
    for name in names:
        known = [settings.get(name) for settings in runs if settings]
        if any(value != known[0] for value in known):
            differ[name] = [settings.get(name) for settings in runs]
    return differ


def short_names(folders: list[str]) -> list[str]:
    """The folders without the beginning that they share."""
    paths = [Path(folder).absolute() for folder in folders]
    if len(set(paths)) == 1:
        return [paths[0].name] * len(paths)
    shared = Path(os.path.commonpath([path.parent for path in paths]))
    return [str(path.relative_to(shared)) for path in paths]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m acorn.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("out_dirs", nargs="+", metavar="OUT_DIR", help="the out_dir of a run, finished or under way")
    parser.add_argument("--out", metavar="FILE", default="report.png", help="the picture; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    picture = Path(args.out)
    if picture.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--out {args.out} should end in .png, .svg or .pdf")
    if not picture.parent.is_dir():
        raise UserError(f"--out {args.out}: there is no folder {picture.parent}")
    if len({Path(folder).resolve() for folder in args.out_dirs}) < len(args.out_dirs):
        raise UserError("the same out_dir is given twice; give each run once")

    names = short_names(args.out_dirs)
    runs = dict(zip(names, (read_run(Path(folder)) for folder in args.out_dirs), strict=True))
    differ = differences([run["settings"] for run in runs.values()])
    draw_runs({name: run["metrics"] for name, run in runs.items()}, picture)
    if args.json:
        settings = {name: dict(zip(names, row, strict=True)) for name, row in differ.items()}
        figures = {name: run["figures"] for name, run in runs.items()}
        result = {"runs": figures, "differ": settings, "picture": str(picture)}
        print(printable(json.dumps(result, ensure_ascii=False)))
        return 0

    def cell(value) -> str:
        if value is None:
            return "-"
        return f"{value:,.4f}".rstrip("0").rstrip(".") if isinstance(value, float) and abs(value) >= 1 else f"{value}"

    rows = [["", *names]]
    rows += [
        [name, *(cell(run["figures"][name]) for run in runs.values())] for name in next(iter(runs.values()))["figures"]
    ]
    rows += [["settings that differ", *[""] * len(names)]] if differ else []
    rows += [[f"  {name}", *map(cell, row)] for name, row in differ.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(text.rjust(w) for text, w in zip(others, widths[1:], strict=True))]
        print(printable("  ".join(cells)))
    for name, run in runs.items():
        if not run["settings"]:
            print(f"{name} has no whole checkpoint, so its settings are not known")
    print(f"drawn into {picture}")
    return 0


if __name__ == "__main__":
    from acorn import run

    run(main)
