"""What a grid is asked for: read from YAML or Python, and refused where it cannot be meant."""

from pathlib import Path

import pytest

from lofit_lens.errors import DataError, InputError
from lofit_lens.experiments.grid.paper import BLOCKS, PARTS, grid_named, known_grids, paper_grid
from lofit_lens.experiments.grid.run import read_grid
from lofit_lens.experiments.grid.specs import Grid, ModelSpec, Run, Selection, TaskSpec, heads_of

SMALL = "name: small\nmodel: organism\ntasks: [organism/truth]\n"


@pytest.fixture
def read(tmp_path):
    def read_text(text):
        (tmp_path / "grid.yaml").write_text(text)
        return read_grid(tmp_path / "grid.yaml")

    return read_text


def test_yaml_and_python_give_the_same_grid(read):
    """One value stands for a list of one, a name for a record; 1e-3 is a number, as people write it."""
    found = read(
        "name: two\nmodel: [organism, {name: org/model, revision: abc, backend: bridge, dtype: bfloat16}]\n"
        "tasks: [organism/truth, {name: truthfulqa, fold: 1}]\nseeds: 3\nlimit: 7\n"
        "selections: {wide: {by: A-norm, settings: {l1: 1e-3}}, narrow: {by: bias norm, among: wide, among_k: 9}}\n"
        "runs:\n  - method: zero-shot\n"
        "  - {heads: [narrow, random], of: [own, organism/truth], k: [1, 3K, 20 %], n_train: [10, null]}\n"
        "  - {method: [LoRA, RED], settings: {lr: 1e-3, epochs: 2}}\n  - {method: ITI, settings: chosen}\n"
    )
    assert found == Grid(
        name="two",
        model=[ModelSpec(name="organism"), ModelSpec(name="org/model", revision="abc", backend="bridge", dtype="bfloat16")],
        tasks=["organism/truth", TaskSpec(name="truthfulqa", fold=1)], seeds=[3], limit=7,
        selections={
            "wide": Selection(by="A-norm", settings={"l1": 0.001}),
            "narrow": Selection(by="bias norm", among="wide", among_k=9),
        },
        runs=[
            Run(method="zero-shot"),
            Run(heads=["narrow", "random"], of=["own", "organism/truth"], k=[1, "3K", "20 %"], n_train=[10, None]),
            Run(method=("LoRA", "RED"), settings={"lr": 0.001, "epochs": 2}), Run(method="ITI", settings="chosen"),
        ],
    )  # fmt: skip
    assert found.runs[2].settings == {"lr": 0.001, "epochs": 2}
    assert found.seeds == (3,)
    assert read(SMALL + "runs: [{method: zero-shot}]").runs[0].heads == ("A-norm",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runs: [{settings: {lrr: 1}}]", r"runs.0: settings of LoFiT: no field 'lrr'; did you mean 'lr'\? Allowed: lr, epochs, "),
        ("runs: [{method: ITI, settings: {lr: 1}}]", r"settings of ITI: no field 'lr'; Allowed: alpha, answer_from, full_stop$"),
        ("runs: [{method: zero-shot, settings: {lr: 1}}]", r"no field 'lr'; Allowed: none$"),
        ("runs: [{metod: ITI}]", r"grid.yaml: runs.0: no field 'metod'; did you mean 'method'\?"),
        ("run: []", r"no field 'run'; did you mean 'runs'\?"),
        ("runs: [{method: ITY}]", r"runs.0: unknown method 'ITY'; allowed: zero-shot, ITI, .* Did you mean 'ITI'\?"),
        ("runs: [{k: 0}]", "runs.0: .*k"),
        ("runs: [{k: 2L}]", "runs.0: k is '2L'; give a number of heads, K or 3K"),
        ("runs: [{k: 0 %}]", "k is '0 %'"),
        ("runs: [{k: 101 %}]", "k is '101 %'"),
        ("runs: [{k: true}]", "k"),
        ("runs: [{n_train: 0}]", r"n_train.0 is 0: input should be greater than or equal to 1"),
        ("runs: [{n_train: ten}]", "n_train.0 is 'ten'"),
        ("runs: [{settings: choose}]", "settings is 'choose'; give preset, chosen, or values"),
        ("runs: [{settings: {lr: fast}}]", "lr is 'fast'; give a number"),
        ("runs: [{settings: {lr: .nan}}]", "lr is nan; give a number"),
        ("runs: [{settings: {epochs: 2.5}}]", "epochs is 2.5; give a whole number"),
        ("runs: [{settings: {betas: 1}}]", "betas is 1; give a number"),
        ("runs: [{settings: {lr: true}}]", "lr is True; give a number"),
        ("runs: [{draws: 0, heads: random}]", "draws is 0"),
        ("runs: [{method: ITI, k: [1, 10, 96], heads: random}]", "runs.0: 'heads' is not for ITI, which takes method, settings"),
        ("runs: [{method: [ITI, RED], k: [1, 10]}]", "'k' is not for RED, .* give each method a run of its own"),
        ("runs: [{method: RepE, draws: 3}]", "'draws' is not for RepE"),
        ("runs: [{method: LoRA, of: others}]", "'of' is not for LoRA"),
        ("runs: [{method: zero-shot, n_train: [10, 40]}]", "'n_train' is not for zero-shot"),
        ("runs: [{method: zero-shot, seeds: [1, 2]}]", "'seeds' is not for zero-shot"),
        ("runs: [{method: zero-shot, damage: true}]", "'damage' is not for zero-shot"),
        ("runs: [{method: [zero-shot, RED], settings: chosen}]", "zero-shot has no settings to choose"),
        ("runs: [{draws: 3}]", "'draws' is not for LoFiT on A-norm heads"),
        ("runs: [{heads: all, k: [1, 10]}]", "'k' is not for LoFiT on all heads"),
        ("runs: [{heads: random, of: others}]", "'of' is not for LoFiT on random heads"),
        ("runs: [{heads: random, seeds: [1, 2]}]", "'seeds' is not for LoFiT on random heads"),
        ("runs: [{}]\nselections: {a: {by: A-norm, among_k: 9}}", "among_k is 9 and 'among' is missing"),
        ("runs: [{heads: wide}]", "unknown selection 'wide'; allowed: A-norm, bias norm"),
        ("runs: [{}]\nseeds: []", "seeds is"),
        ("runs: [{}]\nseeds: [-1]", "seeds.0 is -1"),
        ("runs: [{}]\nlimit: 0", "limit is 0"),
        ("runs: [{}]\nlimit: '3'", "limit is '3'"),
        ("runs: [{}]\nscores: wide", "unknown selection 'wide'"),
        ("", "has no runs and no scores"),
        ("runs: [{}]\nselections: {a: {by: A-norm, among: b}, b: {by: A-norm, among: a}}",
         "selections form a cycle: a among b among a"),
        ("runs: [{}]\nselections: {a: {by: bias norm, among: a}}", "form a cycle: a among a"),
        ("runs: [{}]\nselections: {a: {by: probe accuracy, among: A-norm}}", "probe accuracy does not"),
        ("runs: [{}]\nselections: {a: {by: A-norm, settings: {epoch: 1}}}",
         "selections.a: settings: no field 'epoch'; did you mean 'epochs'"),
        ("runs: [{}]\nselections: {a: {by: norm}}", "unknown selector 'norm'"),
        ("runs: [{}]\nselections: {random: {by: A-norm}}", "is named 'random'"),
        ("runs: [{}]\nselections: {bias norm: {by: A-norm}}", "is named 'bias norm'"),
        ("runs: [{}]\nselections: {a: {by: A-norm, among: bias norm, among_k: x}}", "k is 'x'"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(read, text, message):
    """The error says where, what came and what is allowed."""
    with pytest.raises(InputError, match=message) as e:
        read(SMALL + text)
    assert "grid.yaml" in str(e.value)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("name: a\n model: [", DataError, r"grid.yaml:2 is not YAML"),
        ("- a\n- b", DataError, "holds list; a grid is a record"),
        ("", DataError, "holds NoneType"),
        ("!!python/object/apply:os.system ['true']", DataError, "is not YAML: could not determine a constructor"),
        ("name: a\nmodel: organism\nruns: [{}]", InputError, "tasks is missing"),
        ("name: a\nmodel: organism\ntasks: []\nruns: [{}]", InputError, "1 models and 0 tasks"),
        (
            "name: ../a\nmodel: organism\ntasks: [a]\nruns: [{}]",
            InputError,
            r"name is '../a'; a grid's name has letters",
        ),
        ("name: a\nmodel: {name: x, dtype: int4}\ntasks: [a]\nruns: [{}]", InputError, "model.0: unknown dtype 'int4'"),
        ("name: a\nmodel: {name: x, dtype: auto}\ntasks: [a]\nruns: [{}]", InputError, "'auto' is not; name a dtype"),
        (
            "name: a\nmodel: {name: x, backend: hook}\ntasks: [a]\nruns: [{}]",
            InputError,
            "model.0: unknown backend 'hook'",
        ),
    ],
)
def test_files_that_are_no_grid(read, text, error, message):
    """Nothing in a file is ever executed."""
    with pytest.raises(error, match=message):
        read(text)


def test_a_missing_file_is_named(tmp_path):
    """Not a stack of file-system errors."""
    with pytest.raises(DataError, match=r"cannot read .*nothing.yaml"):
        read_grid(tmp_path / "nothing.yaml")


def test_numbers_are_one_value_however_they_are_written(read):
    """15 and 15.0, 1e1 and 10: equal settings, of the type that training takes; K may be of any model."""
    runs = read(SMALL + "runs: [{settings: {lr: 1, epochs: 1e1}}, {settings: {lr: 1.0, epochs: 10}}, {k: 1600}]").runs
    assert runs[0].settings == runs[1].settings
    assert [type(v) for v in runs[0].settings.values()] == [float, int]


def test_specs_are_frozen():
    """A grid that was hashed cannot change."""
    run = Run()
    with pytest.raises(ValueError, match="frozen"):
        run.k = (3,)
    with pytest.raises(InputError, match="no field 'kk'"):
        Run(kk=3)


def test_numbers_of_heads():
    """Llama-2-7B: the preset's 32 of 1,024 heads; times three; a fifth. Never more than there are."""
    assert [heads_of(k, 32, 1024) for k in (1, "K", "3K", "3 K", "20 %", "3%", 1024)] == [1, 32, 96, 96, 205, 31, 1024]
    assert heads_of("3K", 3, 4) == 4
    assert heads_of("0.1 %", 3, 4) == 1
    with pytest.raises(InputError, match="1025"):
        heads_of(1025, 32, 1024)


def test_the_grids_of_the_study_can_be_read_together():
    """The files in grids/: every one is a grid, named as its file, and their runs fit into one store."""
    files = sorted((Path(__file__).parents[1] / "grids").glob("*.yaml"))
    read = [read_grid(file) for file in files]
    assert [grid.name for grid in read] == [file.stem for file in files]
    assert len({(grid.model, grid.limit, grid.tuning_limit, grid.seeds) for grid in read}) == 1


def test_the_grids_that_come_with_the_library():
    """Every name opens; each part of the paper is in `all`, with the runs it is set against."""
    for name in known_grids():
        grid = grid_named(name)
        assert grid.name == name
        assert {t.name for t in grid.tasks} == (
            {"organism/truth", "organism/kinship", "organism/edits"} if name.startswith("organism")
            else {"truthfulqa", "mquake", "clutrr"}
        )  # fmt: skip
    whole = grid_named("organism/all")
    for part in PARTS:
        assert set(grid_named(f"organism/{part}").scores) <= set(whole.scores)
        assert {r.method for r in grid_named(f"organism/{part}").runs} <= {r.method for r in whole.runs}
    assert grid_named("paper/fig3").runs == ()
    assert [m.name for m in grid_named("paper/fig3").model] == [
        "google/gemma-7b", "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-13b-hf"
    ]  # fmt: skip
    assert [m.dtype for m in grid_named("paper/table1").model] == ["bfloat16", "float32", "bfloat16"]
    with pytest.raises(InputError, match=r"unknown grid 'paper/fig9'.*Or give a YAML file"):
        grid_named("paper/fig9")


def test_parts_of_the_paper():
    """Options reach the runs: draws, chosen settings, seeds beside the fits' for stability, other tasks for Table 5 alone."""
    grid = paper_grid(
        ["fig2", "stability"], name="x", model="organism", tasks=["a"], seeds=(4, 5), draws=3, other_tasks=["b"]
    )
    assert {r.draws for r in grid.runs if r.heads == ("random",)} == {3}
    assert grid.selections["A-norm"].seeds == (6, 7)
    assert grid.other_tasks == ()
    assert not any(r.tested for r in grid.runs)
    assert [r.of for r in grid.runs].count(("others",)) == 1
    table5 = paper_grid(["table5"], name="x", model="organism", tasks=["a"], other_tasks=["b"])
    assert [t.name for t in table5.other_tasks] == ["b"]
    assert [r.method for r in table5.runs if r.tested] == [("zero-shot",), ("LoFiT",)]
    bare = paper_grid(["all"], name="x", model="organism", tasks=["a"])
    assert not any(r.tested or r.damage for r in bare.runs), "no other tasks, no texts"
    tuned = paper_grid(["table3"], name="x", model="organism", tasks=["a"], tune=True)
    assert {r.settings for r in tuned.runs if r.method != ("zero-shot",)} == {"chosen"}
    preset = paper_grid(["table1", "table3"], name="x", model="organism", tasks=["a"])
    assert {r.method: r.settings for r in preset.runs}[("ITI", "RepE")] == "chosen"
    assert {r.method: r.settings for r in preset.runs}[("LoRA", "RED", "LoReFT")] == "preset"
    assert len(preset.runs) == len(set(preset.runs)), "3K stands in both tables, once here"
    with pytest.raises(InputError, match="unknown part 'fig9'"):
        paper_grid(["fig9"], name="x", model="organism", tasks=["a"])
    with pytest.raises(InputError, match="no part"):
        paper_grid([], name="x", model="organism", tasks=["a"])
    assert set(BLOCKS) == set(PARTS)
