"""The report opened in headless Chrome: it stays silent, asks for nothing, and does what the reader asks."""

import numpy as np
import pytest
from scipy.stats import hypergeom

from lofit_lens.report import write_report
from tests import report_data

choreographer = pytest.importorskip(
    "choreographer", reason="finding Chrome needs choreographer (it comes with kaleido)"
)

from tests.browser import Browser, find_chrome  # noqa: E402

pytestmark = pytest.mark.browser

READY = "document.documentElement.dataset.ready && document.querySelector('#layer-plot .bars .point')"
COUNT = "document.getElementById('overlap-count').textContent"
FOCUS = "(document.activeElement.id || document.activeElement.dataset.head || document.activeElement.tagName)"
L1H1 = '[data-side="A"] button[data-head="L1H1"]'


@pytest.fixture(scope="module")
def browser():
    chrome = find_chrome()
    if chrome is None:
        pytest.skip("no Chrome or Chromium on this machine; set BROWSER_PATH to one")
    with Browser(chrome) as b:
        yield b


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return {n: write_report(getattr(report_data, n)(), folder / f"{n}.html") for n in ("least", "full", "large")}


@pytest.fixture
def shown(browser, files):
    """name -> that report, opened. When the test ends, the page must have been silent and asked for its own file only."""
    opened = []

    def show(name="full", **window):
        browser.open(files[name], **window)
        browser.wait(READY)
        opened.append(files[name].resolve().as_uri())
        return browser

    yield show
    assert browser.said == []
    assert browser.asked == opened[-1:]


def text(b, selector):
    return b.js(f"document.querySelector({selector!r}).textContent")


def marks(b, side):
    """Mark -> heads that carry it in one grid."""
    found = b.js(
        f"[...document.querySelectorAll('[data-side={side}] button')].map(e => [e.dataset.head, e.dataset.mark])"
    )
    return {mark: {h for h, m in found if m == mark} for mark in ("own", "shared")}


def set_k(b, k):
    b.js(f"(() => {{ const e = document.getElementById('k'); e.value = {k}; e.dispatchEvent(new Event('input')); }})()")


def test_opens_and_shows_every_part(shown):
    """Title, notes, tables and transfer stand there as text; what looks like HTML in them is not HTML."""
    b = shown()
    assert text(b, "#title") == "Heads of <b>tiny</b> & co"
    assert text(b, "#notes li") == report_data.HOSTILE
    assert b.js("window.pwned === undefined")
    assert "3 layers of 4 heads, revision abc123" in text(b, "#model-line")
    assert text(b, "#tables tbody tr") == "LoFiT81.2"
    cell = text(b, '[data-source="edits"][data-task="truth"]')
    assert cell == "90.0 %+0.720 [0.600, 0.800]p = 0.070"
    assert "n = 1,864" in text(b, "table.transfer thead")
    assert b.js("document.querySelectorAll('table.transfer td.none').length") == 1
    assert b.js("document.querySelectorAll('#overlap-plot .trace.scatter').length") == 4


def test_moving_k_changes_the_overlap(shown):
    """Shared heads for K = 1, 2, 3, 4 are 0, 2, 2, 3 (counted in report_data). At K = 2 of 12 heads: expected 4/12, p = 1/66."""
    b = shown()
    seen = {}
    for k in (1, 2, 3, 4, 12):
        set_k(b, k)
        seen[k] = [text(b, f"#overlap-{part}") for part in ("count", "expected", "p", "jaccard")]
    assert seen == {
        1: ["0", "0.08", "1.000", "0.000"],
        2: ["2", "0.33", "0.015", "1.000"],
        3: ["2", "0.75", "0.127", "0.500"],  # (C(3,2) 9 + 1) / 220
        4: ["3", "1.33", "0.067", "0.600"],  # (C(4,3) 8 + 1) / 495
        12: ["12", "12.00", "1.000", "1.000"],
    }
    set_k(b, 4)  # truth: L0H0 L1H1 L2H2 L0H3; edits: L1H1 L0H0 L2H3 L2H2
    assert marks(b, "A") == {"own": {"L0H3"}, "shared": {"L0H0", "L1H1", "L2H2"}}
    assert marks(b, "B") == {"own": {"L2H3"}, "shared": {"L0H0", "L1H1", "L2H2"}}
    assert [text(b, f"#mean-layer-{s}") for s in "ab"] == ["0.8", "1.3"]  # 3/4 and 5/4
    b.choose("#k-number", "3")
    assert b.js(COUNT) == "2"
    b.choose("#k-number", "999")
    assert b.js("document.getElementById('k').value") == "12"


def test_plots_follow_k(shown):
    """The bars are the layers' shares of the top K, the line stands at K."""
    b = shown()
    set_k(b, 5)
    b.wait("document.getElementById('layer-plot').data[0].customdata.join() === '2,2,1'")
    assert b.js("document.getElementById('layer-plot').data[1].y") == [40, 20, 40]
    assert b.js("document.getElementById('overlap-plot').layout.shapes[0].x0") == 5
    assert b.js("document.getElementById('overlap-plot').data[3].y")[:4] == [0, 2, 2, 3]
    low, high = (b.js(f"document.getElementById('overlap-plot').data[{i}].y") for i in (0, 1))
    ks = np.arange(1, 13)
    assert low == hypergeom.ppf(0.025, 12, ks, ks).tolist()
    assert high == hypergeom.ppf(0.975, 12, ks, ks).tolist()


def test_chance_agrees_with_scipy(shown):
    """Tail probability to ten digits, band to the head, up to 1,600 heads."""
    b = shown()
    cases = [(96, 8, 5), (1024, 32, 6), (448, 16, 8), (1600, 900, 507), (12, 12, 12), (10, 8, 6), (1024, 160, 83)]
    tails = b.js(f"{[list(c) for c in cases]}.map(c => lofitLens.upperTail(...c))")
    np.testing.assert_allclose(tails, [hypergeom.sf(s - 1, n, k, k) for n, k, s in cases], rtol=1e-9)
    bands = b.js(f"{[list(c[:2]) for c in cases]}.map(c => lofitLens.chanceBand(...c))")
    assert bands == [[hypergeom.ppf(q, n, k, k) for q in (0.025, 0.975)] for n, k, _ in cases]


def test_clicking_a_head_opens_its_panel(shown):
    """Ranks, scores, norm, cosine, effect, tokens and the attention pattern of that head; Escape closes."""
    b = shown()
    assert b.js("document.getElementById('head-panel').hidden")
    b.click(L1H1)
    assert b.js("document.getElementById('head-panel').dataset.head") == "L1H1"
    rows = b.js("[...document.querySelectorAll('#head-panel tr')].map(r => [...r.children].map(c => c.textContent))")
    assert rows[1:] == [
        ["chosen for", "truth: A-norm, seed 0", "edits: A-norm, seed 0"], ["rank", "2 of 12", "1 of 12"],
        ["in the top 2", "yes", "yes"], ["score", "1.1 (A-norm)", "1.2 (A-norm)"],
    ]  # fmt: skip
    facts = b.js(
        "[...document.querySelectorAll('#head-panel dl div')].map(r => [...r.children].map(c => c.textContent))"
    )
    assert facts == [
        ["norm of v", "0.75"], ["cosine with ITI mass mean", "0.500"],
        ["change when left out", "\u22120.03 [\u22120.05, \u22120.01]"],
    ]  # fmt: skip
    tokens = b.js("[...document.querySelectorAll('#head-panel .tokens code')].map(c => c.textContent)")
    assert tokens[:2] == ["\u2423Paris", "\u23ce"]
    assert tokens[2].startswith("</script><script>")
    values = b.js("[...document.querySelectorAll('#head-panel .tokens .value')].map(c => c.textContent)")
    assert values == ["+2.50", "+1.25", "\u22121.50"]
    assert "Q (1) 0.70, <bos> (0) 0.20" in text(b, ".pattern-box .quiet")
    b.wait("document.querySelector('.pattern canvas')?.width > 0")
    set_k(b, 1)
    assert text(b, "#head-panel tr:nth-child(3)") == "in the top 1noyes"
    b.press("Escape")
    assert b.js("document.getElementById('head-panel').hidden")
    b.click('[data-side="B"] button[data-head="L0H2"]')
    assert "No tuned offset" in text(b, "#head-panel")
    b.click("#head-panel .close")
    assert b.js("document.getElementById('head-panel').hidden")


def test_everything_works_from_the_keyboard(shown):
    """Tab reaches every control and one head a grid; arrows move; Enter and Space open, Escape closes and returns the focus."""
    b = shown()
    reached = []
    while len(reached) < 30 and reached[-1:] != ["BODY"]:
        b.press("Tab")
        reached.append(b.js(FOCUS))
    wanted = ["set-a", "set-b", "k-number", "k", "colour", "L0H0", "L1H1"]
    at = reached.index("set-a")
    assert [r for r in reached[at:] if r in wanted] == wanted
    b.js(f"document.querySelector('{L1H1.replace('L1H1', 'L0H0')}').focus()")
    seen = []
    for key in ["Up", "Right", "Up", "Up", "End", "Right", "Down", "Home", "Left", "Right"]:
        b.press(key if key in ("End", "Home") else f"Arrow{key}")
        seen.append(b.js(FOCUS))
    assert seen == ["L1H0", "L1H1", "L2H1", "L2H1", "L2H3", "L2H3", "L1H3", "L1H0", "L1H0", "L1H1"]
    assert b.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert "promotes (truth): \u2423Paris" in text(b, "#tip")
    for key in ("Enter", " "):
        b.press(key)
        assert b.js("document.getElementById('head-panel').dataset.head") == "L1H1"
        assert b.js(FOCUS) == "panel-title"
        b.press("Escape")
        assert b.js("document.getElementById('head-panel').hidden")
        assert b.js(FOCUS) == "L1H1"
    b.js("document.getElementById('k').focus()")
    b.press("ArrowRight", "ArrowRight")
    assert b.js("document.getElementById('k').value") == "4"
    assert b.js(COUNT) == "3"


def test_both_selects_change_the_grids(shown):
    """Names, labels, colours and the largest K follow the sets; sets without a common scale are coloured by rank."""
    b = shown()
    assert text(b, "#key").startswith("0.11.2 A-norm")
    colour = "getComputedStyle(document.querySelector('[data-side=B] button[data-head=L1H1]')).backgroundColor"
    label = "document.querySelector('[data-side=\"{}\"] button[data-head=L1H1]').getAttribute('aria-label')"
    best = b.js(colour)
    assert b.js(label.format("A")) == "L1H1, rank 2, A-norm 1.1, in the top K of both sets"
    b.choose("#set-a", "truth-probe")
    assert text(b, '[data-side="A"] .set-name') == "truth: probe accuracy"
    assert b.js(label.format("A")) == "L1H1, rank 1, probe accuracy 1.2, in the top K of both sets"
    assert b.js("document.getElementById('colour').value") == "rank"
    assert "probe accuracy and A-norm share no scale" in text(b, "#key")
    b.choose("#set-a", "truth-0")
    assert b.js("document.getElementById('colour').value") == "score"
    set_k(b, 9)
    b.choose("#set-b", "edits-file")
    assert text(b, '[data-side="B"] .set-name') == "edits: head file, seed 0"
    assert b.js("[document.getElementById('k').max, document.getElementById('k').value].join()") == "5,5"
    assert "not in its list" in text(b, "#key")
    assert b.js(colour) == best, "rank 1 and the best score both take the end of the scale"
    assert b.js(colour.replace("L1H1", "L1H2")) == "rgb(223, 227, 232)", (
        "a head outside the list has no colour of the scale"
    )


def test_hover_tells_rank_score_and_tokens(shown):
    """The note at the pointer, and the same head outlined in the other grid."""
    b = shown()
    b.js("document.getElementById('grids').scrollIntoView({block: 'center'})")
    b.hover(L1H1)
    b.wait("!document.getElementById('tip').hidden")
    assert text(b, "#tip") == "L1H1A: rank 2, A-norm 1.1B: rank 1, A-norm 1.2promotes (truth): \u2423Paris  \u23ce"
    assert b.js("[...document.querySelectorAll('.twin')].map(e => e.dataset.head).join()") == "L1H1,L1H1"
    b.hover("#title")
    b.wait("document.getElementById('tip').hidden")


@pytest.mark.parametrize("name", ["full", "large"])
def test_fits_a_phone(shown, name):
    """375 pixels wide: one column, nothing to scroll sideways, also with a panel open over 40 x 40 heads."""
    b = shown(name, width=375, height=700, phone=True)
    assert b.js("document.documentElement.scrollWidth") <= 375
    lefts = b.js("[...document.querySelectorAll('.grid-box')].map(e => e.getBoundingClientRect().left)")
    assert lefts[0] == lefts[1]
    b.click(L1H1)
    assert not b.js("document.getElementById('head-panel').hidden")
    assert b.js("document.documentElement.scrollWidth") <= 375
    box = b.js("(r => [r.left, r.right, r.bottom])(document.getElementById('head-panel').getBoundingClientRect())")
    assert box[0] >= 0
    assert box[1] <= 375
    assert box[2] <= 700.5
    cell = b.js(f"document.querySelector('{L1H1}').getBoundingClientRect().bottom")
    top = b.js("document.getElementById('head-panel').getBoundingClientRect().top")
    assert cell <= top, "the head stays in sight above its panel"


def test_a_report_of_one_set_alone(shown):
    """No tables, transfer, tokens or patterns: those sections are gone, the rest works."""
    b = shown("least")
    assert b.js("[...document.querySelectorAll('main > section')].map(e => e.id).join()") == "compare,about"
    assert b.js(COUNT) == "1"
    assert text(b, "#overlap-p") == "\u2013"
    b.click(L1H1)
    assert "No tuned offset of this head was recorded for truth" in text(b, "#head-panel")
