"""The Hugging Face hub: download files at one commit, upload them in one commit.

Everything goes through huggingface_hub, which is imported only when the hub is first used.
"""

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lofit_lens import io
from lofit_lens.errors import InputError

logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")
UNREACHABLE = (
    "ConnectError",
    "ConnectTimeout",
    "ConnectionError",
)  # by name: huggingface_hub changed its HTTP package
ASK_SECONDS = 10  # how long the hub may take to name a commit, before the cache is read instead
LOG_IN = "log in (`hf auth login`), or give a token (token=, or HF_TOKEN in the environment)"


def commit_of(revision: str | None) -> str | None:
    """Return a revision if it is a commit on the hub, else None (a branch, a tag, a local folder's checksum, or unknown)."""
    return revision if revision and _COMMIT.fullmatch(revision) else None


def leads_out(path: Path) -> Path | None:
    """Return the target of a link that leaves its folder, else None; the hub cache's links to its own blobs are allowed."""
    folder, real = path.parent.resolve(), path.resolve()
    of_the_hub = folder.parent.name == "snapshots" and real.parent == folder.parents[1] / "blobs"
    return None if real.parent == folder or of_the_hub else real


def fetched(
    name: str | Path, *, files: Sequence[str], revision: str | None = None, token: str | None = None
) -> tuple[Path, str]:
    """Return a folder with the wanted files: a local one, or a model repository downloaded from the hub.

    Args:
        name: a local folder, or a hub id (`"user/repo"`). A `Path` is never looked up on the hub.
        files: patterns of the files to fetch; a local folder is taken as it is.
        revision: branch, tag or commit on the hub; None = its main branch.
        token: of a Hugging Face account; None = the one that is logged in, if any.

    Returns:
        The folder, and where it comes from: `"user/repo@commit"`, or `""` for a local folder. Downloaded files are kept in
        Hugging Face's cache, which also serves them when the hub cannot be reached.

    Raises:
        InputError: no such folder or repository, no such revision, no access, no connection, or none of the files there.
    """
    folder = Path(name)
    if folder.is_dir():
        if revision is not None:
            raise InputError(f"{name} is a local folder, which has no revision {revision!r}; leave revision out")
        return folder, ""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(str(name))
    except HFValidationError:
        local = True
    else:
        local = isinstance(name, Path)
    if local:
        what = "is not a folder" if folder.exists() else "does not exist"
        raise InputError(f"{name} {what}; give a folder, or the id of a repository on the hub (user/repo)")
    try:
        found = Path(snapshot_download(str(name), revision=revision, allow_patterns=list(files), token=token))
    except Exception as e:
        raise _refusal(e, str(name), revision, "fetch") from e
    if not found.is_dir():
        raise InputError(f"{name} on the hub holds none of {', '.join(files)}; it was made for something else")
    return found, f"{name}@{found.name}"


@contextlib.contextmanager
def read_at(name: str, revision: str | None) -> Iterator[str | None]:
    """Yield the commit at which a hub model is read, for the duration of a load.

    The hub is asked once. If it cannot be reached, a warning says so and the cached copy is read without asking again:
    Hugging Face would ask for every file, which takes minutes.

    Raises:
        InputError: an invalid repository id, no such repository or revision, no access, or no connection and nothing cached.
    """
    from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as e:
        raise InputError("it is neither a folder nor the id of a repository on the hub (user/repo)") from e
    file = try_to_load_from_cache(name, "config.json", revision=revision)
    kept = Path(file).parent.name if isinstance(file, str) else None
    if constants.HF_HUB_OFFLINE or (kept and kept == revision):
        yield revision
        return
    try:
        commit = HfApi().model_info(name, revision=revision, timeout=ASK_SECONDS).sha
        snapshot_download(
            name, revision=revision, allow_patterns="config.json"
        )  # the cache learns which commit this is
    except Exception as e:
        answered = isinstance(e, HfHubHTTPError) and e.response.status_code < 500
        if kept is None or answered:
            raise _refusal(e, name, revision, "fetch") from e
        logger.warning("%s cannot be reached; %s is read from the cache, at %s", constants.ENDPOINT, name, kept)
        constants.HF_HUB_OFFLINE = True
        try:
            yield kept
        finally:
            constants.HF_HUB_OFFLINE = False
        return
    yield commit


def pushed(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload the files of a folder in one commit: all of them or none. A missing repository is created.

    Files of the same names are replaced, others stay.

    Args:
        folder: holds the files; subfolders are left out.
        repo_id: `"user/repo"`.
        private: make a new repository private and refuse an existing public one. Otherwise a new one follows the account's
            or organization's default (usually public), and an existing one stays as it is.
        revision: branch, created if missing; None = main.
        message: commit message.
        token: of a Hugging Face account; None = the one that is logged in.

    Returns:
        URL of the commit.

    Raises:
        InputError: an invalid id, a commit as revision, no write access, an existing public repository
            (with `private`), or no connection.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as e:
        raise InputError(f"{repo_id!r} is not the id of a repository: {first_line(e)}; write user/repo") from e
    if "/" not in repo_id:
        raise InputError(f"{repo_id!r} does not say whose repository it is; write user/repo")
    if commit_of(revision):
        raise InputError(f"{revision} is a commit, which cannot change; give a branch, or leave revision out")
    added = [CommitOperationAdd(f.name, f) for f in sorted(Path(folder).iterdir()) if f.is_file()]
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise InputError(
                f"{repo_id} exists already and is public, so nothing was uploaded; make it private on the hub, or give "
                "another name"
            )
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repo_id, added, commit_message=message or "Upload with lofit_lens", revision=revision
        )
    except InputError:
        raise
    except Exception as e:
        raise _refusal(e, repo_id, revision, "upload to") from e
    return str(commit.commit_url)


def _refusal(e: Exception, name: str, revision: str | None, verb: str) -> InputError:
    """Build the error that says what went wrong at the hub and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(e, LocalEntryNotFoundError) and isinstance(e.__cause__, HfHubHTTPError):
        e = e.__cause__  # the hub was reached, and this is what it said
    fetching = verb == "fetch"
    status = e.response.status_code if isinstance(e, HfHubHTTPError) else None
    page, local = f"{constants.ENDPOINT}/{name}", ", or give a local folder" if fetching else ""
    missing = f", and the files are not all in the cache ({constants.HF_HUB_CACHE})" if fetching else ""
    failed = f"cannot {verb} {name}{f' at {revision!r}' if revision else ''}: "
    if isinstance(e, GatedRepoError):
        return InputError(f"{failed}it is gated. Ask for access at {page}, then {LOG_IN}")
    hidden = (
        fetching and status == 401 and "Invalid credentials" not in str(e)
    )  # what the hub tells anonymous users of both
    if isinstance(e, RepositoryNotFoundError) or hidden:
        return InputError(
            f"{failed}{'there is no such local folder, and ' if fetching else ''}the hub has no such repository, or does not "
            f"show it to you. Check the name; if it is private, {LOG_IN}"
        )
    if isinstance(e, RevisionNotFoundError):
        return InputError(
            f"{failed}it has no such revision; give a branch, a tag or a commit that {page}/commits lists"
        )
    if isinstance(e, LocalTokenNotFoundError) or status == 401:
        return InputError(f"{failed}you are not logged in to the hub, or it refuses your token; {LOG_IN}")
    if status == 403:
        return InputError(f"{failed}{first_line(e)} Use a token that has the right to, or a repository of your own")
    if isinstance(e, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return InputError(f"{failed}the hub is switched off (HF_HUB_OFFLINE=1){missing}; set it to 0{local}")
    if isinstance(e, LocalEntryNotFoundError) or type(e).__name__ in UNREACHABLE:
        return InputError(f"{failed}{constants.ENDPOINT} cannot be reached{missing}; check the network{local}")
    if isinstance(e, ValueError) or status == 400:
        return InputError(f"{failed}the hub refuses what was given: {' '.join(str(e).split())[:600]}")
    if isinstance(e, OSError) and e.errno in io.FULL:
        return io.cannot_write(constants.HF_HUB_CACHE, e)
    return InputError(f"{failed}{type(e).__name__}: {first_line(e)}; try again later{local}")


def first_line(e: Exception) -> str:
    """Return the first non-empty line of an error's text, or its class's name if there is none."""
    return next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)[:300]
