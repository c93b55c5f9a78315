"""What is read from a study's adapters: which parts, kept and not computed again, restored as they were; and the report of it."""

import json
import shutil

import numpy as np
import pytest
import torch

from lofit_lens.analysis.logit_lens import promoted_tokens
from lofit_lens.analysis.stored import KINDS, frame_of, restored
from lofit_lens.errors import DataError, InputError
from lofit_lens.experiments import readings
from lofit_lens.experiments.grid.run import plan_grid
from lofit_lens.experiments.store.store import Store
from lofit_lens.experiments.tables.load import load_results
from lofit_lens.explorer.readings import stored_readings
from lofit_lens.explorer.source import read_source
from lofit_lens.heads import Head
from lofit_lens.models import visible
from lofit_lens.report.page import render
from tests import studies

KIN, PLACE = (t.name for t in studies.TASKS)
GIVEN = {"tasks": studies.TASKS, "other_tasks": [studies.OTHER], "texts": studies.TEXTS}
PARTS = {
    "tokens", "geometry", "attention", "leave_one_out", "keep_only", "removal", "removal_edits", "drift", "long_context"
}  # fmt: skip


@pytest.fixture
def results(study_folder):
    return load_results(study_folder)


def test_all_parts_are_there(results, bridge_llama):
    """A file a task and one of all together; tokens are those of the first seed's adapter on its own heads."""
    found = results.readings()
    assert {t: set(parts) for t, parts in found.items()} == {
        KIN: PARTS, PLACE: PARTS, "together": {"interference", "learned_in_turn"}
    }  # fmt: skip
    lofit = results.adapter(KIN, seed=0)
    prompts = [e.prompt for e in studies.TASKS[0].examples("val")]
    assert found[KIN]["tokens"] == json.loads(
        json.dumps(promoted_tokens(bridge_llama, lofit, prompts=prompts).to_dict())
    )
    assert [r["head"] for r in found[KIN]["geometry"]["rows"]] == [str(h) for h in lofit.heads]
    assert found[KIN]["removal"]["rows"][1]["heads"] == str(lofit.heads)
    assert len(found[KIN]["attention"]["heads"]["heads"]) == 12, "all heads of a small model"
    assert {r["n"] for r in found[KIN]["keep_only"]["rows"]} == {5}, "the plan's limit"


def test_attention_is_with_the_adapter(results, bridge_llama):
    """Patterns of later layers are those of the edited model."""
    patterns = restored(results.readings()[KIN]["attention"], "here")
    lofit = results.adapter(KIN, seed=0, model=bridge_llama)
    seen = []
    tokens = bridge_llama.tokenizer(patterns.prompts[0], return_tensors="pt", add_special_tokens=True)["input_ids"]
    if tokens.shape[1] < len(patterns.tokens[0]):
        tokens = torch.cat([torch.tensor([[bridge_llama.tokenizer.bos_token_id]]), tokens], dim=1)
    with lofit.attached(bridge_llama):
        hook = ("blocks.2.attn.hook_pattern", lambda x, hook: seen.append(x[0, 1].clone()))
        bridge_llama.run_with_hooks(tokens, fwd_hooks=[hook])
    assert torch.allclose(patterns.of("L2H1"), seen[0], atol=1e-4)  # kept with four decimals


def of_task(folder, task):
    """Name of the run that holds a task's reading."""
    (found,) = [
        name
        for name, row in Store(folder).grids()["small"]["cells"].items()
        if (row["kind"], row["task"]) == ("reading", task)
    ]
    return found


def test_kept_and_not_computed_again(study_folder, bridge_llama, tmp_path):
    """A second call computes nothing; a reading that is gone is made again, the same."""
    copy = shutil.copytree(study_folder, tmp_path / "study")
    assert studies.run(bridge_llama, copy).computed == ()
    name = of_task(copy, KIN)
    before = (Store(copy).folder(name) / "readings.json").read_bytes()
    Store(copy).remove(name)
    assert KIN not in load_results(copy).readings()
    assert studies.run(bridge_llama, copy).computed == (name,)
    assert (Store(copy).folder(name) / "readings.json").read_bytes() == before


def test_a_part_that_cannot_be_had_is_left_out_and_said(caplog):
    """Bad input of one part leaves the others."""

    def no():
        raise InputError("nothing to read")

    assert readings._parts({"a": dict, "b": no}) == {"a": {}}
    assert any("b is left out: nothing to read" in m for m in caplog.messages)


def test_large_models_keep_the_adapters_patterns(results, bridge_llama, monkeypatch):
    """Above the limit: the adapter's own heads; prompts that are too long to be read are passed over."""
    lofit = results.adapter(KIN, k=2, model=bridge_llama)
    prompts = ["Ann saw " * 60, *(e.prompt for e in studies.TASKS[0].examples("val"))]
    assert len(readings._patterns(bridge_llama, lofit, prompts)["heads"]["heads"]) == 12
    monkeypatch.setattr(readings, "ALL_HEADS", 11)
    record = readings._patterns(bridge_llama, lofit, prompts)
    assert record["heads"]["heads"] == [list(h) for h in lofit.heads]
    assert record["prompts"] == prompts[1:3]
    with pytest.raises(InputError, match="more than 60 tokens"):
        readings._patterns(bridge_llama, lofit, prompts[:1])


def test_another_reading_where_what_it_depends_on_changes(study_folder, bridge_llama):
    """Other draws of random heads, other texts: other runs; the adapters are the same."""
    base = {c.name: c for c in plan_grid(studies.GRID, model=bridge_llama, **GIVEN).cells}
    runs = [run.model_copy(update={"draws": 3}) if "random" in run.heads else run for run in studies.GRID.runs]
    for changed in (
        plan_grid(studies.with_changes(runs=runs), model=bridge_llama, **GIVEN),
        plan_grid(studies.GRID, model=bridge_llama, **{**GIVEN, "texts": studies.TEXTS[1:]}),
    ):
        new = [c.row for c in changed.cells if c.name not in base and c.row["kind"] == "reading"]
        assert [row["task"] for row in new] == [KIN, PLACE]


def test_records_come_back_as_they_were(results):
    """Every part's record gives the object that writes the same record; patched answers are a control of localisation only."""
    kinds = set()
    for task, parts in results.readings().items():
        for name, part in parts.items():
            if name == "geometry":
                continue
            kinds.add(part["kind"])
            again = json.loads(json.dumps(restored(part, task).to_dict()))
            assert again == part, (task, name)
    assert kinds == set(KINDS) - {"lofit_lens.AnswerPatching"}


def test_a_column_without_a_number_is_one_of_nan():
    """One item has no interval: low and high are None in the file, NaN in the table."""
    frame = frame_of([{"low": None, "value": 0.5}, {"low": None, "value": 1.0}])
    assert frame["low"].dtype == float
    assert frame["low"].isna().all()
    assert frame["value"].tolist() == [0.5, 1.0]


@pytest.mark.parametrize("part", ["keep_only", "removal"])
def test_older_records_without_p_lose_their_intervals(results, part):
    """Those were no tests of chosen against random heads; all else is as it was."""
    record = results.readings()[KIN][part]
    old = {
        **record,
        "curve": [{k: v for k, v in row.items() if k not in ("p", "pool")} | {"low": -1.0} for row in record["curve"]],
    }
    found = restored(old, "old").curve
    assert found[["low", "high", "p"]].isna().all(axis=None)
    assert found["difference"].tolist() == [row["difference"] for row in record["curve"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "nix"}, "kind of record 'nix'"),
        ({"schema": 2}, "schema 2"),
        ({"rows": None}, "incomplete"),
        ({"task": ...}, "incomplete"),
    ],
)
def test_damaged_records_are_named(results, change, message):
    """Kind, schema and fields are checked; the file is named."""
    record = {**results.readings()[KIN]["keep_only"], **change}
    record = {k: v for k, v in record.items() if v is not ...}
    with pytest.raises(DataError, match=f"kin.json: .*{message}"):
        restored(record, "kin.json")


def test_damaged_file_is_named(study_folder, tmp_path):
    """No JSON under a reading's name."""
    copy = shutil.copytree(study_folder, tmp_path / "study")
    (Store(copy).folder(of_task(copy, KIN)) / "readings.json").write_text("{")
    with pytest.raises(DataError, match=r"readings\.json"):
        load_results(copy).readings()


# ------------------------------------------------------------------------------------------------------ report


def test_explorer_and_report_have_what_was_read(results, monkeypatch):
    """Each head's tokens, cosines and worth; patterns. Those that do not fit are left out, first prompts kept, and counted."""
    source, parts = read_source(results), results.readings()[KIN]
    row = parts["geometry"]["rows"][0]
    found = source.readings[row["head"]][0]
    assert found["title"] == f"LoFiT on {KIN}, from the results"
    loss = parts["leave_one_out"]["rows"][0]
    change, low, high = (f"{round(-loss[key], 3) + 0.0:+.3f}" for key in ("loss", "high", "low"))
    assert found["facts"][0] == ["norm of the offset v", f"{row['v_norm']:.3g}"]
    assert ["cosine with ITI mass mean", f"{row['cos_mass_mean']:.2f}"] in found["facts"]
    assert found["facts"][-1] == ["change of the metric without this head", f"{change} [{low}, {high}]"]
    strongest = next(
        r for r in parts["tokens"]["rows"] if (r["head"], r["kind"], r["rank"]) == (row["head"], "suppressed", 1)
    )
    assert found["suppressed"][0] == [visible(strongest["token"]), f"{strongest['logit']:+.2f}"]
    first, pattern = source.attention[0], torch.tensor(parts["attention"]["patterns"][0][0])
    assert first["prompt"] == parts["attention"]["prompts"][0]
    head = str(Head(*parts["attention"]["heads"]["heads"][0]))
    assert [len(w) for w in first["heads"][head]] == list(range(1, len(first["tokens"]) + 1))
    np.testing.assert_allclose(first["heads"][head][-1], 1000 * pattern[-1], atol=0.5)
    lengths = [len(a["tokens"]) for a in source.attention[:2]]
    monkeypatch.setattr("lofit_lens.explorer.readings.PATTERN_NUMBERS", sum(12 * n * (n + 1) // 2 for n in lengths))
    few = read_source(results)
    assert [a["task"] for a in few.attention] == [KIN, PLACE]
    assert few.left_out == 24
    assert "24 attention patterns are left out" in render(results)


def test_report_without_readings_and_transfer(study_folder, tmp_path):
    """A study of head scores and few runs still has a report; tokens stand without norms, and the sum of all heads is no head."""
    copy = shutil.copytree(study_folder, tmp_path / "study")
    results = load_results(copy)
    found = stored_readings(KIN, {"tokens": results.readings()[KIN]["tokens"]})
    assert set(found) == {str(h) for h in results.heads(KIN)}
    assert all(r["promoted"] and not r["facts"] for r in found.values())
    for task in (KIN, PLACE, "together"):
        Store(copy).remove(of_task(copy, task))
    for i in results.lofit(KIN, source=PLACE).index:
        shutil.rmtree(results.folders[i])
    text = render(load_results(copy))
    assert 'id="transfer"' not in text
    assert "LoFiT on kin, from the results" not in text
