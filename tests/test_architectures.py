"""The table of architectures: complete, rendered from its files, without a wrong row; and a few families run for real."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # they import each other by name, as scripts do

import architecture_checks as checks  # noqa: E402
import architectures  # noqa: E402
import architectures_page  # noqa: E402
import families  # noqa: E402

from lofit_lens import io  # noqa: E402
from lofit_lens.models import load_model  # noqa: E402
from tests.conftest import needs_hooked  # noqa: E402

RECORDS = architectures_page.read(ROOT / "benchmarks/results")
MAJOR = io.environment()["transformer-lens"].split(".")[0]
# So do Hugging Face's own; they have no heads, and `generate` and scoring, which pad on the left, refuse them.
RECURRENT = {"RecurrentGemma", "Rwkv"}


def record():
    """The file of this environment's TransformerLens."""
    return next(r for r in RECORDS if r["versions"]["transformer-lens"].split(".")[0] == MAJOR)


def case(name):
    return next(c for c in families.cases() if c.name == name)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama on the bridge, and plain Hugging Face."""
    folder = tmp_path_factory.mktemp("llama") / "checkpoint"
    families.save(case("Llama"), folder)
    return load_model(folder, backend="bridge", device="cpu"), checks.plain(folder)


# -------------------------------------------------------------------------------------------------------- the table


def test_every_class_that_transformerlens_takes_has_a_checkpoint_or_a_reason():
    """As of the installed versions; a class that a newer one adds has to get a configuration."""
    claimed = families.claimed()
    assert not [name for name, reason in claimed.items() if "no configuration is given" in reason]
    assert set(families.FAMILIES) <= set(claimed)
    assert record()["results"]["claimed"] == claimed


def test_every_checkpoint_stands_in_the_files():
    """Of both versions of TransformerLens; at least thirty classes."""
    names = [c.name for c in families.cases()]
    assert len(set(names)) == len(names)
    assert len({c.architecture for c in families.cases()}) >= 30
    assert [r["versions"]["transformer-lens"].split(".")[0] for r in RECORDS] == ["3", "4"]
    for one in RECORDS:
        assert list(one["results"]["cases"]) == names
        reasons = [entry.get("not compared", "Hugging Face's own") for entry in one["results"]["cases"].values()]
        assert all(reason.startswith("Hugging Face's own") for reason in reasons)


def test_the_page_is_rendered_from_the_files():
    """Word for word."""
    written = (ROOT / "docs/architectures.md").read_text(encoding="utf-8")
    assert written == architectures_page.page(ROOT / "benchmarks/results")


def test_nothing_that_loads_is_wrong():
    """What a class makes of a checkpoint is right, or refused with the reason; recurrent models see padding on the left."""
    wrong = {row[0] for row in architectures_page.rows(RECORDS) if "**wrong**" in row}
    assert wrong <= RECURRENT


def test_a_word_for_each_outcome():
    """Wrong outweighs refused, which outweighs right; what is said of layers and export does not count."""
    right = {"loads": {"right": True}, "logits": {"right": True}, "export": {"refused": "no room"},
             "layers with heads": "3 of 3", "seconds": 1.0}  # fmt: skip
    assert architectures_page.verdict(right) == "right"
    assert architectures_page.verdict({"loads": {"refused": "x"}}) == "refused"
    assert architectures_page.verdict(right | {"answers": {"refused": "x"}}) == "in part"
    assert architectures_page.verdict(right | {"layers with heads": "0 of 3"}) == "no heads"
    assert architectures_page.verdict(right | {"export": {"right": False, "reason": "x"}}) == "**wrong**"
    assert architectures_page.verdict(right | {"a": {"refused": "x"}, "b": {"right": False}}) == "**wrong**"
    assert architectures_page.reasons(right | {"answers": {"refused": "the checkpoint: no"}}) == ["answers: no"]


# ------------------------------------------------------------------------------------------------------- the checks


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param("Mistral", "hooked", marks=needs_hooked),
        pytest.param("Mistral", "bridge", marks=pytest.mark.slow),
        ("Gemma2", "bridge"),
        pytest.param("FalconH1", "bridge", marks=pytest.mark.slow),
        pytest.param("OPT", "bridge", marks=pytest.mark.slow),
    ],
)
def test_a_family_says_the_same_again(name, backend, monkeypatch):
    """A window, soft caps, a hybrid cache and learned positions: as the committed file has it, reasons included."""
    monkeypatch.setattr(checks, "export", lambda made, base: "")  # tests of its own
    found = architectures.of_case(case(name), [backend])[backend]
    known = record()["results"]["cases"][name][backend]
    assert architectures_page.verdict(found) == architectures_page.verdict(known)
    assert architectures_page.reasons(found) == architectures_page.reasons(known)
    assert found["layers with heads"] == known["layers with heads"]


@torch.no_grad()
@pytest.mark.parametrize("check", ["logits", "answers", "scores", "fused"])
def test_other_weights_are_found(check, llama):
    """Against a Hugging Face model with a changed layer, every check says what is off; against its own, nothing."""
    model, hf = llama
    run = getattr(checks, check)
    assert run(model, hf) == ""
    weight = hf.model.layers[1].self_attn.o_proj.weight
    weight.mul_(3)
    try:
        assert run(model, hf)
    finally:
        weight.div_(3)
