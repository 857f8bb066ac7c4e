"""Choose the fastest of several equivalent computations by timing them on this machine."""

import time
from collections.abc import Callable


def fastest(
    candidates: dict[str, Callable[[], object]], seconds: float = 0.1, margin: float = 1.05
) -> tuple[str, dict[str, float]]:
    """Return the name of the fastest candidate, and the time of each in seconds per call.

    The candidates take turns, so that a change in the machine's speed affects all of them, and each counts with its
    fastest call, which other processes disturb least. A candidate that is far behind is dropped early. No new round
    starts after `seconds`; the candidates should be small enough that this allows several rounds.

    The first candidate is the default: another one is chosen only if it is faster by the factor `margin`, so that
    noise does not decide between equals.
    """
    began = time.perf_counter()
    times = {name: seconds_per_call(work) for name, work in candidates.items()}  # cold: caches fill, libraries load
    running = [name for name in times if times[name] <= 10 * min(times.values())]
    warm = False
    while len(running) > 1 and time.perf_counter() - began < seconds:
        for name in running:
            dt = seconds_per_call(candidates[name])
            times[name] = min(times[name], dt) if warm else dt
        running = [name for name in running if times[name] <= 2 * min(times[name] for name in running)]
        warm = True
    default, best = next(iter(times)), min(times, key=times.get)
    return (best if times[default] > margin * times[best] else default), times


def seconds_per_call(work: Callable[[], object]) -> float:
    """The time of one call of `work`, in seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
