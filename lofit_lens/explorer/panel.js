// What is said of the open head: its place in every set, what its edits do, where it looks.

const quiet = (text) => el("p", { class: "llx-quiet", text });

// All sets, those shown first and in bold.
function placesTable(index, sets, shown, ks) {
  const rows = [...sets].sort((a, b) => shown.includes(b) - shown.includes(a)).map((set) => {
    const sides = shown.flatMap((s, i) => (s === set ? [ks[i]] : []));
    const rank = set.ranks[index];
    const k = Math.max(...sides);
    const inside = sides.length ? `, ${rank && rank <= k ? "in" : "not in"} the top ${k}` : "";
    return el("tr", { class: sides.length ? "llx-shown" : null }, el("th", { scope: "row", text: set.name }),
      el("td", { title: set.kind, text: set.scores && set.scores[index] !== null ? short(set.scores[index]) : "" }),
      el("td", { text: `${rank ? `${rank} of` : "not among"} ${set.ranking.length}${inside}` }));
  });
  const heads = ["set", "score", "rank"].map((text) => el("th", { scope: "col", text }));
  return el("div", { class: "llx-scroll llx-places", tabindex: "0", role: "region", "aria-label": "scores and ranks" },
    el("table", {}, el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...rows)));
}

function tokenList(title, tokens) {
  const most = Math.max(...tokens.map(([, x]) => Math.abs(Number(x))), 1e-9);
  const items = tokens.map(([token, value]) => el("li", {},
    el("span", { class: "llx-bar", style: `width:${(100 * Math.abs(Number(value))) / most}%` }),
    el("code", { text: token }), el("span", { class: "llx-value", text: value })));
  return el("div", { class: "llx-tokens" }, el("h5", { text: title }), el("ol", {}, ...items));
}

function readingBlock(r) {
  const facts = r.facts.map(([name, value]) => el("div", {}, el("dt", { text: name }), el("dd", { text: value })));
  const lists = [tokenList(`promotes (${r.unit})`, r.promoted), tokenList(`suppresses (${r.unit})`, r.suppressed)];
  return el("section", { class: "llx-reading" }, el("h4", { text: r.title }), r.note ? quiet(r.note) : null,
    facts.length ? el("dl", {}, ...facts) : null, r.promoted.length ? el("div", { class: "llx-pair" }, ...lists) : null);
}

// weights: of each token, thousandths of its attention on itself and the tokens before it.
function attentionMap({ title, tokens, weights }, heat) {
  const cell = (row, i, j) => el("td", { style: `background:${heat(row[j] / 1000)}`,
    title: `${tokens[i]} looks at ${tokens[j]}: ${row[j] / 1000}` });
  const rows = weights.map((row, i) => el("tr", {}, el("th", { scope: "row", text: tokens[i] }),
    ...tokens.map((_, j) => (j > i ? el("td") : cell(row, i, j)))));
  const heads = tokens.map((text) => el("th", { scope: "col", class: "llx-down" }, el("span", { text })));
  return el("figure", { class: "llx-attention", style: `--tokens:${tokens.length}` }, el("figcaption", { text: title }),
    el("div", { class: "llx-scroll" },
      el("table", {}, el("thead", {}, el("tr", {}, el("th"), ...heads)), el("tbody", {}, ...rows))));
}

// groups: lists of maps that stand together; the reader chooses among them.
function attentionBlock(name, groups, heat) {
  const box = el("div");
  const draw = (i) => box.replaceChildren(...groups[i].map((map) => attentionMap(map, heat)));
  const options = groups.map(([first], i) => el("option", { value: i, text: first.title }));
  const chooser = el("select", { class: "llx-which", "aria-label": "prompt", on: { change: () => draw(chooser.value) } }, ...options);
  draw(0);
  return el("section", { class: "llx-maps" }, el("h4", { text: `Where ${name} looks` }),
    groups.length > 1 ? chooser : null,
    el("p", { class: "llx-quiet" }, "Row: the token that looks; column: the token looked at. Share of attention 0 ", ramp(heat), " 1"), box);
}
