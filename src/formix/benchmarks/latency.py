"""How long a forward pass takes, measured so that several models can be compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved_medians(
    calls: Mapping[str, Callable[[], object]], *, repeats: int = 15, seconds: float = 5.0
) -> dict[str, float]:
    """Median time of each call in seconds, the calls taken in turn so that all see the same state of the machine.

    Args:
        calls: name -> function; each is run twice before anything is timed.
        repeats: rounds over all calls; fewer (at least 3) if `seconds` have passed.
    """
    for call in calls.values():
        call()
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for done in range(1, repeats + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - begin)
        if done >= 3 and time.perf_counter() - start > seconds:
            break
    return {name: statistics.median(values) for name, values in times.items()}
