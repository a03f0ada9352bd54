"""Statistics against hand calculation and scipy."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from formix.comparison.results import CurvePoint, RunRecord
from formix.comparison.statistics import (
    baseline_design,
    choose_learning_rate,
    learning_curve,
    learning_rates,
    mean_and_deviation,
    paired_difference,
    pareto_front,
    summarise,
)


def runs(design, tests, lr=1e-3, **fields):
    return [
        RunRecord(design=design, seed=seed, lr=lr, status="ok", selected=True, test=value, **fields)
        for seed, value in enumerate(tests)
    ]


def tried(lr, validation, diverged=()):
    return [
        RunRecord(design="relu", seed=seed, lr=lr, status="diverged", message="step 3")
        if seed in diverged
        else RunRecord(design="relu", seed=seed, lr=lr, status="ok", validation=value)
        for seed, value in enumerate(validation)
    ]


def test_mean_and_deviation():
    assert mean_and_deviation([1.0, None, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert mean_and_deviation([1.0]) == (1.0, None)
    assert mean_and_deviation([None]) == (None, None)


def test_paired_difference_is_scipys_paired_t_interval():
    ours, theirs = [0.91, 0.93, 0.90, 0.95], [0.90, 0.94, 0.91, 0.92]
    found = paired_difference(runs("relu", ours), runs("softmax", theirs))
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found.mean == pytest.approx(np.mean(np.subtract(ours, theirs)))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.includes_zero is True
    assert (found.baseline, found.seeds) == ("softmax", 4)


def test_paired_difference_uses_common_seeds_only():
    found = paired_difference(runs("relu", [0.9, 0.8, 0.7]), runs("softmax", [0.5, None, 0.5]))
    assert found.seeds == 2
    assert found.mean == pytest.approx(0.3)


def test_one_seed_gives_no_interval():
    found = paired_difference(runs("relu", [0.9]), runs("softmax", [0.8]))
    assert (found.seeds, found.low, found.high, found.includes_zero) == (1, None, None, None)


@pytest.mark.parametrize("theirs", [[0.7, 0.8, 0.4], [0.8, 0.9, 0.5]], ids=["better", "equal"])
def test_one_and_the_same_difference_gives_no_interval(theirs):
    found = paired_difference(runs("relu", [0.8, 0.9, 0.5]), runs("softmax", theirs))
    assert found.mean == pytest.approx(0.8 - theirs[0])
    assert (found.low, found.high, found.includes_zero) == (None, None, None)


def test_no_common_seed_gives_no_difference():
    assert paired_difference(runs("relu", [0.9, None]), runs("softmax", [None, 0.8])) is None


@pytest.mark.parametrize(
    ("higher", "expected"), [(True, {"fast", "good", "twin"}), (False, {"fast", "poor"})], ids=["higher", "lower"]
)
def test_pareto_front(higher, expected):
    points = {"fast": (1.0, 0.5), "good": (2.0, 0.9), "twin": (2.0, 0.9), "slow": (3.0, 0.9), "poor": (2.5, 0.4)}
    assert pareto_front(points, higher) == expected


def test_pareto_front_against_brute_force():
    generator = np.random.default_rng(0)
    points = {str(i): tuple(p) for i, p in enumerate(generator.integers(0, 6, (40, 2)).astype(float))}
    brute = {
        name
        for name, (x, y) in points.items()
        if not any((a <= x and b > y) or (a < x and b >= y) for a, b in points.values())
    }
    assert pareto_front(points, True) == brute


def test_choose_learning_rate():
    assert choose_learning_rate(tried(1e-3, [0.8, 0.9]) + tried(1e-2, [0.9, 0.9]), True) == 1e-2
    assert choose_learning_rate(tried(1e-3, [0.8, 0.9]) + tried(1e-2, [0.9, 0.9]), False) == 1e-3
    assert choose_learning_rate(tried(1e-3, [0.9]) + tried(1e-2, [0.9]), True) == 1e-3  # of equals, the smaller


def test_choose_learning_rate_compares_common_seeds():
    # 1e-3 ran two more seeds, luckier ones; on seed 0, which both ran, 1e-2 is better
    assert choose_learning_rate(tried(1e-3, [0.80, 0.99, 0.99]) + tried(1e-2, [0.85]), True) == 1e-2


def test_choose_learning_rate_avoids_divergence():
    assert choose_learning_rate(tried(1e-3, [0.8, 0.8]) + tried(1e-2, [0.9, 0.9], diverged=[1]), True) == 1e-3
    assert choose_learning_rate(tried(1e-2, [0.9, 0.9], diverged=[1]), True) == 1e-2
    assert choose_learning_rate(tried(1e-2, [0.9], diverged=[0]), True) is None
    assert choose_learning_rate([], True) is None


def test_summaries(images):
    found = {summary.design: summary for summary in summarise(images)}
    assert list(found) == [record.design for record in images.designs]
    softmax, relu = found["softmax"], found["relu"]
    tests = [run.test for run in images.runs if run.design == "relu" and run.selected]
    assert relu.mean == pytest.approx(np.mean(tests))
    assert relu.deviation == pytest.approx(np.std(tests, ddof=1))
    assert relu.seeds == 3
    assert softmax.difference is None
    assert relu.difference.mean == pytest.approx(relu.mean - softmax.mean)
    speeds = [run.train_items_per_second for run in images.runs if run.design == "relu" and run.selected]
    assert relu.train_items_per_second == pytest.approx(np.median(speeds))
    assert ("float32", "1") in found["activator"].pareto  # the fastest always is


def test_refused_design_has_an_empty_summary(text):
    sima = next(summary for summary in summarise(text) if summary.design == "sima")
    assert sima.refused
    assert (sima.seeds, sima.mean, sima.lr, sima.difference, sima.pareto) == (0, None, None, None, frozenset())


def test_baseline_is_softmax_or_the_first_that_finished(images):
    assert baseline_design(images) == "softmax"
    without = [run for run in images.runs if run.design != "softmax"]
    assert baseline_design(dataclasses.replace(images, runs=tuple(without))) == "relu"
    assert baseline_design(dataclasses.replace(images, runs=())) is None


def test_learning_rates_lists_every_try(images):
    tries = learning_rates(images)
    assert [one.lr for one in tries["relu"]] == [3e-4, 1e-3, 3e-3]
    assert [one.lr for one in tries["relu"] if one.selected] == [1e-3]
    assert (tries["relu+paf+skip"][2].seeds, tries["relu+paf+skip"][2].diverged) == (2, 1)


def curve(*points):
    return tuple(
        CurvePoint(step=step, epoch=step / 10, seconds=step / 100, train_loss=None, validation=value)
        for step, value in points
    )


def test_learning_curve_is_mean_and_deviation():
    same = runs("relu", [0.9, 0.9])
    same = [dataclasses.replace(run, curve=curve((0, 0.1 + i), (10, 0.5 + i))) for i, run in enumerate(same)]
    band = learning_curve(same)
    assert band.step == [0, 10]
    assert band.validation == pytest.approx([0.6, 1.0])
    assert band.validation_deviation == pytest.approx([0.5**0.5] * 2)
    assert band.train_loss == [None, None]
    assert band.epoch == [0, 1]


def test_learning_curve_aligns_seeds_of_different_length():
    pair = runs("relu", [0.9, 0.9])
    pair[0] = dataclasses.replace(pair[0], curve=curve((0, 0.0), (10, 1.0), (20, 2.0)))
    pair[1] = dataclasses.replace(pair[1], curve=curve((0, 0.0), (8, 0.8), (16, 1.6)))
    band = learning_curve(pair)
    assert band.step == [0, 10]
    assert band.validation == pytest.approx([0.0, 1.0])


def test_learning_curve_of_nothing():
    assert learning_curve(runs("relu", [0.9])) is None
