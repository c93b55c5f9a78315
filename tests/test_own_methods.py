"""Methods from outside the library: what names their runs, files that hold them, and how they reach tables and adapters."""

import importlib
import os
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import lofit_lens as ll
from lofit_lens.errors import AdapterError, DataError, InputError
from lofit_lens.experiments.executors.runner import run_cells
from lofit_lens.experiments.executors.schedule import Group
from lofit_lens.experiments.grid.compute import compute
from lofit_lens.experiments.grid.keys import selector_source
from lofit_lens.experiments.grid.run import plan_grid, read_grid, run_grid
from lofit_lens.experiments.methods import METHODS, USED, use_file
from lofit_lens.experiments.methods.source import digest_of
from lofit_lens.experiments.store.store import Store
from lofit_lens.experiments.tables.load import load_results
from lofit_lens.interventions import HeadAdapter
from lofit_lens.sharing.affine import affine
from tests.studies import TASKS

KIN = TASKS[0]
GATES = """
    import torch
    import lofit_lens as ll
    from lofit_lens.experiments.methods.base import rates
    from lofit_lens.interventions import HeadAdapter
    from lofit_lens.training.selectors import register_selector

    class Gate(HeadAdapter):
        method, title = "file-gate", "gate"

        def __init__(self, shape, heads, meta=None):
            super().__init__(shape, heads, meta)
            self.g = torch.nn.Parameter(torch.ones(len(self.heads)))

        @property
        def n_parameters(self):
            return self.g.numel()

        def affine(self, head):
            return self.g[self.heads.heads.index(head)].expand(self.d_head), torch.zeros(self.d_head)

        def _edit(self, layer):
            chosen = [(i, head.head) for i, head in enumerate(self.heads) if head.layer == layer]

            def edit(z):
                scale = torch.ones(self.shape[1])
                for i, head in chosen:
                    scale[head] = self.g[i]
                return z * scale[:, None].to(z)

            return edit

    def fit(bench, asked):
        return bench.train(Gate.for_model(bench.model, asked.heads), asked)

    def depth(model, task, *, seed=42, n_train=None, progress=True):
        info = ll.model_info(model)
        values = [[float(layer)] * info.n_heads for layer in range(info.n_layers)]
        return ll.HeadScores(values, kind="depth", model=info.name, task=task.name)

    register_selector("depth", depth)
    GATE = ll.Method("file gate", fit, lambda o: rates(o.preset.tune), lambda o: o.preset.tune, heads="chosen")
"""


@pytest.fixture
def gates(tmp_path):
    """A file with a method and a head score; both are forgotten after the test."""
    from lofit_lens.training.selectors import SELECTORS

    before = dict(METHODS), dict(SELECTORS), list(sys.path)
    (tmp_path / "own_gates.py").write_text(textwrap.dedent(GATES))
    yield tmp_path / "own_gates.py"
    for known, kept in zip((METHODS, SELECTORS), before, strict=False):
        known.clear()
        known.update(kept)
    sys.path[:] = before[2]
    sys.modules.pop("own_gates", None)
    USED.pop("own_gates", None)


@pytest.mark.slow
def test_a_grid_with_a_file_of_code(gates, checkpoint, tmp_path):
    """A method and a head score of one's own, by their names, in a worker process; rows, adapters and export."""
    (tmp_path / "grid.yaml").write_text(
        f"name: own\ncode: own_gates.py\nmodel: {checkpoint('llama')}\ntasks: kin\nseeds: 0\nruns:\n"
        "  - {method: zero-shot}\n  - {method: file gate, heads: [depth, random], draws: 2}\n"
        "  - {method: [file gate, LoFiT], heads: A-norm}\n"
    )
    found = run_grid(tmp_path / "grid.yaml", tmp_path / "s", tasks=[KIN], workers=2, device="cpu", progress=False)
    assert found.failed == {}
    results = load_results(tmp_path / "s")
    table = results.method_table("kin")
    assert [row.method for row in table.rows] == ["zero-shot", "LoFiT 3 %", "file gate, random heads", "file gate 3 %"]
    assert table["file gate 3 %"].n_parameters == 1
    (row,) = results.rows(method="file gate", heads_from="depth").index
    gate = ll.load_adapter(results.folders[row] / "adapter")
    assert type(gate).__name__ == "Gate"
    assert gate.heads.layers == (2,)
    scale, shift = affine(gate)
    head = gate.heads[0]
    assert torch.equal(scale[head], gate.g.detach().expand(8))
    assert not shift.any()


def test_other_source_other_runs(gates, checkpoint, tmp_path):
    """A changed file names other runs of its own method and head score, and the same ones of the library's."""
    text = f"name: own\ncode: own_gates.py\nmodel: {checkpoint('llama')}\ntasks: kin\nruns:\n  - {{method: [file gate, LoFiT]}}\n"
    (tmp_path / "grid.yaml").write_text(text)

    def names():
        return {
            c.row["method"]: c.name
            for c in plan_grid(tmp_path / "grid.yaml", tasks=[KIN]).cells
            if c.row["kind"] == "fit"
        }

    first = names()
    assert names() == first
    gates.write_text(textwrap.dedent(GATES.replace("scale[head] = self.g[i]", "scale[head] = 2 * self.g[i]")))
    with pytest.raises(InputError, match=r"own_gates\.py has changed since this process imported it"):
        names()
    importlib.invalidate_caches()
    sys.modules.pop("own_gates")
    second = names()
    assert second["LoFiT"] == first["LoFiT"]
    assert second["file gate"] != first["file gate"]


def test_a_run_is_named_by_the_code_that_makes_it(gates, checkpoint, tmp_path):
    """A file that changes after its import: the digest is that of the code in memory, and no cell is made by other code."""
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        f"name: own\ncode: own_gates.py\nmodel: {checkpoint('llama')}\ntasks: kin\nruns: [{{method: file gate, heads: depth}}]\n"
    )
    planned = plan_grid(grid, tasks=[KIN])
    before = METHODS["file gate"].source, selector_source("depth")
    gates.write_text(
        textwrap.dedent(GATES)
        .replace("scale[head] = self.g[i]", "scale[head] = -self.g[i]")
        .replace("float(layer)", "-float(layer)")
    )
    assert (METHODS["file gate"].source, selector_source("depth")) == before
    importlib.invalidate_caches()
    sys.modules.pop("own_gates")
    use_file(gates)  # as a worker does that starts later
    assert METHODS["file gate"].source != before[0]
    asked = replace(planned.context, code=())
    store = Store(tmp_path / "s")
    found = run_cells(store, planned.cells, compute, asked, retries=0, progress=False)
    assert {error.split(" has changed")[0] for error in found.failed.values()} == {"InputError: the code of depth"}
    fits = [cell for cell in planned.cells if cell.row["kind"] == "fit"]
    with pytest.raises(InputError, match="the code of file gate has changed since this grid was planned"):
        compute(store, Group(tuple(fits)), asked, "cpu", each=lambda cell: nullcontext())


FACTOR = 2.0


def scaled(x):
    return FACTOR * x


class Holder:
    model = "x"


def reads(bench):
    """`model` is an attribute's name here, not the global below."""
    return bench.model, scaled(1)


model = object()


def test_what_a_digest_holds(monkeypatch):
    """Values and functions that code reads by name, however deep; not what only shares a name with an attribute."""
    first = digest_of([reads], "it")
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 3.0)
    assert digest_of([reads], "it") != first

    def direct():
        return model

    with pytest.raises(InputError, match="it takes 'model' from around it, a object"):
        digest_of([direct], "it")
    assert digest_of([Holder], "it") != digest_of([type("Holder", (), {"model": "y"})], "it")


@pytest.mark.slow
def test_a_digest_is_the_same_in_every_process():
    """Texts in a set have another order in each."""
    code = (
        "from lofit_lens.experiments.methods.source import digest_of\n"
        "def f(x):\n    return x in {'a', 'b', 'c', 'd'}, lambda y: y in {'e', 'f', 'g'}\n"
        "print(digest_of([f], 'it'))"
    )
    found = {
        subprocess.check_output([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, text=True)
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1


def test_names_of_rows():
    """By the share of heads; where the usual K is as large as the wide one, its name counts."""
    lofit = METHODS["LoFiT"]
    assert [lofit.row("A-norm", k, 3, 9) for k in (3, 9, 4)] == ["LoFiT 3 %", "LoFiT 10 %", "LoFiT, 4 heads"]
    assert lofit.row("A-norm", 3, 3, 3) == "LoFiT 3 %"


def test_files_that_are_none(tmp_path):
    """No file, no Python, a name that is taken."""
    for name, error, message in (
        ("no.py", DataError, "is not a Python file"),
        ("json.py", InputError, "is hidden by another"),
    ):
        if name == "json.py":
            (tmp_path / name).write_text("")
        with pytest.raises(error, match=message):
            use_file(tmp_path / name)
    (tmp_path / "grid.yaml").write_text("name: a\ncode: gone.py\nmodel: organism\ntasks: organism/truth\nruns: [{}]\n")
    with pytest.raises(InputError, match=r"gone\.py is not a Python file"):
        read_grid(tmp_path / "grid.yaml")


def test_adapters_of_ones_own_are_known_by_their_method():
    """The library's names are taken; an edit that is no scale and shift is not folded."""
    with pytest.raises(InputError, match="the library has a method 'lofit' already; rename that of Mine"):
        type("Mine", (HeadAdapter,), {"method": "lofit", "title": "x"})
    made = type("Mine", (HeadAdapter,), {"method": "mine", "title": "mine"})((2, 2, 4), ["L0H1"])
    with pytest.raises(AdapterError, match="mine does not edit a head's output by a constant scale and shift"):
        affine(made)
