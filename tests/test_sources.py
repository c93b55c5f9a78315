"""Data files: fetched once with a checksum, or read from a folder; every defect names file and line."""

import functools
import hashlib
import http.server
import json
import threading

import pyarrow
import pyarrow.parquet
import pytest

from lofit_lens import load_task
from lofit_lens.errors import DataError
from lofit_lens.io import file_digest
from lofit_lens.tasks import clutrr, mquake, truthfulqa
from lofit_lens.tasks.sources import Source, fetch, locate, read_rows

CONTENT = b'{"prompt": "p", "answer": "a"}\n'
GOOD = hashlib.sha256(CONTENT).hexdigest()


# ------------------------------------------------------------------------------------------------------- fetching


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine with one file, and an empty download cache; returns its address and requests."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "web" / "folder").mkdir(parents=True)
    (tmp_path / "web" / "folder" / "x.jsonl").write_bytes(CONTENT)
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            requests.append(self.path)
            super().do_GET()

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path / "web")
    ) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{web.server_port}", requests
        finally:
            web.shutdown()
            thread.join()


def test_a_file_with_the_right_checksum_is_fetched_once(server):
    """The bytes arrive, and a second call takes them from the cache."""
    address, requests = server
    path = fetch(f"{address}/folder/x.jsonl", GOOD)
    assert path.read_bytes() == CONTENT
    assert fetch(f"{address}/folder/x.jsonl", GOOD) == path
    assert requests == ["/folder/x.jsonl"]


def test_other_bytes_than_expected_are_refused(server):
    """A changed file is never used: both checksums are named, and the cached file to delete."""
    address, _ = server
    with pytest.raises(DataError, match=rf"SHA-256 {GOOD}, expected {'0' * 64}.*delete .*cache"):
        fetch(f"{address}/folder/x.jsonl", "0" * 64)


def test_what_cannot_be_reached_is_refused(server):
    """A missing page: the address is named, and data_dir as the way out."""
    address, _ = server
    with pytest.raises(DataError, match=rf"cannot fetch {address}/none.*data_dir"):
        fetch(f"{address}/none", GOOD)


def test_a_task_without_a_folder_is_fetched(server, monkeypatch):
    """locate() builds the address from base, folder and name, and checks each file's own checksum."""
    address, _ = server
    source = Source("folder", {"x.jsonl": GOOD, "y.jsonl": GOOD}, base=address)
    assert locate(source, {"train": "x.jsonl"}, None)["train"].read_bytes() == CONTENT
    with pytest.raises(DataError, match=r"folder/y\.jsonl"):
        locate(source, {"train": "y.jsonl"}, None)


def test_the_official_address_is_pinned_to_a_commit():
    """A branch could move; a commit of forty digits cannot."""
    for source in (truthfulqa.SOURCE, mquake.SOURCE, clutrr.SOURCE):
        assert len(source.base.split("/lo-fit/")[1].split("/")[0]) == 40
        assert all(len(digest) == 64 for digest in source.files.values())
        name = next(iter(source.files))
        assert source.url(name) == f"{source.base}/{source.folder}/{name}"


# -------------------------------------------------------------------------------------------------- local folders


def test_a_folder_is_the_tasks_own_or_the_one_above(tmp_path):
    """data_dir may be the task's folder, or hold it, by its official or its lower-case name."""
    source = Source("MQuAKE", {"x": ""})
    for place in ("", "MQuAKE", "mquake"):
        folder = tmp_path / f"root-{place}" / place
        folder.mkdir(parents=True)
        (folder / "x").write_text("1")
        assert locate(source, {"train": "x"}, tmp_path / f"root-{place}") == {"train": folder / "x"}


def test_a_missing_folder_or_file_is_named(tmp_path):
    """With the address it could come from."""
    with pytest.raises(DataError, match=r"no data folder .*nowhere"):
        load_task("mquake", data_dir=tmp_path / "nowhere")
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"no file val\.jsonl in .*https://.*MQuAKE/val\.jsonl"):
        load_task("mquake", data_dir=tmp_path)


def test_an_optional_file_may_be_missing(tmp_path, server):
    """Found where the others are, left out where it is not; fetched only if its checksum is known; the rest is needed."""
    address, requests = server
    names = {"train": "train.jsonl", "test": "x.jsonl"}
    source = Source("folder", {"x.jsonl": GOOD}, base=address)
    assert list(locate(source, names, None, optional=("train",))) == ["test"]
    assert requests == ["/folder/x.jsonl"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.jsonl").write_bytes(CONTENT)
    (tmp_path / "train.jsonl").write_bytes(CONTENT)  # not beside the needed file, so not this task's
    found = locate(source, names, tmp_path, optional=("train",))
    assert found == {"test": tmp_path / "folder" / "x.jsonl"}
    (tmp_path / "folder" / "train.jsonl").write_bytes(CONTENT)
    assert locate(source, names, tmp_path, optional=("train",)) == {
        "train": tmp_path / "folder" / "train.jsonl", "test": tmp_path / "folder" / "x.jsonl"
    }  # fmt: skip
    (tmp_path / "folder" / "x.jsonl").unlink()
    with pytest.raises(DataError, match=r"no file x\.jsonl in"):
        locate(source, names, tmp_path, optional=("train",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("x.jsonl", b"", "is empty"), ("x.jsonl", b"\n \n", "is empty"), ("x.json", b"", "is empty"), ("x.json", b"[]", "is empty"),
     ("x.csv", b"", "is empty"), ("x.csv", b"a,b\n", "is empty"), ("x.jsonl", b'{"a": 1}\n{"a": \n', r"x\.jsonl:2: not JSON"),
     ("x.json", b'[{"a": 1},\n{', "line 2"), ("x.json", b'{"a": 1}', "expected a list"),
     ("x.jsonl", b'{"a": "\xe9"}', "not UTF-8"),
     ("x.csv", b"a\n\xe9\n", "not UTF-8"), ("x.csv", b'a,b\n1,"open', r"x\.csv:\d: not CSV"),
     ("x.csv", b"a,b\n1,2\n1,Rome, Italy\n", r"x\.csv:3: 3 cells under 2 columns; put a cell that holds a comma in"),
     ("x.jsonl", b'{"a": ' + b"1" * 5000 + b"}", r"x\.jsonl:1: not JSON \(Exceeds the limit"),
     ("x.jsonl", b"[" * 100_000, r"x\.jsonl:1: not JSON"), ("x.parquet", b"1", "parquet")],
)  # fmt: skip
def test_a_defective_file_is_refused_with_file_and_line(tmp_path, name, content, message):
    """Empty, cut off, of another encoding, of another form."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{tmp_path}.*{message}"):
        read_rows(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("x.csv", ["a,b", "é,1", "{},2"]),
        ("x.jsonl", ['{"a": "é"}', "", '{"a": "{}"}']),
        ("x.json", ["[", '{"a": "é"},', '"{}"]']),
    ],
)
def test_mixed_encodings_are_refused_with_the_line(tmp_path, name, lines):
    """UTF-8 on line 2, Latin-1 on line 3: file, line, byte and its place; all of it UTF-8 reads, a mark in front or not."""
    text = "\r\n".join(lines).encode()
    path = tmp_path / name
    path.write_bytes(text.replace(b"{}", b"caf\xe9 au lait"))
    at = text.index(b"{}") + 3
    with pytest.raises(DataError, match=rf"^{path}:3: not UTF-8 text \(.*byte 0xe9 at {at}\); re-encode it as UTF-8"):
        read_rows(path)
    path.write_bytes(text)
    plain = read_rows(path)
    assert len(plain) == 2
    path.write_bytes(b"\xef\xbb\xbf" + text)
    assert read_rows(path) == plain


def test_another_encoding_altogether_is_refused(tmp_path):
    """UTF-16, as spreadsheets write it, begins with bytes that UTF-8 never has."""
    (tmp_path / "x.csv").write_bytes("a,b\n1,2\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"x\.csv:1: not UTF-8 text \(.*byte 0xff at 0\)"):
        read_rows(tmp_path / "x.csv")


def test_parquet_rows_are_records(tmp_path):
    """Nested values come as lists and dictionaries, a gap as None; rows are named by number; cut off or empty is refused."""
    rows = [{"a": "x", "b": {"c": ["y", "z"]}}, {"a": None, "b": {"c": []}}]
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read_rows(path) == [(f"{path}: row 1", rows[0]), (f"{path}: row 2", rows[1])]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=rf"{path} is not a complete parquet file .*fetch it again"):
        read_rows(path)
    pyarrow.parquet.write_table(pyarrow.table({"a": []}), path)
    with pytest.raises(DataError, match=rf"{path} is empty"):
        read_rows(path)


def test_an_unknown_format_is_refused(tmp_path):
    """The formats that can be read are listed."""
    (tmp_path / "x.tsv").write_text("a\tb")
    with pytest.raises(DataError, match=r"x\.tsv: unknown format '\.tsv'; give \.csv, \.json, \.jsonl, \.parquet"):
        read_rows(tmp_path / "x.tsv")


def test_rows_know_where_they_stand(tmp_path):
    """File and line in jsonl and csv (the last line of a row that spans several), file and row in json."""
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    (tmp_path / "x.json").write_text('[{"a": 1},\n{"a": 2}]')
    (tmp_path / "x.csv").write_bytes(b'a,b\n1,"two\nlines"\n3,4\n')
    assert [w.split("/")[-1] for w, _ in read_rows(tmp_path / "x.jsonl")] == ["x.jsonl:1", "x.jsonl:3"]
    assert [w.split("/")[-1] for w, _ in read_rows(tmp_path / "x.json")] == ["x.json: row 1", "x.json: row 2"]
    assert [w.split("/")[-1] for w, _ in read_rows(tmp_path / "x.csv")] == ["x.csv:3", "x.csv:4"]
    assert read_rows(tmp_path / "x.csv")[0][1] == {"a": "1", "b": "two\nlines"}


@pytest.mark.parametrize("field", ["clean_story", "query", "target_text"])
def test_a_row_without_a_field_names_file_row_and_field(tmp_path, field):
    """Through load_task: the second row of train.json lacks one field."""
    row = {"clean_story": "[A] b.", "query": "('A', 'B')", "target_text": "aunt"}
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.json").write_text(json.dumps([row]))
    (tmp_path / "train.json").write_text(json.dumps([row, {k: v for k, v in row.items() if k != field}]))
    with pytest.raises(DataError, match=rf"train\.json: row 2: no field '{field}'"):
        load_task("clutrr", data_dir=tmp_path)


EDIT = {
    "requested_rewrite": [{"prompt": "{} is", "subject": "s", "target_new": {"str": "n"}}], "questions": ["q"], "new_answer": "n",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"requested_rewrite": []}, "requested_rewrite"), ({"requested_rewrite": [{"subject": "s"}]}, "'prompt'"),
     ({"requested_rewrite": [{"prompt": "{}", "subject": "s"}]}, "target_new"), ({"questions": []}, "questions"),
     ({"questions": [3]}, "questions"), ({"new_answer": ""}, "new_answer"), ({"new_answer_alias": "abc"}, "new_answer_alias"),
     ({"new_answer_alias": [3]}, "new_answer_alias")],
)  # fmt: skip
def test_a_defective_edit_is_named(tmp_path, changes, message):
    """File, line and field of an MQuAKE row."""
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(EDIT))
    (tmp_path / "test.jsonl").write_text(json.dumps(EDIT) + "\n" + json.dumps({**EDIT, **changes}))
    with pytest.raises(DataError, match=rf"test\.jsonl:2.*{message}"):
        load_task("mquake", data_dir=tmp_path)


def test_answers_that_vanish_when_split_are_refused():
    """A TruthfulQA cell of semicolons alone holds no answer."""
    row = {"Question": "q", "Best Answer": "b", "Correct Answers": ";", "Incorrect Answers": "x"}
    with pytest.raises(DataError, match="here: no answers left"):
        truthfulqa.choices("here", row)


# ------------------------------------------------------------------------------------------------- the real files


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("mquake", (134, 95, 864)),
        ("clutrr", (3151, 450, 450)),
        ("truthfulqa:0", (326, 82, 409)),
        ("truthfulqa:1", (327, 82, 408)),
    ],
)
def test_the_official_counts(data_dir, name, counts):
    """Rows of train, val and test."""
    task = load_task(name, data_dir=data_dir)
    assert tuple(len(task.training[s]) for s in ("train", "val", "test")) == counts
    assert tuple(len(task.examples(s)) for s in ("train", "val", "test")) == counts


@pytest.mark.data
@pytest.mark.parametrize("source", [truthfulqa.SOURCE, mquake.SOURCE, clutrr.SOURCE], ids=lambda s: s.folder)
def test_checksums_are_those_of_the_files(data_dir, source):
    """What would be fetched is what lies in the folder."""
    for name, digest in source.files.items():
        assert file_digest(data_dir / source.folder.lower() / name) == digest


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "files"),
    [("truthfulqa:0", "truthfulqa/fold_0_{}_seed_42.csv"), ("truthfulqa:1", "truthfulqa/fold_1_{}_seed_42.csv"),
     ("mquake", "mquake/{}.jsonl"), *[(n, n + "/{}.json") for n in ("clutrr", "siqa", "arc_challenge", "boolq", "svamp")]],
)  # fmt: skip
def test_each_splits_hash_is_that_of_its_file(data_dir, name, files):
    """SHA-256 of the bytes; where validation rows are held out of the training file, its hash is theirs."""
    task = load_task(name, data_dir=data_dir)
    splits = ["test"] if name in ("siqa", "svamp") else ["train", "val", "test"]
    file_of = {s: "train" if s == "val" and name in ("arc_challenge", "boolq") else s for s in splits}
    expected = {s: hashlib.sha256((data_dir / files.format(f)).read_bytes()).hexdigest() for s, f in file_of.items()}
    assert task.hashes == expected


@pytest.mark.data
def test_both_folds_of_truthfulqa_hold_every_question_once_as_test(data_dir):
    """817 questions; the two test splits share none, and each fold's train, val and test are disjoint."""
    tested = []
    for fold in (0, 1):
        task = load_task("truthfulqa", fold=fold, data_dir=data_dir)
        questions = {s: [e.prompt.rsplit("\n\n", 1)[1] for e in task.examples(s)] for s in ("train", "val", "test")}
        assert len({q for rows in questions.values() for q in rows}) == 817
        tested += questions["test"]
        assert all(e.true and e.false and e.best.endswith(".") for e in task.examples("test"))
    assert len(set(tested)) == len(tested) == 817


@pytest.mark.data
def test_hops_and_leaks_of_the_real_files(data_dir):
    """MQuAKE's test has 393/287/184 questions of 2/3/4 hops; CLUTRR has 18 relations and four leaked training rows."""
    rows = [r for _, r in read_rows(data_dir / "mquake" / "test.jsonl")]
    hops = [len(r["new_single_hops"]) for r in rows]
    assert [hops.count(n) for n in (2, 3, 4)] == [393, 287, 184]
    groups = [e.group for e in load_task("mquake", data_dir=data_dir).examples("test")]
    assert [groups.count(f"{n} hops") for n in (2, 3, 4)] == [393, 287, 184]
    task = load_task("clutrr", data_dir=data_dir)
    assert len(task.leaked) == 4
    assert len(task.training_examples(seed=0)) == 300
    assert len({e.answer for e in task.training["train"]}) == 18
    relations = [e.references[0] for e in task.examples("test")]
    assert max(relations.count(r) for r in set(relations)) / 450 == pytest.approx(0.102, abs=0.0005)
