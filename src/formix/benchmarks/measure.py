"""From cases to their measurements: every contender of a case in turn, the whole list of cases once per repetition."""

from __future__ import annotations

import dataclasses
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

from formix.benchmarks.latency import interleaved_times
from formix.benchmarks.memory import peak_growth
from formix.benchmarks.results import Case, Timing

Show = Callable[[int, int, str], None]  # steps done, steps in all, what comes next
MOST_ROUNDS = 50
TURN = 0.01  # seconds for one contender


def idle(done: int, total: int, name: str) -> None:
    """Shows nothing."""


class Measurable(ABC):
    """A case that can be measured: the base of a frozen dataclass."""

    device: str  # where its tensors and models are made

    @property
    def place(self) -> str:
        """The end of the name of a case that is not measured on the CPU."""
        return "" if self.device == "cpu" else f" on {self.device}"

    @property
    @abstractmethod
    def name(self) -> str:
        """Unique among the cases of a run."""

    @abstractmethod
    def calls(self) -> dict[str, Callable[[], object]]:
        """Contender -> what is timed."""

    @abstractmethod
    def flops(self, contender: str) -> int | None:
        """Operations of one call of it; None where nobody counts them."""

    def mode(self) -> AbstractContextManager[object]:
        """What the calls run in, entered outside the clock."""
        return nullcontext()

    def profile(self) -> dict[str, dict[str, float]]:
        """Contender -> part -> seconds of one call; empty if none is wanted."""
        return {}


def measure(
    bench: Literal["attention", "block", "model", "converted"],
    cases: Sequence[Measurable],
    *,
    repetitions: int = 3,
    seconds: float = 1.0,
    show: Show = idle,
) -> tuple[Case, ...]:
    """Measure all cases, and all again for every repetition, so that repetitions lie minutes apart.

    Args:
        seconds: rounds of a case in one repetition end after this time; there is always one.
    """
    medians: list[dict[str, list[float]]] = [{} for _ in cases]
    rounds: list[dict[str, int]] = [{} for _ in cases]
    memory: list[dict[str, int | None]] = [{} for _ in cases]
    for repetition in range(repetitions):
        for i, case in enumerate(cases):
            show(repetition * len(cases) + i, repetitions * len(cases), case.name)
            torch.manual_seed(0)
            with torch.device(case.device):
                calls = case.calls()
            with case.mode():
                if repetition == 0:
                    start = time.perf_counter()
                    for call in calls.values():  # compilation and first pages are not memory of the call
                        call()
                    memory[i] = {name: peak_growth(call, case.device) for name, call in calls.items()}
                    long = time.perf_counter() - start > 4 * seconds
                else:
                    long = sum(values[0] for values in medians[i].values()) > seconds
                times = interleaved_times(
                    calls, repeats=MOST_ROUNDS, seconds=seconds, least=1, warm_up=0 if long else 1, turn=TURN
                )
            for name, values in times.items():
                medians[i].setdefault(name, []).append(statistics.median(values))
                rounds[i][name] = rounds[i].get(name, 0) + len(values)
    return tuple(
        Case(
            name=case.name,
            bench=bench,
            settings=_settings(case),
            timings={
                name: Timing(
                    seconds=tuple(medians[i][name]),
                    rounds=rounds[i][name],
                    flops=case.flops(name),
                    memory=None if memory[i][name] is None else max(0, memory[i][name]),  # type: ignore[type-var]
                )
                for name in medians[i]
            },
            profile=case.profile(),
        )
        for i, case in enumerate(cases)
    )


def _settings(case: Any) -> dict[str, Any]:
    settings = dataclasses.asdict(case)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
