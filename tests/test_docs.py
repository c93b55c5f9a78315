"""The documentation: every block of docs/ runs or is checked, every link leads somewhere, every public name has its place.

- `python` blocks of a page run in order in one namespace, in a new folder, on the embedded model (`fences.STANDS_FOR`).
- A `text` block right behind a `python` block is what that prints; decimals may be off by `TOLERANCE` (other processors).
- `yaml` blocks are grids that can be planned.
- `lofit-lens` lines of `sh` blocks and of README are parsed by the shell's own parser; those in `QUICK` run.
"""

import ast
import doctest
import importlib
import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import typer

import lofit_lens as ll
from lofit_lens.cli import app
from lofit_lens.experiments.grid.run import plan_grid
from tests.fences import blocks, commands, embedded, links
from tests.test_cli import run as run_cli

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [p for p in DOCS if p.name != "performance.md"]
README = ROOT / "README.md"
PYTHON = [p for p in PAGES if any(b.language == "python" for b in blocks(p))]
YAML = [(p, b.text) for p in PAGES for b in blocks(p) if b.language == "yaml"]
COMMANDS = [(p, words) for p in (README, *PAGES) for words in commands(p)]
QUICK = ("doctor", "grid --list", "grid organism/fig5 --store runs/mine --dry-run")
TOLERANCE = 0.03
NUMBER = re.compile(r"(?<![\w.])[+-]?\d*\.\d+|(?<![\w.])[+-]?\d+")
PARTS = ("analysis", "plots", "probing", "report", "sharing")
CONTENTS = {"python", "text", "sh", "yaml"}
NEEDS = {"evaluate-elsewhere.md": ("lm_eval", "inspect_ai")}  # packages of extras that [dev] leaves out


def name_of(page):
    """For the tests' names."""
    return page.relative_to(ROOT).as_posix() if isinstance(page, Path) else " ".join(page)


def same(said, expected):
    """Whether two outputs are equal, decimals within the tolerance; whole numbers are names, counts and ranks."""
    texts = [NUMBER.sub("#", text).split() for text in (said, expected)]
    numbers = [NUMBER.findall(text) for text in (said, expected)]
    return texts[0] == texts[1] and all(
        abs(float(a) - float(b)) <= (TOLERANCE if "." in a else 0) for a, b in zip(*numbers, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("page", PYTHON, ids=name_of)
def test_python_blocks_run_and_print_what_the_page_says(page, tmp_path, monkeypatch):
    """In order, one namespace a page."""
    for package in NEEDS.get(page.name, ()):
        pytest.importorskip(package, reason=f"{page.name} needs {package}, of an extra that is not installed")
    monkeypatch.chdir(tmp_path)
    namespace, listed = {"__name__": "page"}, blocks(page)
    for block, after in zip(listed, [*listed[1:], None], strict=True):
        if block.language != "python":
            continue
        said = io.StringIO()
        code = "\n" * (block.line - 1) + embedded(block.text)  # errors name the page's own line
        with redirect_stdout(said), redirect_stderr(io.StringIO()):
            exec(compile(code, str(page), "exec"), namespace)
        if after is not None and after.language == "text" and between(page, block, after) == "":
            assert same(said.getvalue(), after.text), f"{name_of(page)}:{after.line} prints\n{said.getvalue()}"


def between(page, block, after):
    """What stands between two blocks."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return "".join(lines[block.line + block.text.count("\n") : after.line - 2]).strip()


def test_a_number_may_round_and_nothing_else_may_differ():
    """Decimals within the tolerance; whole numbers, words and their order as they are."""
    assert same("em 0.977 [0.954, 0.995]\n", "em 0.970 [0.95, 0.99]")
    assert not same("em 0.977", "em 0.877")
    assert not same("n=216", "n=217")
    assert not same("L2H3 L1H6", "L1H6 L2H3")
    assert not same("yes", "no")


def test_only_languages_that_are_checked():
    """A block in another language would be checked by nobody."""
    languages = {name_of(page): {b.language for b in blocks(page)} for page in PAGES}
    assert not {page: found - CONTENTS for page, found in languages.items() if found - CONTENTS}


@pytest.mark.parametrize(("page", "text"), YAML, ids=lambda v: name_of(v) if isinstance(v, Path) else "")
def test_grids_can_be_planned(page, text, tmp_path):
    """On the embedded model, as a file."""
    (tmp_path / "grid.yaml").write_text(embedded(text))
    assert plan_grid(tmp_path / "grid.yaml").cells


def parsed(words):
    """The verb and its options as the shell reads them; its parser raises where it would refuse them."""
    command, context, rest = typer.main.get_command(app), None, list(words)
    while hasattr(command, "commands"):
        context = command.make_context("lofit-lens", rest, parent=context)
        _, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    return command.name, command.make_context(command.name, rest, parent=context).params


def test_shell_lines_are_understood():
    """Every verb and option is one."""
    wrong = []
    for page, words in COMMANDS:
        try:
            assert words[-1] == "--help" or parsed(words)[0]
        except Exception as e:  # whatever the parser says of a line
            wrong.append(f"{name_of(page)}: lofit-lens {' '.join(words)}: {e}")
    assert not wrong, "\n".join(wrong)
    assert len(COMMANDS) > 50


def test_an_unknown_option_is_found():
    """What the test above would miss if it parsed nothing."""
    assert parsed(["eval", "--task", "t"])[1]["task"] == "t"
    with pytest.raises(Exception, match="No such option"):
        parsed(["eval", "--task", "t", "--no-such-option"])
    with pytest.raises(Exception, match="No such command"):
        parsed(["store", "no-such-verb"])


@pytest.mark.slow
@pytest.mark.parametrize("line", QUICK)
def test_quick_lines_run(line, capsys, monkeypatch, tmp_path):
    """Those that need no model of their own and no network; each stands in the documentation."""
    assert line.split() in [words for _, words in COMMANDS]
    monkeypatch.chdir(tmp_path)
    assert run_cli(capsys, monkeypatch, *line.split())[0] == 0


def test_links_lead_somewhere():
    """Files exist, and pages have the headings that are linked to."""
    wrong = []
    for page in [README, *DOCS]:
        for target in links(page):
            path, _, anchor = target.partition("#")
            file = page if not path else page.parent / path
            if not file.exists() or (anchor and anchor not in anchors(file)):
                wrong.append(f"{name_of(page)} links to {target}")
    assert not wrong, "\n".join(wrong)


def anchors(page):
    """Headings of a page as they are linked to."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", h.lower())).strip("-") for h in found}


def public_names():
    """`ll.NAME` of the package, and `ll.PART.NAME` of its parts."""
    yield from (f"ll.{name}" for name in ll.__all__)
    for part in PARTS:
        yield from (f"ll.{part}.{name}" for name in importlib.import_module(f"lofit_lens.{part}").__all__)


def test_every_public_name_is_documented_once():
    """As the heading of an entry, under its own name or its package's; what an entry names is the object itself."""
    text = "\n".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "docs/api").glob("*.md")))
    headings = re.findall(r"^::: (\S+)\n +options:\n +heading: (\S+)$", text, re.MULTILINE)
    listed = [heading for _, heading in headings] + re.findall(r"^`(ll\.[\w.]+)` is", text, re.MULTILINE)
    assert len(set(listed)) == len(listed)
    twins = {f"ll.{n}" for n in ll.__all__}
    missing = {n for n in public_names() if n not in listed and f"ll.{n.rpartition('.')[2]}" not in twins & set(listed)}
    assert not missing
    for path, heading in headings:
        assert found_at(path) is found_at(heading), (path, heading)


def found_at(path):
    """The object of a dotted path; `ll` is the package."""
    front, _, name = path.rpartition(".")
    return getattr(importlib.import_module(re.sub(r"^ll\b", "lofit_lens", front)), name)


def test_the_cost_of_the_papers_grids_is_what_its_file_says(monkeypatch):
    """The table in docs/paper.md is rendered from benchmarks/results/paper_cost.json."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    paper_cost = importlib.import_module("paper_cost")
    found = json.loads((ROOT / "benchmarks/results/paper_cost.json").read_text(encoding="utf-8"))["results"]
    assert paper_cost.table(found) in (ROOT / "docs/paper.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_asks_nobody(tmp_path):
    """`mkdocs build --strict`; pages name no other host for a script, a style, a font or a picture."""
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        tags = re.findall(r"<(?:script|img|iframe|link)\b[^>]*>", page.read_text(encoding="utf-8"))
        assert not [tag for tag in tags if re.search(r"(?:src|href)=[\"']?(?:https?:)?//", tag)], page


def test_examples_in_docstrings():
    """Each `>>>` of the library gives what stands below it."""
    failed, n = {}, 0
    for path in sorted(Path(ll.__file__).parent.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if ">>> " not in source:
            continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        names = vars(importlib.import_module(name))
        for node in ast.walk(ast.parse(source)):
            text = ast.get_docstring(node) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) else None
            if text and ">>> " in text:
                said = io.StringIO()
                test = doctest.DocTestParser().get_doctest(text, dict(names), name, str(path), 0)
                n += 1
                if doctest.DocTestRunner().run(test, out=said.write).failed:
                    failed[f"{name}: {text.splitlines()[0]}"] = said.getvalue()
    assert not failed, "\n".join(failed.values())
    assert n > 20
