"""The shell's table of methods, its probes and its adapters of any method, on a tiny checkpoint and a task of one's own."""

import json

import pandas as pd
import pytest

import lofit_lens as ll
from lofit_lens.experiments.comparison import METHODS, rows_of
from lofit_lens.experiments.methods import repe
from lofit_lens.heads import HeadScores, HeadSet
from lofit_lens.training.selectors import SELECTORS
from tests import tiny
from tests.conftest import BACKENDS
from tests.test_cli import run

ROWS = list(rows_of(METHODS.values()))
ANSWERS = (" yes", " no")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("shell") / "my-llama", "llama")


@pytest.fixture(scope="module")
def own_task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task") / "caps"
    folder.mkdir()
    for split, n in (("train", 6), ("val", 4), ("test", 5)):
        rows = [{"prompt": f"{split} {i}:", "chosen": ANSWERS[i % 2], "rejected": ANSWERS[1 - i % 2]} for i in range(n)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "texts.txt").write_text("Ann asked her son.\n\nBob met his aunt.\n")
    return folder


@pytest.fixture
def shell(capsys, monkeypatch):
    """Run one command; exit code, stdout, stderr."""
    return lambda *args: run(capsys, monkeypatch, *args)


@pytest.fixture
def small_grids(monkeypatch):
    """Two points per method instead of four: the shell is tested here, not the methods."""
    monkeypatch.setattr("lofit_lens.experiments.methods.base.RATES", (0.3, 1.0))
    monkeypatch.setattr("lofit_lens.experiments.methods.iti.STRENGTHS", (5.0, 15.0))
    monkeypatch.setattr("lofit_lens.experiments.methods.repe.POINTS", repe.POINTS[:2])


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_method_on_each_class(shell, small_grids, llama, own_task, tmp_path, backend):
    """All rows, all columns, all files; LoRA on HookedTransformer takes the same checkpoint as a bridge."""
    out = tmp_path / "c"
    code, printed, err = shell(
        "compare", "--task", own_task, "--model", llama, "--backend", backend, "--device", "cpu", "--seeds", 2, "--texts",
        own_task / "texts.txt", "--out", out, "-q",
    )  # fmt: skip
    assert code == 0, err
    read = pd.read_csv(out / "caps.csv")
    assert read["method"].tolist() == ROWS
    assert all(name in printed for name in ROWS)
    for column in ("mc1", "mc1_low", "mc1_high", "n_parameters", "fit_mean", "evaluation_mean"):
        assert read[column].notna().all(), column
    others = read[read["method"] != "LoFiT 3 %"]
    assert others[["difference", "difference_low", "difference_high", "p_holm"]].notna().all().all()
    assert read[read["method"] != "zero-shot"][["kl", "kl_low", "kl_high", "increase"]].notna().all().all()
    # K = 1 of 12 heads of size 8 (3 heads for 10 %), d_model 32, 3 layers, rank 8, q and v.
    counts = dict(zip(read["method"], read["n_parameters"], strict=True))
    assert {k: v for k, v in counts.items() if k not in ("RepE", "JoLA")} == {
        "zero-shot": 0, "ITI": 8, "random heads": 8, "LoFiT 3 %": 8, "LoFiT 10 %": 24, "LoRA": 8 * (32 + 32) * 2 * 3,
        "RED": 2 * 32 * 3, "LoReFT": 3 * (2 * 8 * 32 + 8), "post-block": 3 * 2 * 8 * 32,
    }  # fmt: skip
    assert (out / "caps.md").read_text().count("\n| ") == len(ROWS) + 2  # head, rule, rows
    assert (out / "caps.tex").read_text().count(r"\\") == len(ROWS) + 1
    trials = pd.read_csv(out / "caps-trials.csv")
    assert set(trials["method"]) == set(ROWS) - {"zero-shot", "random heads", "LoFiT 10 %"}
    assert trials.groupby("method").size().unique().tolist() == [2]
    assert trials.groupby("method")["chosen"].sum().unique().tolist() == [1]


def test_a_comparison_goes_on_from_its_folder(shell, small_grids, llama, own_task, tmp_path, monkeypatch):
    """The same command again fits nothing; JSON on stdout alone."""
    args = (
        "compare", "--task", own_task, "--model", llama, "--device", "cpu", "--method", "RED", "--texts", "none", "--out",
        tmp_path / "c", "-q",
    )  # fmt: skip
    code, printed, err = shell(*args)
    assert code == 0, err
    assert "LoFiT 3 %" in printed
    assert "KL" not in printed

    monkeypatch.setattr("lofit_lens.experiments.grid.compute.KINDS", {})  # nothing can be computed
    code, printed, err = shell(*args, "--json")
    assert code == 0, err
    rows = json.loads(printed)["caps"]["rows"]
    assert [r["method"] for r in rows] == ["LoFiT 3 %", "RED"]


def test_selectors_side_by_side(shell, llama, own_task, tmp_path):
    """Two selectors, the A-norm first, the random one with five draws."""
    code, printed, err = shell(
        "compare", "--task", own_task, "--model", llama, "--device", "cpu", "--selectors", "--method", "random", "--method",
        "A-norm", "--out", tmp_path / "c", "-q",
    )  # fmt: skip
    assert code == 0, err
    assert "heads by random" in printed
    runs = pd.read_csv(tmp_path / "c" / "caps-selectors-runs.csv")
    assert runs.groupby("method").size().to_dict() == {"heads by A-norm": 2, "heads by random": 5}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("compare",), "two folders"),
        (("compare", "a", "b", "--task", "organism/truth"), "--task"),
        (("compare", "--task", "organism/truth", "--method", "LORA"), "Did you mean 'LoRA'"),
        (("compare", "--task", "organism/truth", "--selectors", "--method", "norm"), "allowed: A-norm"),
        (("compare", "--task", "organism/truth", "--texts", "nowhere"), "unknown text"),
        (("compare", "--task", "organism/trut"), "Did you mean 'organism/truth'"),
        (("select", "-t", "organism/truth", "--by", "norm", "--out", "x"), "allowed: A-norm"),
        (
            ("select", "-t", "organism/truth", "--by", "random", "--lr", "1", "--out", "x"),
            "--lr is a setting of A-norm",
        ),
    ],
    ids=lambda a: " ".join(a)[:40] if isinstance(a, tuple) else None,
)
def test_bad_requests_are_one_line_and_exit_2(shell, monkeypatch, tmp_path, args, message):
    """Before any work; nothing is written."""
    monkeypatch.chdir(tmp_path)
    code, _, err = shell(*args)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_probe_writes_scores_that_tune_takes(shell, llama, own_task, tmp_path):
    """Accuracies in [0, 1], the best heads, the share of the more frequent label."""
    common = ("--model", llama, "--task", own_task, "--device", "cpu")
    code, printed, err = shell("probe", *common, "--out", tmp_path / "p", "--k", 2, "-q")
    assert code == 0, err
    scores, heads = HeadScores.load(tmp_path / "p" / "scores.json"), HeadSet.load(tmp_path / "p" / "heads.json")
    assert scores.kind == "probe accuracy"
    assert scores.top(2).heads == heads.heads
    assert "label: 0.500" in printed
    code, _, err = shell("tune", *common, "--heads", tmp_path / "p", "--out", tmp_path / "a", "--epochs", 1, "-q")
    assert code == 0, err


@pytest.mark.parametrize("by", [name for name in SELECTORS if name != "A-norm"])
def test_select_by_another_score(shell, llama, own_task, tmp_path, by):
    """Each selector by its name; the file says what the scores are."""
    code, printed, err = shell(
        "select", "--model", llama, "--task", own_task, "--device", "cpu", "--by", by, "--out", tmp_path / "h", "--k", 2, "-q"
    )  # fmt: skip
    assert code == 0, err
    scores = HeadScores.load(tmp_path / "h" / "scores.json")
    assert scores.shape == (3, 4)
    assert f"top 2 by {scores.kind}" in printed


def adapters(model):
    """One of each method, with numbers that change something."""
    return {
        "red": ll.Red.for_model(model), "loreft": ll.LoReft.for_model(model, seed=0),
        "lora": ll.Lora.for_model(model, seed=0),
    }  # fmt: skip


@pytest.mark.parametrize("method", ["red", "loreft", "lora"])
def test_eval_and_generate_take_any_adapter(shell, llama, own_task, tmp_path, method):
    """`--adapter` reads the method from the folder; LoRA gets the bridge by itself, and refuses the other class."""
    adapter = adapters(ll.load_model(llama, backend="bridge", device="cpu"))[method]
    adapter.save_pretrained(tmp_path / "a")
    common = ("--model", llama, "--adapter", tmp_path / "a", "--device", "cpu")
    code, printed, err = shell("eval", *common, "--task", own_task, "-q")
    assert code == 0, err
    assert "mc1" in printed
    code, printed, err = shell("generate", "word", *common, "--max-new-tokens", 1)
    assert code == 0, err
    assert "with adapter" in printed
    if method == "lora":
        code, _, err = shell("eval", *common, "--task", own_task, "-q", "--backend", "hooked")
        assert code == 2
        assert "bridge" in err
