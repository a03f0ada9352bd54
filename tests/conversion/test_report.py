"""The page of one conversion."""

from __future__ import annotations

from sources import make

import formix
from formix.conversion.report import write_report


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
