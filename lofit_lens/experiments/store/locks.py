"""Locks on a shared folder: each is a file that its holder touches at regular intervals.

A holder that was killed on this host is replaced at once. A holder elsewhere is replaced when its file has been unchanged for one
lease (for two leases on file systems that cannot swap two names, such as NFS; for two seconds if the file is empty). The time is
measured by the clock of the process that wants the lock, so clocks may differ, and it starts with that process's first attempt.
"""

import contextlib
import functools
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import LeaseCompromise, LeaseSettingsMismatch, SoftFileLease, Timeout

from lofit_lens import io

EMPTY = 2.0  # seconds after which an empty lock counts as left by a process that was killed before it wrote into it

log = logging.getLogger(__name__)


@contextlib.contextmanager
def claimed(path: Path, seconds: float) -> Iterator[bool]:
    """Hold a lock while the block runs; yields False at once if another holder has it, including an outer block of this thread.

    A holder that is silent for so long (stopped, or cut off) that its lock is taken over gets a warning in the log and continues.

    Args:
        path: path of the lock's file.
        seconds: length of the lease; the holder touches the file three times per lease.

    Raises:
        InputError: the file cannot be written (`DiskFull`: no space is left).
    """
    lease = _lease(str(path), seconds, os.getpid())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = not lease.is_locked and (_acquired(lease) or (_cleared(lease) and _acquired(lease)))
    except OSError as e:
        raise io.cannot_write(path, e) from e
    try:
        yield mine
    finally:
        if mine:
            with contextlib.suppress(OSError):  # a file that cannot be removed now will expire
                lease.release()


def held(path: Path, seconds: float) -> bool:
    """Whether a lock is held by a process that may be alive; changes nothing."""
    if not path.exists():
        return False
    try:
        with tempfile.TemporaryDirectory() as folder:  # tests whether a copy of the lock can be acquired
            lease = SoftFileLease(shutil.copy2(path, folder), lease_duration=seconds)
            mine = _acquired(lease)
            lease.release()
    except OSError:
        return path.exists()
    return not mine


@functools.cache  # one per process: it remembers since when another holder's lock has been silent
def _lease(path: str, seconds: float, _process: int) -> SoftFileLease:
    return SoftFileLease(path, lease_duration=seconds, on_compromise=_warn)


def _warn(lost: LeaseCompromise) -> None:
    log.warning(
        "the lock %s was lost (%s): another runner may compute this run too; the first to finish is kept",
        lost.lock_file, lost.reason,
    )  # fmt: skip


def _acquired(lease: SoftFileLease) -> bool:
    for _ in range(2):  # the first attempt may only clear a dead holder's lock
        with contextlib.suppress(Timeout, LeaseSettingsMismatch):
            lease.acquire(blocking=False)
            return True
    return False


_silent: dict[
    str, tuple[tuple[int, int], float]
] = {}  # lock file -> its inode and time stamp, and since when they are unchanged


def _cleared(lease: SoftFileLease) -> bool:
    """Remove a lock that has been silent for two leases, for file systems where filelock cannot (NFS: no swap of two names)."""
    path, owner, now = lease.lock_file, lease.owner, time.monotonic()
    try:
        with open(path, "rb") as f:  # opening makes a network file system refresh its cache
            there = os.fstat(f.fileno())
            stamp = (there.st_ino, there.st_mtime_ns)
            known, since = _silent.get(path, (None, now))
            if known != stamp:
                _silent[path] = (stamp, now)
                return False
            patience = 2 * max(lease.lease_duration, (owner and owner.lease_duration) or 0)
            if now - since < (patience if there.st_size else EMPTY):
                return False
            aside = f"{path}.{uuid.uuid4().hex}.tmp"
            os.rename(path, aside)
            moved = Path(aside).stat()
            if (moved.st_ino, moved.st_mtime_ns) != stamp:  # another process was faster: put its lock back
                os.link(aside, path)
            os.unlink(aside)
    except OSError:
        return False
    return True
