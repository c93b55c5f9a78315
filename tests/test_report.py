"""The report as text: what is refused, what is escaped, and that nothing in it asks a server for anything."""

import copy
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import plotly.offline
import pytest

from lofit_lens.errors import InputError
from lofit_lens.report import page as page_module
from lofit_lens.report import render, write_report
from lofit_lens.report.data import checked
from tests import report_data


class Elements(HTMLParser):
    """Every element with its attributes, and the text of scripts and styles."""

    def __init__(self, text):
        super().__init__(convert_charrefs=False)
        self.found, self.inside = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside.append("")

    def handle_data(self, data):
        if self.cdata_elem:  # a script or a style
            self.inside[-1] += data


@pytest.fixture(scope="module")
def full_page():
    return render(report_data.full())


@pytest.fixture(scope="module")
def elements(full_page):
    return Elements(full_page)


def embedded(elements):
    scripts = [a for t, a in elements.found if t in ("script", "style")]
    at = next(i for i, a in enumerate(scripts) if a.get("id") == "report-data")
    return json.loads(elements.inside[at])


def test_the_page_holds_the_data(elements):
    """What was given stands in the page, hostile text unchanged, attention weights to four decimals."""
    found, given = embedded(elements), report_data.full()
    for key in ("title", "model", "versions", "notes", "sets", "tables", "transfer", "heads"):
        assert found[key] == given[key], key
    assert found["attention"]["truth"][0]["heads"]["L1H1"] == [[1, 0, 0], [0.25, 0.75, 0], [0.2, 0.7, 0.1]]
    assert found["theme"]["colors"][0] == "#0072B2"


def test_text_cannot_leave_its_place(full_page, elements):
    """`</script>`, `<!--`, `<b>`, `&` and U+2028 in titles, notes and tokens end nothing and start nothing."""
    assert len([t for t, _ in elements.found if t == "script"]) == 4  # data, plotly.js, circuitsvis, the page's own
    assert len(re.findall("</script", full_page, re.IGNORECASE)) == 4
    assert "<b>tiny" not in full_page
    assert full_page.count("Heads of &lt;b&gt;tiny&lt;/b&gt; &amp; co") == 2  # the window's title and the heading
    data_line = full_page.split('id="report-data">')[1].split("</script>")[0]
    assert data_line.isascii()
    assert not set(data_line) & set("<>&")


def test_libraries_once(full_page):
    """plotly.js stands in the page once, circuitsvis once, or not at all when there is no pattern to draw."""
    start = plotly.offline.get_plotlyjs()[:300]
    assert full_page.count(start) == 1
    assert full_page.count("var CircuitsVis=") == 1
    plain = render(report_data.least())
    assert plain.count(start) == 1
    assert "var CircuitsVis=" not in plain
    assert "sourceMappingURL" not in full_page


def test_scripts_cannot_end_their_element():
    """A library's text that would end the script, open a comment or ask for a source map is made harmless."""
    source = "a = '</script>' + '</SCRIPT>' + '<!--';\n//# sourceMappingURL=x.map\nb()"
    assert page_module.script_text(source) == "a = '<\\/script>' + '<\\/SCRIPT>' + '<\\!--';\n\nb()"


def test_nothing_is_loaded(elements):
    """No element, style or script of ours names an address; the content policy allows none."""
    for tag, attributes in elements.found:
        for name in ("src", "srcset", "href", "action", "data", "poster", "background"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), f"<{tag} {name}={value}>"
    own = [page_module._asset(name) for name in (*page_module.SCRIPTS, "page.css", "page.html")]
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttpRequest|import\(|innerHTML", "".join(own))
    policy = next(a["content"] for t, a in elements.found if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"http|\*|'self'|eval", policy)


def test_every_head_of_a_large_model_fits(full_page):
    """Two sets of 1,600 heads: under 10 MB."""
    assert len(full_page.encode()) < 10_000_000
    assert len(render(report_data.large()).encode()) < 10_000_000


def test_too_large_a_page_is_refused(monkeypatch):
    """The message says how large and what to leave out."""
    monkeypatch.setattr(page_module, "MAX_BYTES", 5_000_000)
    with pytest.raises(InputError, match=r"would be 6\.\d MB.*under 5 MB.*fewer head sets"):
        render(report_data.full())


def test_same_data_same_page(full_page):
    """Rendering is a pure function and leaves its input alone."""
    data = report_data.full()
    assert render(data) == full_page
    assert data == report_data.full()


def test_written_whole_or_not_at_all(tmp_path):
    """The file is the rendered text; data that is refused leaves the old file in place."""
    path = write_report(report_data.least(), tmp_path / "new" / "report.html")
    assert path == tmp_path / "new" / "report.html"
    assert path.read_text(encoding="utf-8") == render(report_data.least())
    with pytest.raises(InputError):
        write_report(report_data.least() | {"sets": []}, path)
    assert path.read_text(encoding="utf-8") == render(report_data.least())
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_marks_inside_the_data_are_not_filled_in():
    """Text that looks like the template's own marks stays text."""
    text = render(report_data.least() | {"notes": ["/*@plotly*/ <!--@title-->"]})
    assert embedded(Elements(text))["notes"] == ["/*@plotly*/ <!--@title-->"]


def test_numpy_numbers_are_numbers():
    """Scores and rankings may come as arrays."""
    data = report_data.full()
    plain = checked(data)
    data["sets"][0]["scores"] = np.array(data["sets"][0]["scores"])
    data["sets"][0]["ranking"] = np.array(data["sets"][0]["ranking"])
    data["sets"][0]["k"] = np.int64(2)
    assert checked(data) == plain


def test_scores_are_kept_to_six_digits():
    """Enough to read and to colour by; the page stays small."""
    data = report_data.full()
    data["sets"][0]["scores"][0][0] = 1.23456789
    assert checked(data)["sets"][0]["scores"][0][0] == 1.23457


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["sets"], [], "no head set to show.*lofit-lens select"),
        (["title"], None, "title = None must be text"),
        (["model", "n_heads"], 0, "model.n_heads = 0 must be a whole number from 1"),
        (["model"], "tiny", "model must be a mapping.*str"),
        (["notes"], "one", "notes must be a list"),
        (["colour"], 1, "unknown key.*'colour'"),
        (["sets", 1, "id"], "truth-0", r"sets\[1\].id = 'truth-0' is taken"),
        (["sets", 0, "ranking"], [], r"sets\[0\].ranking is empty"),
        (["sets", 0, "ranking", 1], [3, 0], r"ranking\[1\] = L3H0 is outside this model \(3 layers of 4 heads"),
        (["sets", 0, "ranking", 1], [0, 4], "L0H4 is outside"),
        (["sets", 0, "ranking", 1], [0, 0], "L0H0 twice"),
        (["sets", 0, "ranking", 1], [0], r"sets\[0\].ranking\[1\]: \[0\] is not a head"),
        (["sets", 0, "k"], 13, "k = 13 is more than the 12 heads"),
        (["sets", 0, "k"], True, "k = True must be a whole number"),
        (["sets", 0, "scores", 1, 2], math.nan, r"sets\[0\].scores\[1\]\[2\] is nan.*finite"),
        (["sets", 0, "scores", 1, 2], math.inf, "is inf"),
        (["sets", 0, "scores", 1, 2], "high", "'high' must be a number"),
        (["sets", 0, "scores", 1], [1.0], r"sets\[0\].scores\[1\] has 1 entries where 4 belong"),
        (["sets", 0, "scores"], [[1.0] * 4], "scores has 1 entries where 3 belong"),
        (["sets", 0, "seed"], -1, "seed = -1"),
        (["tables", 0, "rows", 0], ["LoFiT"], r"rows\[0\] has 1 entries where 2 belong"),
        (["tables", 0, "rows", 0, 1], 81.2, r"rows\[0\]\[1\] = 81.2 must be text"),
        (["transfer", "relative", 0, 0], 100.0, "ratios"),
        (["transfer", "p", 0], [0.1], r"transfer.p\[0\] has 1 entries where 2 belong"),
        (["transfer", "low", 2, 0], math.nan, r"transfer.low\[2\]\[0\] is nan"),
        (["transfer", "metric"], {"truth": "MC1"}, "transfer.metric lacks 'edits'"),
        (["transfer", "tasks"], [], "no task"),
        (["heads", "truth", "L3H0"], {}, "L3H0 is outside"),
        (["heads", "truth", "first"], {}, "'first' is not a head"),
        (["heads", "truth", "L1H1", "promoted", 0], [" Paris"], "has 1 entries where 2 belong"),
        (["heads", "truth", "L1H1", "norm_v"], math.nan, "norm_v is nan"),
        (["heads", "truth", "L1H1", "without"], {"value": 0.1}, "without lacks 'low'"),
        (["attention", "truth", 0, "heads", "L1H1", 2], [1.0], "has 1 entries where 3 belong"),
        (["attention", "truth", 0, "tokens"], ["a"], "has 3 entries where 1 belong"),
    ],
)
def test_bad_data_is_refused(place, value, message):
    """The error names the place, what stands there and what is allowed."""
    data = copy.deepcopy(report_data.full())
    *path, last = place
    inner = data
    for step in path:
        inner = inner[step]
    inner[last] = value
    with pytest.raises(InputError, match=message):
        render(data)


@pytest.mark.parametrize("key", ["title", "model", "sets"])
def test_missing_keys_are_named(key):
    data = report_data.least()
    del data[key]
    with pytest.raises(InputError, match=f"report data lacks '{key}'; it has"):
        render(data)


def test_data_that_is_no_mapping_is_refused(unchecked):
    with pytest.raises(InputError, match="report data must be a mapping"):
        render([])
