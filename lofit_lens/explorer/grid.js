// One layer x head grid of buttons. The longer of the two axes lies across, since windows are wide; the last layer, or the last
// head, is on top. One of the buttons takes Tab; arrow keys move between them.

class Grid {
  // on: what to do with a head's number (layer-major): `click`, and `point` when the mouse or the keyboard is at it (null: left).
  constructor(side, [nLayers, nHeads], heat, on) {
    [this.side, this.nHeads, this.heat, this.cells, this.picked] = [side, nHeads, heat, [], []];
    this.layersAcross = nLayers > nHeads;
    const axes = [["layer", nLayers], ["head", nHeads]];
    const [[down, nDown], [across, nAcross]] = this.layersAcross ? axes.reverse() : axes;
    [this.nDown, this.nAcross] = [nDown, nAcross];
    const rows = [];
    for (let y = nDown - 1; y >= 0; y--) {
      rows.push(el("div", { class: "llx-row", role: "row" },
        el("span", { class: "llx-axis", role: "rowheader", "aria-label": `${down} ${y}`, text: y % labelStep(nDown) ? "" : y }),
        ...Array.from({ length: nAcross }, (_, x) => this.cell(y, x))));
    }
    const ticks = Array.from({ length: nAcross }, (_, x) => el("span", { text: x % labelStep(nAcross) ? "" : x }));
    this.caption = el("figcaption");
    const at = (act) => (event) => event.target.dataset.head && act(event.target.index, event.target);
    this.body = el("div", { class: "llx-cells", role: "grid", "data-side": side, on: {
      click: at(on.click),
      pointerover: (event) => event.pointerType !== "touch" && at(on.point)(event),
      pointerleave: () => on.point(null),
      focusin: at((index, cell) => { this.setHome(cell); on.point(index, cell); }),
      focusout: () => on.point(null),
      keydown: (event) => this.move(event),
    } }, ...rows);
    this.root = el("figure", { class: "llx-grid", style: `--across:${nAcross}` }, this.caption,
      el("div", { class: "llx-plane" }, el("span", { class: "llx-y", text: down }),
        el("div", { class: "llx-core" }, this.body,
          el("div", { class: "llx-row llx-ticks", "aria-hidden": "true" }, el("span", { class: "llx-axis" }), ...ticks),
          el("div", { class: "llx-x", text: across }))));
    this.home = this.cells[0];
    this.setHome(this.home);
  }

  indexAt(y, x) {
    return this.layersAcross ? x * this.nHeads + y : y * this.nHeads + x;
  }

  cell(y, x) {
    const index = this.indexAt(y, x);
    const name = `L${Math.floor(index / this.nHeads)}H${index % this.nHeads}`;
    const made = el("button", { type: "button", role: "gridcell", tabindex: "-1", "data-head": name, "aria-pressed": "false" });
    made.index = index;
    this.cells[index] = made;
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
    const [y, x] = this.layersAcross ? [head, layer] : [layer, head];
    const [top, last] = [this.nDown - 1, this.nAcross - 1];
    const to = {
      ArrowRight: [y, Math.min(last, x + 1)], ArrowLeft: [y, Math.max(0, x - 1)],
      ArrowUp: [Math.min(top, y + 1), x], ArrowDown: [Math.max(0, y - 1), x],
      Home: [y, 0], End: [y, last], PageUp: [top, x], PageDown: [0, x],
    }[event.key];
    if (!to) return;
    event.preventDefault();
    this.cells[this.indexAt(...to)].focus();
  }

  // Color by score, or by rank where that is wanted or all that is known.
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
    this.caption.replaceChildren(el("span", {}, badge(this.side), " ", el("b", { text: set.name }), set.name.includes(set.kind) ? "" : ` ${set.kind}`),
      el("span", { class: "llx-legend" }, short(low), ramp(this.heat), `${short(high)}${kind === set.kind ? "" : ` (${kind})`}`));
    this.body.setAttribute("aria-label", `${set.name}, heads by layer; arrow keys move, Enter opens a head`);
  }

  // Marks: "shared" (top K of both sets), "own" (of this one only), "none". `isIn` tells whether a head is in a side's top K.
  mark(isIn, other) {
    for (const cell of this.cells) {
      const mark = !isIn(cell.index) ? "none" : other(cell.index) ? "shared" : "own";
      if (cell.dataset.mark === mark) continue;
      cell.dataset.mark = mark;
      const words = { shared: ", in the top K of both sets", own: ", in the top K of this set", none: "" };
      cell.setAttribute("aria-label", `${cell.dataset.head}: ${describe(this.set, cell.index)}${words[mark]}`);
    }
  }

  // What the reader marked, and the open head; only these cells are touched.
  pick(marked, open) {
    for (const cell of this.picked) {
      cell.classList.remove("llx-picked", "llx-open");
      cell.setAttribute("aria-pressed", "false");
    }
    this.picked = [...marked, ...open].map((index) => this.cells[index]);
    for (const index of marked) {
      this.cells[index].classList.add("llx-picked");
      this.cells[index].setAttribute("aria-pressed", "true");
    }
    for (const index of open) this.cells[index].classList.add("llx-open");
  }
}

// A head's place in a set, in words.
function describe(set, index) {
  const rank = set.ranks[index];
  const score = set.scores && set.scores[index] !== null ? `, ${set.kind} ${short(set.scores[index])}` : "";
  return `${rank ? `rank ${rank} of ${set.ranking.length}` : `not among ${set.ranking.length}`}${score}`;
}
