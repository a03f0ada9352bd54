"""SIGTERM and SIGINT end a run at the next step, not inside one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


class Interrupted(KeyboardInterrupt):
    """A signal ended the run, and what it had done is saved."""

    def __init__(self, number: int, saved: str) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}; {saved}")
        self.number = number


class SignalBox:
    """Which of the two arrived since it was opened; 0: none."""

    received = 0


@contextlib.contextmanager
def collected_signals() -> Iterator[SignalBox]:
    """Instead of acting at once, signals wait in the box; outside the main thread nothing is changed."""
    box = SignalBox()
    if threading.current_thread() is not threading.main_thread():
        yield box
        return

    def collect(number: int, _: object) -> None:
        box.received = number

    before = {number: signal.signal(number, collect) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield box
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
