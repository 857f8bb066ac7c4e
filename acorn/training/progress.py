"""Show the progress of a run: lines and a progress bar on the console, and lines in metrics.jsonl."""

import math
import os
import shutil
import signal
import statistics
import sys
import time
from typing import TYPE_CHECKING

from torch import Tensor

from acorn import printable, report
from acorn.distributed import runtime
from acorn.report import duration, task_name
from acorn.training.accumulate import Accumulator

if TYPE_CHECKING:
    from acorn.training.run import RunState
    from train import TrainSettings

LINES = 40  # on the console, for a run with log_interval=0
MOST_UPDATES = 100  # between two lines of such a run


class Console:
    """Prints lines on rank 0. On a terminal, a progress bar stays below them."""

    def __init__(self, is_main: bool, signals: list[int]):
        self.is_main, self.signals, self.bar = is_main, signals, None

    def log(self, text: str) -> None:
        """Print a line, above the bar.

        If the reader has exited, as in `python train.py | head`, the run stops as after SIGTERM. Other errors, such as
        a full disk under a log file, are ignored.
        """
        if not self.is_main:
            return
        try:
            if self.bar is not None:
                self.bar.clear()
            print(printable(text), flush=True)
            if self.bar is not None:
                self.bar.refresh()
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            self.signals.append(signal.SIGTERM)
        except OSError:
            pass

    def fail(self, text: str, code: int) -> int:
        """Print an error on rank 0, and return the exit code `code`."""
        self.close()
        if self.is_main:
            print(printable(f"error: {text}"), file=sys.stderr)
        return code

    def start_bar(self, step: int, max_iters: int) -> None:
        """Show a progress bar if stdout is a terminal."""
        if self.is_main and sys.stdout.isatty():
            from tqdm import tqdm

            layout = "{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt}{postfix}"
            width = shutil.get_terminal_size().columns  # 80 for a terminal that does not tell its width
            self.bar = tqdm(initial=step, total=max_iters, file=sys.stdout, bar_format=layout, ncols=width, leave=False)

    def advance(self) -> None:
        """Move the bar by one update."""
        if self.bar is not None:
            self.bar.update()

    def update(self, parts: list[str]) -> None:
        """Show the figures of an update: next to the bar on a terminal, otherwise as a line."""
        if self.bar is None:
            self.log(" | ".join(parts))
        else:
            # the bar itself shows the step; 80 columns are too few for all figures, so the time left comes first
            self.bar.set_postfix_str(" | ".join(sorted(parts[1:], key=lambda part: not part.endswith(" left"))))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class TimeLeft:
    """Estimates the remaining seconds of a run.

    The time of updates is averaged over about the last minute, and the time of evaluations over all so far.
    """

    WINDOW = 60.0  # seconds after which the weight of a measurement has fallen to 1/e

    def __init__(self, max_iters: int, eval_interval: int):
        self.max_iters, self.eval_interval = max_iters, eval_interval
        self.seconds, self.updates, self.measured = 0.0, 0.0, 0
        self.evaluations: list[float] = []

    def add_updates(self, n: int, seconds: float) -> None:
        """Add a measurement: `n` updates took `seconds`. The second one replaces the first, which included warm-up."""
        decay = math.exp(-seconds / self.WINDOW) if self.measured > 1 else 0.0
        self.seconds, self.updates = decay * self.seconds + seconds, decay * self.updates + n
        self.measured += 1

    def add_evaluation(self, seconds: float) -> None:
        """Add an evaluation that took `seconds`, including its checkpoint, plot and sample."""
        self.evaluations.append(seconds)

    def estimate(self, step: int) -> float | None:
        """Return the seconds from `step` updates to the end of the run, or None before there is an estimate."""
        if self.measured < 2:
            return None
        interval = self.eval_interval
        n = self.max_iters // interval - math.ceil(step / interval) + 1  # an evaluation at `step` itself is still due
        n += self.max_iters % interval > 0  # an evaluation always follows the last update
        evaluating = n * statistics.fmean(self.evaluations) if self.evaluations else 0.0
        return (self.max_iters - step) * self.seconds / self.updates + evaluating


class Progress:
    """Reports updates on the console and, unless `metrics` is None, in metrics.jsonl."""

    def __init__(
        self,
        s: "TrainSettings",
        state: "RunState",
        accumulator: Accumulator,
        console: Console,
        metrics: report.Metrics | None,
    ):
        self.s, self.state, self.accumulator = s, state, accumulator
        self.console, self.metrics = console, metrics
        self.interval = s.log_interval or min(math.ceil(s.max_iters / LINES), MOST_UPDATES) or 1
        self.time_left = TimeLeft(s.max_iters, s.eval_interval)
        self.clock, self.clock_step = time.perf_counter(), state.step  # start of the interval of the next line

    def restart_clock(self) -> None:
        """Exclude the time since the last line, in which the run evaluated, from the time of the updates."""
        now = time.perf_counter()
        self.time_left.add_evaluation(now - self.clock)
        self.clock, self.clock_step = now, self.state.step

    def is_due(self, step: int) -> bool:
        """Return whether the figures of update `step` are reported."""
        return step % self.interval == 0

    def update(self, step: int, loss_sum: Tensor, n_targets: Tensor, lr: float, grad_norm: Tensor) -> None:
        """Report update `step`, from the results of the accumulator. The host waits for the device."""
        dist, model, state = self.accumulator.dist, self.accumulator.raw_model, self.state
        dist.synchronize()
        now = time.perf_counter()
        n_updates, seconds = state.step - self.clock_step, now - self.clock
        self.clock, self.clock_step = now, state.step
        self.time_left.add_updates(n_updates, seconds)
        loss, norm = dist.sum(loss_sum).item() / max(n_targets.item(), 1), grad_norm.item()
        n_sequences = self.accumulator.n_sequences
        rate = n_updates * n_sequences * self.s.block_size / seconds
        mfu = model.estimate_mfu(n_sequences, seconds / n_updates, dist.peak_flops())
        if self.accumulator.objective.rollouts is not None:  # most of the time is spent on sampling
            rate, mfu = n_updates * n_targets.item() / seconds, None
        left = self.time_left.estimate(state.step)
        if left is not None and self.s.max_minutes:
            left = min(left, max(0.0, 60 * self.s.max_minutes - state.tick()))
        figures = self.accumulator.objective.means(self.accumulator.figures)
        figures.pop("loss", None)
        if figures.get("no_signal") == 1 and not self.s.kl_beta:
            text = f"all completions of a prompt have equal rewards (mean {figures['reward']:g}), so nothing is learned"
            advice = "Use prompts that the model sometimes answers right, or a larger --group_size."
            self.console.log(f"note: in step {step}, {text}. {advice}")
        self.console.update(update_parts(step, self.s.max_iters, loss, lr, norm, rate, mfu, left, figures))
        of_rank = dist.gather([runtime.peak_memory(dist.device), self.accumulator.waited.take()])
        if self.metrics is not None:
            self.metrics.write(
                step=step,
                loss=loss,
                **figures,
                lr=lr,
                grad_norm=norm,
                tokens_per_second=rate,
                mfu=mfu,
                skipped=state.skipped,
                seconds=state.tick(),
                memory=[int(memory) for memory, _ in of_rank],
                waited=[round(waited, 4) for _, waited in of_rank],
            )


def update_parts(
    step: int,
    max_iters: int,
    loss: float,
    lr: float,
    grad_norm: float,
    rate: float,
    mfu: float | None,
    left: float | None,
    figures: dict[str, float] | None = None,
) -> list[str]:
    """Return the figures of update `step` for the console. `rate` is in tokens per second, `left` in seconds.

    An unknown `mfu` or `left` (None) is omitted. `figures` are those of the objective, by name.
    """
    parts = [f"step {step}/{max_iters}", f"loss {loss:.4f}", *format_figures(figures or {})]
    parts += [f"lr {lr:.2e}", f"grad norm {grad_norm:.3f}"]
    parts += [f"{rate:,.0f} tok/s"]
    parts += [] if mfu is None else [f"mfu {mfu:.1%}"]
    parts += [] if left is None else [f"{duration(left)} left"]
    return parts


def format_figures(figures: dict[str, float]) -> list[str]:
    """Return figures for the console, such as "chosen reward 0.123"."""
    return [f"{name.replace('_', ' ')} {value:.3f}" for name, value in figures.items()]


def evaluation_line(
    step: int, train: dict[str, float], val: dict[str, float], measured: dict[str, float | None]
) -> str:
    """Return the console line of an evaluation at `step`.

    `train` and `val` are the results of `Objective.evaluate`, `measured` those of `measure_tasks`.
    """
    each = ", ".join(f"{name[5:]} {loss:.4f}" for name, loss in val.items() if name.startswith("loss/"))
    per_byte = f", {val['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in val else ""
    tasks = "".join(f", {task_name(name)} {'n/a' if x is None else f'{x:.1f}%'}" for name, x in measured.items())
    if "perplexity" not in val:
        words = ", ".join(format_figures({name: value for name, value in val.items() if name != "loss"}))
        return f"step {step}: train loss {train['loss']:.4f}, val loss {val['loss']:.4f} ({words}){tasks}"
    return (
        f"step {step}: train loss {train['loss']:.4f}, val loss {val['loss']:.4f}{f' ({each})' if each else ''}, "
        f"perplexity {val['perplexity']:.2f}{per_byte}{tasks}"
    )
