"""Choose the fastest of several equivalent computations by timing them on this machine."""

import time
from collections.abc import Callable


def fastest(
    candidates: dict[str, Callable[[], object]],
    seconds: float = 0.1,
    margin: float = 1.05,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[str, dict[str, float]]:
    """Return the name of the fastest candidate, and the time of each in seconds per call.

    The candidates take turns, so that a change in the machine's speed affects all of them, and each counts with its
    fastest call, which other processes disturb least. A candidate that is far behind is dropped early. No new round
    starts after `seconds`; the candidates should be small enough that this allows several rounds.

    The first candidate is the default: another one is chosen only if it is faster by the factor `margin`, so that
    noise does not decide between equals. `clock` gives seconds; `time.thread_time` suits work on one thread, since it
    does not count the time that other processes take.
    """
    began = time.perf_counter()
    # the first calls: caches fill, libraries load
    times = {name: seconds_per_call(work, clock) for name, work in candidates.items()}
    # a first call may compile for some milliseconds; one that takes far longer than that is slow
    running = [name for name in times if times[name] <= max(10 * min(times.values()), seconds / 5)]
    warm = False
    while len(running) > 1 and time.perf_counter() - began < seconds:
        for name in running:
            dt = seconds_per_call(candidates[name], clock)
            times[name] = min(times[name], dt) if warm else dt
        running = [name for name in running if times[name] <= 2 * min(times[name] for name in running)]
        warm = True
    default, best = next(iter(times)), min(times, key=times.get)
    return (best if times[default] > margin * times[best] else default), times


def seconds_per_call(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """The time of one call of `work`, in seconds."""
    began = clock()
    work()
    return clock() - began
