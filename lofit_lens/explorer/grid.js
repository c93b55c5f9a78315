// One layer x head grid of buttons, last layer on top. One of them takes Tab; arrow keys move between them.

class Grid {
  // on: what to do with a head's number (layer-major): `click`, and `point` when the mouse or the keyboard is at it (null: left).
  constructor(side, [nLayers, nHeads], heat, on) {
    [this.side, this.nLayers, this.nHeads, this.heat] = [side, nLayers, nHeads, heat];
    this.cells = [];
    const rows = [];
    for (let layer = nLayers - 1; layer >= 0; layer--) {
      const label = layer % labelStep(nLayers) ? "" : layer;
      rows.push(el("div", { class: "llx-row", role: "row" },
        el("span", { class: "llx-axis", role: "rowheader", "aria-label": `layer ${layer}`, text: label }),
        ...Array.from({ length: nHeads }, (_, head) => this.cell(layer, head))));
    }
    const ticks = Array.from({ length: nHeads }, (_, head) => el("span", { text: head % labelStep(nHeads) ? "" : head }));
    this.caption = el("figcaption");
    this.legend = el("div", { class: "llx-legend" });
    const indexOf = (act) => (event) => event.target.dataset.head && act(event.target.index, event.target);
    this.body = el("div", { class: "llx-cells", role: "grid", "data-side": side, on: {
      click: indexOf(on.click),
      pointerover: indexOf(on.point),
      pointerleave: () => on.point(null),
      focusin: indexOf((index, cell) => { this.setHome(cell); on.point(index); }),
      focusout: () => on.point(null),
      keydown: (event) => this.move(event),
    } }, ...rows);
    this.root = el("figure", { class: "llx-grid" }, this.caption,
      el("div", { class: "llx-plane" }, el("span", { class: "llx-y", text: "layer" }),
        el("div", { class: "llx-core", style: `--heads:${nHeads}` }, this.body,
          el("div", { class: "llx-row llx-ticks", "aria-hidden": "true" }, el("span", { class: "llx-axis" }), ...ticks),
          el("div", { class: "llx-x", text: "head" }))),
      this.legend);
    this.home = this.cells[0];
    this.setHome(this.home);
  }

  cell(layer, head) {
    const made = el("button", { type: "button", role: "gridcell", tabindex: "-1", "data-head": `L${layer}H${head}` });
    made.index = layer * this.nHeads + head;
    this.cells[made.index] = made;
    return made;
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

  // Colour by score, or by rank where that is wanted or all that is known.
  show(set, byRank) {
    this.set = set;
    const last = set.ranking.length;
    const [scores, kind] = byRank || !set.scores ? [null, "rank"] : [set.scores, set.kind];
    const known = (scores || []).filter((x) => x !== null);  // null: a layer without heads
    const [low, high] = scores ? [Math.min(...known), Math.max(...known)] : [last, 1];
    const level = (i) => {
      if (!scores) return set.ranks[i] ? 1 - (set.ranks[i] - 1) / last : null;
      if (scores[i] === null) return null;
      return high > low ? (scores[i] - low) / (high - low) : 0.5;
    };
    this.cells.forEach((cell, i) => {
      const t = level(i);
      cell.style.backgroundColor = t === null ? "" : this.heat(t);
      cell.dataset.mark = "";
    });
    this.caption.replaceChildren(el("span", { class: `llx-badge llx-${this.side}`, text: this.side }), " ",
      el("b", { text: set.name }), ` ${set.kind}`);
    this.body.setAttribute("aria-label", `${set.name}, heads by layer; arrow keys move, Enter opens a head`);
    this.legend.replaceChildren(el("span", { text: short(low) }), ramp(this.heat), el("span", { text: `${short(high)} (${kind})` }));
  }

  // Marks: "shared" (top K of both sets), "own" (of this one only), "none". `isIn` tells whether a head is in a side's top K.
  mark(isIn, other, selection, open) {
    for (const cell of this.cells) {
      const mark = !isIn(cell.index) ? "none" : other(cell.index) ? "shared" : "own";
      if (cell.dataset.mark !== mark) {
        cell.dataset.mark = mark;
        const words = { shared: ", in the top K of both sets", own: ", in the top K of this set", none: "" };
        cell.setAttribute("aria-label", `${cell.dataset.head}: ${describe(this.set, cell.index)}${words[mark]}`);
      }
      cell.classList.toggle("llx-picked", selection.has(cell.dataset.head));
      cell.setAttribute("aria-pressed", selection.has(cell.dataset.head));
      cell.classList.toggle("llx-open", cell.dataset.head === open);
    }
  }
}

// A head's place in a set, in words.
function describe(set, index) {
  const rank = set.ranks[index];
  const score = set.scores && set.scores[index] !== null ? `, ${set.kind} ${short(set.scores[index])}` : "";
  return `${rank ? `rank ${rank} of ${set.ranking.length}` : `not among ${set.ranking.length}`}${score}`;
}
