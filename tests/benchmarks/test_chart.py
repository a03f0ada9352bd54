import dataclasses
import json
import re

from formix.benchmarks.chart import chart_page


def test_the_chart_holds_the_times_and_needs_no_network(measured):
    page = chart_page(measured)
    figure = json.loads(re.search(r"const figure = (\{.*\});\n", page)[1])
    lines = {trace["name"]: trace for trace in figure["data"]}
    assert set(lines) == {"relu", "softmax"}
    assert lines["relu"]["x"] == [128, 256]
    assert lines["relu"]["y"] == [2.0, 2.0]
    assert "default-src 'none'" in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)


def test_one_number_of_tokens_makes_no_chart(measured):
    assert chart_page(dataclasses.replace(measured, cases=measured.cases[:1])) is None
