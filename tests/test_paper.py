"""Figures at a paper's width: true size, fonts that can be read and are embedded, labels that leave each other alone."""

import re
import sys
import zlib

import numpy as np
import plotly.graph_objects as go
import pytest

from lofit_lens import plots
from lofit_lens.analysis.overlap import overlap
from lofit_lens.errors import InputError
from lofit_lens.plots import for_paper, save_figure, saving, to_matplotlib
from lofit_lens.plots.paper import PAPERS
from tests.browser import Browser, find_chrome
from tests.figure_kinds import grid, kinds, scores

LOOKS = {
    "neurips column": {"paper": "neurips", "width": "column"}, "neurips text": {"paper": "neurips"},
    "icml": {"paper": "icml", "title": False}, "acl across": {"paper": "acl", "width": "text", "transpose": True},
}  # fmt: skip
# Every text of a drawing with its box and its font, and each line of a text of several on its own.
PAGE = "(() => { const r = document.querySelector('svg').getBoundingClientRect(); return [r.width, r.height]; })()"
# Width and height of the first panel as drawn.
PANEL = "(c => ['width', 'height'].map(n => parseFloat(c.getAttribute(n))))(document.querySelector('.plotclip rect'))"
TEXTS = """[...document.querySelectorAll('text')].flatMap((t, whole) => {
  const lines = [...t.querySelectorAll('tspan.line')], scale = document.querySelector('svg').getScreenCTM().a;
  return (lines.length ? lines : [t]).filter(e => e.textContent.trim()).map(e => { const r = e.getBoundingClientRect();
    return {text: e.textContent, size: parseFloat(getComputedStyle(e).fontSize) * scale, whole, left: r.left, right: r.right,
            top: r.top, bottom: r.bottom}; }); })"""


@pytest.fixture(scope="module")
def figures():
    return kinds()


@pytest.fixture(scope="module")
def made(figures):
    """(name, look) -> the figure at a paper's width: one that is narrow, and one that is mirrored."""
    return {
        (n, look): for_paper(fig, **LOOKS[look])
        for n, fig in figures.items()
        for look in ("neurips column", "acl across")
    }


def points(fig):
    return fig.layout.width * 0.75, fig.layout.height * 0.75


def panel(fig):
    """Width and height of the first panel as the layout has it."""
    margin, (x0, x1), (y0, y1) = fig.layout.margin, fig.layout.xaxis.domain, fig.layout.yaxis.domain
    return [(x1 - x0) * (fig.layout.width - margin.l - margin.r), (y1 - y0) * (fig.layout.height - margin.t - margin.b)]


# ------------------------------------------------------------------------------------------------ without Chrome


def test_width_is_the_papers(figures, made):
    """Every kind of figure has the width that was asked for, to a hundredth of a point."""
    wrong = [at for at, fig in made.items() if abs(points(fig)[0] - _wanted(LOOKS[at[1]])) > 0.01]
    assert wrong == []
    assert points(for_paper(figures["layers"], width=300))[0] == pytest.approx(300)


def _wanted(options):
    widths = PAPERS[options["paper"]]
    return widths[options.get("width", next(iter(widths)))]


def fonts(fig):
    """Sizes in points that the figure's own settings name: titles, ticks, legend, small line, cells."""
    found = {}

    def walk(part, path):
        if isinstance(part, dict):
            for key, value in part.items():
                if key == "size" and "font" in path[-1]:
                    found[".".join(path)] = value * 0.75
                walk(value, (*path, str(key)))
        elif isinstance(part, list | tuple) and part and isinstance(part[0], dict):
            for i, value in enumerate(part):
                walk(value, (*path, str(i)))

    spec = fig.to_plotly_json()
    walk({"layout": {k: v for k, v in spec["layout"].items() if k != "template"}, "data": spec["data"]}, ("",))
    return found


def test_no_font_below_six_points_and_a_title_no_smaller_than_an_axis_title(figures, made):
    """On paper and on the screen; also where the smallest font is asked for."""
    smallest = for_paper(figures["k_sweep"], "icml", font_size=6)
    small = {at: sizes for at, fig in made.items() if min((sizes := fonts(fig)).values()) < 5.999}
    assert small == {}
    assert min(fonts(smallest).values()) >= 5.999
    for fig in (*figures.values(), *made.values(), smallest):
        sizes = fonts(fig)
        axes = [s for path, s in sizes.items() if re.search(r"axis\d*\.title", path)]
        assert sizes[".layout.title.font"] >= max(axes)


def test_font_size_is_that_of_axis_titles(figures):
    fig = for_paper(figures["k_sweep"], "neurips", font_size=10)
    assert fig.layout.xaxis.title.font.size * 0.75 == pytest.approx(10, abs=0.01)
    assert fig.layout.xaxis.tickfont.size < fig.layout.xaxis.title.font.size


def test_a_map_shows_numbers_or_their_colors(figures, made):
    """Where the numbers have no room, the color bar stays; where only the bar is in their way, it goes."""
    for (name, look), fig in made.items():
        if not name.startswith("overlap") and name != "transfer":
            continue
        written = any(c.isdigit() for row in fig.data[0].text for text in row for c in text.removeprefix("K="))
        assert written or fig.data[0].showscale is not False, (name, look)
    many = {f"set {i}": scores((6, 16), i).top(3) for i in range(15)}
    tight = for_paper(plots.overlap_heatmap(overlap(many), "shared"), "neurips", width="column").data[0]
    assert not any(c.isdigit() for row in tight.text for text in row for c in text)
    assert tight.showscale is not False


def test_error_bars_and_bands_lie_inside_their_axes(figures):
    """With a fixed range, none is cut off."""
    cut = []
    for name, fig in figures.items():
        for t in fig.data:
            for letter in "xy":
                axis = fig.layout[(t[f"{letter}axis"] or letter).replace(letter, f"{letter}axis", 1)]
                if axis.range is None or axis.type == "log" or t.type == "heatmap" or isinstance(t[letter][0], str):
                    continue
                at, error = np.array(t[letter], dtype=float), t[f"error_{letter}"] if t.type != "heatmap" else None
                more, less = (np.array(error[k] if error[k] is not None else 0.0) for k in ("array", "arrayminus"))
                low, high = sorted(axis.range)
                if np.nanmax(at + more) > high or np.nanmin(at - less) < low:
                    cut.append((name, t.name, letter))
    assert cut == []


def test_every_named_row_of_a_panel_has_its_name(figures, made):
    """The tokens of a head, however narrow the figure is and however many panels are stacked."""
    wide, narrow = figures["tokens"], made["tokens", "neurips column"]
    assert [len(a.ticktext) for a in narrow.select_yaxes()] == [len(a.ticktext) for a in wide.select_yaxes()]


def test_title_and_note_can_be_left_to_the_caption(figures):
    """The figure gets lower; the original keeps both."""
    fig = figures["k_sweep"]
    full, bare = for_paper(fig, "icml"), for_paper(fig, "icml", title=False, note=False)
    assert full.layout.title.text
    assert bare.layout.title.text == ""
    assert [a.name for a in bare.layout.annotations] == []
    assert bare.layout.height < full.layout.height - 20
    assert fig.layout.title.text


def test_a_title_of_ones_own_stays():
    fig = grid((6, 16)).update_layout(title="My own title")
    assert for_paper(fig, "acl").layout.title.text == "My own title"


def test_paper_of_paper_is_the_same(figures):
    """A figure that was made for one paper can be made for another, or put back on the screen."""
    for name in ("layers", "methods", "agreement"):
        once = for_paper(figures[name], "icml")
        again = for_paper(for_paper(figures[name], "neurips"), "icml")
        assert points(again) == pytest.approx(points(once), abs=3), name


def test_transposed_grid_has_layers_across():
    """z, marks, hover and titles are mirrored; twice is the figure itself."""
    fig = grid((30, 9))
    across = for_paper(fig, transpose=True)
    assert np.array(across.data[0].z).shape == (9, 30)
    assert np.array_equal(np.array(across.data[0].z), np.array(fig.data[0].z).T)
    marks = [(list(t.x), list(t.y)) for t in fig.data if t.name == "chosen"]
    assert [(list(t.y), list(t.x)) for t in across.data if t.name == "chosen"] == marks
    assert across.data[0].hovertemplate.startswith("L%{x}H%{y}")
    assert across.layout.xaxis3.title.text == "layer"
    assert across.layout.yaxis.title.text == "head"
    tops = [across.layout[f"yaxis{i}"].domain[1] for i in ("", 2, 3)]
    assert tops == sorted(tops, reverse=True), "panels stand under each other"
    assert len({across.layout[f"xaxis{i}"].domain for i in ("", 2, 3)}) == 1
    back = for_paper(across, transpose=True)
    assert np.array_equal(np.array(back.data[0].z), np.array(fig.data[0].z))
    assert back.layout.xaxis.title.text == "head"


def test_transposed_bars_and_curves(figures):
    """Bars lie, error bars turn, the even spread stands upright, and the triangle of the mean points at its layer."""
    bars = for_paper(figures["layers"], transpose=True)
    assert {t.orientation for t in bars.data} == {"h"}
    assert list(bars.data[0].x) == list(figures["layers"].data[0].y)
    assert bars.layout.shapes[0].x0 == bars.layout.shapes[0].x1 == figures["layers"].layout.shapes[0].y0
    mean = next(a for a in bars.layout.annotations if a.text == "◀")
    assert (mean.xref, mean.yref) == ("x domain", "y")
    assert "◀ mean layer" in bars.layout.annotations[-1].text
    loss = for_paper(figures["leave_one_out"], transpose=True)
    assert loss.layout.yaxis.range[0] > loss.layout.yaxis.range[1], "the first head on top"
    overlap = for_paper(figures["overlap"], transpose=True)
    assert overlap.layout.yaxis.autorange == "reversed"
    assert overlap.layout.xaxis.autorange is True
    methods = for_paper(figures["methods"], transpose=True)
    assert methods.layout.xaxis.autorange is True, "the first method on the left"
    assert methods.data[0].error_y.array is not None
    assert methods.data[0].error_x.array is None
    k = for_paper(figures["k_sweep"], transpose=True)
    assert k.layout.yaxis.type == "log"
    assert k.layout.xaxis.tickformat == "~%"


def test_ticks_run_into_nothing(figures):
    """At a column's width some values of K are left out, the last one never."""
    wide, column = figures["k_sweep"], for_paper(figures["k_sweep"], "neurips", width="column")
    assert len(column.layout.xaxis.ticktext) < len(wide.layout.xaxis.ticktext)
    assert column.layout.xaxis.ticktext[-1] == wide.layout.xaxis.ticktext[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paper": "nips"}, r"unknown paper 'nips'"),
        ({"width": "text"}, "which only a paper has"),
        ({"paper": "icml", "width": "page"}, "unknown width 'page'"),
        ({"width": 40}, "from 120 to 2000"),
        ({"font_size": 5}, "from 6 to 24"),
    ],
)
def test_wrong_papers_are_refused(figures, options, message):
    with pytest.raises(InputError, match=message):
        for_paper(figures["layers"], **options)
    with pytest.raises(InputError, match="not made by lofit_lens"):
        for_paper(go.Figure(go.Scatter(x=[1], y=[2])), "icml")


# --------------------------------------------------------------------------------------------------- matplotlib


def test_without_matplotlib_it_is_said_what_to_install(figures, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"pip install 'lofit-lens\[matplotlib\]'"):
        to_matplotlib(figures["layers"])


def test_matplotlib_draws_the_same_numbers(figures):
    """Size, values, names in their order, percent and legend of the main figures; every kind can be drawn."""
    pytest.importorskip("matplotlib")
    layers, methods, k, transfer = (
        to_matplotlib(for_paper(figures[n], "icml")) for n in ("layers", "methods", "k_sweep", "transfer")
    )
    assert layers.get_size_inches()[0] * 72 == pytest.approx(234)
    heights = [b.get_height() for b in layers.axes[0].patches]
    assert heights == pytest.approx(list(figures["layers"].data[0].y))
    ticks = methods.axes[0].get_yticklabels()
    names = dict(zip(map(round, methods.axes[0].get_yticks()), [t.get_text() for t in ticks], strict=True))
    dots = {names[round(y)]: x for x, y in methods.axes[0].collections[-1].get_offsets().tolist()}
    source = figures["methods"].data[0]
    low, high = methods.axes[0].get_ylim()
    assert (names[0], low > high) == (source.y[0], True), "the first method stands on top"
    assert dots == pytest.approx(dict(zip(source.y, source.x, strict=True))), "each dot stands at its method"
    assert [t.get_text() for t in k.legends[0].get_texts()] == [
        t.name for t in figures["k_sweep"].data if t.showlegend is not False
    ]
    assert k.axes[0].get_xscale() == "log"
    cells = {t.get_text() for t in transfer.axes[0].texts}
    assert {str(text) for row in figures["transfer"].data[0].text for text in row} <= cells
    sets = to_matplotlib(figures["localisation"]).axes[0].collections
    dots = [c for c in sets if type(c).__name__ == "PathCollection"]
    places = sorted(round(x) for c in dots for x, _ in c.get_offsets().tolist())
    assert places == list(range(11)), "chosen first, then each random set at its own name"
    for name, fig in figures.items():
        assert to_matplotlib(fig).axes, name


# --------------------------------------------------------------------------------------------------- with Chrome


def texts_of_pdf(pdf):
    """Sizes in points of every text that a PDF of Chrome shows: its font size times the matrices around it."""
    streams = [
        zlib.decompress(m) for m in re.findall(rb"/Filter /FlateDecode[^>]*>> stream\n(.*?)\nendstream", pdf, re.S)
    ]
    pages = [s.decode("latin1") for s in streams if b" Tf" in s]
    sizes = []
    for page in pages:
        stack, now, font, text = [], 1.0, 0.0, 1.0
        for line in page.splitlines():
            words = line.split()
            if not words:
                continue
            match words[-1]:
                case "q":
                    stack.append(now)
                case "Q":
                    now = stack.pop()
                case "cm":
                    now *= _stretch(words[:4])
                case "Tf":
                    font = float(words[-2])
                case "Tm":
                    text = _stretch(words[:4])
                case "Tj" | "TJ":
                    sizes.append(font * now * text)
    return sizes


def _stretch(words):
    a, b, c, d = map(float, words)
    return abs(a * d - b * c) ** 0.5


@pytest.fixture(scope="module")
def chrome():
    path = find_chrome()
    if path is None:
        pytest.skip("no Chrome or Chromium on this machine")
    return path


@pytest.mark.browser
@pytest.mark.parametrize(
    "look", ["neurips column", *(pytest.param(name, marks=pytest.mark.slow) for name in [*LOOKS][1:])]
)
def test_labels_leave_each_other_alone(figures, chrome, tmp_path, look):
    """In the SVG, as Chrome draws it: nothing outside the page, no text over another, none under 6 points."""
    faults = []
    with saving.many_figures(["svg"]), Browser(chrome) as browser:
        for name, fig in figures.items():
            made = for_paper(fig, **LOOKS[look])
            save_figure(made, tmp_path / "figure.svg")
            browser.open(tmp_path / "figure.svg", width=1400, height=2000)
            width, height = browser.js(PAGE)
            assert (width * 0.75, height * 0.75) == pytest.approx(points(made), abs=0.5), name
            # Plotly shrinks panels where labels or the legend need more room than the layout gave them.
            drawn = browser.js(PANEL)
            if max(abs(a - b) for a, b in zip(drawn, panel(made), strict=True)) > 5:
                faults.append((name, "panel", drawn, panel(made)))
            found = browser.js(TEXTS)
            assert len(found) > 5, name
            for i, a in enumerate(found):
                if a["left"] < -1 or a["top"] < -1 or a["right"] > width + 1 or a["bottom"] > height + 1:
                    faults.append((name, "outside", a["text"]))
                if a["size"] * 0.75 < 5.99:
                    faults.append((name, a["size"] * 0.75, a["text"]))
                for b in found[i + 1 :]:
                    across = min(a["right"], b["right"]) - max(a["left"], b["left"])
                    down = min(a["bottom"], b["bottom"]) - max(a["top"], b["top"])
                    if across > 1 and down > 2.5 and a["whole"] != b["whole"]:
                        faults.append((name, a["text"], b["text"]))
    assert faults == [], "\n".join(map(str, faults))


PLACES = """(() => { const box = e => document.querySelector(e).getBoundingClientRect(), lines = e => [
  ...document.querySelectorAll(e)].map(t => t.getBoundingClientRect());
  const scale = document.querySelector('svg').getScreenCTM().a, title = box('.gtitle'), note = box('.annotation-text');
  return {title: title.top / scale, below: title.bottom / scale, left: title.left / scale, note: note.top / scale,
          note_left: note.left / scale, axis: Math.max(...lines('.infolayer text[class^=x]').map(r => r.bottom)) / scale,
          legend: Math.min(...lines('.legendtext').map(r => r.top)) / scale}; })()"""


@pytest.mark.browser
def test_titles_notes_and_legends_have_their_own_room(chrome, tmp_path):
    """A title of one, two or three lines starts at one height and left edge; note and legend stand below what is over them."""
    places = []
    with saving.many_figures(["svg"]), Browser(chrome) as browser:
        for words in (2, 9, 15):
            fig = grid((6, 16)).update_layout(title=" ".join(["heading"] * words))
            fig.layout.annotations = [a for a in fig.layout.annotations if a.name == "note"]  # the only annotation
            save_figure(fig, tmp_path / "figure.svg", paper="neurips", width="column")
            browser.open(tmp_path / "figure.svg", width=1400, height=2000)
            places.append(browser.js(PLACES))
    assert [p["title"] for p in places] == pytest.approx([places[0]["title"]] * 3, abs=1)
    for p in places:
        assert p["note"] >= p["below"] - 1
        assert p["note_left"] == pytest.approx(p["left"], abs=1)
        assert p["legend"] >= p["axis"] + 4


@pytest.mark.browser
def test_pdf_has_the_size_fonts_and_text_of_the_paper(figures, chrome, tmp_path):
    """Page within a point, every text at 6 points and more, all fonts inside the file, text as text."""
    with saving.many_figures(["svg"]):
        for name in ("head_grid 32x32", "layers", "k_sweep", "removal_bars"):
            for look in ("neurips column", "icml"):
                made = for_paper(figures[name], **LOOKS[look])
                pdf = save_figure(made, tmp_path / "figure.pdf")[0].read_bytes()
                boxes = re.findall(rb"/MediaBox \[0 0 ([0-9.]+) ([0-9.]+)\]", pdf)
                assert len(boxes) == 1, "one page"
                assert [float(x) for x in boxes[0]] == pytest.approx(points(made), abs=1), (name, look)
                sizes = texts_of_pdf(pdf)
                assert len(sizes) > 5
                assert min(sizes) >= 5.99, (name, look, sizes)
                wanted = set(fonts(made).values())
                strange = {s for s in sizes if min(abs(s - w) for w in wanted) > 0.02}
                assert not strange, (
                    f"{name}, {look}: neither smaller nor larger than the figure says, but for {strange}"
                )
                assert len(re.findall(rb"/FontFile2 ", pdf)) == len(re.findall(rb"/Type /FontDescriptor", pdf)) > 0


@pytest.mark.browser
def test_save_figure_takes_the_paper(chrome, tmp_path):
    """The options of `for_paper` on `save_figure`: one file each, SVG in points, PNG of 300 dots an inch and more."""
    from PIL import Image

    fig = grid((30, 9), "rank")
    files = save_figure(fig, tmp_path / "grid", formats=["png", "svg"], paper="icml", title=False, transpose=True)
    assert [f.name for f in files] == ["grid.png", "grid.svg", "grid.json"]
    assert 'width="234pt"' in files[1].read_text()[:400]
    assert Image.open(files[0]).width / (234 / 72) >= 300
    assert fig.layout.width > 312, "the figure itself stays"
