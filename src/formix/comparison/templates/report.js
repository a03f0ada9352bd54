"use strict";
const SHAPES = ["circle", "square", "diamond", "triangle-up", "cross", "x", "triangle-down", "star"];
const LEGEND = {orientation: "h", x: 0, xanchor: "left", yref: "container", y: 0, yanchor: "bottom", itemwidth: 30};
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = design => css(`--d${design.colour}`);
const format = (value, decimals) => value.toFixed(decimals).replace("-", "−");

/* Tables: a click on a header sorts by its column, a second click the other way round; missing values stay last. */
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const key = row => row.cells[column].dataset.key;
    const compare = (a, b) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      return direction * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
    };
    body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
  }));
}

function layout(extra) {
  const axis = {gridcolor: css("--grid"), linecolor: css("--soft"), zeroline: false, tickcolor: css("--soft"),
    automargin: true, showline: true, ticks: "outside", ticklen: 4};
  const merged = {
    font: {family: css("--sans"), size: 13, color: css("--ink")}, margin: {l: 48, r: 16, t: 34, b: 44},
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
    hoverlabel: {bgcolor: css("--panel"), bordercolor: css("--rule"), font: {color: css("--ink"), family: css("--sans")}},
    dragmode: matchMedia("(pointer: fine)").matches ? "zoom" : false, ...extra,
  };
  for (const name of ["xaxis", "yaxis"]) merged[name] = {...axis, ...extra[name], title: {standoff: 10, font: {size: 13, color: css("--soft")}, ...extra[name].title}};
  return merged;
}

/* The name of the vertical axis, set horizontally above it. */
const heading = text => ({text, xref: "paper", yref: "paper", x: 0, y: 1, xanchor: "left", yanchor: "bottom",
  xshift: -40, yshift: 8, showarrow: false, font: {color: css("--soft")}});

/* A range widened to the reference values close by, which are worth the room. */
function withReferences(task, range) {
  const span = range[1] - range[0];
  for (const value of Object.values(task.references))
    if (value > range[0] - span && value < range[1] + span) range = [Math.min(range[0], value - span / 20), Math.max(range[1], value + span / 10)];
  return range;
}

/* Reference values: a dashed line with its name at the right where it lies inside the range, else a note at the left of
   the edge it lies beyond. */
function references(task, range) {
  const shapes = [], annotations = [];
  for (const [name, value] of Object.entries(task.references)) {
    const inside = !range || (value >= range[0] && value <= range[1]);
    const label = `${name} ${Number(value.toPrecision(4))}`;
    const note = {text: inside ? label : `${label} ${value < range[0] ? "↓" : "↑"}`, xref: "paper", showarrow: false,
      xanchor: "right", x: 1, font: {color: css("--soft"), size: 12}};
    if (inside) {
      shapes.push({type: "line", xref: "paper", x0: 0, x1: 1, y0: value, y1: value, layer: "below",
        line: {color: css("--soft"), width: 1, dash: "dash"}});
      annotations.push({...note, y: value, yref: "y", yanchor: "bottom"});
    } else {
      const below = value < range[0], stacked = annotations.filter(a => a.yref === "paper" && (a.y === 0) === below).length;
      annotations.push({...note, x: 0, xanchor: "left", xshift: 4, yref: "paper", y: below ? 0 : 1, yanchor: below ? "bottom" : "top",
        yshift: (below ? 1 : -1) * 16 * stacked});
    }
  }
  return {shapes, annotations};
}

function bounds(values, share) {
  const low = Math.min(...values), high = Math.max(...values), pad = (high - low || Math.abs(high) || 1) * share;
  return [low - pad, high + pad];
}

/* Where each point's name goes: the first of eight places in which it covers no point, no line (a box without width
   or height) and no other name; null when a name finds none. All in pixels. */
function places(points, lines, size) {
  const taken = points.map(p => [p.x - 7, p.y - Math.max(7, p.bar), p.x + 7, p.y + Math.max(7, p.bar)]);
  taken.push(...lines);
  const free = box => box[0] >= 0 && box[1] >= 0 && box[2] <= size.width && box[3] <= size.height &&
    !taken.some(t => box[0] < t[2] && box[2] > t[0] && box[1] < t[3] && box[3] > t[1]);
  return points.map(p => {
    const width = 7.5 * p.name.length + 4, height = 17, gap = 8;
    const across = {left: p.x - gap - width, center: p.x - width / 2, right: p.x + gap};
    const down = {top: p.y - gap - height, middle: p.y - height / 2, bottom: p.y + gap};
    const tries = ["top right", "bottom right", "top left", "bottom left", "middle right", "middle left", "top center", "bottom center"];
    const box = place => { const [v, h] = place.split(" "); return [across[h], down[v], across[h] + width, down[v] + height]; };
    const place = tries.find(t => free(box(t))) || null;
    if (place) taken.push(box(place));
    return place;
  });
}

function drawTradeoff(section, task) {
  const chart = section.querySelector(".tradeoff");
  if (!chart) return;
  const precision = section.querySelector("[name=precision]").value, batch = section.querySelector("[name=batch]").value;
  const setting = `${precision}/${batch}`;
  const shown = task.designs.filter(d => d.mean !== null && d.latency[setting] !== undefined);
  const front = section.querySelector(".front");
  if (!shown.length) {
    Plotly.purge(chart);
    chart.innerHTML = "<p>No latency was measured at this precision and batch size.</p>";
    front.textContent = "";
    return;
  }
  chart.querySelector(":scope > p")?.remove();
  const x = d => d.latency[setting], bar = d => d.deviation || 0;
  const yrange = withReferences(task, bounds(shown.flatMap(d => [d.mean - bar(d), d.mean + bar(d)]), .15));
  const xrange = bounds(shown.map(x), .18);
  xrange[0] = Math.max(xrange[0], 0);
  const best = shown.filter(d => d.pareto.includes(setting)).sort((a, b) => x(a) - x(b));
  const worst = task.higher ? yrange[0] : yrange[1];
  const step = {x: [x(best[0]), ...best.map(x), xrange[1]], y: [worst, ...best.map(d => d.mean), best.at(-1).mean]};
  const size = {width: chart.clientWidth - 64, height: chart.clientHeight - 78};
  const across = value => (value - xrange[0]) / (xrange[1] - xrange[0]) * size.width;
  const down = value => (yrange[1] - value) / (yrange[1] - yrange[0]) * size.height;
  const lines = step.x.slice(1).flatMap((end, i) => [
    [across(step.x[i]), down(step.y[i]), across(end), down(step.y[i])],
    [across(end), Math.min(down(step.y[i]), down(step.y[i + 1])), across(end), Math.max(down(step.y[i]), down(step.y[i + 1]))],
  ]);
  const labels = places(shown.map(d => ({name: d.name, x: across(x(d)), y: down(d.mean),
    bar: down(d.mean) - down(d.mean + bar(d))})), lines, size);
  const named = labels.every(place => place !== null);  // else a legend names the points
  const traces = [{
    ...step, name: "Pareto front",
    mode: "lines", line: {shape: "hv", dash: "dot", width: 1.5, color: css("--soft")}, hoverinfo: "skip", showlegend: false,
  }];
  shown.forEach((d, index) => traces.push({
    x: [x(d)], y: [d.mean], name: d.name, text: [d.name], mode: named ? "markers+text" : "markers",
    textposition: labels[index] || "top center", cliponaxis: false,
    marker: {color: colour(d), symbol: SHAPES[d.shape], size: 11}, textfont: {color: css("--ink")},
    error_y: {type: "data", array: [bar(d)], visible: d.deviation !== null, color: colour(d), thickness: 1.5, width: 4},
    hovertemplate: `<b>%{text}</b><br>${task.metric} ${format(d.mean, task.decimals)}` +
      (d.deviation === null ? "" : ` ± ${format(d.deviation, task.decimals)} (${d.seeds} seeds)`) +
      `<br>${x(d).toPrecision(3)} ms<extra></extra>`,
  }));
  const {shapes, annotations} = references(task, yrange);
  Plotly.react(chart, traces, layout({
    xaxis: {title: {text: "Latency, ms (lower is better)"}, range: xrange}, yaxis: {range: yrange},
    showlegend: !named, legend: LEGEND, shapes, annotations: [heading(`Test ${task.metric} (${task.higher ? "higher" : "lower"} is better)`), ...annotations],
  }), {displayModeBar: false, responsive: true});
  front.textContent = `On the Pareto front: ${best.map(d => d.name).join(", ")}.`;
}

function drawCurves(section, task) {
  const chart = section.querySelector(".curves");
  const quantity = section.querySelector("[name=quantity]").value, along = section.querySelector("[name=along]").value;
  const late = section.querySelector("[name=range]").value === "end", axes = {xaxis: {rangemode: "tozero"}, yaxis: {}};
  const bands = [], lines = [], every = [], last = [];
  for (const d of task.designs) {
    if (!d.curve) continue;
    const points = d.curve[along].map((x, i) => ({x, y: d.curve[quantity][i], s: d.curve[`${quantity}_deviation`][i]})).filter(p => p.y !== null);
    if (!points.length) continue;
    every.push(...points);
    last.push(...points.filter(p => p.x >= points.at(-1).x * 2 / 3));
    const wide = points.filter(p => p.s !== null), group = {legendgroup: d.name, name: d.name};
    if (wide.length) bands.push({...group, x: [...wide, ...wide.toReversed()].map(p => p.x), hoverinfo: "skip", showlegend: false,
      y: [...wide.map(p => p.y + p.s), ...wide.toReversed().map(p => p.y - p.s)], mode: "lines", line: {width: 0},
      fill: "toself", fillcolor: colour(d) + "26"});
    lines.push({...group, x: points.map(p => p.x), y: points.map(p => p.y), mode: "lines+markers",
      line: {color: colour(d), width: 2}, marker: {symbol: SHAPES[d.shape], size: 7, maxdisplayed: 8, color: colour(d)},
      text: points.map(p => format(p.y, task.decimals) + (p.s === null ? "" : ` ± ${format(p.s, task.decimals)}`)),
      hovertemplate: `<b>${d.name}</b> %{text}<extra></extra>`});
  }
  if (!lines.length) {
    Plotly.purge(chart);
    chart.innerHTML = "<p>No curve was recorded.</p>";
    return;
  }
  chart.querySelector(":scope > p")?.remove();
  if (late) {
    axes.xaxis = {range: bounds(last.map(p => p.x), .02)};
  }
  const reach = bounds((late ? last : every).flatMap(p => [p.y - (p.s || 0), p.y + (p.s || 0)]), .05);
  axes.yaxis = {range: quantity === "validation" && !late ? withReferences(task, reach) : reach};
  const {shapes, annotations} = quantity === "validation" ? references(task, axes.yaxis.range) : {shapes: [], annotations: []};
  const names = {step: "Training step", epoch: "Epoch", seconds: "Training time, s"};
  const label = quantity === "validation" ? `Validation ${task.metric}` : "Training loss";
  Plotly.react(chart, [...bands, ...lines], layout({
    xaxis: {...axes.xaxis, title: {text: names[along]}}, yaxis: axes.yaxis, hovermode: "x unified", shapes,
    annotations: [heading(label), ...annotations],
    legend: LEGEND,
  }), {displayModeBar: false, responsive: true});
}

const tasks = JSON.parse(document.getElementById("data").textContent);
function draw() {
  for (const task of tasks) {
    const section = document.getElementById(task.id);
    drawTradeoff(section, task);
    drawCurves(section, task);
  }
}

async function start() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), c => c.charCodeAt(0));
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(unpacked).text();
  document.head.append(script);
  draw();
  for (const select of document.querySelectorAll("select")) select.addEventListener("change", draw);
  for (const form of document.querySelectorAll("form")) form.addEventListener("submit", event => event.preventDefault());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(); } });
  document.documentElement.dataset.drawn = "true";
}
start().catch(error => {
  console.error(error);
  for (const chart of document.querySelectorAll(".chart"))
    chart.innerHTML = "<p>This browser cannot draw the charts (it is older than 2023); the tables hold the same numbers.</p>";
});
