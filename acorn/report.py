"""Report a run (metrics.jsonl, loss.png, wandb, TensorBoard), and compare the losses and settings of runs.

python -m acorn.report out/a out/b
"""

import argparse
import contextlib
import functools
import json
import math
import os
import re
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from acorn import UserError, files, printable, visible

DRAW_SECONDS = 5  # seconds between pictures; a short run, in which drawing would take much of the time, draws one
MAX_METRICS_BYTES = 1 << 31  # bytes; a larger metrics.jsonl is not read
NUMERIC_FIELDS = {"loss", "train_loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "mfu", "skipped", "seconds"}
NUMERIC_FIELDS |= {"val_perplexity", "val_bits_per_byte"}
TASKS = ("choices/", "pairs/")  # how the names of the figures in percent begin that `measure_tasks` returns

# settings that do not affect results
SETTINGS_WITHOUT_EFFECT = "out_dir overwrite dry_run eval_only wandb_run_name log_interval".split()


class Metrics:
    """Writes metrics.jsonl in `out_dir`, one object per line, and sends the metrics to wandb and TensorBoard if given.

    A run that resumes at `step` first removes lines that would be duplicated: updates from `step` on, evaluations newer
    than the checkpoint, and an incomplete last line.
    """

    def __init__(self, out_dir: Path, step: int, evaluated_at: int | None, wandb_run=None, tensorboard=None):
        self.path, self.torn = out_dir / "metrics.jsonl", False
        self.drawn_at, self.undrawn = time.monotonic(), False
        self.loggers = {}  # by name, functions that send figures elsewhere
        if wandb_run is not None:
            self.loggers["wandb"] = lambda figures: wandb_run.log(figures, step=figures["step"])
        if tensorboard is not None:
            self.loggers["TensorBoard"] = functools.partial(log_to_tensorboard, tensorboard)
        kept = [
            line
            for line in read_metrics(self.path, warn=True)
            if line["step"] < step or ("val_loss" in line and line["step"] == step == evaluated_at)
        ]
        files.replace(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write_evaluation(
        self,
        step: int,
        train: dict[str, float],
        val: dict[str, float],
        measured: dict[str, float | None],
        seconds: float,
    ) -> None:
        """Append the results of `evaluate_mixture` on both splits and of `measure_tasks`.

        Draws loss.png unless it was drawn, or the run began, within the last DRAW_SECONDS. Call `draw` at the end.
        """
        self.write(
            step=step,
            train_loss=train["loss"],
            **{f"val_{name}": value for name, value in val.items()},
            **measured,
            seconds=seconds,
        )
        self.undrawn = True
        if time.monotonic() - self.drawn_at > DRAW_SECONDS:
            self.draw()

    def draw(self) -> None:
        """Draw loss.png if it lacks the last evaluation."""
        if self.undrawn:
            draw_curve(read_metrics(self.path), self.path.with_name("loss.png"))
            self.drawn_at, self.undrawn = time.monotonic(), False

    def write(self, **values) -> None:
        """Append a line, in which non-finite numbers become null.

        If the line cannot be written, as on a full disk, it is lost, a warning is printed once, and the run continues.
        """
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        try:
            with files.open_own(self.path, "a") as file:
                file.write("\n" * self.torn + json.dumps(values) + "\n")
            self.torn = False
        except OSError as error:
            if not self.torn:
                print(f"warning: cannot write {self.path} ({error.strerror}); its lines are lost", file=sys.stderr)
            self.torn = True  # perhaps in the middle of the line
        lists = {k: v for k, v in values.items() if isinstance(v, list)}  # split by rank: memory/0, memory/1, ...
        each = {f"{k}/{rank}": value for k, v in lists.items() for rank, value in enumerate(v)}
        for name, send in list(self.loggers.items()):
            try:
                send({k: v for k, v in values.items() if k not in lists} | each)
            except Exception as error:  # wandb raises many types of exceptions
                reason = printable(f"{error!s:.200}")
                print(f"warning: {name} logging failed ({reason}); the run continues without it", file=sys.stderr)
                del self.loggers[name]


def read_metrics(path: Path, warn: bool = False) -> list[dict]:
    """Return the objects in a metrics.jsonl, with None for non-finite values.

    Invalid lines, such as one cut off by a kill, are skipped; `warn` prints how many. An unreadable file gives [].
    """
    lines, bad, content = [], [], b""
    try:
        content = files.read_bytes(path, MAX_METRICS_BYTES)
    except FileNotFoundError:
        pass
    except OSError as error:
        print(f"warning: cannot read {path} ({error.strerror})", file=sys.stderr)
    for number, text in enumerate(content.splitlines(), 1):
        try:
            line = json.loads(text)
            if not isinstance(line["step"], int) or not 0 <= line["step"] < 2**53 or line["step"] is True:
                raise ValueError("step is not a count")
            for name in {name for name in line if name in NUMERIC_FIELDS or name.startswith(TASKS)}:
                line[name] = None if line[name] is None or not math.isfinite(line[name]) else line[name]
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            bad += [number] if text.strip() else []
        else:
            lines.append(line)
    if warn and bad:
        count = f"{len(bad)} invalid lines, the first at" if len(bad) > 1 else "an invalid line,"
        print(f"warning: {path} has {count} line {bad[0]}; skipped", file=sys.stderr)
    return lines


def spikes(losses: list[float]) -> list[int]:
    """Return the indices of losses that exceed the median of the 50 losses before them by 6 sigma and by 5%.

    Sigma is estimated from the median absolute deviation, which is robust against other spikes among the 50.
    """
    values, found = np.array(losses, dtype=float), []
    for first in range(50, len(values), 10_000):  # in pieces, because the windows take 50 times the memory
        piece = values[first - 50 : first + 10_000]
        before = np.lib.stride_tricks.sliding_window_view(piece, 50)[:-1]  # (n, 50)
        middle = np.median(before, axis=1)  # (n,)
        deviation = 1.4826 * np.median(abs(before - middle[:, None]), axis=1)  # equals sigma for normal noise
        above = piece[50:] > middle + np.maximum(6 * deviation, 0.05 * abs(middle))
        found += (first + np.flatnonzero(above)).tolist()
    return found


def running_mean(values: list[float], width: int) -> np.ndarray:
    """Return the mean of each value and the up to `width` - 1 values before it."""
    sums = np.cumsum([0.0, *values])
    first = np.maximum(np.arange(len(values)) - width + 1, 0)
    return (sums[1:] - sums[first]) / (np.arange(len(values)) + 1 - first)


def draw_curve(metrics: list[dict], picture: Path) -> None:
    """Call `draw_losses`. If that fails, print a warning: a plot never ends a run."""
    try:
        draw_losses(metrics, picture)
    except Exception as error:  # from the disk, or from matplotlib
        reason = printable(f"{getattr(error, 'strerror', None) or error!s:.200}")
        print(f"warning: cannot write {picture} ({reason}); the run continues", file=sys.stderr)


def task_name(name: str) -> str:
    """Return the name of a figure of `measure_tasks` for people: exact match for pairs/exact_match."""
    return name.partition("/")[2].replace("_", " ")


def draw_losses(metrics: list[dict], picture: Path) -> None:
    """Draw losses over steps into the PNG file `picture`, with marks at spikes and its folder as the title.

    The y-axis is scaled to the losses after the first tenth of the run. If evaluations measured tasks, a second panel
    below shows them.
    """
    plt = import_pyplot()
    updates = [m for m in metrics if m.get("loss") is not None]
    evaluations = [m for m in metrics if m.get("val_loss") is not None]
    lines = {"batch": [(m["step"], m["loss"]) for m in updates]}
    for split in ("train", "val"):
        lines[split] = [(m["step"], m[f"{split}_loss"]) for m in evaluations if m.get(f"{split}_loss") is not None]
    tasks: dict[str, list] = {}  # by name, the points of each line
    for m in metrics:
        for name in (name for name in m if name.startswith(TASKS) and m[name] is not None):
            tasks.setdefault(name, []).append((m["step"], m[name]))
    (title,), fonts, note = drawable([visible(str(picture.parent))])
    with plt.rc_context({"font.family": fonts}):
        n_panels = 2 if tasks else 1
        options = dict(sharex=True, squeeze=False, height_ratios=[3, 2][:n_panels], layout="constrained")
        figure, panels = plt.subplots(n_panels, 1, figsize=(10, 7.5) if tasks else (8, 4.5), **options)
        axes = panels[0, 0]
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
            top = limits[1] if limits else math.inf  # a spike above the axis is marked at its edge
            points = [m["step"] for m in marks], [min(m["loss"], top) for m in marks]
            style = dict(color="tab:red", marker="v", s=24, zorder=3, clip_on=False)
            axes.scatter(*points, label=f"spikes: {len(marks)}", **style)
        axes.set(ylabel="loss (nats per token)")
        panels[-1, 0].set(xlabel="step (updates)")
        axes.set_title("" if note else title, parse_math=False)
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(loc="upper right")
        if tasks:
            for name, curve in tasks.items():
                label = f"{task_name(name)} {curve[-1][1]:.1f}"
                panels[1, 0].plot(*zip(*curve, strict=True), marker=".", lw=1.5, label=label)
            panels[1, 0].set(ylabel="tasks (percent)", ylim=(-2, 102))
            panels[1, 0].grid(alpha=0.3)
            panels[1, 0].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        save_picture(figure, picture)


def useful_limits(noisy: list[list[tuple]], smooth: list[list[tuple]]) -> tuple[float, float] | None:
    """Return y-axis limits that fit lines, given as lists of (x, y), after the first tenth of their length.

    The steep fall before would flatten the rest. 1% of the points of `noisy` lines may be above the limits. Returns
    None if there is no range.
    """
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
    """Draw the metrics of several runs, given by name, over steps and over time.

    The panels show the smoothed training loss and the validation loss, or with `per_byte` bits per byte. Returns a note
    if no font can draw a name.
    """
    plt = import_pyplot()
    timed = {name: [m for m in metrics if isinstance(m.get("seconds"), (int, float))] for name, metrics in runs.items()}
    longest = max((m["seconds"] for metrics in timed.values() for m in metrics), default=0)
    unit, word = (3600, "hours") if longest > 7200 else (60, "minutes") if longest > 120 else (1, "seconds")
    keys = ("loss", "val_bits_per_byte" if per_byte else "val_loss")
    names, fonts, note = drawable(list(runs))
    with plt.rc_context({"font.family": fonts}):
        figure, axes = plt.subplots(2, 2, figsize=(12, 8), sharex="col", sharey="row", layout="constrained")
        colors = plt.get_cmap("tab10") if len(runs) <= 10 else plt.get_cmap("turbo", len(runs))
        handles = []
        drawn: tuple[list, list] = ([], [])  # the lines in each row of panels, for its limits
        for number, metrics in enumerate(timed.values()):
            for column, (across, scale) in enumerate((("step", 1), ("seconds", unit))):
                for panel, key, own in zip(axes[:, column], keys, drawn, strict=True):
                    lines = [m for m in metrics if isinstance(m.get(key), (int, float))]
                    x, y, color = [m[across] / scale for m in lines], [m[key] for m in lines], colors(number)
                    if key == "loss":  # noisy: drawn faintly, with the running mean over 1/50 of the run
                        panel.plot(x, y, alpha=0.2, lw=0.8, color=color)
                        y = running_mean(y, max(1, len(y) // 50)).tolist()
                    (handle,) = panel.plot(x, y, lw=1.5, marker=None if key == "loss" else ".", color=color)
                    own.append(list(zip(x, y, strict=True)))
            handles.append(handle)
        validation = "bits per byte, validation" if per_byte else "validation loss (nats per token)"
        for row, words, own in zip(axes, ("training loss (nats per token)", validation), drawn, strict=True):
            row[0].set_ylabel(words)
            if limits := useful_limits([], own):
                row[0].set_ylim(limits)  # for the whole row, which shares its y-axis
            for panel in row:
                panel.grid(alpha=0.3)
        if per_byte:
            axes[0, 0].set_title("Losses per token are not comparable: tokenizers differ.", loc="left", fontsize=10)
        axes[1, 0].set_xlabel("step (updates)")
        axes[1, 1].set_xlabel(f"training time ({word})")
        # the names are set afterwards, because matplotlib omits labels that begin with an underscore
        legend = axes[0, 1].legend(handles, [str(number) for number in range(len(names))], loc="upper right")
        for text, name in zip(legend.get_texts(), names, strict=True):
            text.set_text(name)
            text.set_parse_math(False)  # $ is an ordinary character
        save_picture(figure, picture)
    return note


def drawable(names: list[str]) -> tuple[list[str], list[str], str | None]:
    """Return the names as they can be drawn, the font families for them, and a note or None.

    A name with a character that no font has is replaced by its number, such as "run 2", and the note says so.
    """
    families, missing = fonts_for("".join(names))
    drawn = [f"run {i}" if missing & set(map(ord, name)) else name for i, name in enumerate(names, 1)]
    replaced = [f"{label} is {name}" for label, name in zip(drawn, names, strict=True) if label != name]
    if not replaced:
        return drawn, families, None
    without = "".join(map(chr, sorted(missing)))
    note = (
        f"no installed font has {without:.20}, so in the picture {', '.join(replaced)}. Install a font with these "
        "characters, such as Noto Sans CJK (on Debian and Ubuntu: apt install fonts-noto-cjk)."
    )
    return drawn, families, note


def fonts_for(text: str) -> tuple[list[str], set[int]]:
    """Return font families that can draw `text`, and the code points that no installed font has.

    Fonts for characters that the default font lacks are searched among the installed ones.
    """
    from matplotlib import font_manager, rcParams

    families = list(rcParams["font.family"])
    default = font_manager.findfont(font_manager.FontProperties())
    missing = {ord(c) for c in text} - characters(default)
    if missing:
        known = {font.fname for font in font_manager.fontManager.ttflist}
        for path in sorted({*font_manager.findSystemFonts()} - known):  # installed after matplotlib cached its list
            with contextlib.suppress(OSError, RuntimeError):
                font_manager.fontManager.addfont(path)
        # likely fonts first, because opening a font takes time
        likely = re.compile("CJK|Han|Hei|Ming|Song|Gothic|Unicode|Fallback|Noto Sans")
        faces = [font for font in font_manager.fontManager.ttflist if "Last Resort" not in font.name]
        faces.sort(key=lambda font: str(font.weight) in ("400", "normal") and font.style == "normal")
        fonts = {font.name: font.fname for font in faces}  # the regular face is last, so it wins
        for name in sorted(fonts, key=lambda name: (not likely.search(name), name)):
            if missing and missing & (own := characters(fonts[name])):
                families.append(name)
                missing -= own
    return families, missing


@functools.cache
def characters(font: str) -> frozenset[int]:
    """Return the code points in a font file, or an empty set if matplotlib cannot read it."""
    from matplotlib import font_manager

    try:
        return frozenset(font_manager.get_font(font).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def import_pyplot():
    import matplotlib

    matplotlib.use("Agg")  # draws into files without a display
    from matplotlib import pyplot

    return pyplot


def save_picture(figure, picture: Path, format: str | None = None) -> None:
    """Write a matplotlib figure atomically, and close it. `format` is that of the file's suffix if it is None."""
    temporary = picture.with_name(f".{picture.stem}.writing{picture.suffix}")
    try:
        with files.create(temporary) as file:
            figure.savefig(file, dpi=120, format=format or picture.suffix[1:])
        os.replace(temporary, picture)
    finally:
        temporary.unlink(missing_ok=True)
        import_pyplot().close(figure)


def start_wandb(project: str, name: str, settings: dict, out_dir: Path, run_id: str | None):
    """Start a wandb run, or continue the run `run_id`. Raises UserError if wandb is not installed or fails to start."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "wandb_log=True, but wandb is not installed. Run `pip install wandb`, or use --wandb_log=False."
        ) from error
    for folder in (out_dir / "wandb", out_dir / ".wandb"):
        if folder.is_symlink():
            raise UserError(f"{folder} is a symbolic link, through which wandb would write. Remove it.")
    try:
        return wandb.init(
            project=project, name=name, config=settings, dir=str(out_dir), id=run_id, resume="allow" if run_id else None
        )
    except Exception as error:  # wandb raises many types: no key, no network, no such project
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"wandb did not start ({reason}). Run `wandb login`, set WANDB_MODE=offline, or use --wandb_log=False."
        ) from error


def start_tensorboard(out_dir: Path, step: int, evaluated_at: int | None):
    """Return a writer of TensorBoard's event files, in which a run that resumes at `step` replaces what follows.

    Raises UserError if tensorboard is not installed or its folder cannot be written.
    """
    folder = out_dir / "tensorboard"
    if folder.is_symlink():
        raise UserError(f"{folder} is a symbolic link, through which TensorBoard would write. Remove it.")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "tensorboard_log=True, but tensorboard is not installed. Run `pip install tensorboard`, or use "
            "--tensorboard_log=False."
        ) from error
    try:
        return SummaryWriter(str(folder), purge_step=step + (evaluated_at == step))
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}. Use another --out_dir.") from error


def log_to_tensorboard(writer, figures: dict) -> None:
    """Write the figures of a step, and flush them, because a killed process would lose them."""
    for name, value in figures.items():
        if name != "step" and value is not None:
            writer.add_scalar(name, value, figures["step"])
    writer.flush()


def duration(seconds: float) -> str:
    """Format seconds for people: 9 s, 2:05 min, 3:20 h, 4.2 days."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02d} min"
    if seconds < 48 * 3600:
        return f"{seconds // 3600}:{seconds % 3600 // 60:02d} h"
    return f"{seconds / 86400:.1f} days"


def size(n_bytes: float) -> str:
    """Format bytes for people, in powers of 1000: 512 KB, 1.5 GB."""
    units = ["B", "KB", "MB", "GB", "TB"]
    while n_bytes >= 1000 and len(units) > 1:
        n_bytes /= 1000
        units.pop(0)
    return f"{n_bytes:.0f} {units[0]}" if n_bytes >= 10 or units[0] == "B" else f"{n_bytes:.1f} {units[0]}"


def read_run(out_dir: Path) -> dict:
    """Read a run from its out_dir: "metrics", "settings", "tokenizer", and "figures" for the table.

    Settings and tokenizer are empty before the first checkpoint. Raises UserError if there is no run.
    """
    metrics = read_metrics(out_dir / "metrics.jsonl", warn=True)
    if not metrics:
        raise UserError(f"{out_dir} has no metrics.jsonl with steps of a run. Give the out_dir of a training run.")
    settings, tokenizer = {}, {}
    for state in sorted(out_dir.glob("step_*/state.json"), key=lambda file: (len(file.parent.name), file)):
        try:
            saved = files.read_json(state)
            settings, tokenizer = dict(saved["settings"]), dict(saved.get("tokenizer") or {})
        except (OSError, ValueError, KeyError, TypeError):
            print(printable(f"warning: {state} is damaged; skipped"), file=sys.stderr)

    def numbers(name: str) -> list[float]:
        return [m[name] for m in metrics if isinstance(m.get(name), (int, float))]

    def median(name: str) -> float | None:
        return statistics.median(numbers(name)) if numbers(name) else None

    evaluations = [m for m in metrics if isinstance(m.get("val_loss"), (int, float))]
    best = min(evaluations, key=lambda m: m["val_loss"], default={})
    tokenizer.pop("chat_template", None)  # it does not affect how text is tokenized
    figures = {
        "steps": max(m["step"] + ("loss" in m) for m in metrics),  # updates made; a loss line counts its own update
        "best val loss": best.get("val_loss"),
        "at step": best.get("step"),
        "best bits per byte": min(numbers("val_bits_per_byte"), default=None),
        "tokens per second": median("tokens_per_second"),
        "mfu": median("mfu"),
        "seconds": max(numbers("seconds"), default=None),
        "skipped updates": max(numbers("skipped"), default=0),
        "spikes": len(spikes(numbers("loss"))),
    }
    return {"metrics": metrics, "settings": settings, "tokenizer": tokenizer, "figures": figures}


def rank(runs: list[dict]) -> bool:
    """Add "rank" (1 is best) to each run's figures, and return whether the tokenizers differ.

    Runs are ranked by their best validation loss. If the tokenizers differ, losses per token are not comparable, and
    runs are ranked by their best bits per byte.
    """
    tokenizers = [run["tokenizer"] for run in runs if run["tokenizer"]]
    differ = any(tokenizer != tokenizers[0] for tokenizer in tokenizers)
    key = "best bits per byte" if differ else "best val loss"
    values = sorted(run["figures"][key] for run in runs if run["figures"][key] is not None)
    for run in runs:
        value = run["figures"][key]
        run["figures"] = {"rank": None if value is None else 1 + values.index(value), **run["figures"]}
    return differ


def differences(runs: list[dict]) -> dict[str, list]:
    """Return the settings that differ between runs, each with its value in every run (None if unknown)."""
    names = dict.fromkeys(name for settings in runs for name in settings if name not in SETTINGS_WITHOUT_EFFECT)
    differ = {}
    for name in names:
        known = [settings.get(name) for settings in runs if settings]
        if any(value != known[0] for value in known):
            differ[name] = [settings.get(name) for settings in runs]
    return differ


def short_names(folders: list[str]) -> list[str]:
    """Return the folders without their common parent."""
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
    parser.add_argument("out_dirs", nargs="+", metavar="OUT_DIR", help="the out_dir of a finished or running run")
    parser.add_argument("--out", metavar="FILE", default="report.png", help="picture to write; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    picture = Path(args.out)
    if picture.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--out {args.out} has an unknown file type. Use a name that ends in .png, .svg or .pdf.")
    if not picture.parent.is_dir():
        raise UserError(f"--out {args.out} cannot be written: there is no folder {picture.parent}. Create it first.")
    if len({Path(folder).resolve() for folder in args.out_dirs}) < len(args.out_dirs):
        raise UserError("the same out_dir is given twice. Give each run once.")

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
        value = round(value, 0 if abs(value) >= 1000 else places) if isinstance(value, float) else value
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
            print(f"{name} has no complete checkpoint, so its settings are unknown")
    if per_byte:
        print("ranked by bits per byte: the tokenizers differ, so losses per token are not comparable")
    if unlike := [name for name in ("objective", "dataset") if name in differ]:
        print(f"note: these runs differ in {' and '.join(unlike)}, so their losses and ranks may not be comparable")
    if note:
        print(f"note: {note}")
    print(f"saved {picture}")
    return 0


if __name__ == "__main__":
    from acorn import run

    run(main)
