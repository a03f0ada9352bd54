"""How long calls take, measured so that several of them can be compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved_times(
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    seconds: float,
    least: int = 3,
    warm_up: int = 2,
    turn: float = 0.0,
) -> dict[str, list[float]]:
    """Times of each call in seconds, the calls taken in turn so that all see the same state of the machine. Every
    second round goes backwards, so that none always follows the one that leaves the processor hot and slow.

    Args:
        calls: name -> function.
        repeats: rounds over all calls; fewer (at least `least`) if `seconds` have passed.
        warm_up: how often each is run before anything is timed.
        turn: a call shorter than this is repeated in its turn until so many seconds have passed, and the first of
            them does not count: it would be charged for the caches that the call before it has emptied.
    """
    for call in calls.values():
        for _ in range(warm_up):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for done in range(1, repeats + 1):
        for name, call in list(calls.items())[:: 1 if done % 2 else -1]:
            times[name] += _turn(call, turn)
        if done >= least and time.perf_counter() - start > seconds:
            break
    return times


def _turn(call: Callable[[], object], seconds: float) -> list[float]:
    times = [_time(call)]
    if times[0] < seconds:
        times = []
        start = time.perf_counter()
        while not times or time.perf_counter() - start < seconds:
            times.append(_time(call))
    return times


def _time(call: Callable[[], object]) -> float:
    gpu = torch.cuda.is_available()  # asked before the clock starts: it takes a microsecond
    begin = time.perf_counter()
    call()
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def interleaved_medians(
    calls: Mapping[str, Callable[[], object]], *, repeats: int = 15, seconds: float = 5.0
) -> dict[str, float]:
    """Median time of each call in seconds; see `interleaved_times`."""
    times = interleaved_times(calls, repeats=repeats, seconds=seconds)
    return {name: statistics.median(values) for name, values in times.items()}
