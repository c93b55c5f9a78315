// The one front-end: of the widget in Jupyter and of every saved page.
// `data` stays as it is. `state` is what the reader chose: it lives here and, where there is a kernel, in Python as well.
// `said` is what Python answers: chance of the sets shown, what the model says. A saved page has all that it needs in `data`.

const HINT = "Click a head, or move with the arrow keys and press Enter, to see its score and rank in every set, the tokens it " +
  "promotes and where it attends. The click also marks the head; a second one unmarks it. Escape closes the panel.";

function withRanks(set, nHeads) {
  const ranks = new Array(nHeads).fill(0);
  set.ranking.forEach((head, i) => { ranks[head] = i + 1; });
  return { ...set, ranks };
}

// Shared heads of the top K for K = 1 .. the shorter ranking's length.
function sharedByK(a, b) {
  const found = new Array(Math.min(a.ranking.length, b.ranking.length)).fill(0);
  for (const head of a.ranking) {
    const k = Math.max(a.ranks[head], b.ranks[head]);
    if (b.ranks[head] && k <= found.length) found[k - 1] += 1;
  }
  let sum = 0;
  return found.map((n) => (sum += n));
}

const pText = (thousandths) => (thousandths === undefined ? "\u2026" : thousandths ? (thousandths / 1000).toFixed(3) : "< 0.001");

function render({ model, el: place }) {
  const data = model.get("data");
  const [nLayers, nHeads] = data.shape;
  const heat = scale(data.heat);
  const sets = data.sets.map((s) => withRanks(s, nLayers * nHeads));
  const saved = data.chance.pairs !== undefined;
  const sides = sets.length > 1 ? SIDES : SIDES.slice(0, 1); // a single set is not compared with itself
  const nameOf = (index) => `L${Math.floor(index / nHeads)}H${index % nHeads}`;
  const indexOf = (name) => name.slice(1).split("H").map(Number).reduce((layer, head) => layer * nHeads + head);
  let state = model.get("state"), said = model.get("said");
  const shownSets = () => sides.map((side) => sets.find((s) => s.name === state[side]));

  function change(part) {
    model.set("state", { ...state, ...part }); // which draws
    model.save_changes();
  }

  // ------------------------------------------------------------------------------------------------- the two sets and K

  const isTied = () => state.linked || saved || sides.length < 2; // a saved page knows chance for equal K
  const longest = (i) => Math.min(...shownSets().filter((_, j) => j === i || isTied()).map((s) => s.ranking.length));
  const every = saved ? data.chance.ks : Array.from({ length: nLayers * nHeads }, (_, i) => i + 1);
  const stops = (i) => every.filter((k) => k <= longest(i));

  function setK(i, wanted) {
    const near = stops(i).reduce((best, k) => (Math.abs(k - wanted) < Math.abs(best - wanted) ? k : best));
    change({ k: isTied() ? [near, near] : state.k.map((k, j) => (j === i ? near : k)) });
  }

  function choose(i, name) {
    state = { ...state, [SIDES[i]]: name };
    setK(i, Math.min(state.k[i], longest(i)));
  }

  function chooser(side, i) {
    const tasks = [...new Set(sets.map((s) => s.task))];
    const options = (task) => sets.filter((s) => s.task === task).map((s) => el("option", { value: s.name, text: s.name }));
    const on = { change: (event) => choose(i, event.target.value) };
    return el("select", { class: "llx-set", "data-side": side, "aria-label": `${side} set`, on },
      ...tasks.flatMap((task) => (task ? [el("optgroup", { label: task }, ...options(task))] : options(task))));
  }

  const choosers = sides.map(chooser);
  const sliders = sides.map((side, i) => el("input", { type: "range", min: "0", class: "llx-k", "aria-label": `K, ${side}`,
    on: { input: (e) => setK(i, stops(i)[e.target.value]) } }));
  const numbers = sides.map((side, i) => el("input", { type: "number", min: "1", class: "llx-k-number",
    "aria-label": `K, ${side}, as a number`, on: { change: (e) => setK(i, Number(e.target.value) || state.k[i]) } }));
  const mosts = sides.map(() => el("span", { class: "llx-quiet" }));
  const ks = sides.map((_, i) => el("label", {}, el("span"), sliders[i], numbers[i], mosts[i]));
  const link = el("input", { type: "checkbox", on: { change: (e) => {
    state = { ...state, linked: e.target.checked };
    setK(0, state.k[0]);
  } } });
  const overlap = el("dl", { class: "llx-overlap", "aria-live": "polite", "aria-label": "overlap of the two sets" });
  const readout = el("div", { class: "llx-readout", "aria-hidden": "true", hidden: true });

  // ----------------------------------------------------------------------------------------- grids, marks and the open head

  const on = {
    click(index) {
      const head = nameOf(index), marked = state.selection.includes(head);
      change({ head, selection: marked ? state.selection.filter((h) => h !== head) : [...state.selection, head] });
      grids.find((g) => g.body.contains(document.activeElement))?.home.scrollIntoView({ block: "nearest" });
    },
    point(index, cell) {
      for (const grid of grids) {
        grid.body.querySelector(".llx-twin")?.classList.remove("llx-twin");
        if (index !== null) grid.cells[index].classList.add("llx-twin");
      }
      readout.hidden = index === null;
      if (index === null) return;
      const places = shownSets().map((set, i) => el("div", {}, badge(SIDES[i]), ` ${describe(set, index)}`));
      const promoted = (data.readings[nameOf(index)] ?? []).flatMap((r) => r.promoted.slice(0, 5)).map(([token]) => token);
      const tokens = promoted.length ? [el("div", { text: `promotes ${promoted.slice(0, 8).join(" ")}` })] : [];
      readout.replaceChildren(el("b", { text: nameOf(index) }), ...places, ...tokens);
      beside(cell);
    },
  };
  // Put what is said of a head where the eye is: below its cell, or above it in the lower half of the window.
  function beside(cell) {
    const [at, frame] = [cell, main].map((e) => e.getBoundingClientRect());
    const below = at.bottom < window.innerHeight / 2;
    const left = Math.min(at.left + at.width / 2 - frame.left - readout.offsetWidth / 2, frame.width - readout.offsetWidth);
    readout.style.left = `${Math.max(0, left)}px`;
    readout.style.top = `${below ? at.bottom - frame.top + 10 : at.top - frame.top - readout.offsetHeight - 10}px`;
  }
  const grids = sides.map((side) => new Grid(side, data.shape, heat, on));
  const color = el("select", { "aria-label": "color of a head", on: { change: () => { drawn.clear(); draw(); } } },
    el("option", { value: "score", text: "score" }), el("option", { value: "rank", text: "rank" }));
  const picked = el("span", { class: "llx-marked" });
  const clear = el("button", { type: "button", class: "llx-plain", text: "clear", on: { click: () => change({ selection: [] }) } });
  const sample = (mark, text) => el("span", { class: "llx-key" }, el("span", { class: "llx-sample", "data-mark": mark }), text);
  const panel = el("aside", { class: "llx-panel", "aria-label": "the open head" });
  const lower = plots();
  const looks = { group: 0, first: "shown" }; // how attention is looked at, from head to head

  function close() {
    const grid = grids.find((g) => g.body.contains(document.activeElement)) ?? grids[0];
    change({ head: null });
    grid.home.focus({ preventScroll: true });
  }

  // -------------------------------------------------------------------------------------------------------- a typed prompt

  const prompt = el("textarea", { rows: 2, "aria-label": "prompt", placeholder: "Type a prompt for the model to continue", on: {
    keydown: (e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) { e.preventDefault(); run(); } },
  } });
  const adapter = el("select", { "aria-label": "adapter", on: { change: () => change({ adapter: adapter.value }) } });
  const chat = el("input", { type: "checkbox", on: { change: () => change({ chat: chat.checked }) } });
  const examples = el("select", { class: "llx-examples", "aria-label": "example prompts",
    on: { change: () => { prompt.value = examples.value; } } });
  const go = el("button", { type: "button", class: "llx-run", text: "Run", on: { click: () => run() } });
  const busy = el("span", { class: "llx-busy", role: "status", "aria-live": "polite" });
  const labels = { adapter: el("label", {}, "adapter ", adapter), examples: el("label", {}, "examples ", examples),
    chat: el("label", { title: "Apply the model's chat template to the prompt" }, chat, " as a chat") };
  const buttons = [labels.examples, labels.adapter, labels.chat, go, busy, el("span", { class: "llx-quiet", text: "or Ctrl+Enter" })];
  const ask = el("div", { class: "llx-ask" }, prompt, el("div", { class: "llx-go" }, ...buttons));
  const why = el("p", { class: "llx-quiet" });
  const answers = el("div", { "aria-live": "polite" });
  const asked = el("section", { class: "llx-prompt", "aria-label": "prompt" }, el("h3", { text: "Ask the model" }), why, ask, answers);
  const run = () => go.disabled || model.send({ do: "run", prompt: prompt.value, state });

  // ------------------------------------------------------------------------------------------------------------- drawing

  const drawn = new Map();
  // Rebuild a part only if what it shows has changed.
  function when(part, value, build) {
    const now = JSON.stringify(value);
    if (drawn.get(part) === now) return;
    drawn.set(part, now);
    build();
  }

  // Of the two sets shown.
  function chance() {
    const [i, j] = shownSets().map((s) => sets.indexOf(s)).sort((a, b) => a - b);
    const { left, right, k } = said.overlap;
    if (left === state.left && right === state.right && `${k}` === `${state.k}`) return said.overlap;
    const at = state.k[0] === state.k[1] ? data.chance.ks.indexOf(state.k[0]) : -1;
    const [p, pLayer] = data.chance.pairs?.[`${i},${j}`] ?? [[], []];
    return { expected: data.chance.expected[at], p: p[at], p_layer: pLayer[at] };
  }

  function drawNumbers(shown, shared) {
    const layers = shown.map((set, i) => {
      const found = set.ranking.slice(0, state.k[i]).map((head) => Math.floor(head / nHeads));
      return found.reduce((sum, layer) => sum + layer) / found.length;
    });
    const mean = ["mean layer", layers.map((x) => x.toFixed(1)).join(", "), "of the heads in the top K of each set"];
    const items = shown.length > 1 ? [...comparison(shared), mean] : [mean];
    overlap.replaceChildren(...items.map(([label, value, title]) =>
      el("div", { title }, el("dt", { text: label }), el("dd", { text: value }))));
  }

  function comparison(shared) {
    const { expected, p, p_layer: pLayer } = chance();
    const [k, l] = state.k, same = state.left === state.right;
    const note = (how) => `probability that at least this many heads are shared by chance, with heads drawn ${how}; ` +
      "not corrected for trying several K or sets";
    return [
      ["shared heads", `${shared} of ${k === l ? k : `${k} and ${l}`}`, "heads in the top K of both sets"],
      ["expected by chance", expected?.toFixed(2) ?? "\u2026", "K of the left set times K of the right set, divided by the model's number of heads"],
      ["p, over all heads", same ? "\u2013" : pText(p), note("from all heads of the model")],
      ["p, within layers", same ? "\u2013" : pText(pLayer), note("within each layer, so that a preference for the same layers does not count")],
      ["Jaccard", (shared / (k + l - shared)).toFixed(2), "shared heads divided by the heads in either set"],
    ];
  }

  function drawPanel(shown) {
    if (state.head === null) {
      panel.replaceChildren(quiet(HINT));
      return;
    }
    const index = indexOf(state.head);
    const live = said.head === state.head ? said : { readings: [], maps: [], note: "" };
    const readings = [...live.readings, ...(data.readings[state.head] ?? [])];
    const edits = Object.entries(data.edited).filter(([name]) => !readings.some((r) => r.title === name)).map(([name, heads]) => {
      if (heads === null) return `${name} edits no single heads.`;
      if (heads.includes(state.head)) return `${name} edits this head.`; // its tokens are on their way, or were not kept
      const more = heads.length > 6 ? ` and ${heads.length - 6} more` : "";
      return `${state.head} is outside ${name}, which edits ${heads.slice(0, 6).join(" ")}${more}.`;
    });
    const stored = data.attention.filter((a) => shown.some((s) => s.task === a.task) && state.head in a.heads);
    const groups = live.maps.length ? [live.maps] : stored.map(({ title, tokens, heads }) => [{ title, tokens, weights: heads[state.head] }]);
    const button = el("button", { type: "button", class: "llx-plain", text: "close", on: { click: close } });
    panel.replaceChildren(el("div", { class: "llx-head" }, el("h3", { class: "llx-head-name", text: state.head }), button),
      placesTable(index, sets, shown, state.k), ...readings.map(readingBlock), ...edits.map(quiet),
      ...(readings.length || edits.length ? [] : [quiet("No adapter here edits this head.")]),
      groups.length ? attentionBlock(state.head, groups, heat, looks) : quiet(live.note));
  }

  function drawPrompt() {
    asked.hidden = said.ask === null && !said.answers.rows.length;
    why.textContent = said.ask ?? "";
    ask.hidden = said.ask !== "";
    busy.textContent = said.busy;
    go.disabled = said.busy !== "";
    when("prompt", said.prompt, () => { prompt.value = said.prompt; });
    when("adapters", [said.adapters, state.adapter], () => adapter.replaceChildren(
      ...said.adapters.map((a) => el("option", { value: a, text: a, selected: a === state.adapter }))));
    when("examples", said.prompts, () => examples.replaceChildren(...said.prompts.map((p) => el("option", { value: p, text: p }))));
    labels.adapter.hidden = !said.adapters.length;
    labels.examples.hidden = said.prompts.length < 2;
    labels.chat.hidden = !said.has_chat;
    chat.checked = state.chat;
    when("answers", said.answers, () => {
      const rows = said.answers.rows.map(([what, text]) => el("tr", {}, el("th", { scope: "row", text: what }), el("td", { text })));
      const table = el("table", { class: "llx-said" }, el("caption", { text: said.answers.prompt }), el("tbody", {}, ...rows));
      answers.replaceChildren(rows.length ? table : "", quiet(said.answers.note));
    });
  }

  function draw() {
    const shown = shownSets();
    const isIn = sides.map((_, i) => (head) => shown[i].ranks[head] > 0 && shown[i].ranks[head] <= state.k[i]);
    const other = (i) => isIn[1 - i] ?? (() => false);
    const shared = shown[0].ranking.slice(0, state.k[0]).filter(other(0)).length;
    choosers.forEach((select, i) => { select.value = state[SIDES[i]]; });
    ks.forEach((label, i) => {
      label.hidden = i === 1 && isTied();
      label.firstChild.textContent = isTied() ? "K, heads in each set" : `K ${SIDES[i]}`;
      sliders[i].max = stops(i).length - 1;
      sliders[i].value = stops(i).filter((k) => k <= state.k[i]).length - 1;
      sliders[i].setAttribute("aria-valuetext", `K = ${state.k[i]}`);
      numbers[i].value = state.k[i];
      mosts[i].textContent = `of ${longest(i)}`;
    });
    link.checked = state.linked;
    link.parentElement.hidden = saved || sides.length < 2;
    grids.forEach((grid, i) => when(SIDES[i], state[SIDES[i]], () => {
      grid.show(shown[i], color.value === "rank");
      drawn.delete("marks");
    }));
    when("marks", [state.k, state.left, state.right], () => grids.forEach((grid, i) => grid.mark(isIn[i], other(i))));
    when("picks", [state.selection, state.head], () => {
      const open = state.head === null ? [] : [indexOf(state.head)];
      grids.forEach((grid) => grid.pick(state.selection.map(indexOf), open));
    });
    when("plots", [state.k, state.left, state.right], () => {
      const counts = shown.map((set, i) => Array.from({ length: nLayers }, (_, layer) =>
        set.ranking.slice(0, state.k[i]).filter((h) => Math.floor(h / nHeads) === layer).length));
      lower.draw(data.chance, shown.length > 1 ? sharedByK(...shown) : null, counts, state.k);
    });
    drawNumbers(shown, shared);
    picked.textContent = state.selection.length ? `marked by you: ${state.selection.join(" ")} ` : "marked by you";
    clear.hidden = !state.selection.length;
    when("panel", [state.k, state.left, state.right, state.head, said.head, said.readings, said.maps, said.note], () => drawPanel(shown));
    drawPrompt();
    error.hidden = !said.error;
    error.textContent = said.error;
    root.setAttribute("aria-busy", said.busy !== "");
    root.classList.toggle("llx-opened", state.head !== null);
    root.dataset.version = said.version;
  }

  const across = Math.max(nLayers, nHeads) >= 3 * Math.min(nLayers, nHeads); // much wider than high: one above the other
  const main = el("div", { class: "llx-main" }, el("div", { class: `llx-two${across ? " llx-stacked" : ""}` }, ...grids.map((g) => g.root)),
    el("div", { class: "llx-keys" }, ...(sides.length > 1 ? [sample("shared", "in the top K of both"), sample("own", "of this set only")] : [sample("own", "in the top K")]),
      el("span", { class: "llx-key" }, el("span", { class: "llx-sample llx-picked" }), picked, clear),
      el("label", {}, "color ", color)),
    asked, lower.root, readout);
  const error = el("div", { class: "llx-error", role: "alert", hidden: true });
  const colors = SIDES.concat("both").map((name, i) => `--${name}:${data.colors[i]}`).join(";");
  const root = el("div", { class: sides.length > 1 ? "llx" : "llx llx-alone", style: colors, on: { keydown: (e) => { if (e.key === "Escape" && state.head !== null) close(); } } },
    error,
    el("div", { class: "llx-two" }, ...sides.map((side, i) => el("label", {}, badge(side), choosers[i]))),
    el("div", { class: "llx-bar" }, el("div", { class: "llx-ks" }, ...ks, el("label", {}, link, " same K")), overlap),
    el("div", { class: "llx-body" }, main, panel));
  on.point(null);
  draw();
  place.append(root);
  const update = () => {
    [state, said] = [model.get("state"), model.get("said")];
    draw();
  };
  const heard = ["change:state", "change:said"];
  heard.forEach((name) => model.on(name, update));
  return () => heard.forEach((name) => model.off(name, update));
}

// A saved page: what Python would give stands in it. The picture that stands there for want of a script goes.
function open(place) {
  const values = JSON.parse(place.querySelector("script").textContent);
  let changed = null;
  const made = el("div");
  const set = (name, value) => {
    values[name] = value;
    changed();
  };
  render({ el: made, model: { get: (name) => values[name], set, save_changes() {}, send() {}, on: (_, act) => { changed = act; } } });
  place.firstElementChild.replaceWith(...made.childNodes);
}
