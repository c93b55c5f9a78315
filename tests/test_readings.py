"""What is read from a study's adapters: which parts, kept and not computed again, restored as they were; and the report of it."""

import json
import shutil

import pytest
import torch

from lofit_lens.analysis.logit_lens import promoted_tokens
from lofit_lens.analysis.stored import KINDS, frame_of, restored
from lofit_lens.errors import DataError, InputError
from lofit_lens.experiments import readings
from lofit_lens.experiments.grid.run import plan_grid
from lofit_lens.experiments.store.store import Store
from lofit_lens.experiments.tables.load import load_results
from lofit_lens.report.collect import collect, head_readings
from lofit_lens.report.data import checked
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
    with pytest.raises(InputError, match="longer than 60 tokens"):
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
    """Every part's record gives the object that writes the same record."""
    kinds = set()
    for task, parts in results.readings().items():
        for name, part in parts.items():
            if name == "geometry":
                continue
            kinds.add(part["kind"])
            again = json.loads(json.dumps(restored(part, task).to_dict()))
            assert again == part, (task, name)
    assert kinds == set(KINDS)


def test_a_column_without_a_number_is_one_of_nan():
    """One item has no interval: low and high are None in the file, NaN in the table."""
    frame = frame_of([{"low": None, "value": 0.5}, {"low": None, "value": 1.0}])
    assert frame["low"].dtype == float
    assert frame["low"].isna().all()
    assert frame["value"].tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "nix"}, "kind 'nix'"),
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


def test_report_has_what_the_study_has(results):
    """Sets by task, selector and seed; transfer as ratios; each head's tokens, cosines and worth; patterns."""
    data = collect(results)
    assert checked(data)["model"]["n_layers"] == 3
    ids = [s["id"] for s in data["sets"]]
    assert ids[:4] == ["kin|A-norm|0", "kin|A-norm|1", "kin|A-norm|2", "kin|probe accuracy|0"]
    assert len(ids) == len(set(ids)) == 2 * (3 + 2)
    first = data["sets"][0]
    assert first["ranking"][0] == list(results.heads(KIN, k=1)[0])
    assert first["scores"] == results.scores[KIN, "A-norm", 0].values.tolist()
    assert first["k"] == results.k(KIN)
    transfer = data["transfer"]
    assert transfer["sources"] == [KIN, PLACE, "random"]
    assert transfer["accuracy"][0][1] == pytest.approx(results.values(results.lofit(PLACE, source=KIN)).mean())
    own = results.values(results.lofit(PLACE)).mean()
    if own:
        assert transfer["relative"][1][1] == pytest.approx(1.0)
    parts = results.readings()[KIN]
    row = parts["geometry"]["rows"][0]
    head = data["heads"][KIN][row["head"]]
    assert head["norm_v"] == row["v_norm"]
    assert head["cosines"]["ITI mass mean"] == row["cos_mass_mean"]
    strongest = next(
        r for r in parts["tokens"]["rows"] if (r["head"], r["kind"], r["rank"]) == (row["head"], "suppressed", 1)
    )
    assert head["suppressed"][0] == [strongest["token"], strongest["logit"]]
    loss = parts["leave_one_out"]["rows"][0]
    assert head["without"] == {"value": -loss["loss"], "low": -loss["high"], "high": -loss["low"]}
    patterns = data["attention"][KIN][0]
    assert patterns["heads"]["L1H2"] == parts["attention"]["patterns"][0][1 * 4 + 2]
    assert [t["title"] for t in data["tables"]]


def test_a_report_stays_small(results, monkeypatch):
    """Patterns that do not fit are left out, first prompts kept; the notes say how many. Values stand without geometry too."""
    parts = results.readings()
    sizes = [12 * len(parts[t]["attention"]["tokens"][0]) ** 2 for t in (KIN, PLACE)]
    monkeypatch.setattr("lofit_lens.report.collect.PATTERN_NUMBERS", sum(sizes))
    data = collect(results)
    assert {t: len(p) for t, p in data["attention"].items()} == {KIN: 1, PLACE: 1}
    assert any(note.startswith("24 attention patterns were left out") for note in data["notes"])
    del parts[KIN]["geometry"]
    heads = head_readings(parts[KIN])
    assert heads[str(results.heads(KIN)[0])]["norm_v"] is None
    assert heads[str(results.heads(KIN)[0])]["promoted"]
    assert "total" not in heads


def test_report_without_readings_and_transfer(study_folder, tmp_path):
    """A study of head scores and few runs still has a report."""
    copy = shutil.copytree(study_folder, tmp_path / "study")
    for task in (KIN, PLACE, "together"):
        Store(copy).remove(of_task(copy, task))
    results = load_results(copy)
    for i in results.lofit(KIN, source=PLACE).index:
        shutil.rmtree(results.folders[i])
    data = collect(load_results(copy))
    assert checked(data)["transfer"] is None
    assert data["heads"] == data["attention"] == {}
