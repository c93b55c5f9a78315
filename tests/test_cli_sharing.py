"""The verbs export and import as a user meets them: what is written, what is said, and one line for bad input."""

import json

import pytest
import torch
import transformers

import lofit_lens as ll
from tests import tiny
from tests.adapters import CHOSEN, random_adapter
from tests.task_rows import words_task
from tests.test_cli import run

TOKENS = torch.randint(3, 400, (1, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def adapter(loaded, tmp_path_factory):
    """A folder with offsets alone for the tiny Llama."""
    made = random_adapter(loaded("llama", "bridge"), A=0.0)
    made.meta.task = "caps"
    return made.save_pretrained(tmp_path_factory.mktemp("adapter") / "a")


@pytest.fixture(scope="module")
def own_task(tmp_path_factory):
    return words_task(tmp_path_factory.mktemp("task") / "caps")


@torch.no_grad()
def hooked_logits(model, adapter):
    with adapter.attached(model):
        return model(TOKENS)


def test_there_and_back(capsys, monkeypatch, adapter, bridge_llama, tmp_path):
    """Folded, the checkpoint is plain transformers' and has the hooked model's logits; imported again, the adapter's numbers."""
    lofit = ll.Lofit.from_pretrained(adapter)
    code, out, err = run(capsys, monkeypatch, "export", adapter, "--folded", "--out", tmp_path / "served", "-q")
    assert code == 0, err
    assert "loaded again and compared on" in out
    assert "greedy answers the same" in out
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "served").eval()
    with torch.no_grad():
        assert torch.allclose(plain(TOKENS).logits, hooked_logits(bridge_llama, lofit), atol=1e-5)
    heads = ",".join(map(str, CHOSEN))
    code, out, err = run(
        capsys, monkeypatch, "import", tmp_path / "served", "--heads", heads, "--out", tmp_path / "back"
    )
    assert code == 0, err
    assert "in the worst layer" in out
    back = ll.Lofit.from_pretrained(tmp_path / "back")
    assert torch.allclose(back.v, lofit.v, atol=1e-5)
    assert back.heads.heads == lofit.heads.heads


def test_every_other_form(capsys, monkeypatch, adapter, checkpoint, tmp_path):
    """PEFT's folder; Steerability's file, with the call that uses it, and back, where the model gives the shape."""
    for form, name in (("--peft", "peft"), ("--svec", "a.svec")):
        code, out, err = run(capsys, monkeypatch, "export", adapter, form, "--out", tmp_path / name)
        assert code == 0, err
        assert f"wrote {tmp_path / name}" in out.replace("\n", "")
        assert ("alpha=1.0, token_scope='all')" in out) == (form == "--svec")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["peft_type"] == "BEFT"
    args = (
        "import",
        tmp_path / "a.svec",
        "--heads",
        ",".join(map(str, CHOSEN)),
        "--alpha",
        1,
        "--out",
        tmp_path / "back",
    )
    code, _, err = run(capsys, monkeypatch, *args)
    assert (code, "give --model, --alpha" in err) == (2, True), err
    code, _, err = run(capsys, monkeypatch, *args, "--model", checkpoint("llama"), "--positions", "all")
    assert code == 0, err
    assert torch.allclose(ll.load_adapter(tmp_path / "back").shift(2), ll.load_adapter(adapter).v[2], atol=1e-6)


def test_the_hub(capsys, monkeypatch, remote, adapter, own_task, checkpoint, tmp_path):
    """Pushed with what an evaluation found, used from there by name and revision; other weights are refused unless asked for."""
    common = ("--task", own_task, "--model", checkpoint("llama"), "--device", "cpu")
    code, _, err = run(capsys, monkeypatch, "eval", *common, "--adapter", adapter, "--out", tmp_path / "e")
    assert code == 0, err
    push = ("export", adapter, "--hub", "ann/caps", "--result", tmp_path / "e", "--license", "mit")
    code, out, err = run(capsys, monkeypatch, *push)
    assert code == 0, err
    commit = remote.repos["ann/caps"].branches["main"]
    assert commit in out.replace("\n", "")
    card = remote.repos["ann/caps"].commits[commit]["README.md"].decode()
    assert "license: mit" in card
    assert "| caps | test |" in card
    code, _, err = run(capsys, monkeypatch, "eval", *common, "--out", tmp_path / "bare")
    assert code == 0, err
    code, _, err = run(capsys, monkeypatch, "export", adapter, "--hub", "ann/x", "--result", tmp_path / "bare")
    assert (code, "evaluation of the bare model" in err, "ann/x" in remote.repos) == (2, True, False), err
    code, out, err = run(capsys, monkeypatch, "eval", *common, "--adapter", f"ann/caps@{commit}")
    assert code == 0, err
    other = tiny.save(tmp_path / "other-llama", seed=1)
    use = ("generate", "word 1:", "-m", other, "-a", "ann/caps", "--max-new-tokens", 1)
    code, _, err = run(capsys, monkeypatch, *use)
    assert (code, "other weights" in err) == (2, True), err
    code, out, err = run(capsys, monkeypatch, *use, "--other-model")
    assert (code, "with adapter" in out) == (0, True), err


def test_bad_requests(capsys, monkeypatch, adapter, tmp_path):
    """One line, exit code 2, and nothing is written."""
    out = tmp_path / "x"
    (tmp_path / "a.pt").write_bytes(b"\x80\x04")
    (tmp_path / "a.json").write_text("{}")
    for args, message in (
        (("export", adapter, "--out", out), "no form asked for; give one of --folded"),
        (("export", adapter, "--folded", "--peft", "--out", out), "--folded and --peft asked for"),
        (("export", adapter, "--folded"), "--folded needs --out"),
        (("export", adapter, "--hub", "a/b", "--out", out), "--hub takes no --out; it takes --result"),
        (("export", tmp_path, "--folded", "--out", out), "is not an adapter folder"),
        (("export", adapter, "--svec", "--license", "mit", "--out", out), "--svec takes no --license; it takes --out"),
        (
            ("export", adapter, "--folded", "--out", adapter, "--overwrite"),
            "is the adapter itself, which would be lost",
        ),
        (("import", tmp_path / "a.json", "--out", tmp_path / "a.json"), "is the source itself, which would be lost"),
        (("import", tmp_path / "a.json", "--out", tmp_path, "--overwrite"), "was not written by this package"),
        (("import", "a.svec", "--base-revision", "x", "--out", out), "format svec takes no --base-revision"),
        (("import", tmp_path / "a.pt", "--out", out), "leave pickles where they are"),
        (("import", tmp_path / "a.json", "--out", out), "make an ITI adapter of a dictionary of directions in Python"),
        (("import", tmp_path / "a.json", "--format", "gguf", "--out", out), "unknown format 'gguf'; allowed: lofit"),
        (("import", tmp_path / "a.json", "--format", "lofit", "--k", 3, "--out", out), "--k 3 without --heads"),
        (("import", tmp_path / "nowhere", "--out", out), "nowhere"),
        (("import", "a.svec", "--model", "organism", "--alpha", 3, "--out", adapter), "exists"),
    ):
        code, _, err = run(capsys, monkeypatch, *args)
        assert (code, len(err.strip().splitlines())) == (2, 1), (args, err)
        assert message in err
        assert not out.exists()
