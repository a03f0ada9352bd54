"""The results file of `formix bench`: round trip, refusals, and the numbers that are computed from times."""

import dataclasses
import json
import runpy
from pathlib import Path

import pytest

from formix import records
from formix.benchmarks.results import Benchmark, Check
from formix.benchmarks.tables import comparison_rows, page, rows, target_rows, targets_markdown


def test_round_trip_and_the_fields_of_the_file(measured, tmp_path):
    path = tmp_path / "results.json"
    records.write(measured, path)
    assert records.read(Benchmark, path, "formix bench") == measured
    document = json.loads(path.read_text())
    assert document["schema"] == "formix.benchmarks/1"
    assert document["environment"]["cpu"] == "Synthetic processor"
    assert document["environment"]["threads"] == 2
    assert document["isa"] == "avx2"
    assert document["cases"][0]["timings"]["relu"]["seconds"] == [0.001, 0.002, 0.004]


def test_files_of_another_kind_are_refused(measured, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"schema": "formix.results/1"}))
    with pytest.raises(ValueError, match=r"results\.json: schema is 'formix\.results/1'.*formix bench wrote"):
        records.read(Benchmark, path, "formix bench")
    with pytest.raises(ValueError, match="does not exist"):
        records.read(Benchmark, tmp_path / "none.json", "formix bench")
    with pytest.raises(ValueError, match="twice"):
        dataclasses.replace(measured, cases=measured.cases * 2)


def test_ratios_are_of_medians_repetition_by_repetition(measured):
    case = measured.case("relu forward N=128")
    assert case.timings["relu"].median == 0.002
    assert case.ratio("relu", "softmax") == 2.0  # the median of 4, 2 and 1.5
    assert case.ratio("softmax", "softmax") == 1.0
    assert case.timings["relu"].gflops == pytest.approx(2.0)
    assert case.share("relu") == pytest.approx(0.5)  # a quarter of the operations; 0.004 against 0.002 s
    assert case.share("matmul") == 1.0


def test_shares_need_a_ceiling(measured):
    case = measured.cases[0]
    without = dataclasses.replace(case, timings={k: v for k, v in case.timings.items() if k != "matmul"})
    assert without.share("relu") is None


def test_rows_name_every_contender(measured):
    found = rows(measured.cases)
    assert len(found) == 6
    assert found[0] == ("relu forward N=128", "relu", "2", "2.00", "2", "50%", "1")
    assert found[1][-1] == "–"


def test_checks_of_a_kind_share_a_row_with_the_worst(measured):
    first, second = target_rows(measured.checks)
    assert first == (
        "1. ReLU attention, forward",
        "bfloat16: times faster",
        "at least 3",
        "no, 1 of 2",
        "2.00",
        "N = 128",
    )
    assert second[2:] == ("at most 1.3", "yes, 1 of 1", "1.20", "N = 256")


@pytest.mark.parametrize(("value", "at_most", "met"), [(3.0, False, True), (2.9, False, False), (3.1, True, False)])
def test_a_bound_is_kept_from_its_own_side(value, at_most, met):
    check = Check(target=1, quantity="x", where="", value=value, bound=3.0, at_most=at_most)
    assert check.met is met
    assert (check.margin >= 1) is met


def test_a_benchmark_is_compared_with_an_earlier_one(measured):
    faster = {
        name: dataclasses.replace(timing, seconds=tuple(s / 2 for s in timing.seconds))
        for name, timing in measured.cases[0].timings.items()
        if name != "matmul"
    }
    after = dataclasses.replace(measured, cases=(dataclasses.replace(measured.cases[0], timings=faster),))
    head, *body = comparison_rows(measured, after)
    assert len(head) == len(body[0]) == 7
    assert body[0] == ("relu forward N=128", "relu", "2", "1", "2.00", "2.00", "2.00")
    assert [row[1] for row in body] == ["relu", "softmax"]
    other = dataclasses.replace(after, cases=(dataclasses.replace(measured.cases[0], name="another"),))
    with pytest.raises(ValueError, match="no case in common"):
        comparison_rows(measured, other)


def test_the_page_has_the_targets_and_every_case(measured):
    text = page(measured)
    assert targets_markdown(measured) in text
    assert "Synthetic processor (AVX512), 2 threads" in text
    for case in measured.cases:
        assert text.count(f"| {case.name} |") == 3


def test_the_readme_can_hold_the_targets(measured, tmp_path):
    path = tmp_path / "results.json"
    records.write(measured, path)
    source = Path(__file__).resolve().parents[2] / "docs" / "readme.py"
    readme = runpy.run_path(str(source))
    text = f"before\n<!-- table: {path} -->\nstale\n<!-- end -->\nafter\n"
    written = readme["TABLE"].sub(readme["tables"], text)
    assert targets_markdown(measured).strip() in written
    assert "stale" not in written
    assert written.endswith("<!-- end -->\nafter\n")
    assert readme["TABLE"].sub(readme["tables"], written) == written
