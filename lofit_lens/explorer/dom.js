// Small helpers. Text reaches the page as text only, never as HTML.

const SVG = "http://www.w3.org/2000/svg"; // a name, not an address: nothing is asked for
const SIDES = ["left", "right"];
const KEYS = ["button", "input", "select", "textarea"]; // what takes keys; JupyterLab would take them for its shortcuts

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") node.textContent = value;
    else if (name === "on") Object.entries(value).forEach(([event, act]) => node.addEventListener(event, act));
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  if (KEYS.includes(tag)) node.setAttribute("data-lm-suppress-shortcuts", "true");
  return fill(node, attributes, children);
}

const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

function channels(color) {
  const hex = color.match(/^#(..)(..)(..)$/);
  return hex ? hex.slice(1).map((x) => parseInt(x, 16)) : color.match(/\d+/g).slice(0, 3).map(Number);
}

// A scale of colors: t in 0 .. 1 -> "rgb(...)".
function scale(colors) {
  const stops = colors.map(channels);
  return (t) => {
    const at = Math.min(Math.max(t, 0), 1) * (stops.length - 1);
    const i = Math.min(Math.floor(at), stops.length - 2);
    return `rgb(${stops[i].map((c, j) => Math.round(c + (stops[i + 1][j] - c) * (at - i))).join()})`;
  };
}

function ramp(heat) {
  const colors = [0, 0.25, 0.5, 0.75, 1].map(heat).join();
  return el("span", { class: "llx-ramp", style: `background:linear-gradient(to right,${colors})` });
}

const short = (x) => (x === 0 || Math.abs(x) >= 0.001 ? String(Number(x.toPrecision(4))) : x.toExponential(2));

const badge = (side) => el("span", { class: `llx-badge llx-${side}`, text: side });

// Every how many of n ticks a label stands.
const labelStep = (n) => [1, 2, 4, 8].find((s) => n / s <= 12) || 10;
