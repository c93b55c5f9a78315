"""Saved pages as text: what is escaped, what stands in them, and that nothing in them asks a server for anything."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy.stats import hypergeom

import lofit_lens as ll
from lofit_lens.analysis.overlap import overlap
from lofit_lens.errors import InputError
from lofit_lens.explorer import page
from lofit_lens.explorer.source import read_source
from lofit_lens.models import visible
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
def text(tmp_path_factory):
    return report_data.saved(report_data.full(), tmp_path_factory.mktemp("page")).read_text(encoding="utf-8")


def embedded(text):
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)[1])


def test_text_cannot_leave_its_place(text):
    """`</script>`, `<!--`, `<b>`, `&` and U+2028 in titles, names and tokens end nothing and start nothing, and are all there."""
    assert len([t for t, _ in Elements(text).found if t == "script"]) == 2  # data, front-end
    assert len(re.findall("</script", text, re.IGNORECASE)) == 2
    assert "<b>tiny" not in text
    assert text.isascii()
    assert text.count("Heads of &lt;b&gt;tiny&lt;/b&gt; &amp; co") == 2  # the window's title and the heading
    held = embedded(text)
    assert held["data"]["sets"][3]["name"] == f"edits, {report_data.HOSTILE}"
    assert held["data"]["readings"]["L1H1"][0]["suppressed"] == [[visible(report_data.HOSTILE), "-1.50"]]
    assert held["data"]["attention"][0]["heads"]["L1H1"] == [[1000], [250, 750], [200, 700, 100]]


def test_nothing_is_loaded(text):
    """No element, style or script names an address; the content policy allows none."""
    for tag, attributes in Elements(text).found:
        for name in ("src", "srcset", "href", "action", "data", "poster", "background"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), f"<{tag} {name}={value}>"
    own = (
        page.script().replace('"http://www.w3.org/2000/svg"', "") + page.asset("explorer.css") + page.asset("page.css")
    )
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttpRequest|import\(|innerHTML|eval", own)
    assert own.isascii()
    policy = next(a["content"] for t, a in Elements(text).found if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"http|\*|'self'|eval", policy)


def test_chance_is_that_of_the_analysis():
    """For each pair of sets and each K: p over all heads, p within layers; for each K the band. 0 is below 0.0005."""
    source = report_data.full().source
    chance = page.view_data(source, work=page.IN_PAGE)["chance"]
    ks = np.array(chance["ks"])
    assert ks.tolist() == list(range(1, 13))
    assert chance["expected"] == (ks**2 / 12).round(2).tolist()
    assert chance["low"] == hypergeom.ppf(0.025, 12, ks, ks).tolist()
    assert chance["high"] == hypergeom.ppf(0.975, 12, ks, ks).tolist()
    sets = list(source.entries.values())
    assert set(chance["pairs"]) == {f"{i},{j}" for j in range(4) for i in range(j)}
    for place, by_k in chance["pairs"].items():
        a, b = (sets[int(i)].ranking for i in place.split(","))
        assert len(by_k[0]) == min(len(a), len(b))
        for k in range(1, len(by_k[0]) + 1):
            row = overlap({"a": a.top(k), "b": b.top(k)}, shape=source.shape).iloc[0]
            for got, wanted in zip(by_k, (row["p_hypergeometric"], row["p_layer"]), strict=True):
                assert abs(got[k - 1] - 1000 * wanted) <= 0.5001, (place, k)
                assert (got[k - 1] == 0) == (wanted < 0.0005)


def test_with_much_to_compute_k_moves_in_steps():
    """Both ends and the usual K are there, small K lie nearest; a live view has some for its band and no pairs."""
    source = report_data.large().source
    ks = page.view_data(source, work=20 * 40)["chance"]["ks"]
    assert {1, 2, 3, 48, 1600} <= set(ks)
    assert 15 < len(ks) < 23
    assert "pairs" not in (live := page.view_data(source)["chance"])
    assert 100 < len(live["ks"]) < 202


def test_a_large_model_fits_and_too_large_a_page_is_refused(tmp_path, monkeypatch):
    """Two sets of 1,600 heads: under 2 MB. A page that is refused leaves the old file as it was; the message says how large."""
    monkeypatch.setattr(page, "IN_PAGE", 4000)
    path = report_data.saved(report_data.large(), tmp_path)
    assert path.stat().st_size < 2_000_000
    before = path.read_bytes()
    monkeypatch.setattr(page, "MAX_BYTES", 60_000)
    with pytest.raises(InputError, match=r"would be 0\.\d MB.*must stay under 0 MB.*fewer head sets"):
        report_data.saved(report_data.large(), tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_same_data_same_page(text, tmp_path):
    assert report_data.saved(report_data.full(), tmp_path).read_text(encoding="utf-8") == text


def test_what_needs_the_model_is_left_out(bridge_llama, tmp_path):
    """No prompt can be typed; the tokens and answers that were shown are kept."""
    lofit = ll.interventions.Lofit.for_model(bridge_llama, ll.HeadSet(["L1H1"], shape=(3, 4))).init_("v", seed=0)
    sets = {"a": report_data.scores(report_data.TRUTH), "b": report_data.scores(report_data.EDITS)}
    ex = ll.explore(sets, bridge_llama, adapters={"LoFiT": lofit}, prompts=["Ann is"], k=2, max_new_tokens=2)
    ex.head = "L1H1"
    ex.run()
    shown = ex.widget.said
    held = embedded(ex.save(tmp_path / "page.html").read_text(encoding="utf-8"))
    assert held["said"]["ask"] is None
    assert held["said"]["answers"] == shown["answers"]
    assert held["said"]["maps"] == shown["maps"]
    assert held["data"]["readings"]["L1H1"] == shown["readings"]
    assert held["state"] == ex.widget.state


def test_a_report_is_the_explorer_of_its_study(study_folder):
    """Tables, the transfer matrix, versions and notes stand around the explorer of the same folder."""
    results = ll.load_results(study_folder)
    text = ll.report.render(results)
    explored = json.loads(json.dumps(page.view_data(read_source(results), work=page.IN_PAGE)))
    assert embedded(text)["data"] == explored
    assert text == ll.report.render(results)
    for words in (
        'id="summary"',
        'id="transfer"',
        "random heads",
        "tuned on kin",
        "torch",
        "3 layers of 4 heads",
        "Seeds 0, 1",
    ):
        assert words in text
