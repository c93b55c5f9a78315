// The panel of one head: ranks, scores, what its offset does, where it attends.

const readingOf = (task, name) => data.heads[task]?.[name] ?? null;
const patternsOf = (task, name) => (data.attention[task] ?? []).filter((p) => name in p.heads);

function rankTable(index, sets, k) {
  const [layer, head] = [Math.floor(index / nHeads), index % nHeads];
  return table(["", "set A", "set B"], [
    ["chosen for", ...sets.map(setName)],
    ["rank", ...sets.map((s) => (s.ranks[index] ? `${s.ranks[index]} of ${s.ranking.length}` : `not among the best ${s.ranking.length}`))],
    [`in the top ${k}`, ...sets.map((s) => (s.ranks[index] && s.ranks[index] <= k ? "yes" : "no"))],
    ["score", ...sets.map((s) => (s.scores ? `${number(s.scores[layer][head])} (${s.kind})` : "\u2013"))],
  ], "Ranks and scores");
}

function tokenList(title, tokens) {
  const top = Math.max(...tokens.map(([, v]) => Math.abs(v)), 1e-12);
  return el("div", { class: "tokens" }, el("h5", { text: title }),
    tokens.length ? el("ol", {}, ...tokens.map(([token, logit]) => el("li", {},
      el("span", { class: "bar", style: `width:${(100 * Math.abs(logit)) / top}%` }), el("code", { text: visible(token) }), el("span", { class: "value", text: (logit > 0 ? "+" : "") + fixed(logit, 2) }))))
      : el("p", { class: "quiet", text: "none recorded" }));
}

function readingBlock(task, reading) {
  const facts = [];
  if (reading.norm_v !== null) facts.push(["norm of v", number(reading.norm_v)]);
  for (const [name, value] of Object.entries(reading.cosines)) facts.push([`cosine with ${name}`, fixed(value, 3)]);
  if (reading.without) {
    facts.push(["change when left out", `${signed(reading.without.value)} [${signed(reading.without.low)}, ${signed(reading.without.high)}]`]);
  }
  return el("section", { "data-task": task }, el("h4", { text: `Offset tuned on ${task}` }),
    el("dl", {}, ...facts.map(([name, value]) => el("div", {}, el("dt", { text: name }), el("dd", { text: value })))),
    el("div", { class: "pair" }, tokenList("promoted tokens", reading.promoted), tokenList("suppressed tokens", reading.suppressed)));
}

// circuitsvis is large and often not needed: it is run at the first pattern asked for.
function circuitsvis() {
  if (window.CircuitsVis === undefined) {
    const source = byId("circuitsvis").textContent;
    // A plain script, so that its `var CircuitsVis` becomes a global.
    document.head.append(el("script", { text: source }));
  }
  return window.CircuitsVis;
}

let drawn = 0;

function drawPattern(box, prompt, name) {
  const weights = prompt.heads[name];
  const last = weights.length - 1;
  const strongest = weights[last].map((w, i) => [w, i]).sort((x, y) => y[0] - x[0] || x[1] - y[1]).slice(0, 3);
  const id = `pattern-${++drawn}`;
  box.replaceChildren(
    el("p", { class: "prompt", text: prompt.prompt }),
    el("p", { class: "quiet", text: `The last token attends most to: ${strongest.map(([w, i]) => `${visible(prompt.tokens[i])} (${i}) ${fixed(w, 2)}`).join(", ")}. ` +
      "Rows: the token that attends; columns: the token attended to; white 0, blue 1." }),
    el("div", { id, class: "pattern" }));
  const vis = circuitsvis();
  vis.render(id, vis.AttentionPattern, { tokens: prompt.tokens.map(visible), attention: weights, minValue: -1, maxValue: 1, showAxisLabels: true });
}

function attentionBlock(tasks, name) {
  const found = tasks.flatMap((task) => patternsOf(task, name).map((prompt) => ({ task, prompt })));
  if (!found.length) return null;
  const box = el("div", { class: "pattern-box" });
  const select = el("select", { id: "prompt" }, ...found.map(({ task, prompt }, i) =>
    el("option", { value: i, text: `${task}: ${prompt.prompt.length > 60 ? `${prompt.prompt.slice(0, 57)}...` : prompt.prompt}` })));
  const draw = () => drawPattern(box, found[select.value].prompt, name);
  select.addEventListener("change", draw);
  return { node: el("section", { class: "attention" }, el("h4", { text: "Attention pattern" }), el("label", {}, "prompt ", select), box), draw };
}

class Panel {
  constructor(onClose) {
    this.root = byId("head-panel");
    this.index = null;
    this.onClose = onClose;
  }

  show(index, sets, k) {
    this.index = index;
    this.sets = sets;
    const name = headName(index);
    const tasks = [...new Set(sets.map((s) => s.task))];
    const close = el("button", { type: "button", class: "close", "aria-label": "Close this head's panel", text: "\u00d7" });
    close.addEventListener("click", () => this.close());
    this.ranks = el("div");
    const readings = tasks.map((task) => [task, readingOf(task, name)]).filter(([, r]) => r);
    const attention = attentionBlock(tasks, name);
    this.root.replaceChildren(
      el("div", { class: "panel-head" }, el("h3", { id: "panel-title", tabindex: "-1", text: `Head ${name}` }), close), this.ranks,
      ...readings.map(([task, reading]) => readingBlock(task, reading)), ...(attention ? [attention.node] : []));
    if (!readings.length) this.root.append(el("p", { class: "quiet", text: `No tuned offset of this head was recorded for ${tasks.join(" or ")}.` }));
    this.root.dataset.head = name;
    this.root.setAttribute("aria-label", `Head ${name}`);
    this.root.hidden = false;
    byId("panel-hint").hidden = true;
    document.body.classList.add("panel-open");
    this.refresh(k);
    if (attention) attention.draw();
  }

  refresh(k) {
    if (this.index !== null) this.ranks.replaceChildren(rankTable(this.index, this.sets, k));
  }

  close() {
    if (this.index === null) return;
    this.index = null;
    this.root.hidden = true;
    this.root.replaceChildren();
    delete this.root.dataset.head;
    byId("panel-hint").hidden = false;
    document.body.classList.remove("panel-open");
    this.onClose();
  }
}
