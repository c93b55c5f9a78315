// What the page shows now (two sets, K, colours, an open head) and what changes it.

for (const set of data.sets) {
  set.ranks = new Int32Array(nLayers * nHeads);
  set.ranking.forEach(([layer, head], i) => { set.ranks[layer * nHeads + head] = i + 1; });
}

const controls = { a: byId("set-a"), b: byId("set-b"), k: byId("k"), kNumber: byId("k-number"), colour: byId("colour") };
const tip = byId("tip");
let a;
let b;
let k;
let shared = [];
let opener = null;
let tipCell = null;
let wantScores = true;

const panel = new Panel(() => {
  markOpen(null);
  if (opener) opener.focus();
  opener = null;
});
const on = {
  open(index, grid) {
    opener = grid.cells[index];
    on.leave();
    panel.show(index, [a, b], k);
    markOpen(index);
    byId("panel-title").focus({ preventScroll: true });
    opener.scrollIntoView({ block: "nearest" });
  },
  point(index, cell) {
    grids.forEach((g) => g.twin(index));
    showTip(index, cell);
  },
  leave() {
    grids.forEach((g) => g.twin(null));
    hideTip();
  },
};
const grids = [new Grid("A", on), new Grid("B", on)];

function showTip(index, cell) {
  const name = headName(index);
  const [layer, head] = [Math.floor(index / nHeads), index % nHeads];
  const line = (set, side) => el("div", { text: `${side}: ${set.ranks[index] ? `rank ${set.ranks[index]}` : `not among the best ${set.ranking.length}`}` +
    (set.scores ? `, ${set.kind} ${number(set.scores[layer][head])}` : "") });
  const promoted = [...new Set([a.task, b.task])].map((task) => [task, readingOf(task, name)?.promoted ?? []]).filter(([, p]) => p.length);
  tip.replaceChildren(el("b", { text: name }), line(a, "A"), line(b, "B"),
    ...promoted.map(([task, p]) => el("div", {}, `promotes (${task}): `, el("code", { text: p.slice(0, 5).map(([t]) => visible(t)).join("  ") }))));
  tip.hidden = false;
  tipCell = cell;
  placeTip();
}

// Above its cell, or below it where there is no room; gone when the cell is out of sight.
function placeTip() {
  if (tip.hidden) return;
  const at = tipCell.getBoundingClientRect();
  if (at.bottom < 0 || at.top > window.innerHeight) return hideTip();
  const left = Math.min(Math.max(8, at.left + at.width / 2 - tip.offsetWidth / 2), document.documentElement.clientWidth - tip.offsetWidth - 8);
  const above = at.top - tip.offsetHeight - 6;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 4 ? above : at.bottom + 6}px`;
}

function markOpen(index) {
  for (const grid of grids) {
    grid.body.querySelector(".open")?.classList.remove("open");
    if (index !== null) grid.cells[index].classList.add("open");
  }
}

function hideTip() {
  tip.hidden = true;
}

// Heads of two sets can be set on one scale only if both have scores of one kind.
function drawGrids() {
  const comparable = a.scores && b.scores && a.kind === b.kind;
  const byScore = comparable && wantScores;
  controls.colour.options[0].disabled = !comparable;
  controls.colour.value = byScore ? "score" : "rank";
  let low = "";
  let high = "";
  let why = "";
  if (byScore) {
    const all = [...a.scores.flat(), ...b.scores.flat()];
    const [min, max] = [all.reduce((x, y) => Math.min(x, y)), all.reduce((x, y) => Math.max(x, y))];
    const shade = (set) => (i) => (max > min ? (set.scores[Math.floor(i / nHeads)][i % nHeads] - min) / (max - min) : 1);
    grids.forEach((g, i) => g.show([a, b][i], shade([a, b][i])));
    [low, high] = [number(min, 3), `${number(max, 3)} ${a.kind}`];
  } else {
    const longest = Math.max(a.ranking.length, b.ranking.length);
    const shade = (set) => (i) => (set.ranks[i] ? (longest > 1 ? 1 - (set.ranks[i] - 1) / (longest - 1) : 1) : null);
    grids.forEach((g, i) => g.show([a, b][i], shade([a, b][i])));
    [low, high] = [`rank ${longest}`, "rank 1"];
    if (!comparable) why = a.scores && b.scores ? `Coloured by rank: ${a.kind} and ${b.kind} share no scale.` : "Coloured by rank: not every set has scores.";
  }
  const partial = [a, b].some((s) => s.ranking.length < nLayers * nHeads);
  byId("key").replaceChildren(
    el("div", { class: "legend" }, low, el("span", { class: "gradient", style: `background:${heatGradient}` }), high),
    el("div", { class: "legend" }, el("i", { class: "sample", "data-mark": "own" }), "top K of this set", el("i", { class: "sample", "data-mark": "shared" }), "top K of both",
      ...(!byScore && partial ? [el("i", { class: "sample blank" }), "not in its list"] : [])),
    ...(why ? [el("p", { class: "quiet", text: why })] : []));
}

function drawK() {
  const n = nLayers * nHeads;
  const count = shared[k - 1];
  const meanLayer = (set) => set.ranking.slice(0, k).reduce((sum, [layer]) => sum + layer, 0) / k;
  controls.k.value = controls.kNumber.value = k;
  byId("overlap-count").textContent = count;
  byId("overlap-k").textContent = k;
  byId("overlap-expected").textContent = fixed((k * k) / n, 2);
  byId("overlap-p").textContent = a === b ? "\u2013" : pValue(upperTail(n, k, count));
  byId("overlap-jaccard").textContent = fixed(count / (2 * k - count), 3);
  byId("mean-layer-a").textContent = fixed(meanLayer(a), 1);
  byId("mean-layer-b").textContent = fixed(meanLayer(b), 1);
  grids[0].mark(b, k);
  grids[1].mark(a, k);
  panel.refresh(k);
  drawPlots();
}

let waiting = false;
let newPair = true;

// The plots follow once a frame, however fast the slider moves.
function drawPlots() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    if (newPair) drawOverlap(shared);
    newPair = false;
    markOverlap(shared, k);
    drawLayers(a, b, k);
  });
}

function chooseK(value) {
  const wanted = Math.round(Number(value));
  k = Math.min(Math.max(1, Number.isFinite(wanted) ? wanted : 1), shared.length);
  drawK();
}

function chooseSets() {
  [a, b] = [controls.a, controls.b].map((select) => data.sets.find((s) => s.id === select.value));
  const most = Math.min(a.ranking.length, b.ranking.length);
  shared = overlapCurve(a.ranks, b.ranks, most);
  newPair = true;
  controls.k.max = controls.kNumber.max = most;
  drawGrids();
  chooseK(k ?? Math.min(a.k, b.k));
  if (panel.index !== null) panel.show(panel.index, [a, b], k);
}

function fillSelects() {
  const tasks = [...new Set(data.sets.map((s) => s.task))];
  for (const select of [controls.a, controls.b]) {
    select.append(...tasks.map((task) => el("optgroup", { label: task }, ...data.sets.filter((s) => s.task === task).map((s) =>
      el("option", { value: s.id, text: setName(s) })))));
  }
  const [first, ...rest] = data.sets;
  const second = rest.find((s) => s.task !== first.task && s.method === first.method && s.seed === first.seed) ?? rest[0] ?? first;
  [controls.a.value, controls.b.value] = [first.id, second.id];
}

function fillText() {
  const { model } = data;
  byId("model-line").append(el("b", { text: model.name }), ` (${model.class_name}): ${plural(nLayers, "layer", "layers")} of ${plural(nHeads, "head", "heads")}` +
    (model.revision ? `, revision ${model.revision}` : ""));
  byId("notes").append(...data.notes.map((text) => el("li", { text })));
  byId("tables").append(...data.tables.flatMap((t) => [el("h3", { text: t.title }), table(t.columns, t.rows, t.title), ...t.notes.map((text) => el("p", { class: "quiet", text }))]));
  if (data.transfer) byId("transfer-box").append(...transferTable(data.transfer));
  for (const [id, there] of [["summary", data.tables.length > 0], ["transfer", data.transfer !== null]]) {
    if (there) continue;
    byId(id).remove();
    document.querySelector(`[data-for="${id}"]`).remove();
  }
  const versions = Object.entries(data.versions);
  byId("about-box").append(
    el("p", { class: "quiet", text: "One file, made by lofit-lens; it works without a network. Chance: two sets of K heads drawn at random from all " +
      `${(nLayers * nHeads).toLocaleString("en")} heads share K\u00b2/n heads on average; p is the hypergeometric probability of as many or more, for one pair ` +
      "of sets (not corrected for looking at several pairs or several K)." }),
    ...(versions.length ? [table(["package", "version"], versions, "Versions")] : []));
}

fillText();
byId("grids").append(...grids.map((g) => g.root));
fillSelects();
controls.a.addEventListener("change", chooseSets);
controls.b.addEventListener("change", chooseSets);
controls.k.addEventListener("input", () => chooseK(controls.k.value));
controls.kNumber.addEventListener("change", () => chooseK(controls.kNumber.value));
controls.colour.addEventListener("change", () => {
  wantScores = controls.colour.value === "score";
  drawGrids();
  drawK();
});
document.addEventListener("keydown", (e) => { if (e.key === "Escape") { hideTip(); panel.close(); } });
window.addEventListener("scroll", placeTip, { passive: true, capture: true });
chooseSets();
window.lofitLens = { upperTail, chanceBand, overlapCurve };
document.documentElement.dataset.ready = "yes";
