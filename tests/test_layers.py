"""The shape of the house: imports point one way, one part knows TransformerLens, files stay small, nothing is unpickled."""

import ast
import functools
from pathlib import Path

import lofit_lens

ROOT = Path(lofit_lens.__file__).parent
GROUPS = (
    "errors", "checks", "io", "hub", "html", "progress", "heads", "models", "tasks", "organism", "interventions", "probing",
    "training", "evaluation", "sharing", "analysis", "experiments", "plots", "explorer", "report", "cli",
)  # fmt: skip
FILES = sorted(p for p in ROOT.rglob("*.py"))
MAX_LINES = 400


def group_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@functools.cache
def nodes(path):
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


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


def test_imports_point_one_way():
    """A module imports from its own group or from groups before it; the package's own front door may take all."""
    wrong = []
    for path in FILES:
        for name in imports(path) if path != ROOT / "__init__.py" else ():
            if name.split(".")[0] == "lofit_lens":
                there, here = [*name.split("."), ""][1], GROUPS.index(group_of(path))
                # `from lofit_lens import io` names a group; anything else taken from the front door would be a cycle.
                if there not in GROUPS:
                    wrong.append(f"{name_of(path)} imports {name}: import from the module itself")
                elif GROUPS.index(there) > here:
                    wrong.append(f"{name_of(path)} ({GROUPS[here]}) imports {name}, which comes after it")
    assert not wrong, "\n".join(wrong)


def test_one_part_imports_transformer_lens():
    """models/ alone."""
    others = [p for p in FILES if group_of(p) != "models"]
    assert not [name_of(p) for p in others if any(n.split(".")[0] == "transformer_lens" for n in imports(p))]


def test_files_stay_small():
    """No file of more than 400 lines."""
    lengths = {name_of(p): len(p.read_text(encoding="utf-8").splitlines()) for p in FILES}
    assert not {name: n for name, n in lengths.items() if n > MAX_LINES}


def test_only_the_shell_prints():
    """print() is the command line's; the library logs."""
    others = [p for p in FILES if group_of(p) != "cli"]
    assert not [f"{name_of(p)}:{n.lineno}" for p in others for n in nodes(p) if called(n) == "print"]


PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
PARALLEL = {"joblib.Parallel", "joblib.delayed"}  # joblib's other half reads and writes pickles


def unpickling(path):
    """What in a file may read a pickle: pickle and its kin (of joblib all but parallel work), torch.load, allow_pickle."""
    yield from (n for n in imports(path) if n.split(".")[0] in PICKLES and n not in PARALLEL)
    for node in nodes(path):
        if called(node) == "torch.load":
            yield f"torch.load in line {node.lineno}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield f"allow_pickle in line {node.value.lineno}"


def test_nothing_is_unpickled():
    found = {name_of(p): list(unpickling(p)) for p in FILES}
    assert not {name: what for name, what in found.items() if what}


def test_the_checks_above_see_what_they_look_for(tmp_path):
    """Imports at the top, inside a function, relative, and calls are all found by these helpers."""
    assert len(FILES) > 20
    assert "transformer_lens.HookedTransformer" in set(imports(ROOT / "models" / "info.py"))
    assert "lofit_lens.io" in set(imports(ROOT / "heads" / "sets.py"))
    assert "lofit_lens.evaluation.scoring.score_encoded" in set(imports(ROOT / "evaluation" / "evaluate.py"))
    (tmp_path / "x.py").write_text("def f():\n    print(torch.load('x'))\n")
    assert {called(n) for n in nodes(tmp_path / "x.py")} >= {"print", "torch.load"}


def test_of_joblib_only_parallel_work_is_allowed(monkeypatch, tmp_path):
    """Names of joblib that do not read or write files pass; the module itself, which has them all, does not."""
    monkeypatch.setattr("tests.test_layers.ROOT", tmp_path)
    for i, (text, allowed) in enumerate([
        ("from joblib import Parallel, delayed", True), ("import joblib", False), ("from joblib import load", False),
        ("from joblib import Parallel, dump", False), ("from joblib import Memory", False), ("import joblib as j", False),
        ("from joblib import *", False), ("from joblib.numpy_pickle import load", False), ("import pickle", False),
        ("f(x, allow_pickle=True)", False), ("f(x, allow_pickle=False)", True), ("torch.load(x)", False),
    ]):  # fmt: skip
        (tmp_path / f"{i}.py").write_text(text)
        assert (not list(unpickling(tmp_path / f"{i}.py"))) == allowed, text
