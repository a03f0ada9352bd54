"""A chart of time against the number of tokens, as one HTML file that needs no network."""

from __future__ import annotations

import base64
import gzip
from collections import defaultdict
from typing import Any

from formix.benchmarks.results import CEILING, Benchmark

# The page unpacks plotly.js itself (a quarter of its size); `data-drawn` says that it is done.
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>formix bench</title>
<div id="chart"></div>
<script type="text/plain" id="plotly">{plotly}</script>
<script>
(async () => {{
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), c => c.charCodeAt(0));
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.text = await new Response(unpacked).text();
  document.head.append(script);
  const figure = {figure};
  await Plotly.newPlot("chart", figure.data, figure.layout);
  document.documentElement.dataset.drawn = "true";
}})();
</script>
</html>
"""
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def chart_page(benchmark: Benchmark) -> str | None:
    """The page, or None if no contender was measured at two or more numbers of tokens."""
    from plotly.offline import get_plotlyjs

    figure = _figure(_lines(benchmark), benchmark)
    if figure is None:
        return None
    plotly = base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()
    return _PAGE.format(plotly=plotly, figure=figure.to_json().replace("</", "<\\/"))


def _lines(benchmark: Benchmark) -> dict[str, dict[str, dict[int, float]]]:
    """Panel -> contender -> tokens -> milliseconds, of the attention cases that differ in their tokens only."""
    panels: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for case in benchmark.cases:
        s = case.settings
        if case.bench != "attention" or s["only"]:
            continue
        panel = ("causal, " if s["causal"] else "") + ("forward + backward" if s["backward"] else "forward")
        shape = f"B = {s['batch']}, H = {s['heads']}, D = {s['head_size']}"
        for name, timing in case.timings.items():
            if name != CEILING:
                panels[f"{panel}, {s['dtype']}, {shape}"][name][s["tokens"]] = 1e3 * timing.median
    lines = {
        panel: {name: points for name, points in contenders.items() if len(points) > 1}
        for panel, contenders in panels.items()
    }
    return {panel: contenders for panel, contenders in lines.items() if contenders}


def _figure(panels: dict[str, dict[str, dict[int, float]]], benchmark: Benchmark) -> Any:
    from plotly.subplots import make_subplots

    if not panels:
        return None
    names = list(dict.fromkeys(name for contenders in panels.values() for name in contenders))
    names.sort(key=lambda name: name != "softmax")
    height = (len(panels) + 1) // 2
    figure = make_subplots(rows=height, cols=2, subplot_titles=list(panels), vertical_spacing=0.28 / height)
    shown: set[str] = set()
    for i, contenders in enumerate(panels.values()):
        for name, points in contenders.items():
            tokens = sorted(points)
            figure.add_scatter(
                x=tokens,
                y=[points[n] for n in tokens],
                name=name,
                legendgroup=name,
                showlegend=name not in shown,
                mode="lines+markers",
                line={"color": "#666666" if name == "softmax" else _COLOURS[(names.index(name) - 1) % len(_COLOURS)]},
                row=i // 2 + 1,
                col=i % 2 + 1,
            )
            shown.add(name)
    where = benchmark.environment
    figure.update_xaxes(type="log", title="tokens", tickvals=[128, 256, 512, 1024, 2048, 4096, 8192, 16384, 65536])
    figure.update_yaxes(type="log", title="milliseconds", dtick=1)
    figure.update_layout(
        template="plotly_white",
        title="Time of attention; softmax is PyTorch's"
        f"<br><sup>{where.cpu}, {where.instruction_set}, {where.threads} threads</sup>",
        width=1080,
        height=120 + 380 * height,
    )
    return figure
