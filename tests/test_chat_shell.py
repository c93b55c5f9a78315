"""Chat, BOS and the model's name in the shell, in grids and in the explorer."""

import json

import pytest

import lofit_lens as ll
from lofit_lens.errors import InputError
from lofit_lens.evaluation import EvalResult
from lofit_lens.experiments.grid.run import plan_grid, run_grid
from lofit_lens.experiments.grid.specs import Grid
from lofit_lens.heads import HeadScores, HeadSet
from lofit_lens.interventions import Lofit
from lofit_lens.models import planned_tokenizer
from lofit_lens.tasks.chat import template_digest
from tests import chats, tiny
from tests.task_rows import words_task
from tests.test_cli import run

SAYS = "this model has a chat template; --chat puts prompts through it"


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """Folder of a tiny model with a chat template."""
    folder, hf, tok = tmp_path_factory.mktemp("model") / "my-chat", tiny.hf_model("llama"), chats.tokenizer("chatml")
    hf.resize_token_embeddings(len(tok), mean_resizing=False)
    hf.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def own_task(tmp_path_factory):
    return words_task(tmp_path_factory.mktemp("task") / "caps")


# -------------------------------------------------------------------------------------------------------------- shell


def test_the_verbs_hand_chat_bos_and_name_on(capsys, monkeypatch, chatty, own_task, tmp_path):
    """select, tune and eval: what they write says what was asked, and the suggested command repeats it."""
    given = ("--model", chatty, "--name", "mine", "--prepend-bos", "--device", "cpu")
    asked = ("--task", own_task, "--chat", "--system", "Be brief.")
    code, out, err = run(
        capsys, monkeypatch, "select", *given, *asked, "--out", tmp_path / "h", "--k", 2, "--max-steps", 1
    )
    assert code == 0, err
    assert SAYS not in out
    said = " ".join(out.split())
    assert (
        f"lofit-lens tune --model {chatty} --name mine --device cpu --prepend-bos --task {own_task} --chat --system 'Be"
        in said
    )
    code, out, err = run(
        capsys,
        monkeypatch,
        "tune",
        *given,
        *asked,
        "--heads",
        tmp_path / "h",
        "--out",
        tmp_path / "a",
        "--max-steps",
        1,
    )
    assert code == 0, err
    meta = Lofit.from_pretrained(tmp_path / "a").meta
    assert meta.model is not None
    assert (meta.model.name, meta.model.prepend_bos, meta.task.partition("-")[0]) == ("mine", True, "caps:chat")
    evaluate = ("eval", *given, "--adapter", tmp_path / "a", "--limit", 2, "--out")
    code, out, err = run(capsys, monkeypatch, *evaluate, tmp_path / "e", *asked)
    assert code == 0, err
    assert "the adapter was made on" not in out
    result = EvalResult.load(tmp_path / "e")
    assert result.config["chat"] == {"system": "Be brief.", "template": template_digest(planned_tokenizer(chatty))}
    assert result.data_hash == meta.data_hash
    assert result.model is not None
    assert (result.model.name, result.model.prepend_bos) == ("mine", True)
    code, out, err = run(capsys, monkeypatch, *evaluate, tmp_path / "plain", "--task", own_task)
    assert code == 0, err
    assert out.count(SAYS) == 1
    assert f"the adapter was made on {meta.task}, and is evaluated on caps" in " ".join(out.split())


def test_generate_through_the_template(capsys, monkeypatch, chatty, tmp_path):
    """--chat and --system are the library's; without them, one line says that there is a template."""
    from lofit_lens.evaluation import generation

    seen, inner = [], generation.turn_of
    monkeypatch.setattr(generation, "turn_of", lambda t, p: (seen.append(p), inner(t, p))[1])
    for options in ((), ("--chat",), ("--system", "Hi.")):
        code, out, err = run(capsys, monkeypatch, "generate", "Ann", "-m", chatty, "--max-new-tokens", 2, *options)
        assert code == 0, err
        assert (SAYS in out) == (not options)
    assert [getattr(p, "messages", None) for p in seen] == [
        None, (("user", "Ann"),), (("system", "Hi."), ("user", "Ann")),
    ]  # fmt: skip


@pytest.mark.parametrize("verb", ["select", "probe", "eval", "compare"])
def test_a_model_without_a_template_is_refused_in_one_line(capsys, monkeypatch, checkpoint, own_task, tmp_path, verb):
    """And nothing is written."""
    out = tmp_path / "out"
    code, _, err = run(
        capsys, monkeypatch, verb, "-t", own_task, "-m", checkpoint("llama"), "--chat", "--out", out, "--device", "cpu"
    )
    assert code == 2
    assert err.splitlines()[-1].startswith("error: the tokenizer of ")
    assert "has no chat template" in err
    assert not out.exists()


def test_every_verb_that_loads_a_model_takes_its_options():
    """Each option once, by one name; `--chat` where there are prompts."""
    import typer.main

    from lofit_lens.cli import app

    commands = typer.main.get_command(app).commands
    for verb in ("select", "probe", "tune", "eval", "compare", "transfer", "figures", "generate", "damage", "grid"):
        options = [o for p in commands[verb].params for o in (*p.opts, *p.secondary_opts)]
        assert len(set(options)) == len(options), verb
        assert {"--model", "--name", "--prepend-bos", "--no-prepend-bos"} <= set(options), verb
        assert (verb == "damage") or {"--chat", "--system"} <= set(options), verb


# -------------------------------------------------------------------------------------------------------------- grids


def grid_of(folder, task, *, loaded=None, **asked):
    """A grid of one run; `loaded`: more fields of its model, the others of its task."""
    return Grid(
        name="g", model={"name": str(folder), "backend": "bridge", **(loaded or {})}, tasks=[{"name": str(task), **asked}],
        runs=[{"method": "zero-shot"}], seeds=[0], limit=2,
    )  # fmt: skip


def test_runs_are_named_by_chat_system_bos_and_template(chatty, own_task, tmp_path):
    """Each changes the name of every cell; the model's display name does not, since its weights are known."""
    grids = [
        {}, {"chat": True}, {"system": "Hi."}, {"system": "Hello."}, {"loaded": {"prepend_bos": True}},
        {"chat": True, "loaded": {"prepend_bos": True}},
    ]  # fmt: skip
    names = [plan_grid(grid_of(chatty, own_task, **g)).cells[0].name for g in grids]
    assert len(set(names)) == len(names)
    assert plan_grid(grid_of(chatty, own_task, loaded={"called": "mine"})).cells[0].name == names[0]
    other = tmp_path / "other"
    other.mkdir()
    for file in chatty.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tok = chats.tokenizer("chatml", template=chats.TEMPLATES["zephyr"])
    tok.save_pretrained(other)
    assert plan_grid(grid_of(other, own_task, chat=True)).cells[0].name != names[1]


def test_a_grid_runs_as_it_was_planned(chatty, own_task, tmp_path):
    """Hash, task and model of its results are those of `evaluate`."""
    grid = grid_of(chatty, own_task, system="Hi.", loaded={"called": "mine", "prepend_bos": True})
    report = run_grid(grid, tmp_path / "s", device="cpu", progress=False)
    assert not report.failed
    (result,) = ll.load_results(tmp_path / "s").evaluations
    model = ll.load_model(chatty, backend="bridge", prepend_bos=True, device="cpu")
    task = ll.load_task(own_task).as_chat(model, system="Hi.")
    expected = ll.evaluate(model, task, limit=2, progress=False)
    assert (result.task, result.data_hash) == (task.name, task.data_hash)
    assert result.items["generated"].tolist() == expected.items["generated"].tolist()
    assert result.model is not None
    assert (result.model.name, result.model.prepend_bos) == ("mine", True)


def test_a_grid_whose_model_has_no_template_is_not_begun(checkpoint, own_task):
    """It is known before anything is computed."""
    with pytest.raises(InputError, match="has no chat template"):
        plan_grid(grid_of(checkpoint("llama"), own_task, chat=True))


def test_the_verb_puts_a_grid_into_a_chat(capsys, monkeypatch, chatty, own_task, tmp_path):
    """All its tasks; a name only for one model."""
    file = tmp_path / "g.yaml"
    file.write_text(grid_of(chatty, own_task).model_dump_json(exclude_unset=True))
    asked = ("grid", file, "--dry-run", "--json", "--store", tmp_path / "s")
    plain = json.loads(run(capsys, monkeypatch, *asked)[1])
    code, out, err = run(capsys, monkeypatch, *asked, "--chat", "--prepend-bos", "--name", "mine")
    assert code == 0, err
    assert SAYS not in err
    assert json.loads(out)["to_compute"] != plain["to_compute"]
    code, _, err = run(capsys, monkeypatch, *asked, "--name", "mine", "-m", chatty, "-m", "organism")
    assert code == 2
    assert "--name mine for 2 models" in err


# ----------------------------------------------------------------------------------------------------------- explorer


@pytest.fixture(scope="module")
def shown(chatty):
    model = ll.load_model(chatty, backend="bridge", device="cpu")
    scores = HeadScores([[0.0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]], "A-norm", "m", "t", {})
    return model, {"one": scores, "other": HeadSet(["L1H2"], shape=(3, 4))}


def test_a_typed_prompt_goes_through_the_template(shown):
    """By the switch or from code; what was run says how, and a note says when that changed."""
    model, sets = shown
    ex = ll.explore(sets, model, prompts=["Ann?"], max_new_tokens=2, system="Hi.")
    assert ex.chat
    found = ex.run()
    assert next(iter(found.texts.values())) == ll.generate(model, "Ann?", system="Hi.", max_new_tokens=2)
    assert found.prompt.messages == (("system", "Hi."), ("user", "Ann?"))
    assert ex.widget.state["chat"]
    assert ex.widget.said["has_chat"]
    ex.widget.state = {**ex.widget.state, "chat": False}  # as the switch does
    assert not ex.chat
    assert "run as a chat; press Run again" in ex.widget.said["answers"]["note"]
    assert type(ex.run().prompt) is str
    assert ex.prompt == "Ann?"


def test_a_chat_needs_a_template(shown, bridge_llama):
    """The switch is not there, and from code it is an error."""
    _, sets = shown
    ex = ll.explore(sets, bridge_llama, prompts=["Ann?"])
    assert not ex.widget.said["has_chat"]
    with pytest.raises(InputError, match="has no chat template"):
        ex.chat = True
    with pytest.raises(InputError, match="the chat template is the model's"):
        ll.explore(sets, chat=True)
