"""The shape of the house: imports point one way, one part knows TransformerLens, files stay small, nothing is unpickled."""

import ast
from pathlib import Path

import pytest

import lofit_lens

ROOT = Path(lofit_lens.__file__).parent
GROUPS = (
    "errors", "checks", "io", "hub", "html", "heads", "models", "tasks", "organism", "interventions", "probing", "training",
    "evaluation", "sharing", "analysis", "experiments", "plots", "explorer", "report", "cli",
)  # fmt: skip
FILES = sorted(p for p in ROOT.rglob("*.py"))
MAX_LINES = 400

every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


def group_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def nodes(path):
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def imports(path):
    """Every module a file imports, at the top or inside a function, relative imports resolved."""
    package = ["lofit_lens", *path.relative_to(ROOT).with_suffix("").parts]
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}" for alias in node.names)


def called(node):
    """`print` of `print(...)`, `torch.load` of `torch.load(...)`."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else None


@every_file
def test_imports_point_one_way(path):
    """A module imports from its own group or from groups before it; the package's own front door may take all."""
    if path == ROOT / "__init__.py":
        return
    here = GROUPS.index(group_of(path))
    for name in imports(path):
        if name.split(".")[0] == "lofit_lens":
            there = [*name.split("."), ""][1]
            # `from lofit_lens import io` names a group; anything else taken from the front door would be a cycle.
            assert there in GROUPS, f"{path.name} imports {name}: import from the module itself"
            assert GROUPS.index(there) <= here, f"{path.name} ({GROUPS[here]}) imports {name}, which comes after it"


@every_file
def test_one_part_imports_transformer_lens(path):
    """models/ alone."""
    if group_of(path) != "models":
        assert not [n for n in imports(path) if n.split(".")[0] == "transformer_lens"]


@every_file
def test_files_stay_small(path):
    """No file of more than 400 lines."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@every_file
def test_only_the_shell_prints(path):
    """print() is the command line's; the library logs."""
    if group_of(path) != "cli":
        assert not [n.lineno for n in nodes(path) if called(n) == "print"]


PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
PARALLEL = {"joblib.Parallel", "joblib.delayed"}  # joblib's other half reads and writes pickles


@every_file
def test_nothing_is_unpickled(path):
    """No pickle and its kin (of joblib, parallel work alone), no torch.load, no allow_pickle=True."""
    assert not [n for n in imports(path) if n.split(".")[0] in PICKLES and n not in PARALLEL]
    for node in nodes(path):
        assert called(node) != "torch.load"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False


def test_the_checks_above_see_what_they_look_for(tmp_path):
    """Imports at the top, inside a function, relative, and calls are all found by these helpers."""
    assert len(FILES) > 20
    assert "transformer_lens.HookedTransformer" in set(imports(ROOT / "models" / "info.py"))
    assert "lofit_lens.io" in set(imports(ROOT / "heads" / "sets.py"))
    assert "lofit_lens.evaluation.scoring.score_encoded" in set(imports(ROOT / "evaluation" / "evaluate.py"))
    (tmp_path / "x.py").write_text("def f():\n    print(torch.load('x'))\n")
    assert {called(n) for n in nodes(tmp_path / "x.py")} >= {"print", "torch.load"}


@pytest.mark.parametrize(
    ("text", "allowed"),
    [("from joblib import Parallel, delayed", True), ("import joblib", False), ("from joblib import load", False),
     ("from joblib import Parallel, dump", False), ("from joblib import Memory", False), ("import joblib as j", False),
     ("from joblib import *", False), ("from joblib.numpy_pickle import load", False), ("import pickle", False)],
)  # fmt: skip
def test_of_joblib_only_parallel_work_is_allowed(monkeypatch, tmp_path, text, allowed):
    """Names of joblib that do not read or write files pass; the module itself, which has them all, does not."""
    monkeypatch.setattr("tests.test_layers.ROOT", tmp_path)
    (tmp_path / "x.py").write_text(text)
    if allowed:
        test_nothing_is_unpickled(tmp_path / "x.py")
    else:
        with pytest.raises(AssertionError):
            test_nothing_is_unpickled(tmp_path / "x.py")
