// The data, and small helpers. Text from the data reaches the page as text only, never as HTML.

const data = JSON.parse(document.getElementById("report-data").textContent);
const { n_layers: nLayers, n_heads: nHeads } = data.model;
const byId = (id) => document.getElementById(id);

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") node.textContent = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((c) => c !== null));
  return node;
}

const headName = (index) => `L${Math.floor(index / nHeads)}H${index % nHeads}`;
const minus = (text) => text.replace("-", "\u2212");
const number = (x, digits = 4) => (x === null ? "\u2013" : minus(String(Number(x.toPrecision(digits)))));
const fixed = (x, digits) => (x === null ? "\u2013" : minus(x.toFixed(digits)));
const signed = (x) => (x > 0 ? "+" : "") + number(x, 3);
const pValue = (p) => (p === null ? "\u2013" : p === 0 ? "0" : p < 0.001 ? minus(p.toExponential(1)) : p.toFixed(3));
const plural = (n, one, many) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;

// White space of a token made visible.
const visible = (token) => token.replace(/ /g, "\u2423").replace(/\n/g, "\u23CE").replace(/\t/g, "\u21E5") || "(empty)";

const setName = (s) => `${s.task}: ${s.method}` + (s.seed === null ? "" : `, seed ${s.seed}`);

// [position, "rgb(r, g, b)" or "#rrggbb"] pairs -> colour at t in 0 .. 1.
const heatStops = data.theme.heat.map(([at, colour]) => {
  const parts = colour.startsWith("#")
    ? [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16))
    : colour.match(/[\d.]+/g).map(Number);
  return [at, parts];
});

function heat(t) {
  const x = Math.min(1, Math.max(0, t));
  let i = 1;
  while (i < heatStops.length - 1 && heatStops[i][0] < x) i++;
  const [[from, a], [to, b]] = [heatStops[i - 1], heatStops[i]];
  const f = (x - from) / (to - from);
  return a.map((v, j) => Math.round(v + f * (b[j] - v)));
}

const rgb = (parts) => `rgb(${parts.join(",")})`;
// Black or white, whichever is read more easily on this colour.
const ink = ([r, g, b]) => (0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#000" : "#fff");
const heatGradient = `linear-gradient(to right, ${heatStops.map(([at, c]) => `${rgb(c)} ${100 * at}%`).join(", ")})`;

function table(columns, rows, title) {
  const isNumber = columns.map((_, j) => rows.every((r) => j > 0 && /^([\d\u2212+.<-].*|\s*|\u2013|n\/a)$/.test(r[j])));
  const side = (j) => (isNumber[j] ? "number" : null);
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": title },
    el("table", {},
      el("thead", {}, el("tr", {}, ...columns.map((c, j) => el("th", { scope: "col", class: side(j), text: c })))),
      el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((cell, j) =>
        el(j ? "td" : "th", { scope: j ? null : "row", class: side(j), text: cell })))))));
}
