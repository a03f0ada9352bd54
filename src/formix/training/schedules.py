"""Learning rates over a run, as shares of the peak; pure functions of the spent share of the budget."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "constant", "rsqrt"]


def lr_factor(
    progress: float, schedule: Schedule = "cosine", *, warmup: float = 0.0, cooldown: float = 0.0, floor: float = 0.0
) -> float:
    """Share of the peak learning rate when `progress` p (0 to 1) of the budget is spent.

    cosine    floor + (1 - floor) (1 + cos(pi (p - warmup) / (1 - warmup))) / 2          DeiT, big_vision, nanoGPT
    constant  1                                                                         warm-up, stable, decay
    rsqrt     sqrt(warmup / p)                                                          big_vision

    All rise linearly from 0 while p < `warmup`. `constant` and `rsqrt` are multiplied by the line that falls from 1 to
    `floor` over the last `cooldown` of the budget, as in big_vision (and as "constant with cooldown" is usually meant).
    """
    if progress < warmup:
        return progress / warmup
    progress = min(1.0, progress)
    if schedule == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
    factor = math.sqrt(warmup / progress) if schedule == "rsqrt" else 1.0
    if progress > 1 - cooldown:
        factor *= floor + (1 - floor) * (1 - progress) / cooldown
    return factor
