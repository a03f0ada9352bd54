"""Several comparisons in one table."""

import dataclasses
import runpy
from pathlib import Path

import pytest

from formix.comparison.joint import joint_markdown
from formix.comparison.results import RunRecord, write_results


def on(results, data, **tests):
    """The results of these designs on other data, with these test metrics."""
    runs = [
        RunRecord(design=design, seed=seed, lr=1e-3, status="ok", selected=True, test=value)
        for design, values in tests.items()
        for seed, value in enumerate(values)
    ]
    designs = tuple(record for record in results.designs if record.design in tests)
    return dataclasses.replace(
        results, task=dataclasses.replace(results.task, data=data), designs=designs, runs=tuple(runs)
    )


@pytest.fixture
def both(images, text):
    return [
        on(images, "glue:data/CoLA", softmax=[0.50, 0.52, 0.54], paf=[0.49, 0.52, 0.52]),
        on(text, "stdlib", softmax=[2.0, 2.2, 2.1], relu=[2.3, 2.4, 2.2]),
    ]


def test_a_row_per_design_and_a_column_per_task(both):
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in joint_markdown(both).splitlines() if "|" in line
    ]
    assert rows[0] == ["Design", "CoLA, accuracy ↑", "stdlib, bits per byte ↓"]
    assert [row[0] for row in rows[2:]] == ["`softmax`", "`paf`", "`relu`"]
    assert rows[2][1:] == ["0.520 ± 0.020", "2.10 ± 0.10"]
    # differences -0.01, 0, -0.02: mean -0.01, deviation 0.01; t(0.975, 2) = 4.3027, so +- 0.0248
    assert rows[3][1:] == ["0.510 ± 0.017<br>−0.010 [−0.035, +0.015]", "–"]
    assert rows[4][1] == "–"
    assert rows[4][2].startswith("2.30 ± 0.10<br>+0.20 [")


def test_what_every_task_has_to_say_is_below(both):
    text = joint_markdown(both)
    assert "over 3 seeds; below, the paired difference to softmax and its 95 % interval." in text
    assert "CoLA: For reference, accuracy of chance 0.1." in text
    assert "stdlib: For reference, bits per byte of byte bigram 3.52." in text


def test_designs_that_all_diverged_have_no_figures_to_explain(images):
    text = joint_markdown([on(images, "digits", softmax=[], paf=[])])
    assert "| `softmax` | – |" in text
    assert "Test split" not in text


def test_pages_can_include_it(both, tmp_path):
    for number, results in enumerate(both):
        write_results(results, tmp_path / f"{number}.json")
    page = "before\n<!-- joint: 0.json 1.json -->\nold\n<!-- end -->\nafter\n"
    readme = runpy.run_path(str(Path(__file__).resolve().parents[2] / "docs" / "readme.py"))
    readme["tables"].__globals__["ROOT"] = tmp_path
    filled = readme["TABLE"].sub(readme["tables"], page)
    assert filled == f"before\n<!-- joint: 0.json 1.json -->\n\n{joint_markdown(both)}\n<!-- end -->\nafter\n"
    assert readme["TABLE"].sub(readme["tables"], filled) == filled
