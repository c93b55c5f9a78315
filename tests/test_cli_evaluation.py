"""The verbs eval, compare and damage: what stands on stdout, what is written, and exit code 2 for bad input."""

import json
from functools import partial

import pytest
import torch

from lofit_lens import EvalResult, evaluate
from lofit_lens.cli import common
from lofit_lens.evaluation import compare, damage
from lofit_lens.evaluation.stats import paired_permutation_test
from lofit_lens.interventions import Lofit
from lofit_lens.models import load_model
from lofit_lens.tasks import load_task
from tests.adapters import random_adapter
from tests.test_cli import run as run_cli

WORDS = ("aunt", "son", "wife", "book", "who?", "Rome")


@pytest.fixture(scope="module")
def made(tmp_path_factory, checkpoint):
    """A model, an adapter, a task of answers, a task of pairs, one with an item too long, and two results of the answers."""
    folder = tmp_path_factory.mktemp("shell")
    made = {"MODEL": checkpoint("llama")}
    rows = {
        "TASK": [{"prompt": f"{w}:", "answer": " x"} for w in WORDS],
        "PAIRS": [{"prompt": f"{w}:", "chosen": " mother", "rejected": " no"} for w in WORDS],
        "LONG": [{"prompt": p, "chosen": " mother", "rejected": " no"} for p in ("aunt", "?!" * 1100, "son")],
    }
    for name, listed in rows.items():
        made[name] = folder / name.lower()
        made[name].mkdir()
        for split in ("train", "test"):
            (made[name] / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in listed))
    made["ADAPTER"] = folder / "adapter"
    random_adapter(load_model(made["MODEL"], device="cpu")).save_pretrained(made["ADAPTER"])
    return made


@pytest.fixture
def shell(capsys, monkeypatch, made):
    """Run one command; capitals stand for what was made. The console goes back to stdout afterwards."""
    monkeypatch.setattr(common.console, "stderr", False)

    def run(*args):
        capsys.readouterr()
        verb, *rest = [made.get(a, a) if isinstance(a, str) else a for a in args]
        if verb in ("eval", "damage") and "--model" not in rest:
            rest += ["--model", made["MODEL"], "--device", "cpu", "--quiet"]
        return run_cli(capsys, monkeypatch, verb, *rest)

    return run


@pytest.fixture(scope="module")
def results(made, tmp_path_factory):
    """Folders: the pairs on the bare model and with the adapter, fewer of them, and another task."""
    folder, model = tmp_path_factory.mktemp("results"), load_model(made["MODEL"], device="cpu")
    pairs = load_task(made["PAIRS"])
    run = partial(evaluate, model, progress=False)
    run(pairs, label="bare model").save(folder / "bare")
    with Lofit.from_pretrained(made["ADAPTER"], model=model).attached(model):
        run(pairs, label="LoFiT").save(folder / "lofit")
    run(pairs, limit=3).save(folder / "few")
    run(load_task(made["TASK"])).save(folder / "other")
    return folder


def document(out):
    """Stdout, which must be one JSON document and nothing else."""
    record = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert out.rstrip("\n") == json.dumps(record, indent=2, ensure_ascii=False)
    return record


# --------------------------------------------------------------------------------------------------------------- eval


@pytest.mark.parametrize("on", ["auto", "bridge"])
def test_eval_json_is_one_document(shell, made, tmp_path, on):
    """Stdout holds the record that --out writes; tables and notes are on stderr. The label is the adapter, if none is given."""
    args = ("--task", "PAIRS", "--adapter", "ADAPTER", "--limit", 4, "--backend", on)
    code, out, err = shell("eval", *args, "--json", "--out", tmp_path / "e")
    assert code == 0, err
    record = document(out)
    assert record == json.loads((tmp_path / "e" / "result.json").read_text())
    assert (record["metrics"]["mc1"]["n"], record["config"]["limit"], record["label"]) == (4, 4, str(made["ADAPTER"]))
    assert "pairs" in err
    assert "mc2" in err


def test_eval_prints_a_table_with_intervals(shell, results):
    """Without --json the table is on stdout, each mean with its interval, as the library has them."""
    code, out, _ = shell("eval", "--task", "PAIRS")
    assert code == 0
    assert "n=6: bare model" in out
    for m in EvalResult.load(results / "bare").metrics.values():
        assert f"{m.mean:.4f}" in out
        assert f"{m.interval[0]:.4f} to {m.interval[1]:.4f}" in out


def test_eval_writes_what_the_library_finds(shell, results, tmp_path):
    """Every item, with the adapter attached, which changes the scores; --label is kept."""
    code, _, err = shell("eval", "--task", "PAIRS", "-a", "ADAPTER", "--label", "LoFiT", "--out", tmp_path / "e")
    assert code == 0, err
    read, made = EvalResult.load(tmp_path / "e"), EvalResult.load(results / "lofit")
    assert read.items["mc2"].tolist() == pytest.approx(made.items["mc2"].tolist(), abs=1e-6)
    assert (read.label, list(read.items.columns)) == (made.label, list(made.items.columns))
    assert abs(read["mc2"] - EvalResult.load(results / "bare")["mc2"]) > 1e-3


def test_eval_counts_items_that_are_too_long_as_wrong(shell):
    """Left as it is, the item is named and the exit code is 2; with --too-long wrong it is counted, of all three."""
    code, _, err = shell("eval", "--task", "LONG")
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert "error: item 2 of long needs" in err
    assert "--too-long wrong" in err
    code, out, err = shell("eval", "--task", "LONG", "--too-long", "wrong", "--json")
    record = document(out)
    repeats = {"test: rows that repeat a training row's prompt": 3}
    assert (code, record["counted"]) == (0, repeats | {"too long, counted as wrong": 1})
    assert (record["metrics"]["mc1"]["n"], record["config"]["too_long"]) == (3, "wrong")
    assert "too long, counted as wrong: 1" in err


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(("form", "metrics"), [("options", ["accuracy", "probability"]), ("generation", ["accuracy"])])
def test_eval_in_a_form(shell, data_dir, form, metrics):
    """BoolQ's two ways: --form chooses, and the record says which it was."""
    args = ("--task", "boolq", "--data-dir", data_dir / "boolq", "--form", form, "--limit", 2)
    code, out, err = shell("eval", *args, "--json")
    assert code == 0, err
    record = document(out)
    assert (record["form"], list(record["metrics"])) == (form, metrics)
    assert f"form {form}" in " ".join(err.split())


# ------------------------------------------------------------------------------------------------------------ compare


@pytest.mark.parametrize("test", ["bootstrap", "permutation"])
def test_compare_two_folders(shell, results, tmp_path, test):
    """The record is the library's comparison, on stdout and in the file; differences are first minus second."""
    args = ("--json", "--out", tmp_path / "c.json", "--test", test, "--seed", 3)
    code, out, err = shell("compare", results / "lofit", results / "bare", *args)
    assert code == 0, err
    one, other = (EvalResult.load(results / name) for name in ("lofit", "bare"))
    expected = compare(one, other, seed=3) if test == "bootstrap" else compare(
        one, other, seed=3, test=paired_permutation_test
    )  # fmt: skip
    assert document(out) == json.loads(json.dumps(expected.to_dict())) == json.loads((tmp_path / "c.json").read_text())
    assert expected["mc2"].difference == pytest.approx(one["mc2"] - other["mc2"])
    assert f"paired {test}" in err


def test_compare_several_seeds(shell, results):
    """Folders joined by commas are seeds of one side."""
    seeds = f"{results / 'lofit'},{results / 'bare'}"
    code, out, err = shell("compare", seeds, results / "bare", "--json")
    assert code == 0, err
    record = document(out)
    one, other = (EvalResult.load(results / name) for name in ("lofit", "bare"))
    assert record["a"]["mc2"]["seeds"] == 2
    assert record["tests"]["mc2"]["difference"] == pytest.approx((one["mc2"] - other["mc2"]) / 2)
    assert record["labels"] == ["LoFiT / bare model", "bare model"]


# ------------------------------------------------------------------------------------------------------------- damage


def test_damage_of_a_text_file(shell, made, tmp_path):
    """The library's numbers of its paragraphs, as one JSON document and as a file."""
    text = tmp_path / "t.txt"
    text.write_text("Ann asked her son.\n\nwho?\n\nRome is the capital of France.\n")
    code, out, err = shell(
        "damage",
        "--adapter",
        "ADAPTER",
        "--text",
        text,
        "--limit",
        2,
        "--max-tokens",
        5,
        "--json",
        "--out",
        tmp_path / "d",
    )
    assert code == 0, err
    record = document(out)
    assert record == json.loads((tmp_path / "d").read_text())
    model = load_model(made["MODEL"], device="cpu")
    lofit = Lofit.from_pretrained(made["ADAPTER"], model=model)
    expected = damage(model, lofit, ["Ann asked her son.", "who?"], max_tokens=5, progress=False)
    assert record["metrics"]["kl"]["mean"] == pytest.approx(expected.metrics["kl"].mean, abs=1e-6)
    assert (record["metrics"]["kl"]["n"], record["counted"]) == (2, {"texts cut": 1})
    assert "texts cut: 1" in err
    assert torch.tensor(record["positions"]["kl"]) == pytest.approx(expected.positions["kl"].tolist(), abs=1e-6)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("eval", "-t", "TASK", "--form", "options"), "task has only one form; omit form (got 'options')"),
        (("eval", "-t", "TASK", "--too-long", "skip"), "unknown too_long 'skip'; allowed: error, wrong"),
        (("eval", "-t", "TASK", "--batch-size", 0), "batch_size is 0; give 1 or more"),
        (("eval", "-t", "TASK", "--source", "hub"), "it takes no fold, no data_dir and no source"),
        (("damage", "-a", "ADAPTER", "--text", "nowhere.txt"), "unknown text 'nowhere.txt'; allowed: wikitext, organism"),
        (("damage", "-a", "ADAPTER", "--text", "organism", "--limit", 0), "limit is 0; give 1 or more"),
        (("damage", "-a", "ADAPTER", "--text", "organism", "--max-tokens", 1), "max_tokens is 1; give 2 or more"),
        (("damage", "-a", "nowhere", "--text", "organism"), "nowhere is not an adapter folder"),
    ],
)  # fmt: skip
def test_bad_values_are_one_line_and_exit_2(shell, args, message):
    """Each is named with what is allowed; nothing is on stdout that a reader of JSON would take for a result."""
    code, out, err = shell(*args, "--json")
    last = err.strip().splitlines()[-1]
    assert (code, out) == (2, ""), err
    assert last.startswith("error: ")
    assert message in last


@pytest.mark.parametrize(
    ("args", "option"),
    [(("eval", "-t", "TASK", "--token-budget", 0), "--token-budget"), (("compare", "x", "y", "--seed", -1), "--seed")],
)
def test_a_number_out_of_range_is_a_usage_error(shell, args, option):
    """The shell's own check: exit 2, and the option is named with its range."""
    code, out, err = shell(*args)
    assert (code, out) == (2, "")
    assert f"Invalid value for '{option}'" in err
    assert f"greater than or equal to {args[-1] + 1}" in " ".join(err.replace("│", "").split())


@pytest.mark.parametrize(
    ("second", "args", "message"),
    [
        ("few", (), "these results have 6 and 3 items"),
        ("other", (), "these results differ in task"),
        ("nowhere", (), "cannot read"),
        ("bare", ("--metric", "em"), "metric 'em' is not in all results; they share mc1, mc2, mc3"),
        ("bare", ("--test", "t"), "unknown test 't'; allowed: bootstrap, permutation"),
        ("bare", ("--alternative", "more"), "unknown alternative 'more'"),
        (",", (), "no result given"),
    ],
)
def test_folders_that_do_not_match_are_one_line_and_exit_2(shell, results, second, args, message):
    """Other rows, another task, no folder, an unknown metric or test: nothing is compared."""
    second = results / second if second != "," else second
    code, out, err = shell("compare", results / "lofit", second, *args)
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
    assert err.startswith("error: ")
    assert message in err
