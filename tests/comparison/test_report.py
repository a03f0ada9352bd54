"""What the report and the tables say, without a browser."""

import dataclasses
import io
import re
from html import unescape
from html.parser import HTMLParser

import pytest
from rich.console import Console

from formix.comparison.report import finding, write_report
from formix.comparison.results import RunRecord
from formix.comparison.tables import markdown_table, print_table, si_prefix, signed, significant


def chosen(design, tests):
    return [
        RunRecord(design=design, seed=seed, lr=1e-3, status="ok", selected=True, test=value)
        for seed, value in enumerate(tests)
    ]


def with_tests(results, **tests):
    """The results reduced to these designs and test metrics."""
    return dataclasses.replace(
        results,
        designs=tuple(record for record in results.designs if record.design in tests),
        runs=tuple(run for design, values in tests.items() for run in chosen(design, values)),
    )


def finding_of(results) -> str:
    return finding(results).replace("\N{NO-BREAK SPACE}", " ")


def page(results, tmp_path) -> str:
    write_report(results, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


class Sources(HTMLParser):
    """Collects every attribute that would load something."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]


def test_report_is_one_file_that_loads_nothing(images, text, tmp_path):
    html = page([images, text], tmp_path)
    sources = Sources()
    sources.feed(html)
    assert [value for value in sources.found if not value.startswith("#")] == []
    style = re.search(r"<style>(.*?)</style>", html, re.S).group(1)
    assert "url(" not in style
    assert "@import" not in style
    assert len(html) < 3_000_000
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_report_names_everything(images, text, tmp_path):
    html = unescape(page([images, text], tmp_path))
    for results in (images, text):
        assert finding(results) in html
        for record in results.designs:
            assert f"</svg>{record.design}</span>" in html
        assert results.command in html
        assert results.environment.cpu in html
        assert results.task.provenance in html
    assert "SimA normalises over all tokens" in html
    assert "the loss became NaN at step 118" in html
    assert "3.52" in html


def test_report_is_reproducible(images, tmp_path):
    assert page(images, tmp_path) == page(images, tmp_path)


def test_report_escapes_what_users_wrote(images, tmp_path):
    evil = "</script><script>alert(1)</script><img src=x>"
    results = dataclasses.replace(
        images,
        command=evil,
        config={evil: evil},
        task=dataclasses.replace(images.task, data=evil, provenance=evil, model=evil, baselines={evil: 0.5}),
    )
    html = page(results, tmp_path)
    assert "<script>alert" not in html
    assert "<img" not in html


def test_report_of_a_comparison_in_which_nothing_ran(images, tmp_path):
    html = page(dataclasses.replace(images, runs=()), tmp_path)
    assert "No design finished a run on this task." in html
    assert "No latency was measured." in html


def test_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no results"):
        write_report([], tmp_path / "report.html")


def test_finding_when_the_interval_includes_zero(images):
    sentence = finding_of(with_tests(images, softmax=[0.90, 0.92, 0.91], relu=[0.93, 0.91, 0.92]))
    assert sentence == (
        "relu has the highest mean test accuracy, 0.920 ± 0.010 over 3 seeds; its difference to softmax, "
        "+0.010 [−0.040, +0.060], has a 95 % interval that includes 0, so these seeds do not separate the two."
    )


def test_finding_when_the_interval_excludes_zero(images):
    sentence = finding_of(with_tests(images, softmax=[0.80, 0.81, 0.82], relu=[0.90, 0.911, 0.92]))
    assert sentence.endswith("has a 95 % interval that excludes 0.")


def test_finding_when_the_baseline_is_best(images):
    sentence = finding_of(with_tests(images, softmax=[0.90, 0.92, 0.91], relu=[0.5, 0.53, 0.51], paf=[0.91, 0.9, 0.9]))
    assert "softmax has the highest" in sentence
    assert "excludes 0 for relu and includes 0 for paf, which these seeds do not separate from it" in sentence


def test_finding_with_a_metric_that_should_be_low(text):
    sentence = finding_of(with_tests(text, softmax=[2.5, 2.4], relu=[2.2, 2.3]))
    assert sentence.startswith("relu has the lowest mean test bits per byte")


@pytest.mark.parametrize(
    ("tests", "expected"),
    [
        ({"softmax": [0.8], "relu": [0.9]}, "one seed gives no interval for its difference to softmax (+0.100)"),
        ({"softmax": [0.9], "relu": [0.8]}, "one seed gives no intervals"),
        ({"softmax": [0.9, 0.8]}, "no other design finished a run"),
        ({"softmax": [0.8, 0.7], "relu": [0.9, 0.8]}, "one and the same value in all seeds gives no interval for its"),
        ({"softmax": [0.9, 0.8], "relu": [0.8, 0.7]}, "one and the same difference in all seeds gives no intervals"),
    ],
    ids=["one seed", "one seed, baseline best", "one design", "same difference", "same difference, baseline best"],
)
def test_finding_with_too_little(tests, expected, images):
    assert expected in finding_of(with_tests(images, **tests))


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200, 300])
def test_terminal_table_fits(width, images, text):
    for results in (images, text):
        out = io.StringIO()
        print_table(results, Console(file=out, width=width, force_terminal=False))
        lines = out.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        assert all(any(record.design in line for line in lines) for record in results.designs)
        assert "…" not in out.getvalue()


def test_markdown_table(text):
    lines = markdown_table(text).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(text.designs)
    assert len({line.count("|") for line in table}) == 1
    assert "For reference, bits per byte of byte bigram 3.52." in lines
    assert any(line.startswith("sima did not run: SimA") for line in lines)


def test_numbers():
    assert [significant(v) for v in (0, 0.01234, 4.567, 31.25, 1254.0)] == ["0", "0.0123", "4.57", "31.2", "1250"]
    assert [signed(v, 2) for v in (0.126, -0.126, -0.001)] == ["+0.13", "−0.13", "0.00"]
    assert si_prefix([None, 12.0], 1000) == (1.0, "")
    assert si_prefix([1000.0], 1000) == (1e3, "k")
    assert si_prefix([2.5e9, 1.0], 1000) == (1e9, "G")
    assert si_prefix([3 * 2**20], 1024) == (2**20, "Mi")
    assert si_prefix([], 1000) == (1.0, "")
