"""Attention patterns equal the plain model's, adapters act, and the page shows them without asking anyone."""

import dataclasses
import json
import re
import shutil
import subprocess

import pytest
import torch

from lofit_lens import HeadSet
from lofit_lens.analysis.attention import attention_patterns
from lofit_lens.errors import DataError, InputError
from lofit_lens.plots.attention import attention_block, attention_figure, attention_html, attention_script
from tests import tiny
from tests.adapters import edited, random_adapter
from tests.conftest import PAIRS

HEADS = HeadSet(["L2H1", "L0H3"])
PROMPTS = ["Q: In what country? A:", "Ann asked her son"]


def plain_patterns(plain, prompt):
    """`[layers][heads, pos, pos]` of Hugging Face."""
    ids = torch.tensor([[1, *tiny.tokenizer()(prompt, add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        return [a[0] for a in plain(ids, output_attentions=True).attentions]


@pytest.mark.parametrize(("architecture", "backend"), PAIRS)
def test_patterns_are_the_plain_models(loaded, hf, architecture, backend):
    """Heads in the order given, each prompt at its own length."""
    found = attention_patterns(loaded(architecture, backend), PROMPTS, HEADS)
    for i, prompt in enumerate(PROMPTS):
        truth = plain_patterns(hf(architecture), prompt)
        torch.testing.assert_close(found.patterns[i], torch.stack([truth[2][1], truth[0][3]]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.of("L0H3", i), truth[0][3], atol=1e-5, rtol=1e-4)
        assert "".join(found.tokens[i]) == "<s>" + prompt
        assert found.patterns[i].shape == (2, len(found.tokens[i]), len(found.tokens[i]))


def test_an_attached_adapter_acts(llama, hf):
    """An edit of layer 0 changes where layer 2 looks, as in the plain model."""
    lofit = random_adapter(llama, HeadSet(["L0H1"]))
    with lofit.attached(llama):
        found = attention_patterns(llama, PROMPTS[:1], HEADS)
    with edited(hf("llama"), lofit):
        truth = plain_patterns(hf("llama"), PROMPTS[0])[2][1]
    torch.testing.assert_close(found.of("L2H1"), truth, atol=1e-5, rtol=1e-4)
    bare = attention_patterns(llama, PROMPTS[:1], HEADS)
    assert (bare.of("L2H1") - truth).abs().max() > 1e-3
    assert torch.equal(bare.of("L0H3"), found.of("L0H3"))


@pytest.fixture(scope="module")
def patterns(bridge_llama):
    return attention_patterns(bridge_llama, ["Q: </script><b>&\n"], HEADS)


def test_page_holds_the_numbers_and_no_open_door(patterns):
    """Tokens cannot end the script or open a tag; no address is named in a tag; the same page every time."""
    spelled = ("</script><b>&", *patterns.tokens[0][1:])  # as one token
    patterns = dataclasses.replace(patterns, tokens=(spelled,))
    page = attention_html(patterns)
    found = json.loads(re.search(r"CircuitsVis\.AttentionHeads, (\{.*\})\)</script>", page)[1])
    assert found["attentionHeadNames"] == ["L2H1", "L0H3"]
    torch.testing.assert_close(torch.tensor(found["attention"]), patterns.patterns[0], atol=6e-5, rtol=0)
    assert "".join(found["tokens"]) == "</script><b>&Q:\u2423</script><b>&\u21b5"
    assert page.count("</script") == 2
    assert "<b>" not in page.replace(attention_script(), "")
    assert not re.search(r"<(script|link|img|iframe)[^>]*\b(src|href)=", page)
    assert "default-src 'none'" in page
    assert page == attention_html(patterns)
    assert attention_block(patterns, 0, ["L0H3"], name="one").startswith('<div id="one">')
    assert '"L2H1"' not in attention_block(patterns, 0, ["L0H3"])


@pytest.mark.browser
def test_page_draws_in_a_browser_without_a_network(patterns, tmp_path):
    """Chromium draws a canvas a head and a large one, names both heads, and complains of nothing."""
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no browser")
    (tmp_path / "page.html").write_text(attention_html(patterns))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
               "--virtual-time-budget=6000", "--enable-logging=stderr", "--dump-dom", f"file://{tmp_path}/page.html"]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    drawn = ran.stdout.replace(attention_script(), "")
    assert drawn.count("<canvas") == 3
    assert ">L2H1</h4>" in drawn
    assert "CONSOLE" not in ran.stderr


def test_figure_shows_one_head(patterns):
    """Row = query token, on a scale from 0 to 1; later tokens, which it cannot attend to, are left out."""
    fig = attention_figure(patterns, "L0H3")
    drawn, pattern = fig.data[0], patterns.of("L0H3")
    n = len(patterns.tokens[0])
    assert [[x for x in row if x is not None] for row in drawn.z] == [pattern[i, : i + 1].tolist() for i in range(n)]
    assert (drawn.zmin, drawn.zmax) == (0, 1)
    assert fig.layout.yaxis.title.text == "query token"
    assert fig.layout.xaxis.title.text == "key token (attended to)"
    assert "attention" in drawn.colorbar.title.text
    assert not any("<b>" in t for t in fig.layout.xaxis.ticktext)
    assert "L0H3" in fig.layout.title.text


def test_bad_requests_say_what_to_give(bridge_llama, patterns):
    """No prompt, no head, too long, heads and prompts that are not there, more tokens than a figure takes."""
    with pytest.raises(InputError, match="0 prompts and 2 heads"):
        attention_patterns(bridge_llama, [], HEADS)
    with pytest.raises(InputError, match="1 prompts and 0 heads"):
        attention_patterns(bridge_llama, ["x"], HeadSet([]))
    with pytest.raises(InputError, match="outside this model"):
        attention_patterns(bridge_llama, ["x"], HeadSet(["L3H0"]))
    with pytest.raises(DataError, match="prompt 1 has"):
        attention_patterns(bridge_llama, ["x", "x " * 2100], HEADS)
    with pytest.raises(InputError, match="no pattern of head L1H1"):
        attention_figure(patterns, "L1H1")
    with pytest.raises(InputError, match="prompt is 1; give 0 to 0"):
        attention_html(patterns, 1)
    with pytest.raises(InputError, match="no head to show"):
        attention_html(patterns, 0, [])
    with pytest.raises(InputError, match="use attention_html"):
        attention_figure(attention_patterns(bridge_llama, ["x " * 70], HEADS), "L2H1")
