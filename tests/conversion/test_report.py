"""The page of one conversion."""

from __future__ import annotations

from sources import make

import formix
from formix.conversion.report import write_report
from formix.conversion.search import Converted, Search


def test_stages_are_those_that_were_trained(tmp_path) -> None:
    conversion = formix.convert(make("bert"), "relu").conversion
    calibrated = {"stage": "calibrate", "trained": False}
    aligned = {"stage": "align", "trained": True, "held_out_before": 0.5, "held_out_after": 0.25, "seconds": 3.0}
    for stages, shown in (([], False), ([calibrated], False), ([calibrated, aligned], True)):
        conversion.stages = stages
        write_report(conversion.to_dict(), tmp_path / "report.html")
        page = (tmp_path / "report.html").read_text()
        assert ("<h2>Stages</h2>" in page) == shown
        assert ('<td class="number">0.2500</td>' in page) == shown


def test_the_curve_of_a_search_is_shown(tmp_path) -> None:
    record = formix.convert(make("bert"), "relu", layers=[2]).conversion.to_dict()
    points = [Converted(layers=[2][:n], loss=n / 8, milliseconds=3.5 - n, metrics={"sts": 0.75}) for n in range(2)]
    found = Search(costs=[0.5, 0.25, 0.125], curve=points, chosen=[2])
    write_report(record, tmp_path / "report.html", search=found.to_dict())
    rows = (tmp_path / "report.html").read_text().partition("<h2>Number of layers converted</h2>")[2].split("<tr>")
    assert '<th class="number">sts</th>' in rows[1]
    assert [cell in rows[3] for cell in ("<td>2</td>", "0.1250", ">2.50<", ">0.7500<", "chosen")] == [True] * 5
    assert "chosen" not in rows[2]
