"""The explorer in JupyterLab in headless Chrome: what the reader does changes what is shown, and Python knows it.

`python -m tests.test_explorer_browser docs/images/explorer.png` makes the picture of the documentation again.
"""

import json
import re
import sys
import tempfile
import time
from pathlib import Path

import pytest

pytest.importorskip("choreographer", reason="finding Chrome needs choreographer (it comes with kaleido)")
pytest.importorskip("jupyterlab", reason="the explorer is driven in JupyterLab")

from tests import report_data
from tests.browser import Browser, find_chrome
from tests.lab import lab

pytestmark = pytest.mark.browser

# What JupyterLab itself says: each beginning, with the reason.
NOISE = (
    "debug: Starting application in workspace",  # its start
    "debug: Starting WebSocket",  # its connection to the kernel
    "warning: Plugin @jupyter",  # that a part of it was slow to start
)
SCORES = f"""
import numpy as np, torch
import lofit_lens as ll
from lofit_lens.interventions import Lofit
model = ll.load_model("organism")
def scores(first, kind):  # [6, 16], larger towards one head
    place = np.arange(96.0).reshape(6, 16)
    return ll.HeadScores(100 - abs(place - first), kind=kind)
lofit = Lofit.for_model(model, ll.HeadSet(["L2H3", "L1H13"])).init_("v", seed=0, std=20.0)
named = {{("kinship", "A-norm"): scores(35, "A-norm"), ("kinship", "probes"): scores(38, "accuracy"),
         ("truth", "A-norm"): scores(69, "A-norm"), ("truth", "probes"): scores(69, "accuracy"),
         ("truth", {report_data.HOSTILE!r}): ll.HeadSet(["L0H0", "L5H15"])}}
PROMPT = "libo 's father is rizo . rizo 's son is krodo . So who is krodo to libo ? A:"
"""
SHOW = 'ex = ll.explore(named, model, adapters={"LoFiT": lofit}, prompts=[PROMPT, "People say Q:"], k=5, max_new_tokens=3)\nex'
LARGE = """
large = np.arange(1600.0).reshape(40, 40)
wide = ll.explore({"up": ll.HeadScores(large), "down": ll.HeadScores(-large)}, k=80)
wide"""
GRID = 'named["kinship", "A-norm"]'
STILL = "from IPython.display import HTML; HTML(ex.to_html())"
APP = "window.jupyterapp?.shell?.currentWidget"
READY = f"{APP}?.content?.widgets?.length && {APP}.sessionContext?.session?.kernel?.status === 'idle'"
LEFT, RIGHT = '#llx-first .llx-cells[data-side="left"]', '#llx-first .llx-cells[data-side="right"]'


def chrome():
    found = find_chrome()
    if found is None:
        pytest.skip("no Chrome or Chromium on this machine; set CHROME_PATH to one")
    return found


def run_all(b, url, *, width=1280, height=1400):
    """Open the notebook, run its cells, and give them the window's width."""
    b.visit(url, width=width, height=height)
    eventually(b, READY)
    b.js("jupyterapp.commands.execute('application:toggle-left-area').then(() => true)")
    b.js("(jupyterapp.commands.execute('notebook:run-all-cells'), true)")


def eventually(b, expression):
    """Wait as `b.wait`, for what a kernel computes: minutes on a busy machine."""
    until = time.monotonic() + 300
    while not b.js(f"!!({expression})"):
        assert time.monotonic() < until, f"never true: {expression}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """JupyterLab with its cells run: the explorer of two tasks, one of 40 x 40 heads, and the first one as it is saved."""
    with Browser(chrome()) as b, lab(tmp_path_factory.mktemp("lab") / "lab", [SCORES, SHOW, LARGE, STILL, GRID]) as url:
        run_all(b, url)
        eventually(b, "[...document.querySelectorAll('.llx')].filter(e => e.dataset.version).length === 3")
        b.js(
            "document.querySelectorAll('.llx').forEach((e, i) => { e.id = ['llx-first', 'llx-wide', 'llx-saved'][i]; })"
        )
        yield b


@pytest.fixture
def b(page):
    """The page; after each test the console must have said nothing but JupyterLab's own words."""
    yield page
    assert [line for line in page.said if not by_jupyterlab(line)] == []


def by_jupyterlab(line):
    """Whether JupyterLab alone said it: a known message, or an exception with no frame outside its own scripts."""
    frames = re.findall(r"^ +at .*", line, re.MULTILINE) if line.startswith("exception: ") else []
    return line.startswith(NOISE) or (bool(frames) and all("/static/lab/" in frame for frame in frames))


def test_only_jupyterlabs_own_exceptions_are_left_out():
    own, ours = (
        "    at http://127.0.0.1:1/static/lab/jlab_core.1.js?v=1:2:3",
        "    at click (blob:http://127.0.0.1:1/2:3:4)",
    )
    assert by_jupyterlab(f"exception: NotFoundError: not a child of this node.\n{own}")
    assert not by_jupyterlab(f"exception: Error: ours\n{ours}\n{own}")
    assert not by_jupyterlab(f"exception: Error: called by it\n{own}\n{ours}")
    assert not by_jupyterlab("exception: Error: without frames")
    assert not by_jupyterlab("error: of the console")


def kernel(b, expression):
    """Value of a Python expression in the notebook's kernel, as JSON."""
    code = f"import json; print(json.dumps({expression}))"
    return json.loads(
        b.js(
            f"new Promise((done, fail) => {{ const future = {APP}.sessionContext.session.kernel.requestExecute("
            f"{{code: {json.dumps(code)}, store_history: false}}); let text = '';"
            " future.onIOPub = (m) => { if (m.header.msg_type === 'stream') text += m.content.text;"
            " if (m.header.msg_type === 'error') fail(new Error(m.content.evalue)); };"
            " future.done.then(() => done(text)); })"
        )
    )


def after(b, act, *, where="#llx-first"):
    """Do something that changes what is shown, and wait until it is."""
    version = b.js(f"document.querySelector('{where}').dataset.version")
    act()
    b.wait(
        f"(e => e.dataset.version !== '{version}' && e.getAttribute('aria-busy') === 'false')(document.querySelector('{where}'))"
    )


def marks(b, side):
    found = b.js(f"[...document.querySelectorAll('{side} button')].map(e => [e.dataset.head, e.dataset.mark])")
    return {mark: [h for h, m in found if m == mark] for mark in ("own", "shared")}


def numbers(b):
    return b.js("[...document.querySelectorAll('.llx-overlap')][0].innerText.split('\\n').filter(x => x)")


def text(b, selector):
    return b.js(f"document.querySelector({selector!r})?.innerText ?? ''")


def test_the_reader_chooses_and_python_knows(b):
    """A set, K by the slider with the keyboard, K apart: marks and numbers follow, and Python has the same sets."""
    assert marks(b, LEFT) == {
        "own": ["L2H1", "L2H2", "L2H3"],
        "shared": ["L2H4", "L2H5"],
    }  # within two places of L2H3 and L2H6
    assert marks(b, RIGHT) == {"own": ["L2H6", "L2H7", "L2H8"], "shared": ["L2H4", "L2H5"]}
    assert kernel(b, "sorted(map(str, ex.shared))") == ["L2H4", "L2H5"]
    assert numbers(b)[1] == "2 of 5"
    after(b, lambda: b.choose(".llx-set[data-side=right]", "truth, probes"))
    assert (numbers(b)[1], kernel(b, "ex.right")) == ("0 of 5", "truth, probes")
    assert set(marks(b, RIGHT)["own"]) == {"L4H3", "L4H4", "L4H5", "L4H6", "L4H7"}
    after(b, lambda: b.choose(".llx-set[data-side=right]", f"truth, {report_data.HOSTILE}"))
    assert b.js("window.pwned === undefined")
    assert kernel(b, "ex.k") == [2, 2]
    after(b, lambda: b.choose(".llx-set[data-side=right]", "kinship, probes"))
    after(b, lambda: b.choose(".llx-k-number", "5"))
    after(b, lambda: (b.js("document.querySelector('.llx-k').focus()"), b.press("ArrowRight")))
    assert (kernel(b, "ex.k"), numbers(b)[1]) == ([6, 6], "3 of 6")
    after(b, lambda: b.click(".llx-ks input[type=checkbox]"))
    after(b, lambda: b.choose(".llx-k-number[aria-label^='K, right']", "9"))
    assert (kernel(b, "ex.k"), numbers(b)[1]) == ([6, 9], "4 of 6 and 9")
    after(b, lambda: b.click(".llx-ks input[type=checkbox]"))
    after(b, lambda: b.choose(".llx-k-number", "5"))
    row = kernel(b, "ex.overlap[['expected', 'p_hypergeometric', 'p_layer']].tolist()")
    assert numbers(b)[3:8:2] == [f"{row[0]:.2f}", f"{row[1]:.3f}", f"{row[2]:.3f}"]


def test_opening_a_head(b):
    """By mouse or keyboard, which leaves the notebook alone: its tokens beside the grids; Python knows the head and the marks."""
    after(b, lambda: b.click(f'{LEFT} [data-head="L2H3"]'))
    assert text(b, ".llx-head-name") == "L2H3"
    assert "1 of 96, in the top 5" in text(b, ".llx-places tr.llx-shown")
    assert b.js("document.querySelectorAll('.llx-tokens li').length") == 16
    assert kernel(b, "[str(ex.head), str(ex.selection)]") == ["L2H3", "L2H3"]
    after(b, lambda: b.click(f'{RIGHT} [data-head="L0H0"]'))
    assert "L0H0 is outside LoFiT, which edits L2H3 L1H13." in text(b, ".llx-panel")
    assert (text(b, ".llx-head-name"), b.js("document.querySelectorAll('.llx-tokens li').length")) == ("L0H0", 0)
    after(b, lambda: b.click(f'{RIGHT} [data-head="L0H0"]'))
    assert kernel(b, "str(ex.selection)") == "L2H3"
    b.js(f"""document.querySelector('{LEFT} [data-head="L2H3"]').focus()""")
    cell = b.js(f"{APP}.content.activeCellIndex")  # the focus has made this cell the active one
    b.press("ArrowUp", "ArrowLeft")
    assert b.js("document.activeElement.dataset.head") == "L3H2"
    after(b, lambda: b.press("Enter"))
    assert (text(b, ".llx-head-name"), kernel(b, "str(ex.head)")) == ("L3H2", "L3H2")
    assert b.js(f"[{APP}.content.activeCellIndex, {APP}.content.mode, {APP}.content.widgets.length]") == [
        cell,
        "command",
        5,
    ]


def test_running_a_prompt(b):
    """Typed, run: what the model says with and without the adapter and the head, and where the head looks."""
    after(b, lambda: b.click(f'{LEFT} [data-head="L1H13"]'))
    b.js("document.querySelector('.llx-ask textarea').select()")
    b.type("rizo 's son is krodo . So who is krodo to rizo ? A:")
    after(b, lambda: b.click(".llx-run"))
    b.wait("document.querySelector('.llx-said')")
    rows = b.js("[...document.querySelectorAll('.llx-said tr')].map(r => [...r.children].map(c => c.textContent))")
    assert dict(rows) == {
        k: v or "(nothing: the end token came first)" for k, v in kernel(b, "ex.last_run.texts").items()
    }
    assert [r[0] for r in rows] == [
        "unmodified model", "with LoFiT", "with LoFiT, L1H13 left out", "unmodified model, L1H13 silenced (z = 0)",
    ]  # fmt: skip
    assert len({r[1] for r in rows}) > 1
    assert kernel(b, "ex.prompt") == "rizo 's son is krodo . So who is krodo to rizo ? A:"
    n = kernel(b, "ex.last_run.n_tokens")
    assert (
        b.js("[...document.querySelectorAll('.llx-attention tbody')].map(e => e.querySelectorAll('td[title]').length)")
        == [n * (n + 1) // 2] * 2
    )
    boxes = b.js(
        "[...document.querySelectorAll('.llx-attention tbody tr:last-child')].map(e => e.getBoundingClientRect().toJSON())"
    )
    assert abs(boxes[0]["top"] - boxes[1]["top"]) < 1.5, "before and after stand side by side, row by row"
    assert boxes[0]["right"] <= boxes[1]["left"]
    first = b.js("document.querySelector('.llx-attention tbody').innerHTML")
    after(b, lambda: b.click(f'{LEFT} [data-head="L0H2"]'))
    assert b.js("document.querySelector('.llx-attention tbody').innerHTML") != first
    assert "This was run with L1H13 open and LoFiT; press Run again." in text(b, ".llx-prompt")
    b.js("document.querySelector('.llx-ask textarea').select()")
    b.press(" ")
    b.click(".llx-run")
    b.wait("!document.querySelector('.llx-error').hidden")
    assert text(b, ".llx-error") == "the prompt is empty; type a text for the model to continue"


def test_set_from_code(b):
    """What Python sets is shown."""
    kernel(b, "setattr(ex, 'selection', ['L5H1']) or setattr(ex, 'head', 'L5H1') or setattr(ex, 'prompt', 'a text')")
    b.wait("document.querySelector('.llx-ask textarea').value === 'a text'")
    assert text(b, ".llx-head-name") == "L5H1"
    assert ": L5H1" in text(b, ".llx-marked")
    assert b.js("document.querySelector('.llx-error').hidden")
    after(b, lambda: b.click(".llx-keys button"))
    assert kernel(b, "len(ex.selection)") == 0


def test_forty_layers_of_forty_heads(b):
    """Each click answers for its head among 3,200 buttons; nothing is wider than the cell."""
    assert b.js("document.querySelectorAll('#llx-wide .llx-cells button').length") == 3200
    after(b, lambda: b.click('#llx-wide [data-side="left"] [data-head="L39H39"]'), where="#llx-wide")
    assert text(b, "#llx-wide .llx-head-name") == "L39H39"
    assert kernel(b, "str(wide.head)") == "L39H39"
    assert b.js("(e => e.scrollWidth <= e.clientWidth)(document.querySelector('#llx-wide'))")
    assert b.js("document.querySelector('#llx-wide .llx-row button').getBoundingClientRect().width") > 6
    assert b.js("document.querySelectorAll('.llx')[0].querySelector('.llx-head-name')?.innerText ?? ''") != "L39H39"


def test_jupyters_theme_decides(b):
    """Dark in JupyterLab's dark theme, whatever the system says; its rows of tables do not color the small grid."""
    ground = "getComputedStyle(document.querySelector('#llx-first')).backgroundColor"
    rows = (
        "[...document.querySelectorAll('.jp-OutputArea-output table tr')].map(e => getComputedStyle(e).backgroundColor)"
    )
    assert b.js(ground) == "rgb(255, 255, 255)"
    for theme, wanted in (("JupyterLab Dark", "rgb(22, 25, 29)"), ("JupyterLab Light", "rgb(255, 255, 255)")):
        b.js(f"jupyterapp.commands.execute('apputils:change-theme', {{theme: '{theme}'}}).then(() => true)")
        b.wait(f"{ground} === '{wanted}'")
        assert set(b.js(rows)) == {"rgba(0, 0, 0, 0)"}


def test_what_is_saved_needs_no_kernel(b):
    """The same view among a notebook's outputs answers by itself; Python hears nothing of it."""
    head = kernel(b, "str(ex.head)")
    b.click('#llx-saved [data-side="left"] [data-head="L5H15"]')
    assert text(b, "#llx-saved .llx-head-name") == "L5H15"
    b.choose("#llx-saved .llx-k-number", "10")
    shown = b.js("document.querySelector('#llx-saved .llx-overlap').innerText.split('\\n').filter(x => x)")
    tops = "[scores.top(10) for scores in list(named.values())[:2]]"
    p = kernel(b, f"ll.analysis.overlap({tops})['p_hypergeometric'].item()")
    assert shown[5] == (f"{p:.3f}" if p >= 0.0005 else "< 0.001")
    assert kernel(b, "str(ex.head)") == head


# ----------------------------------------------------------------------------------- the picture of the documentation

PICTURE = (
    """import lofit_lens as ll
model, task = ll.load_model("organism"), ll.load_task("organism/kinship")
options = {"seed": 0, "progress": False}
scores = {(name, "LoFiT"): ll.select_heads(model, ll.load_task(f"organism/{name}"), **options) for name in ("kinship", "truth")}
scores["kinship", "ITI probes"] = ll.probe_heads(model, task, **options)
lofit = ll.tune_offsets(model, task, scores["kinship", "LoFiT"].top(3), **options)
prompts = [e.prompt for e in task.examples("val")[:8]]
def said(prompt):
    with lofit.attached(model):
        return ll.generate(model, prompt, max_new_tokens=2)
prompts.sort(key=lambda p: said(p) == ll.generate(model, p, max_new_tokens=2))  # first those that the adapter changes""",
    """ex = ll.explore(scores, model, adapters={"LoFiT": lofit}, prompts=prompts, k=10)
ex.right = ("truth", "LoFiT")
ex.head = ex.sets["kinship, LoFiT"][0]
ex.run()
ex""",
)


def make_picture(path: Path) -> Path:
    """Draw the explorer on the embedded model as it stands in JupyterLab; a PNG of the widget alone, in 256 colors."""
    from PIL import Image

    found = find_chrome()
    assert found, "no Chrome or Chromium on this machine; set CHROME_PATH to one"
    with tempfile.TemporaryDirectory() as folder, Browser(found) as b, lab(Path(folder) / "lab", PICTURE) as url:
        run_all(b, url, width=1240, height=1000)
        eventually(b, "document.querySelector('.llx')?.dataset.version && document.querySelector('.llx-attention')")
        time.sleep(1.0)  # fonts and the notebook's own scrolling
        b.js("document.querySelector('.llx-panel').style.maxHeight = '700px'")  # so that all of it is in the window
        b.js("document.querySelector('.llx').scrollIntoView()")
        b.picture(path, of=".llx")
    Image.open(path).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        path, optimize=True
    )
    return path


if __name__ == "__main__":
    make_picture(Path(sys.argv[1]))
