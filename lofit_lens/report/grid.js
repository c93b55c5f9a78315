// A layer x head grid of buttons, last layer on top. One of them takes Tab; arrow keys move between them.

class Grid {
  constructor(side, on) {
    this.side = side;
    this.cells = new Array(nLayers * nHeads);
    const step = (n) => [1, 2, 4, 8].find((s) => n / s <= 12) || 10;
    const rows = [];
    for (let layer = nLayers - 1; layer >= 0; layer--) {
      const row = el("div", { role: "row", class: "row" },
        el("span", { role: "rowheader", class: "axis", "aria-label": `layer ${layer}`, text: layer % step(nLayers) ? "" : layer }));
      for (let head = 0; head < nHeads; head++) {
        const cell = el("button", { type: "button", role: "gridcell", tabindex: "-1", "data-head": `L${layer}H${head}` });
        cell.index = layer * nHeads + head;
        this.cells[cell.index] = cell;
        row.append(cell);
      }
      rows.push(row);
    }
    const below = el("div", { class: "row", "aria-hidden": "true" }, el("span", { class: "axis" }),
      ...Array.from({ length: nHeads }, (_, h) => el("span", { class: "tick", text: h % step(nHeads) ? "" : h })));
    this.name = el("span", { class: "set-name" });
    this.body = el("div", { class: "cells", role: "grid", "data-side": side, "aria-rowcount": nLayers, "aria-colcount": nHeads },
      ...rows);
    this.root = el("figure", { class: "grid-box", "data-side": side },
      el("figcaption", {}, el("span", { class: `badge ${side.toLowerCase()}`, text: side }), " ", this.name),
      el("div", { class: "scroll grid-scroll", style: `--heads:${nHeads}` },
        el("div", { class: "with-axis" }, el("span", { class: "y-title", text: "layer" }),
          el("div", { class: "grid-core" }, this.body, below, el("div", { class: "x-title", text: "head" })))));
    this.home = this.cells[0];
    this.body.addEventListener("click", (e) => e.target.matches("button") && on.open(e.target.index, this));
    this.body.addEventListener("keydown", (e) => this.move(e));
    this.body.addEventListener("pointerover", (e) => e.pointerType !== "touch" && e.target.matches("button") && on.point(e.target.index, e.target));
    this.body.addEventListener("pointerleave", on.leave);
    this.body.addEventListener("focusin", (e) => {
      this.setHome(e.target.index);
      if (e.target.matches(":focus-visible")) on.point(e.target.index, e.target);
    });
    this.body.addEventListener("focusout", on.leave);
  }

  setHome(index) {
    this.home.tabIndex = -1;
    this.home = this.cells[index];
    this.home.tabIndex = 0;
  }

  move(event) {
    const from = event.target.index;
    if (from === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    const [layer, head] = [Math.floor(from / nHeads), from % nHeads];
    const to = {
      ArrowRight: [layer, Math.min(nHeads - 1, head + 1)], ArrowLeft: [layer, Math.max(0, head - 1)],
      ArrowUp: [Math.min(nLayers - 1, layer + 1), head], ArrowDown: [Math.max(0, layer - 1), head],
      Home: [layer, 0], End: [layer, nHeads - 1], PageUp: [nLayers - 1, head], PageDown: [0, head],
    }[event.key];
    if (!to) return;
    event.preventDefault();
    this.cells[to[0] * nHeads + to[1]].focus();
  }

  // set: a head set with `ranks`; shade: index -> 0 .. 1, or null for a head without a value.
  show(set, shade) {
    this.set = set;
    this.name.textContent = setName(set);
    this.body.setAttribute("aria-label", `Set ${this.side}, ${setName(set)}: heads by layer; arrow keys move`);
    for (const cell of this.cells) {
      const t = shade(cell.index);
      cell.style.backgroundColor = t === null ? "" : rgb(heat(t));
      cell.dataset.mark = "";
    }
    if (document.activeElement === null || !this.body.contains(document.activeElement)) {
      this.setHome(set.ranking[0][0] * nHeads + set.ranking[0][1]);
    }
  }

  // Marks of the top k: "own" (this set alone) or "shared" (both sets).
  mark(other, k) {
    for (const cell of this.cells) {
      const rank = this.set.ranks[cell.index];
      const inside = rank > 0 && rank <= k;
      const both = inside && other.ranks[cell.index] > 0 && other.ranks[cell.index] <= k;
      const mark = both ? "shared" : inside ? "own" : "none";
      if (cell.dataset.mark === mark) continue;
      cell.dataset.mark = mark;
      const score = this.set.scores ? `, ${this.set.kind} ${number(this.set.scores[Math.floor(cell.index / nHeads)][cell.index % nHeads])}` : "";
      cell.setAttribute("aria-label", `${headName(cell.index)}, ${rank ? `rank ${rank}` : "not ranked"}${score}` +
        { shared: ", in the top K of both sets", own: `, in the top K of set ${this.side}`, none: "" }[mark]);
    }
  }

  twin(index) {
    this.body.querySelector(".twin")?.classList.remove("twin");
    if (index !== null) this.cells[index].classList.add("twin");
  }
}
