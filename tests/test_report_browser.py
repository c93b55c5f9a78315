"""A saved page opened in headless Chrome: it stays silent, asks for nothing, and does what the reader asks."""

import json

import pytest

from tests import report_data

choreographer = pytest.importorskip(
    "choreographer", reason="finding Chrome needs choreographer (it comes with kaleido)"
)

from lofit_lens.explorer import Explorer  # noqa: E402
from lofit_lens.explorer.source import read_source  # noqa: E402
from lofit_lens.models import visible  # noqa: E402
from tests.browser import Browser, find_chrome  # noqa: E402

pytestmark = pytest.mark.browser

FOCUS = "(e => e.dataset.head || e.getAttribute('aria-label') || e.tagName)(document.activeElement)"
LEFT, RIGHT = ('.llx-cells[data-side="left"]', '.llx-cells[data-side="right"]')
L1H1 = f'{LEFT} [data-head="L1H1"]'
OPEN = "document.querySelector('.llx-head-name')?.textContent ?? null"


@pytest.fixture(scope="module")
def browser():
    chrome = find_chrome()
    if chrome is None:
        pytest.skip("no Chrome or Chromium on this machine; set BROWSER_PATH to one")
    with Browser(chrome) as b:
        yield b


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    sizes = {"30x9": (30, 9), "32x32": (32, 32), "40x40": (40, 40)}
    pages = {n: getattr(report_data, n)() for n in ("full", "large")}
    pages["single"] = Explorer(read_source({"LoFiT": report_data.scores(report_data.TRUTH)}), k=3)
    pages |= {n: report_data.sized(*size) for n, size in sizes.items()}
    return {n: report_data.saved(page, folder, n) for n, page in pages.items()}


@pytest.fixture
def shown(browser, files):
    """name -> that page, opened. When the test ends, the page must have been silent and asked for its own file only."""
    opened = []

    def show(name="full", **window):
        browser.open(files[name], **window)
        browser.wait("document.querySelector('.llx').dataset.version")
        opened.append(files[name].resolve().as_uri())
        return browser

    yield show
    assert browser.said == []
    assert browser.asked == opened[-1:]


def text(b, selector):
    return b.js(f"document.querySelector({selector!r}).textContent")


def marks(b, side):
    """Mark -> heads that carry it in one grid."""
    found = b.js(f"[...document.querySelectorAll('{side} button')].map(e => [e.dataset.head, e.dataset.mark])")
    return {mark: {h for h, m in found if m == mark} for mark in ("own", "shared")}


def place(b, selector):
    return b.js(f"document.querySelector({selector!r}).getBoundingClientRect().toJSON()")


def numbers(b):
    return b.js("[...document.querySelectorAll('.llx-overlap dd')].map(e => e.textContent)")


def test_moving_k_changes_marks_and_numbers(shown):
    """Shared heads for K = 1, 2, 3, 4 are 0, 2, 2, 3 (counted in report_data). At K = 2 of 12 heads: expected 4/12, p = 1/66."""
    b = shown()
    assert b.js("window.pwned === undefined")
    b.choose(".llx-set[data-side=right]", "edits, A-norm")
    seen = {}
    for k in (1, 2, 3, 4, 12):
        b.choose(".llx-k-number", str(k))
        seen[k] = numbers(b)[:5]
    assert seen == {
        1: ["0 of 1", "0.08", "1.000", "1.000", "0.00"],
        2: ["2 of 2", "0.33", "0.015", "0.062", "1.00"],  # within layers 1/4 * 1/4
        3: ["2 of 3", "0.75", "0.127", "0.156", "0.50"],  # (C(3,2) 9 + 1) / 220; (3 * 3 + 1) / 64
        4: ["3 of 4", "1.33", "0.067", "0.062", "0.60"],  # (C(4,3) 8 + 1) / 495; 1/2 * 1/4 * 1/2
        12: ["12 of 12", "12.00", "1.000", "1.000", "1.00"],
    }
    b.js("document.querySelector('.llx-k').focus()")
    b.press("Home", "ArrowRight", "ArrowRight", "ArrowRight")
    assert numbers(b) == [*seen[4], "0.8, 1.3"]  # mean layers 3/4 and 5/4
    # truth: L0H0 L1H1 L2H2 L0H3; edits: L1H1 L0H0 L2H3 L2H2
    assert marks(b, LEFT) == {"own": {"L0H3"}, "shared": {"L0H0", "L1H1", "L2H2"}}
    assert marks(b, RIGHT) == {"own": {"L2H3"}, "shared": {"L0H0", "L1H1", "L2H2"}}
    assert text(b, ".llx-plots svg text:last-of-type") == "heads in both sets"
    assert b.js("document.querySelector('.llx-plots svg').getAttribute('aria-label')").endswith("at K = 4: 3")
    bars = b.js("[...document.querySelectorAll('.llx-plots rect title')].map(e => e.textContent)")
    assert bars[:3] == ["layer 0: 2 heads, 50.0 %", "layer 1: 1 heads, 25.0 %", "layer 2: 1 heads, 25.0 %"]
    b.choose(".llx-k-number", "999")
    assert numbers(b)[0] == "12 of 12"


def test_choosing_a_set(shown):
    """Names, labels, colors and the largest K follow; a list without scores is colored by rank, all of them if asked for."""
    b = shown()
    color = "getComputedStyle(document.querySelector('{} [data-head={}]')).backgroundColor"
    best = b.js(color.format(RIGHT, "L1H1"))
    label = f"document.querySelector('{RIGHT} [data-head=L1H1]').getAttribute('aria-label')"
    assert b.js(label) == "L1H1: rank 1 of 12, probe accuracy 1.2, in the top K of both sets"
    b.choose(".llx-k-number", "9")
    b.choose(".llx-set[data-side=right]", f"edits, {report_data.HOSTILE}")
    assert b.js("window.pwned === undefined")
    assert "<b>bold</b>" in b.js("document.querySelectorAll('.llx-grid figcaption')[1].textContent")
    assert b.js("document.querySelector('.llx-k-number').value") == "5"
    assert "of 5" in text(b, ".llx-ks")
    assert b.js(color.format(RIGHT, "L1H1")) == best, "rank 1 and the best score both take the end of the scale"
    assert b.js(color.format(RIGHT, "L1H2")) == "rgb(223, 227, 232)", (
        "a head outside the list has no color of the scale"
    )
    before = b.js(color.format(LEFT, "L2H2"))
    b.choose(".llx-keys select", "rank")
    assert b.js(color.format(LEFT, "L2H2")) != before
    b.choose(".llx-set[data-side=right]", "truth, A-norm")
    assert numbers(b)[2:4] == ["\u2013", "\u2013"], "a set and itself: no chance"


def test_opening_a_head(shown):
    """Its place in every set, what was read of its edit and its pattern stand beside the grids; Escape and the button close."""
    b = shown()
    b.click(L1H1)
    assert b.js(OPEN) == "L1H1"
    rows = b.js(
        "[...document.querySelectorAll('.llx-places tbody tr')].map(r => [...r.children].map(c => c.textContent))"
    )
    assert rows[:3] == [
        ["truth, A-norm", "1.1", "2 of 12, in the top 2"], ["truth, probes", "1.2", "1 of 12, in the top 2"],
        ["edits, A-norm", "1.2", "1 of 12"],
    ]  # fmt: skip
    assert b.js("[...document.querySelectorAll('.llx-reading dl div')].map(e => e.textContent)") == [
        "norm of the offset v0.75"
    ]
    tokens = b.js("[...document.querySelectorAll('.llx-tokens li')].map(e => e.textContent)")
    assert tokens == ["\u2423Paris+2.50", "\u21b5+1.25", f"{visible(report_data.HOSTILE)}-1.50"]
    assert b.js("document.querySelectorAll('.llx-attention td[title]').length") == 6
    assert b.js("document.querySelectorAll('.llx-which option').length") == 2
    panel, cell = place(b, ".llx-panel"), place(b, L1H1)
    assert panel["left"] > cell["right"]
    assert panel["top"] < cell["bottom"], "it begins no lower than the head"
    b.choose(".llx-k-number", "1")
    assert text(b, ".llx-places tbody td:last-child") == "2 of 12, not in the top 1"
    assert text(b, ".llx-marked") == "marked by you: L1H1 "
    b.click(L1H1)
    assert (b.js(OPEN), text(b, ".llx-marked")) == ("L1H1", "marked by you")
    b.press("Escape")
    assert b.js(OPEN) is None
    b.click(f'{RIGHT} [data-head="L0H2"]')
    assert "L0H2 is outside LoFiT on truth, which edits L1H1." in text(b, ".llx-panel")
    b.click(".llx-head button")
    assert b.js(OPEN) is None
    assert b.js("!document.querySelector('.llx-prompt').offsetParent"), "nothing can be typed where no model is"


def test_everything_works_from_the_keyboard(shown):
    """Tab reaches every control and one head a grid; arrows move; Enter and Space open, Escape closes, the focus stays."""
    b = shown()
    reached = []
    while len(reached) < 30 and reached[-1:] != ["BODY"]:
        b.press("Tab")
        reached.append(b.js(FOCUS))
    wanted = ["left set", "right set", "K, left", "K, left, as a number", "L0H0", "L0H0", "color of a head"]
    assert [r for r in reached if r in wanted] == wanted
    b.js(f"document.querySelector('{LEFT} [data-head=L0H0]').focus()")
    seen = []
    for key in ["Up", "Right", "Up", "Up", "End", "Right", "Down", "Home", "Left", "Right"]:
        b.press(key if key in ("End", "Home") else f"Arrow{key}")
        seen.append(b.js(FOCUS))
    assert seen == ["L1H0", "L1H1", "L2H1", "L2H1", "L2H3", "L2H3", "L1H3", "L1H0", "L1H0", "L1H1"]
    assert b.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert "promotes \u2423Paris \u21b5" in text(b, ".llx-readout")
    for key in ("Enter", " "):
        b.press(key)
        assert b.js(OPEN) == "L1H1"
        b.press("Escape")
        assert (b.js(OPEN), b.js(FOCUS)) == (None, "L1H1")


def test_pointing_at_a_head(shown):
    """Its place on both sides and its tokens beside it, and the same head outlined in the other grid."""
    b = shown()
    b.hover(L1H1)
    b.wait("document.querySelectorAll('.llx-twin').length === 2")
    said, cell = place(b, ".llx-readout"), place(b, L1H1)
    assert min(abs(said["top"] - cell["bottom"]), abs(said["bottom"] - cell["top"])) < 20
    said = text(b, ".llx-readout")
    for words in (
        "L1H1",
        "left rank 2 of 12, A-norm 1.1",
        "right rank 1 of 12, probe accuracy 1.2",
        "promotes \u2423Paris",
    ):
        assert words in said
    b.hover("h1")
    b.wait("!document.querySelector('.llx-twin')")
    assert b.js("document.querySelector('.llx-readout').hidden")


def test_k_stays_in_view(shown):
    """Also where the grids are longer than the window."""
    b = shown("large", height=500)
    b.js(f"document.querySelector('{LEFT} [data-head=L0H0]').scrollIntoView()")
    assert b.js("scrollY") > 100
    assert 0 <= place(b, ".llx-k")["top"] < 60
    b.click(f'{LEFT} [data-head="L39H39"]')
    assert b.js(OPEN) == "L39H39"
    assert 0 < place(b, ".llx-head-name")["top"] < 400


@pytest.mark.parametrize("name", ["30x9", "32x32", "40x40"])
def test_one_screen(shown, name):
    """1440 x 900: both grids, K, overlap and the open head are in sight at once and apart; the longer axis lies across."""
    b = shown(name, width=1440, height=900)
    b.click(f'{LEFT} [data-head="L29H8"]')
    b.js("scrollTo(0, 0)")
    assert b.js("document.documentElement.scrollWidth") <= 1440
    boxes = [place(b, s) for s in (".llx-k", ".llx-overlap", LEFT, RIGHT, ".llx-panel")]
    for box in boxes:
        assert 0 <= box["top"] < box["bottom"] <= 900
    k, overlap, left, right, panel = boxes
    assert max(k["bottom"], overlap["bottom"]) <= min(left["top"], right["top"])
    assert max(left["right"], right["right"]) <= panel["left"]
    assert left["width"] >= left["height"]
    assert place(b, f"{LEFT} [data-head]")["width"] > 8
    round_ = b.js("(s => [s.width, s.height])(getComputedStyle(document.querySelector('[data-mark=own]'), '::after'))")
    assert round_[0] == round_[1]


@pytest.mark.parametrize("name", ["30x9", "40x40"])
def test_a_click_and_k_answer_at_once(shown, name):
    """Within 100 ms, the frame with the answer included; the fastest of nine, since the machine may be busy elsewhere."""
    b = shown(name, width=1440, height=900)
    measure = (
        "new Promise((done) => {{ const start = performance.now(); {};"
        " requestAnimationFrame(() => setTimeout(() => done(performance.now() - start), 0)); }})"
    )
    click = "document.querySelector('{} [data-head=L{}H{}]').click()"
    clicks = [b.js(measure.format(click.format(LEFT.replace('"', ""), 3 * i, i % 9))) for i in range(9)]
    assert b.js(OPEN) == "L24H8"
    move = "(e => {{ e.value = {}; e.dispatchEvent(new Event('change')); }})(document.querySelector('.llx-k-number'))"
    moves = [b.js(measure.format(move.format(5 + 20 * i))) for i in range(9)]
    assert numbers(b)[0].split()[2] in ("164", "165")  # of many heads K moves in steps
    assert min(clicks) < 100
    assert min(moves) < 100


def test_a_single_set_is_not_compared_with_itself(shown):
    """One grid, one chooser, no overlap; K, marks and the open head work as with two."""
    b = shown("single")
    assert b.js("[...document.querySelectorAll('.llx-cells, .llx-set, .llx-k')].length") == 3
    assert numbers(b) == ["1.0"], "the mean layer of L0H0 L1H1 L2H2"
    assert marks(b, LEFT) == {"own": {"L0H0", "L1H1", "L2H2"}, "shared": set()}
    b.choose(".llx-k-number", "4")
    assert numbers(b) == ["0.8"]
    b.click(L1H1)
    assert (b.js(OPEN), text(b, ".llx-places tbody")) == ("L1H1", "LoFiT1.12 of 12, in the top 4")
    seen = b.js("document.querySelector('.llx').innerText")
    assert not [word for word in ("left", "right", "both", "Jaccard", "chance") if word in seen]


def test_eight_sets_and_tokens_stand_apart(shown):
    """A head's place in eight sets is read without scrolling; labels of tokens do not run into the next row."""
    b = shown("40x40", width=1440, height=900)
    b.click(f'{LEFT} [data-head="L29H8"]')
    assert b.js("(e => e.scrollHeight <= e.clientHeight)(document.querySelector('.llx-places'))")
    b = shown()
    b.click(L1H1)
    size = "parseFloat(getComputedStyle(document.querySelector('.llx-attention tbody {}')).{})"
    assert b.js(size.format("th", "fontSize")) < b.js(size.format("td", "height"))


def test_grids_side_by_side_are_level(shown):
    """Also at widths where one caption takes two lines and the other one."""
    b = shown()
    b.choose(".llx-set[data-side=right]", "edits, A-norm")
    b.choose(".llx-set[data-side=left]", "truth, probes")
    for width in range(900, 1440, 60):
        b.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        boxes = [place(b, side) for side in (LEFT, RIGHT)]
        assert abs(boxes[0]["top"] - boxes[1]["top"]) < 1, width


def test_the_widget_runs_wherever_anywidget_does(browser, tmp_path):
    """Imported as a module, in a page without Jupyter, with a model that has no more than anywidget promises."""
    view = report_data.full().widget
    given = {"esm": view._esm, "values": {"data": view.data, "state": view.state, "said": view.said}}
    (tmp_path / "bare.html").write_text('<!doctype html><link rel="icon" href="data:,"><body><div id="cell"></div>')
    browser.open(tmp_path / "bare.html")
    browser.js(f"""(async () => {{
      for (const name of ["require", "define", "Jupyter", "IPython", "jupyterapp", "google"])
        Object.defineProperty(window, name, {{ get() {{ throw new Error(`${{name}} was asked for`); }} }});
      const {{ esm, values }} = {json.dumps(given)}, heard = {{}};
      const known = {{
        get: (name) => values[name],
        set(name, value) {{
          values[name] = value;
          (heard[`change:${{name}}`] ?? []).forEach((act) => act());
        }},
        save_changes() {{ window.saves = (window.saves ?? 0) + 1; }},
        send() {{}},
        on(name, act) {{ (heard[name] ??= []).push(act); }},
        off(name) {{ delete heard[name]; }},
      }};
      const model = new Proxy(known, {{ get(of, name) {{
        if (!(name in of)) throw new Error(`the model has no ${{name}}`);
        return of[name];
      }} }});
      const file = new Blob([esm], {{ type: "text/javascript" }});
      const module = await import(URL.createObjectURL(file));
      window.end = module.default.render({{ model, el: document.querySelector("#cell") }});
      window.left = () => Object.keys(heard).length;
    }})()""")
    browser.click(L1H1)
    browser.choose(".llx-k-number", "3")
    assert browser.js(f"[{OPEN}, window.saves, (window.end(), window.left())]") == ["L1H1", 2, 0]
    assert browser.said == []
    assert all(url.startswith(("file:", "blob:", "data:")) for url in browser.asked)


def test_layers_lie_across_where_there_are_more_of_them(shown):
    """30 layers of 9 heads: right is the next layer, up the next head."""
    b = shown("30x9", width=1440, height=900)
    assert b.js("[...document.querySelectorAll('.llx-x')].map(e => e.textContent)") == ["layer", "layer"]
    b.js(f"document.querySelector('{LEFT} [data-head=L0H0]').focus()")
    seen = []
    for key in ["ArrowRight", "ArrowUp", "End", "ArrowRight", "ArrowDown", "ArrowDown", "Home"]:
        b.press(key)
        seen.append(b.js(FOCUS))
    assert seen == ["L1H0", "L1H1", "L29H1", "L29H1", "L29H0", "L29H0", "L0H0"]
    first, second = place(b, f"{LEFT} [data-head=L0H0]"), place(b, f"{LEFT} [data-head=L29H8]")
    assert first["left"] < second["left"]
    assert first["top"] > second["top"]


def test_attention_without_the_first_token(shown):
    """Masked: its column is not shown, the scale ends at the rest's largest. Left out: what is left of each row sums to 1."""
    b = shown()
    b.click(L1H1)
    cells = "[...document.querySelectorAll('.llx-attention td[title]')].map(e => e.title.split(': ')[1])"
    assert b.js(cells) == ["1", "0.25", "0.75", "0.2", "0.7", "0.1"]
    b.choose("[aria-label='first token']", "masked")
    assert b.js(cells) == ["not shown", "not shown", "0.75", "not shown", "0.7", "0.1"]
    assert text(b, ".llx-panel section p.llx-quiet:last-of-type").endswith(" 0.75")
    b.choose("[aria-label='first token']", "left")
    assert b.js(cells) == ["not shown", "not shown", "1", "not shown", "0.875", "0.125"]
    b.press("Escape")
    b.click(L1H1)
    assert b.js(cells)[0] == "not shown", "the switch stays from head to head"


def test_dark_and_light(browser, shown):
    """The page follows the reader's system; colors of data stay. Text and ground differ enough (WCAG: 4.5) in both."""
    heats = []
    for scheme in ("dark", "light"):
        browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        b = shown()
        b.click(L1H1)
        ground = luminance(b, "getComputedStyle(document.body).backgroundColor")
        assert (ground < 0.1) == (scheme == "dark")
        assert luminance(b, "getComputedStyle(document.querySelector('.llx')).backgroundColor") == ground
        for part in ("body", ".llx", ".llx-quiet", ".llx-k-number", ".llx-badge", ".llx-value", ".llx-axis"):
            ink = luminance(b, f"getComputedStyle(document.querySelector('{part}')).color")
            high, low = max(ink, ground), min(ink, ground)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, part)
        heats.append(b.js(f"document.querySelector('{LEFT} [data-head=L2H2]').style.backgroundColor"))
    assert heats[0] == heats[1]


def luminance(b, color):
    """Relative luminance (WCAG 2) of a CSS color that an expression gives."""
    parts = b.js(f"({color}).match(/[0-9.]+/g).slice(0, 3).map(x => x / 255)")
    r, g, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * blue


@pytest.mark.parametrize("name", ["full", "large", "30x9"])
def test_fits_a_phone(shown, name):
    """375 pixels wide: one column, nothing to scroll sideways, also with a head open among 40 x 40, which stays in sight."""
    b = shown(name, width=375, height=700, phone=True)
    assert b.js("document.documentElement.scrollWidth") <= 375
    lefts = b.js("[...document.querySelectorAll('.llx-grid')].map(e => e.getBoundingClientRect().left)")
    assert lefts[0] == lefts[1]
    b.click(L1H1)
    assert b.js("document.documentElement.scrollWidth") <= 375
    panel = place(b, ".llx-panel")
    assert 0 <= panel["left"] < panel["right"] <= 375
    assert panel["top"] < 600
    assert panel["bottom"] <= 700.5
    assert place(b, L1H1)["bottom"] <= panel["top"]
    boxes = "[...document.querySelectorAll('.llx-plots text')].map(e => e.getBoundingClientRect())"
    heights = b.js(f"{boxes}.map(r => Math.min(r.width, r.height))")
    assert min(h for h in heights if h > 7) >= 10, "axes are read without a lens"
