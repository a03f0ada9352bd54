"""What the runs of a comparison say: means over seeds, paired differences, the choice of the learning rate, Pareto."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from formix.comparison.results import Results, RunRecord, latency_settings

ROUNDING = 1e-12  # deviation below which differences are the same


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Paired difference design - baseline of the test metric, over the seeds both finished."""

    baseline: str  # the design compared with
    seeds: int  # number of common seeds
    mean: float  # mean of the differences
    # 95 % Student-t interval; None with one seed, or one and the same difference in all of them (of a small test split
    # not rare), which say nothing about spread
    low: float | None
    high: float | None

    @property
    def includes_zero(self) -> bool | None:
        """Whether the interval contains 0; None where there is no interval."""
        return None if self.low is None or self.high is None else self.low <= 0.0 <= self.high


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One design at its chosen learning rate, over its seeds."""

    design: str  # name
    description: str  # one line
    refused: str | None  # why it cannot do the task
    lr: float | None  # the chosen learning rate; None when no run finished
    seeds: int  # runs with a test metric at the chosen learning rate
    diverged: int  # runs that diverged at the chosen learning rate
    mean: float | None  # test metric
    deviation: float | None  # sample deviation over seeds; None with one seed
    difference: Difference | None  # to the baseline; None for the baseline itself
    train_items_per_second: float | None  # this and all below: medians over seeds
    train_seconds: float | None
    latency_ms: dict[tuple[str, str], float]  # (precision, batch size) -> ms per batch
    parameters: float | None
    flops: float | None
    peak_memory_bytes: float | None
    pareto: frozenset[tuple[str, str]]  # the latency settings in which no other design is both faster and better


@dataclass(frozen=True, kw_only=True)
class LearningRateTry:
    """All seeds of one design at one learning rate."""

    lr: float  # peak learning rate
    validation: float | None  # mean over the finished seeds
    deviation: float | None  # sample deviation; None with one seed
    seeds: int  # finished runs
    diverged: int  # diverged runs
    selected: bool  # chosen on validation


@dataclass(frozen=True, kw_only=True)
class Band:
    """Mean and deviation over seeds along training. All lists have one length; None where nothing was measured."""

    step: list[int]
    epoch: list[float]
    seconds: list[float]
    train_loss: list[float | None]
    train_loss_deviation: list[float | None]
    validation: list[float | None]
    validation_deviation: list[float | None]


def mean_and_deviation(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample deviation (n - 1) of what is not None; None where there is too little."""
    known = [value for value in values if value is not None]
    mean = statistics.fmean(known) if known else None
    return mean, statistics.stdev(known) if len(known) > 1 else None


def paired_difference(design: Sequence[RunRecord], baseline: Sequence[RunRecord]) -> Difference | None:
    """Difference of the test metric over common seeds with its 95 % interval, mean ± t(0.975, n-1) s / sqrt(n).

    There is no interval where s is 0, up to rounding.
    """
    ours = {run.seed: run.test for run in design if run.test is not None}
    theirs = {run.seed: run.test for run in baseline if run.test is not None}
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    mean, deviation = mean_and_deviation(differences)
    if mean is None:
        return None
    low = high = None
    if deviation is not None and deviation > ROUNDING:
        from scipy.stats import t

        n = len(differences)
        half = float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
        low, high = mean - half, mean + half
    return Difference(baseline=baseline[0].design, seeds=len(differences), mean=mean, low=low, high=high)


def pareto_front(points: dict[str, tuple[float, float]], higher_is_better: bool) -> set[str]:
    """Names of the points (latency, metric) that no other point beats in one and equals or beats in the other."""
    sign = 1.0 if higher_is_better else -1.0

    def dominated(latency: float, metric: float) -> bool:
        return any(
            other <= latency and sign * value >= sign * metric and (other, value) != (latency, metric)
            for other, value in points.values()
        )

    return {name for name, point in points.items() if not dominated(*point)}


def choose_learning_rate(runs: Sequence[RunRecord], higher_is_better: bool) -> float | None:
    """The learning rate of one design with the best mean validation metric; None when no run finished.

    Rates are compared over the seeds that all of them ran; one at which a seed diverged comes after one at which
    none did. Of equals, the smaller.
    """
    rates = sorted({run.lr for run in runs})
    common = set.intersection(*({run.seed for run in runs if run.lr == lr} for lr in rates)) if rates else set()

    def rank(lr: float) -> tuple[int, float]:
        tried = [run for run in runs if run.lr == lr and (run.seed in common or not common)]
        mean, _ = mean_and_deviation(run.validation for run in tried if run.status == "ok")
        diverged = sum(run.status == "diverged" for run in tried)
        return diverged, math.inf if mean is None else (-mean if higher_is_better else mean)

    best = min(rates, key=rank, default=None)
    return None if best is None or rank(best)[1] == math.inf else best


def baseline_design(results: Results) -> str | None:
    """The design others are compared with: softmax if it has a test metric, else the first design that has."""
    measured = {run.design for run in results.runs if run.selected and run.test is not None}
    names = [record.design for record in results.designs if record.design in measured]
    return "softmax" if "softmax" in names else (names[0] if names else None)


def summarise(results: Results) -> list[Summary]:
    """One summary per requested design, in the order requested."""
    baseline = baseline_design(results)
    selected = {
        record.design: [run for run in results.runs if run.selected and run.design == record.design]
        for record in results.designs
    }
    metric = {name: mean_and_deviation(run.test for run in runs) for name, runs in selected.items()}
    settings = latency_settings(results)
    latency = {
        name: {
            setting: value
            for setting in settings
            if (value := _median(run.latency_ms.get(setting[0], {}).get(setting[1]) for run in runs)) is not None
        }
        for name, runs in selected.items()
    }
    fronts = {}
    for setting in settings:
        points = {
            name: (latency[name][setting], mean)
            for name, (mean, _) in metric.items()
            if mean is not None and setting in latency[name]
        }
        fronts[setting] = pareto_front(points, results.task.higher_is_better)
    summaries = []
    for record in results.designs:
        name, runs = record.design, selected[record.design]
        compared = baseline is not None and name != baseline
        summaries.append(
            Summary(
                design=name,
                description=record.description,
                refused=record.refused,
                lr=runs[0].lr if runs else None,
                seeds=sum(run.test is not None for run in runs),
                diverged=sum(run.status == "diverged" for run in runs),
                mean=metric[name][0],
                deviation=metric[name][1],
                difference=paired_difference(runs, selected[baseline]) if compared and baseline else None,
                train_items_per_second=_median(run.train_items_per_second for run in runs),
                train_seconds=_median(run.train_seconds for run in runs),
                latency_ms=latency[name],
                parameters=_median(run.parameters for run in runs),
                flops=_median(run.flops for run in runs),
                peak_memory_bytes=_median(run.peak_memory_bytes for run in runs),
                pareto=frozenset(setting for setting, front in fronts.items() if name in front),
            )
        )
    return summaries


def learning_rates(results: Results) -> dict[str, list[LearningRateTry]]:
    """Every learning rate tried, by design, in ascending order."""
    tries: dict[str, list[LearningRateTry]] = {}
    for record in results.designs:
        mine = [run for run in results.runs if run.design == record.design]
        for lr in sorted({run.lr for run in mine}):
            runs = [run for run in mine if run.lr == lr]
            finished = [run for run in runs if run.status == "ok"]
            mean, deviation = mean_and_deviation(run.validation for run in finished)
            tries.setdefault(record.design, []).append(
                LearningRateTry(
                    lr=lr,
                    validation=mean,
                    deviation=deviation,
                    seeds=len(finished),
                    diverged=len(runs) - len(finished),
                    selected=any(run.selected for run in runs),
                )
            )
    return tries


def learning_curve(runs: Sequence[RunRecord]) -> Band | None:
    """The curves of several seeds as mean and deviation; None when no finished run has a curve.

    Seeds evaluated at different steps (a budget in seconds) are interpolated linearly to the steps of the first one,
    as far as all of them went.
    """
    import numpy as np

    curves = [run.curve for run in runs if run.status == "ok" and run.curve]
    if not curves:
        return None
    first, last = max(curve[0].step for curve in curves), min(curve[-1].step for curve in curves)
    steps = [point.step for point in curves[0] if first <= point.step <= last]

    def along(name: str) -> tuple[list[float | None], list[float | None]]:
        rows = []
        for curve in curves:
            known = [(point.step, value) for point in curve if (value := getattr(point, name)) is not None]
            if known:
                x, y = zip(*known, strict=True)
                rows.append(np.interp(steps, x, y, left=np.nan, right=np.nan).tolist())
        columns = [[None if math.isnan(value) else value for value in column] for column in zip(*rows, strict=True)]
        pairs = [mean_and_deviation(column) for column in columns] or [(None, None)] * len(steps)
        return [mean for mean, _ in pairs], [deviation for _, deviation in pairs]

    train_loss, train_loss_deviation = along("train_loss")
    validation, validation_deviation = along("validation")
    return Band(
        step=steps,
        epoch=[value or 0.0 for value in along("epoch")[0]],
        seconds=[value or 0.0 for value in along("seconds")[0]],
        train_loss=train_loss,
        train_loss_deviation=train_loss_deviation,
        validation=validation,
        validation_deviation=validation_deviation,
    )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
