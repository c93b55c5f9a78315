// The plots beside the grids (plotly) and the transfer table.

const [colourA, colourB] = data.theme.colors;
const plotConfig = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false };

function plotLayout(xTitle, yTitle) {
  const axis = { showline: true, linecolor: "#888", ticks: "outside", gridcolor: "#e6e6e6", zeroline: false, fixedrange: true };
  return {
    font: { ...data.theme.font, size: 12 }, height: 300, margin: { l: 52, r: 14, t: 34, b: 44 }, dragmode: false,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "#fff", hovermode: "x unified", barmode: "group", bargap: 0.25,
    legend: { orientation: "h", x: 0, y: 1.01, yanchor: "bottom" },
    xaxis: { ...axis, title: { text: xTitle, standoff: 6 } }, yaxis: { ...axis, title: { text: yTitle, standoff: 6 }, rangemode: "tozero" },
  };
}

const curves = new Map();

// The Ks of the curve (all of them, or some 400 evenly spaced and the last), with what chance gives there.
function chanceCurve(kMax) {
  if (!curves.has(kMax)) {
    const n = nLayers * nHeads;
    const step = Math.ceil(kMax / 400);
    const ks = [];
    for (let k = 1; k < kMax; k += step) ks.push(k);
    ks.push(kMax);
    const all = ks.map((k) => chanceBand(n, k));
    curves.set(kMax, { ks, low: all.map((b) => b[0]), high: all.map((b) => b[1]), mean: ks.map((k) => (k * k) / n) });
  }
  return curves.get(kMax);
}

// For a new pair of sets.
function drawOverlap(shared) {
  const { ks, low, high, mean } = chanceCurve(shared.length);
  const layout = plotLayout("K, heads in each set", "heads in both sets");
  // Fixed ranges: moving the line then costs no new layout.
  layout.xaxis.range = [Math.min(1, ks.length - 1), shared.length * 1.01];
  layout.yaxis.range = [0, Math.max(1, shared[shared.length - 1], high[high.length - 1]) * 1.05];
  layout.shapes = [{ type: "line", x0: 1, x1: 1, y0: 0, y1: 1, yref: "paper", line: { color: colourB, width: 2, dash: "dot" } }];
  Plotly.react("overlap-plot", [
    { x: ks, y: low, mode: "lines", line: { width: 0, shape: "hv" }, hoverinfo: "skip", showlegend: false },
    { x: ks, y: high, mode: "lines", line: { width: 0, shape: "hv" }, fill: "tonexty", fillcolor: "rgba(120,120,120,0.28)", name: "chance, 95 %", hoverinfo: "skip" },
    { x: ks, y: mean, mode: "lines", line: { color: "#555", dash: "dash", width: 1.5 }, name: "chance, mean", hovertemplate: "%{y:.2f}" },
    { x: ks, y: ks.map((k) => shared[k - 1]), mode: ks.length === 1 ? "lines+markers" : "lines", line: { color: colourA, width: 2.5 }, name: "in both", hovertemplate: "%{y}" },
  ], layout, plotConfig);
}

// For a new K: only the line at K moves.
function markOverlap(shared, k) {
  Plotly.relayout("overlap-plot", { "shapes[0].x0": k, "shapes[0].x1": k });
  byId("overlap-plot").setAttribute("aria-label", `Heads in both sets for K from 1 to ${shared.length}; at K = ${k}: ${shared[k - 1]}, ` +
    `expected by chance ${fixed((k * k) / (nLayers * nHeads), 2)}`);
}

function layerCounts(set, k) {
  const counts = new Array(nLayers).fill(0);
  for (const [layer] of set.ranking.slice(0, k)) counts[layer] += 1;
  return counts;
}

// Set A in full colour, set B paler with a border: told apart without colour too.
function drawLayers(a, b, k) {
  const layers = Array.from({ length: nLayers }, (_, i) => i);
  const bar = (set, side, colour, fill) => {
    const counts = layerCounts(set, k);
    return { type: "bar", x: layers, y: counts.map((c) => (100 * c) / k), customdata: counts, name: `set ${side}`,
      marker: { color: fill, line: { color: colour, width: counts.map((c) => (c ? 1.5 : 0)) } }, hovertemplate: "%{customdata} heads, %{y:.1f} %" };
  };
  const layout = plotLayout("layer", `share of the top ${k} heads (%)`);
  layout.xaxis.dtick = Math.max(1, Math.ceil(nLayers / 10));
  layout.xaxis.range = [-0.6, nLayers - 0.4];
  Plotly.react("layer-plot", [bar(a, "A", colourA, colourA), bar(b, "B", colourB, "#F2C7A6")], layout, plotConfig);
}

// Rows: whose heads; columns: the task that was tuned on.
function transferTable(t) {
  const known = t.relative.flat().filter((x) => x !== null);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const interval = (i, j) => (t.low[i][j] === null || t.high[i][j] === null ? "" : ` [${fixed(t.low[i][j], 3)}, ${fixed(t.high[i][j], 3)}]`);
  const cell = (i, j) => {
    const x = t.relative[i][j];
    if (x === null) return el("td", { class: "none", text: t.accuracy[i][j] === null ? "not measured" : `${fixed(t.accuracy[i][j], 3)} (own heads: 0)` });
    const colour = heat(high > low ? (x - low) / (high - low) : 1);
    return el("td", { style: `background:${rgb(colour)};color:${ink(colour)}`, "data-source": t.sources[i], "data-task": t.tasks[j] },
      el("b", { text: `${fixed(100 * x, 1)} %${t.mark[i][j]}` }),
      el("span", { text: t.accuracy[i][j] === null ? "" : fixed(t.accuracy[i][j], 3) + interval(i, j) }),
      el("span", { text: t.p[i][j] === null ? "" : `p = ${pValue(t.p[i][j])}` }));
  };
  return [
    el("p", { class: "quiet", text: "Offsets are tuned on the task of the column, in the heads that were chosen for the row. Large: accuracy relative to the " +
      `task's own heads (100 %); below it the accuracy itself with its interval, mean of ${plural(t.n_seeds, "seed", "seeds")}; then p of the paired ` +
      "test over test items against the task's own heads (* p < 0.05, + p < 0.1)." }),
    el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Transfer between tasks" },
      el("table", { class: "transfer" },
        el("thead", {}, el("tr", {}, el("th", { scope: "col", text: "heads from" }), ...t.tasks.map((task) => el("th", { scope: "col" },
          `tuned on ${task}`, el("span", { text: `${t.metric[task]}, n = ${t.n_items[task].toLocaleString("en")}` }))))),
        el("tbody", {}, ...t.sources.map((s, i) => el("tr", {}, el("th", { scope: "row", text: s === "random" ? "random heads" : s }), ...t.tasks.map((_, j) => cell(i, j))))))),
    !known.length ? "" : el("div", { class: "legend" }, `${fixed(100 * low, 1)} %`, el("span", { class: "gradient", style: `background:${heatGradient}` }), `${fixed(100 * high, 1)} %`),
  ];
}
