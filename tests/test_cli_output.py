"""What a verb writes outlives its screen and its neighbours: any encoding, a reader who went away, two processes at once."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import rich.table

from lofit_lens import cli, evaluate
from lofit_lens.cli import common
from lofit_lens.experiments.store.locks import claimed
from lofit_lens.models import load_model
from lofit_lens.tasks import load_task
from tests.adapters import random_adapter
from tests.task_rows import words_task
from tests.test_cli import run as run_cli


@pytest.fixture(scope="module")
def made(tmp_path_factory, checkpoint):
    """A model, an adapter, a task and an evaluation of it."""
    folder, model = tmp_path_factory.mktemp("made"), load_model(checkpoint("llama"), device="cpu")
    made = {"MODEL": checkpoint("llama"), "TASK": words_task(folder / "caps"), "ADAPTER": folder / "adapter"}
    random_adapter(model).save_pretrained(made["ADAPTER"])
    made["RESULT"] = evaluate(model, load_task(made["TASK"]), progress=False).save(folder / "result")
    return {name: str(path) for name, path in made.items()}


@pytest.fixture
def shell(capsys, monkeypatch, made):
    """Run one command; capitals stand for what was made."""
    monkeypatch.setattr(common.console, "stderr", False)
    return lambda *args: run_cli(capsys, monkeypatch, *(made.get(a, a) if isinstance(a, str) else a for a in args))


EVAL = ("eval", "--task", "TASK", "--model", "MODEL", "--device", "cpu", "--limit", "3")
DAMAGE = ("damage", "--adapter", "ADAPTER", "--model", "MODEL", "--device", "cpu", "--text", "TEXT", "--limit", "2")
COMPARE = ("compare", "RESULT", "RESULT")


@pytest.fixture
def stdout_as(monkeypatch, made, capfd):
    """Run a command in this process whose stdout (and stderr) is a given stream: its exit code."""

    def run(stream, *args, err=None):
        monkeypatch.setattr(common.console, "stderr", False)
        monkeypatch.setattr(sys, "argv", ["lofit-lens", *(made.get(a, str(a)) for a in args)])
        monkeypatch.setattr(sys, "stdout", stream)
        if err is not None:
            monkeypatch.setattr(sys, "stderr", err)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)

    return run


# ------------------------------------------------------------------------------------------------------------- screen


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_character_that_the_screen_lacks_is_replaced(stdout_as, tmp_path, encoding):
    """The label stands in the table as `?` and in the file as it is."""
    shown = io.BytesIO()
    code = stdout_as(io.TextIOWrapper(shown, encoding), *EVAL, "--label", "a → b", "--out", tmp_path / "o")
    assert code == 0
    assert b"a ? b" in shown.getvalue()
    assert json.loads((tmp_path / "o" / "result.json").read_text())["label"] == "a → b"


@pytest.mark.parametrize("label", ["→", "é", "\U0001f600"])
def test_json_is_whole_in_any_encoding(stdout_as, label):
    """What the encoding lacks is escaped, so that the record is the same."""
    shown = io.BytesIO()
    assert stdout_as(io.TextIOWrapper(shown, "ascii"), *EVAL, "--label", label, "--json") == 0
    assert json.loads(shown.getvalue())["label"] == label


def closed_pipe():
    """A stream whose reader went away."""
    read, write = os.pipe()
    os.close(read)
    return io.TextIOWrapper(open(write, "wb"), "utf-8")


@pytest.mark.parametrize("both", [False, True], ids=["stdout", "stdout-and-stderr"])
def test_a_reader_who_went_away_stops_no_work(stdout_as, tmp_path, both):
    """`| head -1`: what was asked for is written, bars included, and the exit code is the work's."""
    out, err = closed_pipe(), closed_pipe() if both else None
    assert stdout_as(out, *EVAL, "--out", tmp_path / "o", err=err) == 0
    assert (tmp_path / "o" / "result.json").is_file()
    out.close()  # nothing is left in it that fails when Python flushes it
    if err is not None:
        err.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_under_stdout_is_told_after_the_work(stdout_as, tmp_path, capfd):
    """A record that is cut off is not passed over: exit 1, and the files are there."""
    full = open("/dev/full", "w")  # noqa: SIM115 (closed below)
    assert stdout_as(full, *EVAL, "--json", "--out", tmp_path / "o") == 1
    assert "cannot write the output: No space left" in capfd.readouterr().err
    assert (tmp_path / "o" / "result.json").is_file()
    full.close()


@pytest.mark.parametrize("args", [EVAL, DAMAGE, COMPARE], ids=lambda a: a[0])
def test_saved_before_it_is_shown(shell, monkeypatch, tmp_path, args):
    """A screen that fails in a way nobody thought of costs no result."""

    def no_table(*args, **kwargs):
        raise RuntimeError("no table")

    text = tmp_path / "text.txt"
    text.write_text("Ann asked her son.\n\nBob went shopping.\n")
    monkeypatch.setattr(rich.table, "Table", no_table)
    with pytest.raises(RuntimeError, match="no table"):
        shell(*(text if a == "TEXT" else a for a in args), "--out", tmp_path / "o")
    assert (tmp_path / "o").exists()


# ------------------------------------------------------------------------------------------------------------- claims

EVERY = {
    "select": ("select", "-t", "TASK", "-m", "MODEL"), "tune": ("tune", "-t", "TASK", "-m", "MODEL", "--heads", "all"),
    "probe": ("probe", "-t", "TASK", "-m", "MODEL"), "eval": EVAL, "damage": DAMAGE, "compare": COMPARE,
    "import": ("import", "MODEL"), "report": ("report", "nowhere"), "explore": ("explore", "nowhere"),
    **{f: ("export", "ADAPTER", f) for f in ("--folded", "--peft", "--svec")},
}  # fmt: skip
FILES = ("damage", "compare", "report", "explore", "--svec")  # verbs that write a file


@pytest.mark.parametrize("verb", EVERY)
def test_the_second_of_two_learns_before_its_work(shell, tmp_path, verb):
    """An output that another process is about to write: exit 2, before a model or a study is opened."""
    with claimed(tmp_path / ".o.lock", common.LEASE) as mine:
        assert mine
        code, out, err = shell(*EVERY[verb], "--out", tmp_path / "o")
    assert (code, out) == (2, "")
    assert f"another process writes {tmp_path / 'o'} now" in err
    assert len(err.strip().splitlines()) == 1


def test_a_claim_dies_with_its_process(shell, tmp_path):
    """A process that was killed with its claim in place leaves the folder free; nobody's claim is left at the end."""
    held = (
        "import os, sys; from filelock import SoftFileLease; "
        f"lease = SoftFileLease(sys.argv[1], lease_duration={common.LEASE}); lease.acquire(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", held, str(tmp_path / ".o.lock")], check=False)
    assert (tmp_path / ".o.lock").exists()
    for more, expected in (((), 0), ((), 2), (("--overwrite",), 0)):
        code, _, err = shell(*EVAL, "--out", tmp_path / "o", *more)
        assert code == expected, err
        assert [p.name for p in tmp_path.iterdir()] == ["o"]


def test_two_processes_share_no_state_file(shell, tmp_path, monkeypatch):
    """The state of a stopped run is beside its output, under the same claim; whoever comes second leaves it alone."""
    state = common.state_file(tmp_path / "o")
    state.write_bytes(b"the first one's")
    with claimed(tmp_path / ".o.lock", common.LEASE):
        assert shell(*EVERY["select"], "--out", tmp_path / "o")[0] == 2
    assert state.read_bytes() == b"the first one's"


# ------------------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize("verb", [v for v in EVERY if v not in FILES])
def test_a_folder_that_is_not_ours_is_refused_before_the_work(shell, tmp_path, verb):
    """--overwrite replaces what this package wrote, nothing else, and says so at once."""
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mine").write_text("precious")
    code, out, err = shell(*EVERY[verb], "--out", tmp_path / "o", "--overwrite")
    assert (code, out) == (2, "")
    assert "was not written by this package" in err
    assert (tmp_path / "o" / "mine").read_text() == "precious"


@pytest.mark.parametrize("verb", FILES)
def test_a_folder_in_the_place_of_a_file_is_refused_before_the_work(shell, tmp_path, verb):
    """One file cannot replace a folder."""
    (tmp_path / "o").mkdir()
    code, out, err = shell(*EVERY[verb], "--out", tmp_path / "o", "--overwrite")
    assert (code, out) == (2, "")
    assert "is a folder" in err


@pytest.mark.parametrize(
    ("name", "message"), [("x" * 250, "File name too long"), ("x/..", "is not a valid name for a new file")]
)
def test_a_name_that_cannot_be_written_is_refused_before_the_work(shell, tmp_path, name, message):
    """So too where the name itself would do, and that of the draft beside it would not."""
    code, out, err = shell(*EVAL, "--out", tmp_path / name)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize("verb", ["select", "tune", "probe", "eval"])
def test_a_task_that_is_not_there_is_refused_before_the_model_is_loaded(shell, monkeypatch, tmp_path, verb):
    """Loading may take minutes."""
    monkeypatch.setattr("lofit_lens.models.load_model", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    code, _, err = shell(*("no-such" if a == "TASK" else a for a in EVERY[verb]), "--out", tmp_path / "o")
    assert code == 2
    assert "unknown task 'no-such'" in err


@pytest.mark.parametrize("seed", [-1, 2**32])
@pytest.mark.parametrize("verb", ["select", "tune", "probe", "compare"])
def test_a_seed_that_no_generator_takes_is_refused(shell, tmp_path, verb, seed):
    """As a usage error, with the range."""
    code, out, err = shell(*EVERY[verb], "--seed", seed, "--out", tmp_path / "o")
    assert (code, out) == (2, "")
    assert "Invalid value for '--seed'" in err


def test_an_option_that_is_no_text_is_refused_before_the_work(shell, tmp_path):
    """Bytes in another encoding than the shell's cannot stand in a result."""
    code, out, err = shell(*EVAL, "--label", "\udcff", "--out", tmp_path / "o")
    assert (code, out) == (2, "")
    assert "--label is '\\udcff', which is not UTF-8 text" in err


def test_a_demo_that_cannot_draw_png_says_so_before_the_work(shell, tmp_path, monkeypatch):
    """A browser that is missing is found before the runs, not after them."""

    def no_browser(*args, **kwargs):
        raise RuntimeError("Kaleido requires Google Chrome to be installed.")

    monkeypatch.setattr("plotly.graph_objects.Figure.to_image", no_browser)
    code, out, err = shell("demo", "--png", "--out", tmp_path / "o")
    assert (code, out) == (2, "")
    assert "cannot draw a static figure" in err
    assert "pip install 'lofit-lens[figures]'" in err
