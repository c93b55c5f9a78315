"""What is imported before anything is asked for: `import lofit_lens` and `lofit-lens --help` wait for no large library."""

import subprocess
import sys

import pytest

LOADED = "print(*sorted({m.partition('.')[0] for m in sys.modules} - set(sys.stdlib_module_names)))"
EVERYWHERE = {"__main__", "__mp_main__", "lofit_lens"}
SHELL = {  # typer, rich and pydantic, and what they are made of
    "annotated_doc", "annotated_types", "attr", "click", "colorama", "markdown_it", "mdurl", "pydantic", "pydantic_core",
    "pygments", "rich", "shellingham", "typer", "typing_extensions", "typing_inspection",
}  # fmt: skip


def loaded(code):
    """Top-level modules, without the standard library's and those that the interpreter starts with, once some code has run."""
    bare, full = (
        subprocess.run([sys.executable, "-c", f"import sys\n{c}\n{LOADED}"], capture_output=True, text=True, check=True)
        for c in ("", code)
    )
    found = set(full.stdout.splitlines()[-1].split()) - set(bare.stdout.split())
    return {name for name in found if not name.startswith("_sysconfigdata")}


def test_the_library_alone():
    assert loaded("import lofit_lens as ll; ll.__version__; dir(ll)") <= EVERYWHERE


def test_help():
    run = "from lofit_lens.cli import app\ntry: app(['--help'])\nexcept SystemExit: pass"
    found = loaded(run)
    assert {"lofit_lens", "typer"} <= found <= EVERYWHERE | SHELL


@pytest.mark.parametrize("verb", ["select", "eval", "grid", "store"])
def test_help_of_a_verb(verb):
    found = loaded(f"from lofit_lens.cli import app\ntry: app([{verb!r}, '--help'])\nexcept SystemExit: pass")
    assert found <= EVERYWHERE | SHELL


def test_every_public_name_is_there():
    loaded(
        "import lofit_lens as ll\nfor n in [*ll.__all__, *ll._PARTS]: getattr(ll, n)\nassert {*ll.__all__} == {*ll._HOME}"
    )


def test_the_main_functions_wait_for_what_others_need():
    """Probes, plots, PEFT, statistics and TransformerLens itself are read when they are first used."""
    run = "import lofit_lens as ll; ll.load_model, ll.load_task, ll.select_heads, ll.tune_offsets, ll.evaluate, ll.generate"
    late = ("sklearn", "plotly", "peft", "datasets", "transformer_lens", "scipy.stats", "scipy.optimize")
    code = f"{run}\nimport sys\nassert not [m for m in {late} if m in sys.modules], sys.modules.keys()"
    loaded(code)
