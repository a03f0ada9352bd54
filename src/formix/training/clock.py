"""Seconds of training."""

from __future__ import annotations

import time


class Clock:
    """Seconds of training: it stands still while it is paused, during evaluations and the writing of checkpoints."""

    def __init__(self) -> None:
        self._spent, self._since = 0.0, time.perf_counter()
        self._running = True

    @property
    def seconds(self) -> float:
        return self._spent + (time.perf_counter() - self._since if self._running else 0.0)

    def set(self, seconds: float) -> None:
        """Go on from there."""
        self._spent, self._since = seconds, time.perf_counter()

    def __enter__(self) -> None:
        """Pause."""
        self._spent, self._running = self.seconds, False

    def __exit__(self, *_: object) -> None:
        self._since, self._running = time.perf_counter(), True
