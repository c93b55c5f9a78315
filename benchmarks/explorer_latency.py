"""How fast the explorer answers in a browser: a click on a head, a step of K.

    python benchmarks/explorer_latency.py

Eight head sets of random scores, at the sizes of SmolLM2 (30 x 9) and of a large model (40 x 40), as a saved page and in
JupyterLab, in headless Chrome. A time runs from the input event's own time stamp to the end of the first frame that shows the
answer. In JupyterLab what Python adds (chance of the new K) comes after that frame. The page's processor time per input stands
beside it, because other programs on the machine lengthen the first and not the second.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import record

import lofit_lens as ll

sys.path.insert(0, str(record.ROOT))

from tests.browser import Browser, find_chrome
from tests.lab import lab
from tests.test_explorer_browser import eventually, run_all

SIZES, N_SETS, ROUNDS, GOAL_MS = ((30, 9), (40, 40)), 8, 20, 100
MAKE = """import numpy as np
import lofit_lens as ll
draw = np.random.default_rng(0)
sets = {{f"set {{i}}": ll.HeadScores(draw.random(({0}, {1}))) for i in range({2})}}
ex = ll.explore(sets, k={3})
ex"""
# A task that a frame's callback posts runs as soon as that frame is done.
WATCH = """
window.llxTimes = [];
for (const kind of ["click", "input"]) document.addEventListener(kind, (event) => {
  const channel = new MessageChannel();
  channel.port1.onmessage = () => window.llxTimes.push(performance.now() - event.timeStamp);
  requestAnimationFrame(() => channel.port2.postMessage(null));
}, true);
true"""


def measured(b: Browser, n_layers: int, n_heads: int) -> dict[str, dict[str, float]]:
    """Milliseconds of clicks on heads all over the grid, and of K's slider moved by a key."""
    places = np.random.default_rng(1).integers(0, (n_layers, n_heads), (ROUNDS + 1, 2))
    b.wait("document.querySelector('.llx [data-head]')")
    b.send("Performance.enable", timeDomain="threadTicks")
    b.js(WATCH)
    clicks, steps = [], []
    for layer, head in places:
        cell = f'.llx-cells[data-side="left"] [data-head="L{layer}H{head}"]'
        b.js(f"document.querySelector('{cell}').scrollIntoView({{block: 'center', inline: 'center'}})")
        b.hover(cell)
        clicks.append(_timed(b, lambda at=cell: b.click(at)))
        assert b.js("document.querySelector('.llx-head-name').textContent") == f"L{layer}H{head}"
    b.js("document.querySelector('.llx-k').focus(); true")
    for i in range(ROUNDS + 1):
        steps.append(_timed(b, lambda key=("ArrowRight", "ArrowLeft")[i % 2]: b.press(key)))
    return {name: _summary(times[1:]) for name, times in (("click", clicks), ("K", steps))}


def _timed(b: Browser, act: Callable[[], None]) -> tuple[float, float]:
    """Milliseconds until the frame, as the page notes them, and of the page's main thread."""
    _settle(b)
    before = _busy(b)
    act()
    b.wait("window.llxTimes.length > 0")
    return b.js("window.llxTimes.splice(0)[0]"), 1000 * (_busy(b) - before)


def _settle(b: Browser) -> None:
    """Let what the last input set off end: Python's answer, frames."""
    b.wait("document.querySelector('.llx').getAttribute('aria-busy') === 'false'")
    b.js("new Promise((done) => setTimeout(() => requestAnimationFrame(done), 300)).then(() => true)")


def _busy(b: Browser) -> float:
    """Seconds of processor time that tasks of the page's main thread have taken."""
    return next(m["value"] for m in b.send("Performance.getMetrics")["metrics"] if m["name"] == "TaskDuration")


def _summary(times: list[tuple[float, float]]) -> dict[str, float]:
    frames, busy = zip(*times, strict=True)
    return {
        "median_ms": round(statistics.median(frames), 1), "worst_ms": round(max(frames), 1),
        "processor_median_ms": round(statistics.median(busy), 1), "n": len(frames),
    }  # fmt: skip


def saved(b: Browser, folder: Path, size: tuple[int, int]) -> dict[str, Any]:
    """In a page that `Explorer.save` wrote."""
    draw = np.random.default_rng(0)
    sets = {f"set {i}": ll.HeadScores(draw.random(size)) for i in range(N_SETS)}
    file = folder / "explorer.html"
    file.write_text(ll.explore(sets, k=_k(size)).to_html(), encoding="utf-8")
    b.open(file, width=1440, height=900)
    return measured(b, *size)


def in_lab(b: Browser, folder: Path, size: tuple[int, int]) -> dict[str, Any]:
    """In JupyterLab, with a kernel behind it."""
    with lab(folder / f"lab-{size[0]}", [MAKE.format(*size, N_SETS, _k(size))]) as url:
        run_all(b, url, width=1440, height=900)
        eventually(b, "document.querySelector('.llx')?.dataset.version && document.querySelector('.llx [data-head]')")
        return measured(b, *size)


def _k(size: tuple[int, int]) -> int:
    return size[0] * size[1] // 10


def main() -> None:
    """Measure and write."""
    chrome = find_chrome()
    if chrome is None:
        raise SystemExit("no Chrome or Chromium on this machine; set CHROME_PATH to one")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            for where, measure in (("saved page", saved), ("JupyterLab", in_lab)):
                with Browser(chrome) as b:  # a new one, since JupyterLab asks before it is left
                    results[name := f"{size[0]}x{size[1]}, {where}"] = measure(b, Path(folder), size)
                print(name, results[name])
    settings = {"head_sets": N_SETS, "window": [1440, 900], "rounds": ROUNDS, "goal_ms": GOAL_MS}
    record.write(record.ROOT / "benchmarks/results/explorer_latency.json", "explorer_latency", settings, results)


if __name__ == "__main__":
    main()
