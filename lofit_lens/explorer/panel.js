// The open head: its place in every set, what its edits do, where it attends.

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

// Ways to look at a pattern. Most of a head's attention often lies on the first token (BOS where there is one), whatever the text.
const FIRST = {
  shown: { text: "shown", of: (row) => row },
  masked: { text: "masked, scale to the rest", of: (row) => [null, ...row.slice(1)] },
  // Weights are whole thousandths: of less than 2 % that is left, shares would be noise.
  left: { text: "left out, the rest sums to 1", of: (row) => {
    const rest = row.slice(1).reduce((sum, x) => sum + x, 0);
    return row.map((x, j) => (j && rest >= 20 ? Math.round((1000 * x) / rest) : null));
  } },
};

// rows: of each token, thousandths of its attention on itself and the tokens before it; null: not shown.
function attentionMap({ title, tokens }, rows, most, heat) {
  const cell = (x, i, j) => (x === null ? el("td", { class: "llx-none", title: `${tokens[i]}, ${tokens[j]}: not shown` })
    : el("td", { style: `background:${heat(x / most)}`, title: `${tokens[i]} attends to ${tokens[j]}: ${x / 1000}` }));
  const body = rows.map((row, i) => el("tr", {}, el("th", { scope: "row", text: tokens[i] }),
    ...tokens.map((_, j) => (j > i ? el("td") : cell(row[j], i, j)))));
  const heads = tokens.map((text) => el("th", { scope: "col", class: "llx-down" }, el("span", { text })));
  return el("figure", { class: "llx-attention" }, el("figcaption", { text: title }),
    el("div", { class: "llx-scroll" },
      el("table", {}, el("thead", {}, el("tr", {}, el("th"), ...heads)), el("tbody", {}, ...body))));
}

// groups: lists of maps that stand together; the reader chooses among them. looks: how, kept by the caller.
function attentionBlock(name, groups, heat, looks) {
  const box = el("div", { class: "llx-maps" }), legend = el("p", { class: "llx-quiet" });
  const draw = () => {
    const maps = groups[looks.group];
    const rows = maps.map(({ weights }) => weights.map(FIRST[looks.first].of));
    const most = looks.first === "masked" ? Math.max(1, ...rows.flat(2)) : 1000;
    box.style.setProperty("--tokens", maps[0].tokens.length);
    box.replaceChildren(...maps.map((map, i) => attentionMap(map, rows[i], most, heat)));
    legend.replaceChildren("Rows are queries, columns keys; weight: 0 ", ramp(heat), ` ${most / 1000}`);
  };
  const choose = (label, key, options) => el("select", { "aria-label": label, on: { change: (e) => { looks[key] = e.target.value; draw(); } } },
    ...options.map(([value, text]) => el("option", { value, text, selected: `${value}` === `${looks[key]}` })));
  if (!(looks.group in groups)) looks.group = 0;
  const which = choose("prompt", "group", groups.map(([first], i) => [i, first.title]));
  which.className = "llx-which";
  const first = choose("first token", "first", Object.entries(FIRST).map(([value, { text }]) => [value, text]));
  draw();
  return el("section", {}, el("h4", { text: `Where ${name} attends` }), groups.length > 1 ? which : null,
    el("label", { class: "llx-first", title: "many heads put much of their attention on the first token, whatever the text" },
      "first token ", first), legend, box);
}
