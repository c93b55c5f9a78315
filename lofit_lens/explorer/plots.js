// Two small plots as SVG: heads in both sets for every K beside chance, and the layers of the top K.

const [WIDTH, HEIGHT, LEFT, BOTTOM, TOP] = [420, 190, 50, 36, 8];

// Axes with some five ticks each; gives the plot and the places of values on it.
function axes(label, xTitle, yTitle, [xLow, xHigh], yHigh, children) {
  const x = (v) => LEFT + ((v - xLow) / (xHigh - xLow || 1)) * (WIDTH - LEFT - 8);
  const y = (v) => HEIGHT - BOTTOM - (v / (yHigh || 1)) * (HEIGHT - BOTTOM - TOP);
  const text = (attributes, said) => svg("text", { ...attributes, text: said });
  const ticks = (high) => {
    const step = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000].find((s) => high / s <= 6) ?? 2000;
    return Array.from({ length: Math.floor(high / step) + 1 }, (_, i) => i * step);
  };
  const marks = [
    ...ticks(xHigh).filter((v) => v >= xLow).map((v) => text({ x: x(v), y: HEIGHT - BOTTOM + 14, "text-anchor": "middle" }, v)),
    ...ticks(yHigh).flatMap((v) => [svg("line", { class: "llx-rule", x1: LEFT, x2: WIDTH - 8, y1: y(v), y2: y(v) }),
      text({ x: LEFT - 5, y: y(v) + 4, "text-anchor": "end" }, v)]),
    text({ x: (LEFT + WIDTH) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, xTitle),
    text({ x: 0, y: 0, "text-anchor": "middle", transform: `translate(11 ${(HEIGHT - BOTTOM) / 2}) rotate(-90)` }, yTitle),
  ];
  return svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label }, ...marks, ...children(x, y));
}

// chance: `ks` with `expected`, `low` and `high`; shared: heads in both sets for K = 1, 2, ...
function overlapPlot(chance, shared, k) {
  const ks = chance.ks.filter((n) => n <= shared.length);
  const last = ks.length - 1;
  const label = `Heads in both sets for K from 1 to ${shared.length}; at K = ${k[0]}: ${shared[k[0] - 1] ?? "unknown"}`;
  const most = Math.max(1, shared.at(-1), chance.high[last]);
  return axes(label, "K, heads in each set", "heads in both sets", [0, shared.length], most, (x, y) => {
    const path = (values) => ks.map((n, i) => `${x(n).toFixed(1)},${y(values[i]).toFixed(1)}`);
    return [
      svg("polygon", { class: "llx-chance", points: [...path(chance.low), ...path(chance.high).reverse()].join(" ") }),
      svg("polyline", { class: "llx-expected", points: path(chance.expected).join(" ") }),
      svg("polyline", { class: "llx-curve", points: path(ks.map((n) => shared[n - 1])).join(" ") }),
      ...[...new Set(k)].map((n) => svg("line", { class: "llx-at", x1: x(n), x2: x(n), y1: TOP, y2: HEIGHT - BOTTOM })),
    ];
  });
}

// counts: of each side, heads of its top K in every layer.
function layersPlot(counts, k) {
  const shares = counts.map((listed, side) => listed.map((n) => (100 * n) / k[side]));
  const nLayers = counts[0].length;
  return axes("Where the top K lie", "layer", "share of the top K (%)", [-0.6, nLayers - 0.4], Math.max(...shares.flat()), (x, y) => {
    const width = (x(1) - x(0)) * 0.4;
    return shares.flatMap((listed, side) => listed.map((share, layer) => svg("rect", {
      x: x(layer) + (side - 1) * width, y: y(share), width, height: y(0) - y(share), class: `llx-${SIDES[side]}`,
    }, svg("title", { text: `layer ${layer}: ${counts[side][layer]} heads, ${share.toFixed(1)} %` }))));
  });
}

function plots() {
  const overlap = el("div"), layers = el("div");
  const key = (swatch, text) => el("span", { class: "llx-key" }, el("span", { class: `llx-swatch ${swatch}` }), text);
  const compared = el("figure", {}, el("figcaption", {}, "Shared heads for every K ", key("llx-s-curve", "observed"),
      key("llx-s-chance", "chance: 95 %, mean dashed")), overlap);
  const root = el("div", { class: "llx-two llx-plots" }, compared,
    el("figure", {}, el("figcaption", {}, "Layers of the top K ", key("llx-left", "left"), key("llx-right", "right")), layers));
  return { root, draw(chance, shared, counts, k) {
    compared.hidden = shared === null; // one set only
    if (shared) overlap.replaceChildren(overlapPlot(chance, shared, k));
    layers.replaceChildren(layersPlot(counts, k));
  } };
}
