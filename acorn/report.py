"""What a run says: console lines, metrics.jsonl, the loss curve loss.png, and Weights & Biases when asked; and runs
compared: how their losses fell, and what differs in their settings.

    python -m acorn.report out/a out/b
"""

import argparse
import functools
import json
import math
import os
import re
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

    def write_evaluation(self, step: int, train: dict[str, float], val: dict[str, float], seconds: float) -> None:
        """Append the line of an evaluation, what `evaluate_mixture` found on both splits, and draw loss.png again."""
        self.write(
            step=step,
            train_loss=train["loss"],
            **{f"val_{name}": value for name, value in val.items()},
            seconds=seconds,
        )
        draw_curve(read_metrics(self.path), self.path.with_name("loss.png"))

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
    """Draw the losses of `metrics` over the steps into the PNG file `picture`, with marks where a loss spikes. The
    title is the folder of the picture. The axis shows the losses after the first tenth of the run. Where drawing
    fails, a warning says why: a picture never ends a run."""
    try:
        draw_losses(metrics, picture)
    except Exception as error:  # of the disk, or of the library that draws
        reason = printable(f"{getattr(error, 'strerror', None) or error!s:.200}")
        print(f"warning: {picture} cannot be written ({reason}); the run goes on", file=sys.stderr)


def draw_losses(metrics: list[dict], picture: Path) -> None:
    plt = import_pyplot()
    updates = [m for m in metrics if m.get("loss") is not None]
    evaluations = [m for m in metrics if m.get("val_loss") is not None]
    lines = {"batch": [(m["step"], m["loss"]) for m in updates]}
    for split in ("train", "val"):
        lines[split] = [(m["step"], m[f"{split}_loss"]) for m in evaluations if m.get(f"{split}_loss") is not None]
    (title,), fonts, note = drawable([visible(str(picture.parent))])
    with plt.rc_context({"font.family": fonts}):
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        if lines["batch"]:
            axes.plot(*zip(*lines["batch"], strict=True), color="0.75", lw=1, label="batch")
        for split, color in (("train", "tab:blue"), ("val", "tab:orange")):
            if lines[split]:
                label = f"{split} {lines[split][-1][1]:.4f}"
                axes.plot(*zip(*lines[split], strict=True), color=color, marker=".", lw=1.5, label=label)
        limits = useful_limits([lines["batch"]], [lines["train"], lines["val"]])
        if limits:
            axes.set_ylim(limits)
        if marks := [updates[i] for i in spikes([m["loss"] for m in updates])]:
            top = limits[1] if limits else math.inf  # a spike beyond the axis is marked at its edge
            where = [m["step"] for m in marks], [min(m["loss"], top) for m in marks]
            how = dict(color="tab:red", marker="v", s=24, zorder=3, clip_on=False)
            axes.scatter(*where, label=f"spikes: {len(marks)}", **how)
        axes.set(xlabel="step (updates)", ylabel="loss (nats per token)")
        axes.set_title("" if note else title, parse_math=False)
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(loc="upper right")
        save_picture(figure, picture)


def useful_limits(noisy: list[list[tuple]], smooth: list[list[tuple]]) -> tuple[float, float] | None:
    """Limits of an axis on which the lines, lists of (x, y), are seen from a tenth of their length on: the fall before
    that would leave no room for the rest. Of `noisy` ones a hundredth may be higher. None where there is no range."""
    highs, lows = [], []
    for lines, percentile in ((noisy, 99), (smooth, 100)):
        for line in lines:
            finite = [(x, y) for x, y in line if math.isfinite(y)]
            start = finite[0][0] + 0.1 * (finite[-1][0] - finite[0][0]) if finite else 0
            if late := [y for x, y in finite if x >= start]:
                highs.append(float(np.percentile(late, percentile)))
                lows.append(min(late))
    if not highs or max(highs) <= min(lows):
        return None
    margin = 0.08 * (max(highs) - min(lows))
    return min(lows) - margin, max(highs) + margin


def draw_runs(runs: dict[str, list[dict]], picture: Path, per_byte: bool = False) -> str | None:
    """Draw runs, by name their metrics, over each other: the loss of their updates, smoothed, and their validation
    loss, or with `per_byte` its bits per byte, against steps and against time. Returns a note on names that no font
    can draw."""
    plt = import_pyplot()
    timed = {name: [m for m in metrics if isinstance(m.get("seconds"), (int, float))] for name, metrics in runs.items()}
    longest = max((m["seconds"] for metrics in timed.values() for m in metrics), default=0)
    unit, word = (3600, "hours") if longest > 7200 else (60, "minutes") if longest > 120 else (1, "seconds")
    keys = ("loss", "val_bits_per_byte" if per_byte else "val_loss")
    names, fonts, note = drawable(list(runs))
    with plt.rc_context({"font.family": fonts}):
        figure, axes = plt.subplots(2, 2, figsize=(12, 8), sharex="col", sharey="row", layout="constrained")
        colors = plt.get_cmap("tab10") if len(runs) <= 10 else plt.get_cmap("turbo", len(runs))
        handles, drawn = [], ([], [])  # drawn: the lines of each row, for its limits
        for number, metrics in enumerate(timed.values()):
            for column, (across, scale) in enumerate((("step", 1), ("seconds", unit))):
                for panel, key, own in zip(axes[:, column], keys, drawn, strict=True):
                    lines = [m for m in metrics if isinstance(m.get(key), (int, float))]
                    x, y, how = [m[across] / scale for m in lines], [m[key] for m in lines], dict(color=colors(number))
                    if key == "loss":  # noisy: faint, and its running mean over a fiftieth of the run
                        panel.plot(x, y, alpha=0.2, lw=0.8, **how)
                        y = running_mean(y, max(1, len(y) // 50)).tolist()
                    (handle,) = panel.plot(x, y, lw=1.5, marker=None if key == "loss" else ".", **how)
                    own.append(list(zip(x, y, strict=True)))
            handles.append(handle)
        validation = "bits per byte, validation" if per_byte else "validation loss (nats per token)"
        for row, words, own in zip(axes, ("training loss (nats per token)", validation), drawn, strict=True):
            row[0].set_ylabel(words)
            if limits := useful_limits([], own):
                row[0].set_ylim(limits)  # of the whole row
            for panel in row:
                panel.grid(alpha=0.3)
        if per_byte:
            axes[0, 0].set_title("Do not compare losses per token: the tokenizers differ.", loc="left", fontsize=10)
        axes[1, 0].set_xlabel("step (updates)")
        axes[1, 1].set_xlabel(f"training time ({word})")
        # names are set afterwards: matplotlib leaves labels out that begin with an underscore
        legend = axes[0, 1].legend(handles, [str(number) for number in range(len(names))], loc="upper right")
        for text, name in zip(legend.get_texts(), names, strict=True):
            text.set_text(name)
            text.set_parse_math(False)  # a $ is a $
        save_picture(figure, picture)
    return note


def drawable(names: list[str]) -> tuple[list[str], list[str], str | None]:
    """The names as they can be drawn, the font families to draw them with, and a note where no font has a character:
    such a name becomes "run 2", by its place. Families with missing characters are looked for among the installed."""
    from matplotlib import font_manager, rcParams

    families = list(rcParams["font.family"])
    default = font_manager.findfont(font_manager.FontProperties())
    missing = {ord(c) for name in names for c in name} - characters(default)
    if missing:
        # these first, because opening a font takes time
        likely = re.compile("CJK|Han|Hei|Ming|Song|Gothic|Unicode|Fallback|Noto Sans")
        fonts = {font.name: font.fname for font in font_manager.fontManager.ttflist if "Last Resort" not in font.name}
        for name in sorted(fonts, key=lambda name: (not likely.search(name), name)):
            if missing and missing & (own := characters(fonts[name])):
                families.append(name)
                missing -= own
    drawn = [f"run {i}" if missing & set(map(ord, name)) else name for i, name in enumerate(names, 1)]
    replaced = [f"{label} is {name}" for label, name in zip(drawn, names, strict=True) if label != name]
    if not replaced:
        return drawn, families, None
    without = "".join(map(chr, sorted(missing)))
    said = f"no installed font has {without:.20}, so in the picture {', '.join(replaced)}"
    return drawn, families, f"{said}; install a font that has them, such as Noto Sans CJK"


@functools.cache
def characters(font: str) -> frozenset[int]:
    """The code points that a font file has; none where matplotlib cannot use it."""
    from matplotlib import font_manager

    try:
        return frozenset(font_manager.get_font(font).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def visible(text: str) -> str:
    """`text` with its control characters, and bytes that are not UTF-8, as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


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


class TimeLeft:
    """An estimate of the seconds that a run still takes: for updates, the mean over about the last minute of them, and
    for evaluations, the mean of those so far."""

    WINDOW = 60.0  # seconds after which a measurement counts 1/e

    def __init__(self, max_iters: int, eval_interval: int):
        self.max_iters, self.eval_interval = max_iters, eval_interval
        self.seconds, self.updates, self.measured = 0.0, 0.0, 0
        self.evaluations: list[float] = []

    def updated(self, n: int, seconds: float) -> None:
        """Count `n` updates that took `seconds`. The first measurement, in which things warm up, is then dropped."""
        decay = math.exp(-seconds / self.WINDOW) if self.measured > 1 else 0.0
        self.seconds, self.updates = decay * self.seconds + seconds, decay * self.updates + n
        self.measured += 1

    def evaluated(self, seconds: float) -> None:
        """Count an evaluation that took `seconds`, with what belongs to it: the checkpoint, the picture, a sample."""
        self.evaluations.append(seconds)

    def estimate(self, step: int) -> float | None:
        """Seconds from the time when `step` updates are made to the end of the run; None before it is known."""
        if self.measured < 2:
            return None
        interval = self.eval_interval
        n = self.max_iters // interval - math.ceil(step / interval) + 1  # that of `step` is to come
        n += self.max_iters % interval > 0  # the last update is always followed by one
        evaluating = n * statistics.fmean(self.evaluations) if self.evaluations else 0.0
        return (self.max_iters - step) * self.seconds / self.updates + evaluating


def update_line(
    step: int,
    max_iters: int,
    loss: float,
    lr: float,
    grad_norm: float,
    rate: float,
    mfu: float | None,
    left: float | None,
) -> str:
    """The console line of update `step`: `rate` in tokens per second, `left` in seconds. An `mfu` or a time left that
    is not known is left out."""
    parts = [f"step {step}/{max_iters}", f"loss {loss:.4f}", f"lr {lr:.2e}", f"grad norm {grad_norm:.3f}"]
    parts += [f"{rate:,.0f} tok/s"]
    parts += [] if mfu is None else [f"mfu {mfu:.1%}"]
    parts += [] if left is None else [f"{duration(left)} left"]
    return " | ".join(parts)


def evaluation_line(step: int, train: dict[str, float], val: dict[str, float]) -> str:
    """The console line of an evaluation at `step`: what `evaluate_mixture` found on both splits."""
    each = ", ".join(f"{name[5:]} {loss:.4f}" for name, loss in val.items() if name.startswith("loss/"))
    per_byte = f", {val['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in val else ""
    return (
        f"step {step}: train loss {train['loss']:.4f}, val loss {val['loss']:.4f}{f' ({each})' if each else ''}, "
        f"perplexity {val['perplexity']:.2f}{per_byte}"
    )


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
    """What a run left in its out_dir: `metrics`, `settings` and `tokenizer` (both empty before its first checkpoint),
    and the figures of the table. Raises UserError where no run is."""
    metrics = read_metrics(out_dir / "metrics.jsonl", warn=True)
    if not metrics:
        raise UserError(f"{out_dir} holds no metrics.jsonl with the steps of a run; give the out_dir of a training run")
    settings, tokenizer = {}, {}
    for state in sorted(out_dir.glob("step_*/state.json"), key=lambda file: (len(file.parent.name), file)):
        try:
            saved = files.read_json(state)
            settings, tokenizer = dict(saved["settings"]), dict(saved.get("tokenizer") or {})
        except (OSError, ValueError, KeyError, TypeError):
            print(printable(f"warning: {state} is not whole; passing it over"), file=sys.stderr)

    def numbers(name: str) -> list[float]:
        return [m[name] for m in metrics if isinstance(m.get(name), (int, float))]

    evaluations = [m for m in metrics if isinstance(m.get("val_loss"), (int, float))]
    best = min(evaluations, key=lambda m: m["val_loss"], default={})
    tokenizer.pop("chat_template", None)  # which changes no token of a text
    figures = {
        "steps": max(m["step"] + ("loss" in m) for m in metrics),  # updates made; of a line of one, its own as well
        "best val loss": best.get("val_loss"),
        "at step": best.get("step"),
        "best bits per byte": min(numbers("val_bits_per_byte"), default=None),
        "tokens a second": statistics.median(numbers("tokens_per_second") or [0]),
        "mfu": statistics.median(numbers("mfu")) if numbers("mfu") else None,
        "seconds": max(numbers("seconds"), default=None),
        "skipped updates": max(numbers("skipped"), default=0),
        "spikes": len(spikes(numbers("loss"))),
    }
    return {"metrics": metrics, "settings": settings, "tokenizer": tokenizer, "figures": figures}


def rank(runs: list[dict]) -> bool:
    """Put each run's "rank" into its figures, 1 the best: by its best val loss; or, where tokenizers differ, so that
    losses per token do not compare, by its best bits per byte. Returns whether they differ."""
    tokenizers = [run["tokenizer"] for run in runs if run["tokenizer"]]
    differ = any(tokenizer != tokenizers[0] for tokenizer in tokenizers)
    key = "best bits per byte" if differ else "best val loss"
    values = sorted(run["figures"][key] for run in runs if run["figures"][key] is not None)
    for run in runs:
        value = run["figures"][key]
        run["figures"] = {"rank": None if value is None else 1 + values.index(value), **run["figures"]}
    return differ


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

    names = list(map(visible, short_names(args.out_dirs)))
    runs = dict(zip(names, (read_run(Path(folder)) for folder in args.out_dirs), strict=True))
    differ = differences([run["settings"] for run in runs.values()])
    per_byte = rank(list(runs.values()))
    note = draw_runs({name: run["metrics"] for name, run in runs.items()}, picture, per_byte)
    if args.json:
        settings = {name: dict(zip(names, row, strict=True)) for name, row in differ.items()}
        figures = {name: run["figures"] for name, run in runs.items()}
        ranked_by = "bits per byte" if per_byte else "val loss"
        result = {"runs": figures, "differ": settings, "ranked_by": ranked_by, "picture": str(picture)}
        print(printable(json.dumps(result, ensure_ascii=False)))
        return 0

    def cell(value, places: int = 99) -> str:
        if value is None:
            return "-"
        value = round(value, places) if isinstance(value, float) else value
        return f"{value:,.4f}".rstrip("0").rstrip(".") if isinstance(value, float) and abs(value) >= 1 else f"{value}"

    rows = [["", *names]]
    rows += [
        [name, *(cell(run["figures"][name], 4) for run in runs.values())]
        for name in next(iter(runs.values()))["figures"]
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
    if per_byte:
        print("ranked by bits per byte: the tokenizers differ, so losses per token do not compare")
    if note:
        print(f"note: {note}")
    print(f"drawn into {picture}")
    return 0


if __name__ == "__main__":
    from acorn import run

    run(main)
