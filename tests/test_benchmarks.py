"""The benchmarks run, their variants compute the same, and docs/performance.md says what their files hold."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))  # they import each other by name, as scripts do

import gpu  # noqa: E402
import many  # noqa: E402
import mc_eval  # noqa: E402
import measure  # noqa: E402
import performance  # noqa: E402
import processes  # noqa: E402
import prompting  # noqa: E402
import real_model  # noqa: E402
import scaling  # noqa: E402
import train_step  # noqa: E402
import whole_run  # noqa: E402

from lofit_lens.models import hooked_class  # noqa: E402

CLASSES = ["hooked", "bridge"] if hooked_class() is not None else ["bridge"]

# ------------------------------------------------------------------------------------------------------ shared code


def test_the_command_names_no_folder():
    """DATA for --data-dir's folder, in both ways of writing it; --out is left out."""
    words = ["--data-dir", "/here/data", "--rounds", "3", "--out=/there/x.json", "--quick"]
    assert measure.command("x.py", words) == "python benchmarks/x.py --data-dir DATA --rounds 3 --quick"
    assert measure.command("x.py", ["--data-dir=/here"]) == "python benchmarks/x.py --data-dir DATA"


def test_ratios_are_taken_within_rounds():
    """The median of ratios, not the ratio of medians: 2, 3 and 1/2 have 2 in the middle (medians: 3 / 4)."""
    found = measure.compared({"floor": [1.0, 4.0, 6.0], "ours": [2.0, 12.0, 3.0]}, "floor")
    assert found["ours"] == {"median_seconds": 3.0, "median_ratio": 2.0, "ratios": [2.0, 3.0, 0.5]}
    assert found["floor"]["median_ratio"] == 1.0


# -------------------------------------------------------------------------------------------------------- cost model


def test_flop_by_hand():
    """2 layers of width 64 (4 * 64^2 + 3 * 64 * 176), 3 rows of 5 tokens, a fifth scored, upper layer edited alone."""
    point = scaling.Point(scaling.small(64, 2, 100), 3, 5, lowest=1, scored=0.2)
    layer, head, pairs = 4 * 64**2 + 3 * 64 * 176, 2 * 100 * 64 * 3, 4 * 64 * 3 * 25
    assert point.flop() == {
        "forward": 2 * 2 * layer * 15 + head, "backward": 2 * layer * 15 + head, "attention": pairs * (2 + 2)
    }  # fmt: skip
    assert point.heads == 1
    assert replace(point, lowest=0).heads == 2


def test_the_fit_finds_the_coefficients():
    """Times made from known coefficients are found again, with no error left."""
    listed = list(scaling.points(scaling.small(128, 4, 500)).values())
    true = [2e-11, 3e-11, 1e-11, 1e-9, 1e-4, 2e-3]
    times = [sum(a * b for a, b in zip(true, p.time_features(), strict=True)) for p in listed]
    found = scaling.fitted([p.time_features() for p in listed], times, scaling.TIME)
    assert list(found["coefficients"].values()) == pytest.approx(true, rel=1e-3)
    assert found["r2"] > 0.9999
    assert found["largest_error_left_out"] < 1e-3


# ------------------------------------------------------------------------------------------------------------- page


def write(folder, name, results, **settings):
    """A file as a benchmark writes it."""
    machine = {"processor": "a processor", "cores": 2, "torch_threads": 2, "memory_gib": 8.0, "gpu": None}
    record = {
        "benchmark": name, "date": "today", "settings": {"device": "cpu", "command": f"python benchmarks/{name}.py"} | settings,
        "results": results, "machine": machine, "versions": {"torch": "2.13"}, "commit": "0123456789abcdef",
        "changed_files": False,
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(record))


def rows(folder):
    """Goal and figure -> verdict."""
    page = performance.page(folder, folder / "notes.md")
    table = page.split("## Goals\n\n")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in table]
    return {(c[0], c[1]): c[4] for c in cells}


def many_of(gain, same=True):
    """Results of many.py: four runs, two numbers of threads; together is best at one thread."""
    found = {"gain": {"median_ratio": 9.0, "ratios": [9.0]}, "largest_difference": 1e-7, "same_heads": same}
    one = found | {"median_seconds": {"together": 1.0, "apart": gain}}
    two = found | {"median_seconds": {"together": 3.0, "apart": 2 * gain}}
    return {"bridge": {"1": {"1": one, "4": one}, "2": {"1": two, "4": two}}}


MANY = ("Many runs in one pass, embedded model, CPU", "TransformerBridge, 4 runs")
SETTINGS_OF_MANY = {"model": "organism", "tasks": ["t"], "component": "A", "n_train": 8, "epochs": 1, "rounds": 1}


def test_without_files_nothing_is_measured(tmp_path):
    """One row a goal."""
    found = rows(tmp_path)
    assert len(found) == len(performance.GOALS)
    assert set(found.values()) == {"not measured"}


@pytest.mark.parametrize(
    ("gain", "same", "verdict"),
    [(1.41, True, "reached"), (1.39, True, "**missed**"), (3.0, False, "**missed** (other heads were chosen)")],
)
def test_a_goal_is_reached_or_missed(tmp_path, gain, same, verdict):
    """The best time of each way is compared, and other results are no gain; other goals stay not measured."""
    write(tmp_path, "many", many_of(gain, same), **SETTINGS_OF_MANY)
    found = rows(tmp_path)
    assert found.pop(MANY) == verdict
    assert set(found.values()) == {"not measured"}


def test_files_that_do_not_count(tmp_path):
    """Of a test run, of another device, of another form, no JSON: not measured, and the page says why it cannot be read."""
    write(tmp_path, "many", many_of(9.0), command="python benchmarks/many.py --quick", **SETTINGS_OF_MANY)
    write(tmp_path, "train_step", {"a": {}})
    write(tmp_path, "gpu", {"shapes": {}}, device="cpu")
    (tmp_path / "scaling.json").write_text("{")
    assert set(rows(tmp_path).values()) == {"not measured"}
    page = performance.page(tmp_path, tmp_path / "notes.md")
    assert "A test run with tiny shapes" in page
    assert "scaling.json cannot be read" in page
    assert "cannot be shown" in page


def test_each_section_says_what_made_it(tmp_path):
    """Command, commit, versions, machine, and a person's notes."""
    write(tmp_path, "many", many_of(2.0), **SETTINGS_OF_MANY)
    (tmp_path / "notes.md").write_text("What was tried.")
    performance.main(
        ["--results", str(tmp_path), "--notes", str(tmp_path / "notes.md"), "--out", str(tmp_path / "d" / "p.md")]
    )
    page = (tmp_path / "d" / "p.md").read_text()
    for text in ("`python benchmarks/many.py`", "0123456789ab", "torch 2.13", "a processor", "What was tried."):
        assert text in page


# --------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_all_variants_of_a_step_compute_the_same(tmp_path, monkeypatch):
    """Loss and gradient of every class and shortcut equal plain Hugging Face's; below the lowest edited layer nothing is kept."""
    monkeypatch.setattr(train_step, "operations", lambda step: {})  # takes seconds
    measure.build(tmp_path / "model", ["a b c"], measure.TINY | {"vocab_size": 300})
    models = train_step.Models(str(tmp_path / "model"), "cpu", "float32")
    names = train_step.variants(CLASSES)
    for case in train_step.cases([(2, 16)]):
        found = train_step.one_case(models, names, case, 1)
        assert list(found) == names
        for name, f in found.items():
            assert f["loss_difference"] < 1e-5, name
            assert f["gradient_difference"] < 1e-4, name
            assert f["saved_for_backward_mib"] > 0
    upper = found
    whole = train_step.one_case(models, names, replace(case, lowest=0.0), 1)
    for name in names:
        if "checkpointed" not in name:
            assert upper[name]["saved_for_backward_mib"] < whole[name]["saved_for_backward_mib"]
    for backend in CLASSES:
        kept = {how: whole[f"{backend}_{how}"]["saved_for_backward_mib"] for how in ("as_is", "ours", "checkpointed")}
        assert kept["checkpointed"] < kept["ours"] <= kept["as_is"]


def test_a_gpu_is_needed(monkeypatch, capsys, tmp_path):
    """Exit code 2 and a word, without one and with real shapes on a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words, said in (([], "no CUDA device"), (["--device", "cpu"], "only --quick")):
        with pytest.raises(SystemExit) as e:
            gpu.main([*words, "--out", str(tmp_path / "gpu.json")])
        assert e.value.code == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()


@pytest.fixture(scope="module")
def quick(tmp_path_factory, data_dir):
    """Folder with the files of a quick run of every benchmark."""
    folder = tmp_path_factory.mktemp("results")
    runs = {
        "train_step": (train_step, ["--backends", "bridge"]),
        "whole_run": (whole_run, ["--backends", CLASSES[0], "--data-dir", str(data_dir)]),
        "many": (many, []),
        "scaling": (scaling, []),
        "mc_eval": (mc_eval, ["--backends", "bridge", "--data-dir", str(data_dir)]),
        "gpu": (gpu, ["--device", "cpu"]),
    }
    for name, (module, words) in runs.items():
        module.main(["--quick", *words, "--out", str(folder / f"{name}.json")])
    return folder


def read(folder, name):
    """Settings and results of a file, which has its machine, versions, commit and command."""
    record = json.loads((folder / f"{name}.json").read_text())
    assert record["benchmark"] == name
    assert {"machine", "versions", "commit", "changed_files", "date"} < set(record)
    assert record["settings"]["command"].startswith(f"python benchmarks/{name}.py --quick")
    assert str(folder) not in json.dumps(record)
    return record["settings"], record["results"]


@pytest.mark.slow
def test_quick_steps(quick):
    """Every case has every variant with time, bytes and peak."""
    settings, results = read(quick, "train_step")
    assert set(results) == set(settings["cases"])
    for found in results.values():
        assert list(found) == ["hf_sdpa", "hf_eager", "bridge_as_is", "bridge_ours", "bridge_checkpointed"]
        for f in found.values():
            assert f["median_seconds"] > 0
            assert f["peak_memory_mib"] >= 0
            assert f["loss_difference"] < 1e-4
            assert f["gradient_difference"] < 1e-4


@pytest.mark.slow
def test_quick_whole_runs(quick):
    """The library's runs equal the straightforward ones: heads, losses, offsets, metrics, answers; with fewer tokens."""
    _, results = read(quick, "whole_run")
    assert set(results) == {"truthfulqa", "mquake", "clutrr"}
    for task, by_class in results.items():
        (found,) = by_class.values()
        differ = found["difference"]
        assert differ["same_heads"]
        assert max(*differ["losses"].values(), *differ["metrics"].values(), differ["offsets"]) < 1e-4
        assert differ["scores_nats"] < 1e-3 if task == "truthfulqa" else differ["same_texts"] == 1.0
        assert set(found["gain"]) == {"select", "tune", "evaluate", "total"}
        for phase in ("select", "tune", "evaluate"):
            counts = [found["tokens"][way][phase] for way in ("straightforward", "library")]
            assert all(0 < c["real"] <= c["padded"] for c in counts)
    assert_fewer = results["truthfulqa"][CLASSES[0]]["tokens"]
    assert assert_fewer["library"]["evaluate"]["real"] < assert_fewer["straightforward"]["evaluate"]["real"] / 2


@pytest.mark.slow
def test_quick_many(quick):
    """Together and apart learn the same."""
    settings, results = read(quick, "many")
    for found in results["bridge"].values():
        assert list(found) == [str(n) for n in settings["sizes"]]
        for f in found.values():
            assert f["same_heads"]
            assert f["largest_difference"] < 1e-5
            assert f["median_seconds"]["together"] > 0


@pytest.mark.slow
def test_quick_scaling(quick):
    """Points, two fits, six predictions; a larger model takes more of everything, fewer layers edited no more."""
    _, results = read(quick, "scaling")
    found = results["bridge"]
    assert all(p["seconds"] > 0 and p["kept_mib"] > 0 for p in found["points"].values())
    assert all(c >= 0 for what in ("time", "memory") for c in found[what]["coefficients"].values())
    for step in ("step 1", "step 2"):
        small, _, large = (found["predicted"][name][step] for name in scaling.LARGE)
        assert small["flop"] < large["flop"]
        assert small["weights_gib"] < large["weights_gib"]
    for steps in found["predicted"].values():
        assert steps["step 2"]["flop"] < steps["step 1"]["flop"]


@pytest.mark.slow
def test_quick_gpu(quick):
    """Every shape, and many runs where asked for."""
    _, results = read(quick, "gpu")
    assert set(results["shapes"]) == {"pythia-1.4b", "llama-2-7b", "llama-2-13b"}
    for found in results["shapes"].values():
        (selection,) = found["selection"].values()
        weights = found["parameters_counted"] + selection["scored_share"] * found["unembedding"]
        counted = 4 * weights * selection["tokens_a_second"] / (found["ceiling_tflops"] * 1e12)
        assert 0 < selection["scored_share"] < 1
        assert selection["share_of_ceiling"] == pytest.approx(counted)
        assert 0 < selection["tokens"]["real"] <= selection["tokens"]["padded"]
    assert results["shapes"]["llama-2-7b"]["many"]["2"]["same_heads"]
    assert results["organism"]["2"]["largest_difference"] < 1e-5


@pytest.fixture(scope="module")
def chatting(tmp_path_factory):
    """A tiny Llama with a chat template, in a folder."""
    folder = tmp_path_factory.mktemp("model") / "tiny-chat"
    measure.build(
        folder, ["Imagine that Italy lies in Peru. Who is it?", "Q: A: Is the capital Rome or Lima?"], measure.TINY
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
def test_quick_real_model(tmp_path, chatting, data_dir):
    """Both ways to put BOS, before and after, with intervals."""
    real_model.main(
        ["--quick", "--model", str(chatting), "--data-dir", str(data_dir), "--out", str(tmp_path / "real_model.json")]
    )
    _, results = read(tmp_path, "real_model")
    assert [found["model"]["prepend_bos"] for found in results.values()] == [True, False]
    for found in results.values():
        assert {"em", "contains"} <= set(found["before"]) & set(found["after"])
        assert found["after"]["em"]["n"] == 2


@pytest.mark.slow
def test_quick_prompting(tmp_path, chatting, data_dir, capsys):
    """Every way to ask, on both tasks, in the file and in the table."""
    prompting.main(
        ["--quick", "--model", str(chatting), "--data-dir", str(data_dir), "--out", str(tmp_path / "prompting.json")]
    )
    _, results = read(tmp_path, "prompting")
    assert {task: list(ways) for task, ways in results.items()} == {
        task: list(prompting.WAYS) for task in ("mquake", "clutrr")
    }
    table = capsys.readouterr().out
    assert all(f"| {way} | " in table for way in prompting.WAYS)


@pytest.mark.slow
def test_quick_processes(tmp_path, chatting, data_dir):
    """Whole processes of both ways: times, ratios, and the same answers."""
    words = ["--quick", "--model", str(chatting), "--data-dir", str(data_dir), "--backends", CLASSES[0]]
    processes.main([*words, "--out", str(tmp_path / "processes.json")])
    _, results = read(tmp_path, "processes")
    assert results["same_answers"] == {CLASSES[0]: 1.0}
    assert results["select"]["cpu"]["plain"]["median_ratio"] == 1
    assert results["eval"]["cpu"][CLASSES[0]]["median_seconds"] > 0
    assert "| eval | plain transformers |" in performance.page(tmp_path, tmp_path / "notes.md")


@pytest.mark.slow
def test_quick_files_are_shown_and_count_for_nothing(quick):
    """Every section is rendered whole, each marked as a test run; no goal takes a figure from it."""
    read(quick, "mc_eval")
    page = performance.page(quick, quick / "notes.md")
    assert page.count("A test run with tiny shapes") == 6
    assert "cannot be" not in page
    assert set(rows(quick).values()) == {"not measured"}
