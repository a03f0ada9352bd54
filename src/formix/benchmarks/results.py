"""What a benchmark found: `results.json` of `formix bench`, and what is computed from it.

Stored are times; ratios, rates and shares are properties, so that the file says everything once.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any, Literal

from formix.environment import Environment

SCHEMA: Literal["formix.benchmarks/1"] = "formix.benchmarks/1"
CEILING = "matmul"  # the contender that is PyTorch's matrix product


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One contender of one case."""

    seconds: tuple[float, ...]  # for every repetition the median of its rounds
    rounds: int  # in all repetitions together
    flops: int | None = None  # operations of one call
    memory: int | None = None  # bytes by which a call raised the process's resident memory at its peak

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def gflops(self) -> float | None:
        """10^9 operations per second."""
        return None if self.flops is None else self.flops / self.median / 1e9


@dataclass(frozen=True, kw_only=True)
class Case:
    """Contenders that were measured in turn on the same inputs."""

    name: str
    bench: Literal["attention", "block", "model", "converted"]
    settings: dict[str, Any]  # shapes, dtype and what else the case is
    timings: dict[str, Timing]
    profile: dict[str, dict[str, float]] = field(default_factory=dict)  # contender -> part -> seconds of one call

    def ratio(self, contender: str, baseline: str) -> float:
        """How many times faster the contender is: the median over repetitions of the quotient of medians."""
        pairs = zip(self.timings[baseline].seconds, self.timings[contender].seconds, strict=True)
        return statistics.median(slow / fast for slow, fast in pairs)

    def share(self, contender: str) -> float | None:
        """Achieved operations per second as a share of those of PyTorch's matrix product."""
        ours, ceiling = self.timings[contender].flops, self.timings.get(CEILING)
        if ours is None or ceiling is None or ceiling.flops is None:
            return None
        return ours / ceiling.flops * self.ratio(contender, CEILING)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One number of a target against its bound."""

    target: int  # number of the target
    quantity: str  # what the number is
    where: str  # on which case of those that share target, quantity and bound
    value: float
    bound: float
    at_most: bool = False  # the bound is an upper one

    @property
    def met(self) -> bool:
        """Whether the number keeps the bound."""
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    @property
    def margin(self) -> float:
        """1 at the bound, more on its good side."""
        return self.bound / self.value if self.at_most else self.value / self.bound


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Everything one run of `formix bench` found."""

    schema: Literal["formix.benchmarks/1"] = SCHEMA
    command: str  # as typed
    created: str  # ISO 8601 time
    environment: Environment
    isa: str | None  # the instruction set of formix's kernels; null: there are none
    config: dict[str, Any]
    cases: tuple[Case, ...]
    checks: tuple[Check, ...] = ()  # of `formix bench targets`

    def __post_init__(self) -> None:
        names = [case.name for case in self.cases]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"cases has {twice!r} twice, expected each name once")

    def case(self, name: str) -> Case:
        """The case of that name."""
        return next(case for case in self.cases if case.name == name)
