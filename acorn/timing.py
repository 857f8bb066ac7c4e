"""Choose the fastest of several equivalent computations by timing them on this machine."""

import time
from collections.abc import Callable, Mapping

FIRST_CALL = 0.2  # seconds; a first call may compile or load a library, but one that takes longer is slow


def fastest(
    candidates: Mapping[str, Callable[[], object]],
    seconds: float = 0.1,
    margin: float = 1.05,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[str, dict[str, float]]:
    """Return the name of the fastest candidate, and the time of each candidate in seconds per call.

    The candidates take turns, so that a change in the machine's speed affects all of them. Each candidate's time is
    that of its fastest call, which other processes disturb least. The first calls warm up and do not count, unless they
    take longer than FIRST_CALL. Candidates that are far behind are dropped early. No new round starts after `seconds`,
    except the first one; candidates should be small enough for several rounds.

    The first candidate is the default. Another one is chosen only if it is faster by the factor `margin`, so that noise
    does not decide between equals. `clock` returns seconds. `time.thread_time` suits single-threaded work, because it
    does not count the time of other processes.
    """
    # warm-up: the first calls fill caches and load libraries, which may take longer than all rounds together
    times = {name: seconds_per_call(work, clock) for name, work in candidates.items()}
    running = [name for name in times if times[name] <= max(10 * min(times.values()), FIRST_CALL)]
    warm = False
    began = time.perf_counter()
    while len(running) > 1 and (not warm or time.perf_counter() - began < seconds):
        for name in running:
            dt = seconds_per_call(candidates[name], clock)
            times[name] = min(times[name], dt) if warm else dt
        running = [name for name in running if times[name] <= 2 * min(times[name] for name in running)]
        warm = True
    default, best = next(iter(times)), min(times, key=times.__getitem__)
    return (best if times[default] > margin * times[best] else default), times


def seconds_per_call(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the time of one call of `work`, in seconds."""
    began = clock()
    work()
    return clock() - began
