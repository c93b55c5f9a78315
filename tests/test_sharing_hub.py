"""The hub: adapters go up in one commit and come back bit for bit, each refusal says what to do, and a card is true and runs."""

import dataclasses
import platform
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData, metadata_load

import lofit_lens as ll
from lofit_lens import HeadSet, hub, load_adapter, load_model
from lofit_lens.errors import AdapterError, InputError
from lofit_lens.interventions.cards import model_card
from lofit_lens.models import model_info
from tests import every_method, fake_hub, tiny
from tests.adapters import random_adapter

FILES = ("adapter_config.json", "adapter_model.safetensors")
MINE = f"{fake_hub.USER}/truthful"


def tensors(adapter):
    """All that an adapter stores, on the CPU."""
    return {name: t.detach().cpu() for name, t in adapter._tensors().items()}


def same(one, other):
    """Whether two adapters hold the same bits."""
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("method", every_method.METHODS)
def test_every_method_comes_back_bit_for_bit(remote, bridge_llama, method):
    """Tensors, settings and provenance; the record says which commit it is from; the card lies beside it."""
    adapter = every_method.made(method, bridge_llama)
    url = adapter.push_to_hub(MINE)
    back = load_adapter(MINE, model=bridge_llama)
    assert type(back) is type(adapter)
    assert same(back, adapter)
    commit = remote.repos[MINE].branches["main"]
    assert url == f"{remote.url}/{MINE}/commit/{commit}"
    assert back.meta.source == f"{MINE}@{commit}"
    assert (back.meta.task, back.meta.config, back.meta.metrics) == (
        "organism/facts",
        {"lr": 0.01},
        [every_method.METRIC],
    )
    files = remote.repos[MINE].commits[commit]
    assert set(files) == {".gitattributes", "README.md", *FILES}
    assert files["README.md"].decode() == model_card(adapter, repo_id=MINE)


def test_an_upload_is_one_commit(remote, bridge_llama):
    """Message and branch as given; main stays as it was; the same files again make no commit."""
    adapter = random_adapter(bridge_llama)
    adapter.push_to_hub(MINE, revision="first/try", message="my first")
    repo = remote.repos[MINE]
    assert repo.messages == ["initial commit", "my first"]
    assert set(repo.commits[repo.branches["main"]]) == {".gitattributes"}
    assert set(repo.commits[repo.branches["first/try"]]) == {".gitattributes", "README.md", *FILES}
    other = random_adapter(bridge_llama, seed=1)
    other.push_to_hub(MINE, revision="first/try")
    assert len(repo.messages) == 3


def test_no_path_of_this_machine_goes_out(remote, bridge_llama):
    """Older adapters name a local base by its path; files and card say the folder's own name alone."""
    adapter = every_method.made("lofit", bridge_llama)
    path = f"/home/ann/models/{adapter.meta.model.name}"
    adapter.meta.model = dataclasses.replace(adapter.meta.model, name=path)
    label = f"{path} /home/ann/tasks/caps A-norm"
    adapter.heads = HeadSet(adapter.heads.heads, [3.0, 2.0, 1.0], adapter.heads.shape, label)
    adapter.meta.task, adapter.meta.config = "~/tasks/caps", {"from": ["../secret/heads.json"]}
    assert Path(path).is_absolute()
    adapter.push_to_hub(MINE)
    files = remote.repos[MINE].commits[remote.repos[MINE].branches["main"]]
    for private in (path, "/home/ann", "~/tasks", "../secret", platform.platform()):
        assert not any(private.encode() in data for data in files.values())
    assert f"{Path(path).name} caps A-norm".encode() in files["adapter_config.json"]
    assert Path(path).name.encode() in files["adapter_config.json"]
    assert adapter.meta.model.name == path
    assert ll.load_adapter(MINE, model=bridge_llama).meta.model.revision == adapter.meta.model.revision


def test_a_revision_is_a_branch_or_a_commit(remote, bridge_llama):
    """Each gives the adapter of its time; without one it is main's newest, also when that has moved on."""
    old, new, aside = (random_adapter(bridge_llama, seed=seed) for seed in range(3))
    first = old.push_to_hub(MINE).rpartition("/")[2]
    assert same(load_adapter(MINE), old)
    new.push_to_hub(MINE)
    aside.push_to_hub(MINE, revision="aside")
    assert same(load_adapter(MINE), new)
    assert same(load_adapter(MINE, revision="aside"), aside)
    found = load_adapter(MINE, revision=first)
    assert same(found, old)
    assert found.meta.source == f"{MINE}@{first}"


def test_only_the_asked_files_are_fetched(remote, bridge_llama):
    """Nothing else of a repository is read, code and pickles least of all; a second read fetches no file again."""
    random_adapter(bridge_llama).push_to_hub(MINE)
    remote.repos[MINE].commit({"setup.py": b"1/0", "pytorch_model.bin": b"pickle"})
    remote.requests.clear()
    folder, source = hub.fetched(MINE, files=FILES)
    assert sorted(f.name for f in folder.iterdir()) == sorted(FILES)
    assert not [r for r in remote.requests if "setup.py" in r or "pytorch_model" in r]
    remote.requests.clear()
    assert hub.fetched(MINE, files=FILES) == (folder, source)
    assert not [r for r in remote.requests if r.startswith("GET") and "/resolve/" in r]


def test_what_was_fetched_is_there_without_a_network(remote, bridge_llama, monkeypatch):
    """Switched off, or on with a hub that is gone: the cache answers."""
    adapter = random_adapter(bridge_llama)
    adapter.push_to_hub(MINE)
    load_adapter(MINE)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert same(load_adapter(MINE), adapter)


def test_a_local_folder_is_taken_as_it_is(remote, tmp_path):
    """No request is made for it, even if its name could be a repository's."""
    assert hub.fetched(tmp_path, files=FILES) == (tmp_path, "")
    assert remote.requests == []
    for read in (
        lambda: hub.fetched(tmp_path, files=FILES, revision="main"),
        lambda: load_adapter(tmp_path, revision="main"),
    ):
        with pytest.raises(InputError, match="local folder, which has no revision 'main'; leave revision out"):
            read()


def test_a_model_of_the_hub_is_the_base(remote, tmp_path, bridge_llama):
    """A base model's files come the same way, all of them that are asked for."""
    folder = tiny.save(tmp_path / "base")
    remote.repo("meta/tiny", {f.name: f.read_bytes() for f in folder.iterdir()})
    found, source = hub.fetched("meta/tiny", files=("*.json", "*.safetensors"))
    assert (found / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert source == f"meta/tiny@{remote.repos['meta/tiny'].branches['main']}"


# --------------------------------------------------------------------------------------------------------- private


def test_private_is_kept(remote, bridge_llama, monkeypatch, tmp_path):
    """A new repository is private if asked; its owner reads it, a stranger learns only that there is nothing for him."""
    adapter = random_adapter(bridge_llama)
    adapter.push_to_hub(MINE, private=True)
    assert remote.repos[MINE].private
    assert same(load_adapter(MINE), adapter)
    adapter.push_to_hub(MINE)
    assert remote.repos[MINE].private
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "another"))
    with pytest.raises(InputError, match=rf"{MINE}.*no such repository.*if it is private, log in"):
        load_adapter(MINE)


def test_nothing_private_goes_to_a_public_place(remote, bridge_llama):
    """An existing public repository is refused before anything is uploaded."""
    remote.repo(MINE)
    with pytest.raises(InputError, match=f"{MINE} exists already and is public, so nothing was uploaded"):
        random_adapter(bridge_llama).push_to_hub(MINE, private=True)
    assert remote.repos[MINE].messages == ["initial commit"]
    assert remote.large == {}


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [("ann/nothing", None, "cannot fetch ann/nothing: there is no such local folder, and the hub has no such repository"),
     ("meta/gated", None, r"it is gated. Ask for access at http://127.0.0.1:\d+/meta/gated, then log in"),
     ("meta/open", "v2", r"cannot fetch meta/open at 'v2': it has no such revision; give a branch, a tag or a commit"),
     ("meta/open", "0" * 40, "has no such revision"),
     ("meta/open", None, "meta/open on the hub holds none of adapter_config.json, adapter_model.safetensors"),
     ("a/b/c", None, "a/b/c does not exist; give a folder, or the id of a repository"),
     ("../up", None, "does not exist"), ("~/x", None, "does not exist")],
)  # fmt: skip
def test_what_cannot_be_fetched(remote, monkeypatch, name, revision, message):
    """No repository, a gated one, no such revision, none of the files, no id at all: each says so, and what to do."""
    remote.repo("meta/gated", dict.fromkeys(FILES, b""), gated=True)
    remote.repo("meta/open")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match=message):
        hub.fetched(name, files=FILES, revision=revision)


def test_a_path_never_goes_out(remote, tmp_path, monkeypatch):
    """A missing `Path`, and a file: no request."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "file").touch()
    for name, message in (
        (Path("user/x"), "does not exist"), (Path("user/file"), "is not a folder"), (tmp_path / "x", "does not exist"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            hub.fetched(name, files=FILES)
    assert remote.requests == []


def test_a_missing_folder_of_one_name_is_no_repository(remote, tmp_path, monkeypatch):
    """An adapter's id has a slash: a typing error in a folder's name asks nobody."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        load_adapter("adaptr")
    assert remote.requests == []


def test_a_wrong_token_is_refused(remote, bridge_llama):
    """In both directions."""
    remote.repo("meta/open")
    for go in (
        lambda: hub.fetched("meta/open", files=("*",), token="hf_wrong"),
        lambda: random_adapter(bridge_llama).push_to_hub(MINE, token="hf_wrong"),
    ):
        with pytest.raises(
            InputError, match=r"you are not logged in to the hub, or it refuses your token; log in .*hf auth login"
        ):
            go()
    assert set(remote.repos) == {"meta/open"}


def test_without_a_token_nothing_is_uploaded(remote, bridge_llama, monkeypatch):
    """It says how to log in."""
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match=f"cannot upload to {MINE}: you are not logged in.*log in"):
        random_adapter(bridge_llama).push_to_hub(MINE)
    assert remote.repos == {}


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [("bob/his", None, "rights to write to bob/his.* a repository of your own"), ("truthful", None, "write user/repo"),
     ("no spaces/here", None, "not the id of a repository"), ("a/b/c", None, "not the id of a repository"),
     (MINE, "0" * 40, "is a commit, which cannot change; give a branch")],
)  # fmt: skip
def test_what_cannot_be_uploaded(remote, bridge_llama, name, revision, message):
    """Another user's repository, a name that is none, a commit as revision."""
    with pytest.raises(InputError, match=message):
        random_adapter(bridge_llama).push_to_hub(name, revision=revision)
    assert remote.repos == {}


def test_the_hub_may_refuse_a_card(remote, bridge_llama):
    """Its reason is passed on, and nothing is uploaded."""
    remote.bad_card = '"license" must be one of [mit, ...]'
    with pytest.raises(InputError, match=r'the hub refuses what was given: .*"license" must be one of'):
        random_adapter(bridge_llama).push_to_hub(MINE, license="my-own")
    assert remote.repos[MINE].messages == ["initial commit"]
    with pytest.raises(InputError, match="license 'My own' is not as the hub abbreviates licenses"):
        random_adapter(bridge_llama).push_to_hub(MINE, license="My own")


def test_switched_off_says_so(remote, bridge_llama, monkeypatch):
    """HF_HUB_OFFLINE and an empty cache, in both directions."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"switched off \(HF_HUB_OFFLINE=1\), and the files are not all in the cache.*local"
    ):
        load_adapter(MINE)
    with pytest.raises(InputError, match=r"cannot upload to .* switched off \(HF_HUB_OFFLINE=1\); set it to 0$"):
        random_adapter(bridge_llama).push_to_hub(MINE)
    assert remote.requests == []


def test_nobody_there_says_so(remote, monkeypatch, bridge_llama):
    """A port at which nobody listens: the network is named, not a stack of exceptions."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        InputError, match=r"http://127.0.0.1:9 cannot be reached, and the files are not all in the cache"
    ):
        hub.fetched(MINE, files=FILES)
    with pytest.raises(
        InputError, match=r"cannot upload to .*: http://127.0.0.1:9 cannot be reached; check the network$"
    ):
        every_method.made("lofit", bridge_llama).push_to_hub(MINE)


def test_a_hub_that_is_down_is_told(remote):
    """What it answered, and to try later; not that there is no such repository."""
    remote.broken = 503
    with pytest.raises(InputError, match=r"cannot fetch .*503.*try again later"):
        hub.fetched(MINE, files=FILES)


def test_a_full_disk_is_told(remote, monkeypatch):
    """As everywhere else: how much is free, and where."""

    def full(*a, **k):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(InputError, match=r"No space left on device .* MB are free"):
        hub.fetched(MINE, files=FILES)


# ------------------------------------------------------------------------------------------------------------ cards


def card_of(adapter, **options):
    text = model_card(adapter, **options)
    return text, ModelCard(text).data.to_dict()


@pytest.mark.parametrize("method", every_method.METHODS)
def test_the_card_of_every_method(bridge_llama, method):
    """The record parses and holds library, method, license and metrics; the text has the paper, the places and the interval."""
    adapter = every_method.made(method, bridge_llama)
    text, record = card_of(adapter, repo_id=MINE, license="mit")
    assert (record["library_name"], record["license"]) == ("lofit_lens", "mit")
    assert {"lofit_lens", method} <= set(record["tags"])
    (index,) = record["model-index"]
    (found,) = index["results"]
    assert index["name"] == "truthful"
    assert (found["dataset"]["type"], found["dataset"]["split"]) == ("organism/facts", "test")
    (metric,) = found["metrics"]
    assert (metric["type"], metric["value"], metric["args"]["interval_95"]) == ("accuracy", 0.75, [0.5, 0.875])
    assert "arXiv" in text or method == "ablation"
    assert "| organism/facts | test | - | accuracy | 0.75 | 0.5 to 0.875 | 40 | 1 | abababababab |" in text
    for told in ("cdcdcdcd", "| training examples | 120 |", "| seed | 0 |", '"lr": 0.01', "without TransformerLens' weight",
                 str(adapter.positions), "License of the adapter: mit.", f"| torch | {torch.__version__} |"):  # fmt: skip
        assert told in text
    assert "None" not in text


def test_heads_stand_best_first_with_scores(bridge_llama):
    """Ten at most, and how many there are in all."""
    text, _ = card_of(every_method.made("iti", bridge_llama))
    assert "3 of 3 x 4 heads" in text
    assert re.search(r"\| 1 \| L2H1 \| 0.3 \|\n\| 2 \| L0H3 \| 0.2 \|\n\| 3 \| L2H0 \| 0.1 \|\n", text)
    assert "Scores: probe accuracy." in text
    every = random_adapter(bridge_llama, ll.HeadSet.all((3, 4)))
    text, _ = card_of(every)
    assert "12 of 3 x 4 heads" in text
    assert "the first 10 of them here" in text
    assert "| 10 | L2H1 | not recorded |" in text
    assert "| 11 |" not in text


def test_a_card_says_what_is_not_known():
    """No base model, revision, task, seed, metrics or license: each is said; nothing is made up."""
    text, record = card_of(ll.Lofit((3, 4, 8), ll.HeadSet(["L0H1"])))
    assert set(record) == {"library_name", "tags", "pipeline_tag"}
    for told in ("Made for: not recorded", "None were recorded", "| task | not recorded |", "| seed | not recorded |",
                 "Settings: not recorded", "No license was given", "revision was not recorded",
                 'll.load_model("...")  # the base model, which was not recorded'):  # fmt: skip
        assert told in text


def changed(bridge_llama, **info):
    adapter = random_adapter(bridge_llama)
    adapter.meta.model = type(adapter.meta.model)(**adapter.meta.model.to_dict() | info)
    return adapter


def test_the_base_model_is_linked_only_if_it_is_on_the_hub(bridge_llama):
    """Known by a commit, or by an id without one; a local folder is named by its last part and never linked."""
    commit = "0123456789" * 4
    text, record = card_of(changed(bridge_llama, name="meta/llama", revision=commit))
    assert (record["base_model"], record["base_model_relation"]) == ("meta/llama", "adapter")
    assert f'll.load_model("meta/llama", revision="{commit}")' in text
    _, record = card_of(changed(bridge_llama, name="gpt2", revision=commit))
    assert record["base_model"] == "gpt2"
    _, record = card_of(changed(bridge_llama, name="meta/llama", revision=None))
    assert record["base_model"] == "meta/llama"
    for name, revision in (("/home/ann/meta/llama", "sha256:12"), ("meta/llama", "sha256:12"), ("in memory", None)):
        text, record = card_of(changed(bridge_llama, name=name, revision=revision))
        assert "base_model" not in record
        assert "base_model_relation" not in record
        assert "/home/ann" not in text
        assert ("read from a local folder" in text) == (revision is not None)


@pytest.mark.parametrize(
    ("backend", "line"),
    [("hooked", 'model = HookedTransformer.from_pretrained("gpt2")'),
     ("bridge", 'model = TransformerBridge.boot_transformers("gpt2")\nmodel.enable_compatibility_mode()')],
)  # fmt: skip
def test_a_model_loaded_with_processing_is_loaded_so_again(bridge_llama, backend, line):
    """With the class that it was made on."""
    text, _ = card_of(changed(bridge_llama, name="gpt2", revision=None, processed=True, backend=backend))
    assert line in text
    assert ", with TransformerLens' weight processing" in text


def test_texts_cannot_break_a_card(bridge_llama):
    """Signs of Markdown, HTML and YAML in names stay what they are: text in one line."""
    adapter = every_method.made("lofit", bridge_llama)
    adapter.meta.task = "a|b\n---\n# <script>x</script>"
    adapter.meta.config = {"why": "```\n# out"}
    adapter.meta.metrics = [{**every_method.METRIC, "task": "t: [1]\n---\nx: 'y'", "form": "<b>|"}]
    text, record = card_of(adapter)
    assert record["model-index"][0]["results"][0]["dataset"]["name"] == "t: [1]\n---\nx: 'y'"
    assert r"a\|b --- \# \<script\>x\</script\>" in text
    body = ModelCard(text).text
    assert "<script>" not in body.replace(r"\<", "")
    assert body.count("```") == 4


def test_the_code_of_a_card_runs(remote, tmp_path, monkeypatch):
    """As it stands, on a hub that has base model and adapter: it edits the model, and leaves it as it was."""
    folder = tiny.save(tmp_path / "base")
    remote.repo("meta/tiny", {f.name: f.read_bytes() for f in folder.iterdir()})
    model = load_model("meta/tiny", device="cpu")
    assert model_info(model).revision == remote.repos["meta/tiny"].branches["main"]
    adapter = random_adapter(model, v=3.0)
    adapter.push_to_hub(MINE)
    card = remote.repos[MINE].commits[remote.repos[MINE].branches["main"]]["README.md"].decode()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    names = {}
    exec(code, names)
    assert same(names["adapter"], adapter)
    with adapter.attached(model):
        assert names["text"] == ll.generate(model, "Q: Who wrote Hamlet? A:")
    assert names["text"] != ll.generate(model, "Q: Who wrote Hamlet? A:")


def test_a_card_beside_its_files_runs_there(tmp_path, monkeypatch):
    """Without an id the code reads the folder that it lies in, and is five lines; the hub's own tools read its record."""
    base = tiny.save(tmp_path / "adapter" / "base")
    adapter = random_adapter(load_model(base, device="cpu"), v=3.0)
    adapter.save_pretrained(tmp_path / "saved")
    for file in (tmp_path / "saved").iterdir():
        file.rename(base.parent / file.name)
    monkeypatch.chdir(base.parent)
    text, record = card_of(adapter, license="apache-2.0")
    Path("README.md").write_text(text)
    assert metadata_load("README.md") == record
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line]) == 5
    names = {}
    exec(code, names)
    assert same(names["adapter"], adapter)
    assert names["text"] != ll.generate(names["model"], "Q: Who wrote Hamlet? A:")


def test_the_record_has_the_hubs_names(bridge_llama):
    """What its search and pages read; nothing that shows a widget. Written again by its tools it is the same."""
    adapter = changed(bridge_llama, name="meta/llama", revision="0123456789" * 4)
    _, record = card_of(adapter, license="apache-2.0")
    wanted = {
        "license": "apache-2.0", "library_name": "lofit_lens", "base_model": "meta/llama", "base_model_relation": "adapter",
        "pipeline_tag": "text-generation", "tags": ["lofit_lens", "lofit", "activation-steering", "transformer-lens"],
    }  # fmt: skip
    assert record == wanted
    assert ModelCardData(**wanted).to_dict() == record
