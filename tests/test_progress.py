"""acorn/training/progress.py: the console lines, the progress bar and the estimated time left."""

import io
import itertools
import random
import sys

import pytest

from acorn.training.progress import Console, Progress, TimeLeft, update_parts
from acorn.training.run import RunState
from train import TrainSettings


def test_estimated_time_left_is_accurate_and_smooth():
    """Simulate 1,000 noisy updates of 0.1 s on average and 5 evaluations of 10 s.

    Compare each estimate with the true remaining time and with the previous estimate.
    """
    chance = random.Random(0)
    seconds = [0.1 * chance.choice([0.5, 0.5, 0.5, 2.5]) for _ in range(1000)]  # mean 0.1
    seconds[0] = 30.0  # compiling
    left = TimeLeft(max_iters=1000, eval_interval=250)
    said = []
    for step in range(1000):
        if step % 250 == 0:
            left.add_evaluation(10.0)
        left.add_updates(1, seconds[step])
        to_come = sum(seconds[step + 1 :]) + 10 * (4 - step // 250)
        said.append((left.estimate(step + 1), to_come))
    for estimate, to_come in said[50:]:
        assert abs(estimate - to_come) < 0.15 * to_come + 2
    assert said[0][0] is None
    errors = [estimate - to_come for estimate, to_come in said[50:]]
    assert max(abs(after - before) for before, after in itertools.pairwise(errors)) < 6
    assert said[-1][0] == pytest.approx(10.0)  # the final evaluation remains
    uneven = TimeLeft(max_iters=10, eval_interval=4)  # evaluations at 4, 8 and 10
    uneven.add_evaluation(1.0)
    uneven.add_updates(1, 9.0)
    uneven.add_updates(2, 2.0)
    assert uneven.estimate(2) == pytest.approx(8 + 3) and uneven.estimate(8) == pytest.approx(2 + 2)


def test_console_line_omits_unknown_values():
    figures = (3, 10, 1.5, 1e-3, 0.5, 12345.6)
    line = " | ".join(update_parts(*figures, None, 65))
    assert line.startswith("step 3/10 | loss 1.5000") and "12,346 tok/s" in line and line.endswith("1:05 min left")
    assert "mfu" not in line and "left" not in " | ".join(update_parts(*figures, None, None))
    assert "mfu 41.2%" in update_parts(*figures, 0.412, 65)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def show(stdout, monkeypatch) -> str:
    monkeypatch.setattr(sys, "stdout", stdout)
    console = Console(is_main=True, signals=[])
    console.start_bar(0, 4)
    for step in range(4):
        console.advance()
        console.update([f"step {step}/4", f"loss {step}.5"])
    console.log("step 4: val loss 3.2")
    console.close()
    return stdout.getvalue()


def test_bar_shows_the_time_left_on_a_narrow_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdout", stdout := Terminal())
    monkeypatch.setenv("COLUMNS", "80")
    console = Console(is_main=True, signals=[])
    console.start_bar(1872, 2000)
    console.update(update_parts(1872, 2000, 1.8, 1e-3, 0.5, 12345.0, None, 45.0))
    console.close()
    assert "45 s left | loss 1.8000" in stdout.getvalue()


def test_terminal_shows_a_bar_and_file_shows_lines(monkeypatch):
    drawn = show(Terminal(), monkeypatch)
    assert "4/4, loss 3.5" in drawn and "step 4: val loss 3.2\n" in drawn
    assert drawn.count("\n") == 1  # updates redraw one line
    lines = show(io.StringIO(), monkeypatch)
    assert lines == "".join(f"step {i}/4 | loss {i}.5\n" for i in range(4)) + "step 4: val loss 3.2\n"


@pytest.mark.parametrize(
    "max_iters, given, expected", [(0, 0, 1), (5, 0, 1), (100, 0, 3), (2000, 0, 50), (10**6, 0, 100), (100, 7, 7)]
)
def test_run_prints_about_40_lines_or_one_per_100_updates(max_iters, given, expected):
    s = TrainSettings(max_iters=max_iters, log_interval=given)
    assert Progress(s, RunState(), None, None, None).interval == expected
