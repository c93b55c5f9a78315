"""A Hugging Face hub on this machine: a real HTTP server with the endpoints that huggingface_hub needs, and nothing behind it.

It keeps repositories of models with branches and commits, knows one user by a token, and answers as the hub does: 401 to
strangers at what is private or not there, 403 without the right to write, an error code for gated files and unknown revisions.
Files that end in .safetensors go the way of large files.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

USER, TOKEN = "ann", "hf_token-of-ann"


def sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@dataclass
class Repo:
    """A repository: commit -> its files, and branch -> commit."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        """Add files to a branch; returns the commit."""
        parent = self.branches.get(branch, self.branches.get("main", ""))
        whole = {**self.commits.get(parent, {}), **files}
        told = f"{parent}{message}{sorted((name, sha1(data)) for name, data in whole.items())}"
        oid = sha1(told.encode())
        self.commits[oid], self.branches[branch] = whole, oid
        self.messages.append(message)
        return oid

    def at(self, revision: str) -> str | None:
        """The commit of a branch or of a commit's own name."""
        return self.branches.get(revision, revision if revision in self.commits else None)


class FakeHub:
    """What the server knows. `requests` lists what it was asked, `broken` makes it answer everything with a status."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken: int | None = None
        self.bad_card = ""
        self.url = ""

    def repo(
        self, name: str, files: dict[str, bytes] | None = None, *, private: bool = False, gated: bool = False
    ) -> Repo:
        """Make a repository."""
        self.repos[name] = Repo(private, gated)
        self.repos[name].commit(files or {".gitattributes": b""}, message="initial commit")
        return self.repos[name]


class Answer(Exception):
    """The way out of a handler: an answer of the server."""

    def __init__(self, status: int, body: object = b"", headers: dict[str, str] | None = None) -> None:
        super().__init__(status)
        self.status, self.headers = status, dict(headers or {})
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


def refused(status: int, message: str, code: str = "") -> Answer:
    return Answer(status, {"error": message}, {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}))


def handler_of(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    """The request handler of a hub."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self.answer()

        do_HEAD = do_POST = do_PUT = do_GET

        def answer(self) -> None:
            asked = f"{self.command} {urlsplit(self.path).path}"
            hub.requests.append(unquote(asked))
            self.sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                if hub.broken:
                    raise Answer(hub.broken)
                for pattern, method in ROUTES:
                    found = re.fullmatch(pattern, asked)
                    if found:
                        method(self, *map(unquote, found.groups()))
                raise refused(404, "no such page")
            except Answer as a:
                self.send_response(a.status)
                for name, value in a.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(a.body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(a.body)

        @property
        def known(self) -> bool:
            """Whether the request carries the user's token; a wrong one is refused at once."""
            token = self.headers.get("Authorization")
            if token and token != f"Bearer {TOKEN}":
                raise refused(401, "Invalid credentials in Authorization header")
            return bool(token)

        def asked(self, name: str, revision: str = "main") -> tuple[Repo, str]:
            """A repository that the user may see, and one of its commits."""
            repo, known = hub.repos.get(name), self.known
            if repo is None or (repo.private and not known):
                raise (
                    refused(404, "Repository not found", "RepoNotFound") if known else refused(401, "Invalid username")
                )
            commit = repo.at(revision)
            if commit is None:
                raise refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return repo, commit

        def writable(self, name: str) -> None:
            if not self.known:
                raise refused(401, "Invalid username or password.")
            if not name.startswith(f"{USER}/"):
                raise refused(403, f"You don't have the rights to write to {name}")

        def create(self) -> None:
            asked = json.loads(self.sent)
            name = f"{asked['organization'] or USER}/{asked['name']}"
            self.writable(name)
            if name in hub.repos:
                raise Answer(409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"})
            hub.repo(name, private=asked.get("visibility") == "private" or bool(asked.get("private")))
            raise Answer(200, {"url": f"{hub.url}/{name}", "name": name})

        def info(self, name: str, revision: str | None = None) -> None:
            repo, commit = self.asked(name, revision or "main")
            raise Answer(200, {
                "id": name, "sha": commit, "private": repo.private, "gated": repo.gated,
                "siblings": [{"rfilename": file} for file in repo.commits[commit]],
            })  # fmt: skip

        def branch(self, name: str, branch: str) -> None:
            self.writable(name)
            repo, commit = self.asked(name)
            if branch in repo.branches:
                raise refused(409, "Reference already exists")
            repo.branches[branch] = commit
            raise Answer(200, {})

        def tree(self, name: str, revision: str) -> None:
            repo, commit = self.asked(name, revision)
            raise Answer(200, [
                {"type": "file", "path": file, "size": len(data), "oid": sha1(data)}
                for file, data in repo.commits[commit].items()
            ])  # fmt: skip

        def folder(self, name: str, revision: str, folder: str) -> None:
            self.asked(name, revision)
            raise refused(404, f"{folder} does not exist", "EntryNotFound")

        def preupload(self, name: str, revision: str) -> None:
            self.writable(name)
            self.asked(name, revision)
            raise Answer(200, {"files": [
                {
                    "path": file["path"], "shouldIgnore": False,
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                }
                for file in json.loads(self.sent)["files"]
            ]})  # fmt: skip

        def batch(self, name: str) -> None:
            self.writable(name)
            raise Answer(200, {"transfer": "basic", "objects": [
                {**one, "actions": {"upload": {"href": f"{hub.url}/large/{one['oid']}"}}}
                for one in json.loads(self.sent)["objects"]
            ]})  # fmt: skip

        def large(self, oid: str) -> None:
            assert hashlib.sha256(self.sent).hexdigest() == oid
            hub.large[oid] = self.sent
            raise Answer(200)

        def commit(self, name: str, revision: str) -> None:
            self.writable(name)
            repo, _ = self.asked(name, revision)
            files, message = {}, ""
            for line in self.sent.splitlines():
                one = json.loads(line)
                value = one["value"]
                if one["key"] == "header":
                    message = value["summary"]
                elif one["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                else:
                    files[value["path"]] = hub.large[value["oid"]]
            oid = repo.commit(files, revision, message)
            raise Answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}"})

        def validate(self) -> None:
            if hub.bad_card:
                raise Answer(400, {"errors": [{"message": hub.bad_card}], "warnings": []})
            raise Answer(200, {"errors": [], "warnings": []})

        def resolve(self, name: str, revision: str, file: str) -> None:
            repo, commit = self.asked(name, revision)
            if repo.gated and not self.known:
                raise refused(401, f"Access to model {name} is restricted", "GatedRepo")
            if file not in repo.commits[commit]:
                raise refused(404, "Entry not found", "EntryNotFound")
            data = repo.commits[commit][file]
            raise Answer(200, data, {"X-Repo-Commit": commit, "ETag": f'"{sha1(data)}"'})

    name = r"([^/]+/[^/]+)"
    ROUTES = (
        (r"POST /api/repos/create", Handler.create),
        (r"POST /api/validate-yaml", Handler.validate),
        (rf"GET /api/models/{name}", Handler.info),
        (rf"GET /api/models/{name}/revision/(.+)", Handler.info),
        (rf"POST /api/models/{name}/branch/(.+)", Handler.branch),
        (rf"GET /api/models/{name}/tree/([^/]+)", Handler.tree),
        (rf"GET /api/models/{name}/tree/([^/]+)/(.+)", Handler.folder),
        (rf"POST /api/models/{name}/preupload/(.+)", Handler.preupload),
        (rf"POST /api/models/{name}/commit/(.+)", Handler.commit),
        (rf"POST /{name}\.git/info/lfs/objects/batch", Handler.batch),
        (r"PUT /large/(\w+)", Handler.large),
        (rf"(?:GET|HEAD) /{name}/resolve/([^/]+)/(.+)", Handler.resolve),
    )
    return Handler


@contextlib.contextmanager
def running() -> Iterator[FakeHub]:
    """A hub that answers at its `url` for the length of the block."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
