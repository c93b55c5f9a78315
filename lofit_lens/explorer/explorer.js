// The view: it shows `data` and `state`, which Python makes, and tells Python what the reader does.

const SIDES = ["left", "right"];
const WAIT = 50; // milliseconds between two messages of a moving slider

const KEYS = ["button", "input", "select", "textarea"]; // what takes keys; JupyterLab would take them for its shortcuts

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  if (KEYS.includes(tag)) node.setAttribute("data-lm-suppress-shortcuts", "true");
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") node.textContent = value;
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((c) => c !== null));
  return node;
}

function channels(color) {
  const hex = color.match(/^#(..)(..)(..)$/);
  return hex ? hex.slice(1).map((x) => parseInt(x, 16)) : color.match(/\d+/g).slice(0, 3).map(Number);
}

// A scale of colours: t in 0 .. 1 -> "rgb(...)".
function scale(colors) {
  const stops = colors.map(channels);
  return (t) => {
    const at = Math.min(Math.max(t, 0), 1) * (stops.length - 1);
    const i = Math.min(Math.floor(at), stops.length - 2);
    return `rgb(${stops[i].map((c, j) => Math.round(c + (stops[i + 1][j] - c) * (at - i))).join()})`;
  };
}

// Let `send` run at once, and again at most every WAIT milliseconds with the last value.
function throttled(send) {
  let timer = null, next = null;
  const later = () => {
    timer = null;
    if (next !== null) { const value = next; next = null; send(value); timer = setTimeout(later, WAIT); }
  };
  return (value) => {
    if (timer === null) { send(value); timer = setTimeout(later, WAIT); } else next = value;
  };
}

const nameOf = (index, nHeads) => `L${Math.floor(index / nHeads)}H${index % nHeads}`;
const step = (n) => [1, 2, 4, 8].find((s) => n / s <= 12) || 10;

// One layer x head grid of buttons, last layer on top. One of them takes Tab; arrow keys move between them.
class Grid {
  constructor(side, shape, send) {
    [this.nLayers, this.nHeads] = shape;
    this.cells = [];
    const body = el("div", { class: "llx-cells", role: "grid", "data-side": side, });
    for (let layer = this.nLayers - 1; layer >= 0; layer--) {
      const row = el("div", { class: "llx-row", role: "row" },
        el("span", { class: "llx-axis", role: "rowheader", "aria-label": `layer ${layer}`, text: layer % step(this.nLayers) ? "" : layer }));
      for (let head = 0; head < this.nHeads; head++) {
        const cell = el("button", { type: "button", role: "gridcell", tabindex: "-1", "data-head": `L${layer}H${head}` });
        this.cells[layer * this.nHeads + head] = cell;
        cell.index = layer * this.nHeads + head;
        row.append(cell);
      }
      body.append(row);
    }
    body.append(el("div", { class: "llx-row llx-ticks", "aria-hidden": "true" }, el("span", { class: "llx-axis" }),
      ...Array.from({ length: this.nHeads }, (_, h) => el("span", { text: h % step(this.nHeads) ? "" : h }))));
    this.body = body;
    this.caption = el("figcaption");
    this.legend = el("div", { class: "llx-legend" });
    this.root = el("figure", { class: "llx-grid" }, this.caption, el("div", { class: "llx-plane" },
      el("span", { class: "llx-y", text: "layer" }), el("div", { class: "llx-core", style: `--heads:${this.nHeads}` }, body, el("div", { class: "llx-x", text: "head" }))),
      this.legend);
    this.home = this.cells[0];
    this.home.tabIndex = 0;
    body.addEventListener("click", (e) => e.target.dataset.head && send({ do: "click", head: e.target.dataset.head }));
    body.addEventListener("focusin", (e) => e.target.dataset.head && this.setHome(e.target));
    body.addEventListener("keydown", (e) => this.move(e));
  }

  setHome(cell) {
    this.home.tabIndex = -1;
    this.home = cell;
    cell.tabIndex = 0;
  }

  move(event) {
    const from = event.target.index;
    if (from === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    const [layer, head] = [Math.floor(from / this.nHeads), from % this.nHeads];
    const to = {
      ArrowRight: [layer, Math.min(this.nHeads - 1, head + 1)], ArrowLeft: [layer, Math.max(0, head - 1)],
      ArrowUp: [Math.min(this.nLayers - 1, layer + 1), head], ArrowDown: [Math.max(0, layer - 1), head],
      Home: [layer, 0], End: [layer, this.nHeads - 1], PageUp: [this.nLayers - 1, head], PageDown: [0, head],
    }[event.key];
    if (!to) return;
    event.preventDefault();
    this.cells[to[0] * this.nHeads + to[1]].focus();
  }

  // What changes with the shown set only.
  show(set, heat) {
    this.set = set;
    this.caption.replaceChildren(el("b", { text: set.name }), ` ${set.kind}`);
    this.body.setAttribute("aria-label", `${set.name}, heads by layer; arrow keys move, Enter opens a head`);
    set.shade.forEach((t, i) => { this.cells[i].style.backgroundColor = t === null ? "" : heat(t); });
    this.legend.replaceChildren(el("span", { text: set.legend[0] }),
      el("span", { class: "llx-ramp", style: `background:linear-gradient(to right,${[0, 0.25, 0.5, 0.75, 1].map(heat).join()})` }),
      el("span", { text: `${set.legend[1]} (${set.kind})` }));
    for (const cell of this.cells) cell.dataset.mark = "";
  }

  // Marks: "shared" (top K of both), "own" (of this one alone), "none".
  mark(own, shared, selection, open) {
    for (const cell of this.cells) {
      const name = cell.dataset.head;
      const mark = shared.has(name) ? "shared" : own.has(name) ? "own" : "none";
      if (cell.dataset.mark !== mark) {
        cell.dataset.mark = mark;
        const rank = this.set.ranks[cell.index];
        const score = this.set.scores ? `, ${this.set.kind} ${Number(this.set.scores[cell.index].toPrecision(4))}` : "";
        cell.title = `${name}: ${rank ? `rank ${rank}` : "not in this set"}${score}`;
        cell.setAttribute("aria-label", cell.title + { shared: ", in the top K of both sets", own: ", in the top K of this set", none: "" }[mark]);
      }
      cell.classList.toggle("llx-picked", selection.has(name));
      cell.setAttribute("aria-pressed", selection.has(name));
      cell.classList.toggle("llx-open", name === open);
    }
  }
}

// Choosers, K and its slider of one side.
class Controls {
  constructor(side, send) {
    this.side = side;
    this.send = send;
    this.seen = "";
    this.choosers = el("div", { class: "llx-choosers" });
    this.slider = el("input", { type: "range", min: "1", class: "llx-k", "aria-label": `K, ${side}` });
    this.number = el("input", { type: "number", min: "1", class: "llx-k-number", "aria-label": `K, ${side}, as a number` });
    this.most = el("span", { class: "llx-quiet" });
    const moved = throttled((value) => send({ do: "k", side, value }));
    this.slider.addEventListener("input", () => { this.number.value = this.slider.value; moved(Number(this.slider.value)); });
    this.number.addEventListener("change", () => send({ do: "k", side, value: Math.round(Number(this.number.value)) }));
    this.root = el("div", { class: "llx-controls", role: "group", "aria-label": `${side} set` }, this.choosers,
      el("label", {}, "K ", this.slider, this.number, this.most));
  }

  show(choosers, k, most) {
    const now = JSON.stringify(choosers);
    if (now !== this.seen) {
      const focused = this.choosers.contains(document.activeElement) ? document.activeElement.dataset.part : null;
      this.seen = now;
      this.choosers.replaceChildren(...choosers.map((c) => {
        const select = el("select", { "data-part": c.part, "data-side": this.side, "aria-label": `${c.label}, ${this.side}` },
          ...c.options.map((o, i) => el("option", { value: i, text: o === null ? "none" : o, selected: o === c.value })));
        select.addEventListener("change", () => this.send({ do: "choose", side: this.side, part: c.part, value: c.options[select.value] }));
        return el("label", {}, `${c.label} `, select);
      }));
      if (focused) this.choosers.querySelector(`[data-part=${focused}]`)?.focus();
    }
    this.slider.max = this.number.max = most;
    if (document.activeElement !== this.slider || Number(this.slider.value) === k) this.slider.value = k;
    if (document.activeElement !== this.slider) this.number.value = k;
    this.most.textContent = `of ${most}`;
  }
}

function tokenList(title, tokens) {
  const most = Math.max(...tokens.map(([, x]) => Math.abs(Number(x))), 1e-9);
  return el("div", { class: "llx-tokens" }, el("h5", { text: title }), el("ol", {}, ...tokens.map(([token, value]) =>
    el("li", {}, el("span", { class: "llx-bar", style: `width:${(100 * Math.abs(Number(value))) / most}%` }),
      el("code", { text: token }), el("span", { class: "llx-value", text: value })))));
}

function reading(r) {
  return el("section", { class: "llx-reading" }, el("h4", { text: r.title }), r.note ? el("p", { class: "llx-quiet", text: r.note }) : null,
    r.facts.length ? el("dl", {}, ...r.facts.map(([k, v]) => el("div", {}, el("dt", { text: k }), el("dd", { text: v })))) : null,
    r.promoted.length ? el("div", { class: "llx-pair" }, tokenList(`promotes (${r.unit})`, r.promoted), tokenList(`suppresses (${r.unit})`, r.suppressed)) : null);
}

function headTable(t) {
  return el("div", { class: "llx-scroll" }, el("table", { class: "llx-scores" },
    el("thead", {}, el("tr", {}, ...t.columns.map((c) => el("th", { scope: "col", text: c })))),
    el("tbody", {}, ...t.rows.map((row, i) => el("tr", { class: t.bold.includes(i) ? "llx-shown" : null }, ...row.map((x) => el("td", { text: x })))))));
}

function attentionMap(m, heat) {
  const n = m.tokens.length;
  const head = el("tr", {}, el("th"), ...m.tokens.map((t) => el("th", { scope: "col", class: "llx-down" }, el("span", { text: t }))));
  const rows = m.weights.map((row, i) => el("tr", {}, el("th", { scope: "row", text: m.tokens[i] }),
    ...Array.from({ length: n }, (_, j) => j > i ? el("td")
      : el("td", { style: `background:${heat(row[j])}`, title: `${m.tokens[i]} looks at ${m.tokens[j]}: ${row[j]}` }))));
  return el("figure", { class: "llx-attention" }, el("figcaption", { text: m.title }),
    el("div", { class: "llx-scroll" }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows))));
}

function render({ model, el: place }) {
  const send = (message) => model.send(message);
  const root = el("div", { class: "llx" });
  const error = el("div", { class: "llx-error", role: "alert", hidden: true });
  const busy = el("div", { class: "llx-busy", role: "status", "aria-live": "polite" });
  const controls = SIDES.map((side) => new Controls(side, send));
  const link = el("input", { type: "checkbox" });
  link.addEventListener("change", () => send({ do: "link", value: link.checked }));
  const overlap = el("dl", { class: "llx-overlap", "aria-live": "polite", "aria-label": "overlap of the two sets" });
  const places = SIDES.map(() => el("div", { class: "llx-side" }));
  const picked = el("span");
  const clear = el("button", { type: "button", class: "llx-plain", text: "clear" });
  clear.addEventListener("click", () => send({ do: "clear" }));
  const panel = el("section", { class: "llx-panel", "aria-label": "the open head" });
  const prompt = el("textarea", { rows: 2, "aria-label": "prompt", placeholder: "Type a prompt for the model to go on from" });
  const adapter = el("select", { "aria-label": "adapter" });
  const adapterLabel = el("label", {}, "adapter ", adapter);
  adapter.addEventListener("change", () => send({ do: "adapter", value: adapter.value }));
  const chat = el("input", { type: "checkbox" });
  const chatLabel = el("label", { title: "Put the prompt through the model's chat template" }, chat, " as a chat");
  chat.addEventListener("change", () => send({ do: "chat", value: chat.checked }));
  const examples = el("select", { class: "llx-examples", "aria-label": "example prompts" });
  const examplesLabel = el("label", {}, "examples ", examples);
  examples.addEventListener("change", () => { prompt.value = examples.value; });
  const run = el("button", { type: "button", class: "llx-run", text: "Run" });
  const go = () => run.disabled || send({ do: "run", prompt: prompt.value });
  run.addEventListener("click", go);
  prompt.addEventListener("keydown", (e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) { e.preventDefault(); go(); } });
  const noModel = el("p", { class: "llx-quiet" });
  const answers = el("div", { class: "llx-answers", "aria-live": "polite" });
  const ask = el("div", { class: "llx-ask" }, prompt, el("div", { class: "llx-go" }, examplesLabel, adapterLabel, chatLabel, run, busy,
    el("span", { class: "llx-quiet", text: "Ctrl+Enter runs, too" })));
  const attention = el("div", { class: "llx-maps" });
  root.append(error, el("div", { class: "llx-two" }, ...places),
    el("label", { class: "llx-link" }, link, " move both K together"), overlap,
    el("div", { class: "llx-key" }, el("span", { class: "llx-sample", "data-mark": "shared" }), "in the top K of both",
      el("span", { class: "llx-sample", "data-mark": "own" }), "of this set alone", el("span", { class: "llx-sample llx-picked" }), "marked by you",
      el("span", { class: "llx-marked" }, picked, clear)),
    panel, el("section", { class: "llx-prompt", "aria-label": "prompt" }, el("h3", { text: "Ask the model" }), noModel, ask, answers), attention);
  controls.forEach((c, i) => places[i].append(c.root));

  let grids = null, heat = null, last = {};
  // `last` keeps what stands there as JSON, so that only what changed is built anew.
  const changed = (name, value) => {
    const now = JSON.stringify(value);
    if (last[name] === now) return false;
    last[name] = now;
    return true;
  };

  function showData() {
    const data = model.get("data");
    if (!data.sides) return;
    heat = scale(data.heat);
    if (grids === null) {
      grids = SIDES.map((side, i) => {
        const grid = new Grid(side, data.shape, send);
        places[i].append(grid.root);
        return grid;
      });
    }
    grids.forEach((grid, i) => { if (changed(`side${i}`, data.sides[i])) { grid.show(data.sides[i], heat); last.marks = null; } });
  }

  function showPanel(s) {
    if (!changed("panel", [s.head, s.table, s.tokens])) return;
    if (s.head === null) {
      panel.replaceChildren(el("p", { class: "llx-quiet", text: "Click a head to open and mark it: its scores and ranks everywhere, tokens, attention. A second click takes the mark away." }));
      return;
    }
    const close = el("button", { type: "button", class: "llx-plain", text: "close" });
    close.addEventListener("click", () => send({ do: "close" }));
    panel.replaceChildren(el("h3", {}, el("span", { class: "llx-head-name", text: s.head }), " ", close),
      el("div", { class: "llx-panel-body" }, headTable(s.table), ...s.tokens.map(reading)));
  }

  function showState() {
    const s = model.get("state"), data = model.get("data");
    if (grids === null || s.version === undefined) return;
    error.hidden = !s.error;
    error.textContent = s.error;
    busy.textContent = s.busy;
    root.setAttribute("aria-busy", s.busy !== "");
    controls.forEach((c, i) => c.show(s.choosers[i], s.k[i], data.sides[i].k_max));
    link.checked = s.linked;
    if (changed("overlap", s.overlap)) {
      overlap.replaceChildren(...s.overlap.map(([label, value, why]) => el("div", { title: why }, el("dt", { text: label }), el("dd", { text: value }))));
    }
    if (changed("marks", [s.own, s.shared, s.selection, s.head])) {
      const [shared, selection] = [new Set(s.shared), new Set(s.selection)];
      grids.forEach((grid, i) => grid.mark(new Set(s.own[i]), shared, selection, s.head));
    }
    picked.textContent = s.selection.length ? `: ${s.selection.join(" ")} ` : "";
    clear.hidden = !s.selection.length;
    showPanel(s);
    if (changed("prompt", s.prompt)) prompt.value = s.prompt;
    if (changed("adapters", [s.adapters, s.adapter])) {
      adapter.replaceChildren(...s.adapters.map((a) => el("option", { value: a, text: a, selected: a === s.adapter })));
      adapterLabel.hidden = !s.adapters.length;
    }
    chat.checked = s.chat;
    chatLabel.hidden = !s.has_chat;
    if (changed("prompts", s.prompts)) {
      examples.replaceChildren(...s.prompts.map((p) => el("option", { value: p, text: p })));
      examplesLabel.hidden = s.prompts.length < 2;
    }
    run.disabled = s.busy !== "" || s.no_model !== "";
    noModel.textContent = s.no_model;
    ask.hidden = s.no_model !== "";
    if (changed("answers", s.answers)) {
      answers.replaceChildren(s.answers.rows.length ? el("table", { class: "llx-said" }, el("caption", { text: s.answers.prompt }),
        el("tbody", {}, ...s.answers.rows.map(([what, text]) => el("tr", {}, el("th", { scope: "row", text: what }), el("td", { text }))))) : "",
        s.answers.note ? el("p", { class: "llx-quiet", text: s.answers.note }) : "");
    }
    if (changed("attention", [s.head, s.attention])) {
      attention.replaceChildren(...(s.head === null ? [] : [el("h3", { text: `Where ${s.head} looks` }),
        s.attention.note ? el("p", { class: "llx-quiet", text: s.attention.note }) : "",
        ...(s.attention.maps.length ? [el("p", { class: "llx-quiet" }, "Row: the token that looks; column: the token looked at. Share of attention 0 ",
          el("span", { class: "llx-ramp", style: `background:linear-gradient(to right,${[0, 0.25, 0.5, 0.75, 1].map(heat).join()})` }), " 1"),
        el("div", { class: "llx-map-row" }, ...s.attention.maps.map((m) => attentionMap(m, heat)))] : [])]));
    }
    root.dataset.version = s.version;
  }

  const update = () => { showData(); showState(); };
  model.on("change:data", update);
  model.on("change:state", update);
  update();
  place.append(root);
  return () => { model.off("change:data", update); model.off("change:state", update); };
}

export default { render };
