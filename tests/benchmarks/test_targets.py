"""The targets' cases and checks, with invented times; and the measurements in processes of their own."""

import pytest

from formix.benchmarks import isolated, targets
from formix.benchmarks.attention import AttentionCase
from formix.benchmarks.results import Case, Timing
from formix.ops import native

FAST = {"relu": 1.0, "sima": 1.0, "matmul": 4.0}  # everything else takes 30


def invented(bench, cases, *, repetitions, **_):
    found = []
    for case in cases:
        names = ["softmax", "relu"]
        if bench == "attention":
            forms = [x for x in case.baselines if x in ("softmax", "matmul")]
            plain = [f"{d}, {x}" for d in case.designs for x in case.baselines if x in ("naive", "compiled")]
            names = [*case.designs, *plain, *forms]
        timings = {n: Timing(seconds=(FAST.get(n, 30.0),) * repetitions, rounds=1, flops=10**9) for n in names}
        settings = {k: getattr(case, k) for k in case.__dataclass_fields__}
        found.append(Case(name=case.name, bench=bench, settings=settings, timings=timings))
    return tuple(found)


@pytest.fixture
def _invented(monkeypatch):
    monkeypatch.setattr(targets, "measure", invented)
    monkeypatch.setattr(targets, "measure_on", lambda isa, cases, **_: invented("attention", cases, repetitions=1))
    monkeypatch.setattr(targets, "peak_memory", lambda case, threads: (10**9, 0))
    monkeypatch.setattr(native, "isas", lambda: dict.fromkeys(targets.ISAS, ""))  # whatever this processor has


@pytest.mark.usefixtures("_invented")
def test_all_targets_are_checked():
    found = targets.run_targets()
    assert {check.target for check in found.checks} == set(targets.TARGETS)
    assert len({case.name for case in found.cases}) == len(found.cases)
    by_target = {n: [c for c in found.checks if c.target == n] for n in targets.TARGETS}
    assert [len(checks) for checks in by_target.values()] == [8 + 6 + 7 + 6, 14, 32, 11, 7, 2, 10, 2]
    assert by_target[1][0].value == 30.0
    assert all(check.met for check in by_target[1])
    assert not any(check.met for check in by_target[3])  # in this test the other activations are no faster
    growth = next(check for check in by_target[5] if "growth" in check.quantity)
    assert growth.value == pytest.approx(1.0)
    assert by_target[6][0].value == 1.0


@pytest.mark.usefixtures("_invented")
def test_some_targets_are_measured_alone():
    found = targets.run_targets([4], repetitions=1)
    assert {check.target for check in found.checks} == {4}
    assert len(found.cases) == 11


def test_unknown_targets():
    with pytest.raises(ValueError, match="targets has 9; the targets are 1, 2"):
        targets.run_targets([1, 9])


@pytest.mark.slow
@pytest.mark.skipif(native.isas().get("avx2") != "", reason="needs the AVX2 kernels and a processor with it")
def test_a_process_is_held_to_an_instruction_set():
    case = AttentionCase(tokens=16, batch=1, heads=1, head_size=8, dtype="float32", only="avx2", baselines=("softmax",))
    (found,) = isolated.measure_on("avx2", [case], seconds=0.01, threads=1)
    assert found.name == case.name
    assert set(found.timings) == {"relu", "softmax"}


def test_the_peak_of_a_process_includes_the_call():
    case = AttentionCase(tokens=1 << 16, batch=1, heads=1, dtype="float32", designs=("sima",), baselines=())
    peak, growth = isolated.peak_memory(case, threads=1)
    if growth is None:
        pytest.skip("this system does not say")
    assert 3 * 4 * 64 * (1 << 16) < growth < peak


def test_a_failure_in_the_process_is_told():
    with pytest.raises(ValueError, match="process of its own failed"):
        isolated._child({"work": "times", "cases": [{"colour": 1}], "seconds": 0.1, "threads": 1}, {})
