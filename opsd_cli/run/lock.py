"""The lock of a run folder, so that one process at a time works in it. `filelock` asks the kernel (flock), which frees
the lock of a process that dies, however it dies; the file says who holds it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from opsd_cli.run.folder import RunFolder
from opsd_cli.settings.errors import ConfigError, OutsideError

_PATIENCE_SECONDS = 0.5  # `opsd watch` looks at the lock by taking it for an instant
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}


@contextlib.contextmanager
def run_lock(folder: RunFolder) -> Iterator[str | None]:
    """Hold the folder's lock. Yields a note for the user, or None. Raises ConfigError if another process has it."""
    lock, note = _lock_of(folder), None
    try:
        lock.acquire(timeout=_PATIENCE_SECONDS, poll_interval=0.02)
    except Timeout:
        raise ConfigError(
            f"run folder {folder.path} is in use by {_holder(folder.lock) or 'another process'}; "
            "wait for that run, or end it with SIGTERM (it saves first)"
        ) from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise OutsideError(f"cannot lock {folder.lock}: {error.strerror} (errno {error.errno})") from None
        note = f"the file system of {folder.path} has no locks: make sure that no other process works in it"
    before = _holder(folder.lock)
    if before and note is None:
        note = f"{before} ended without releasing its lock of {folder.name}; it is taken over"
    holder = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        folder.lock.write_text(json.dumps(holder), encoding="utf-8")
        yield note
    finally:
        # The file stays, empty: removing it would race with the next holder.
        with contextlib.suppress(OSError):
            os.truncate(folder.lock, 0)
        lock.release()


def running_process(folder: RunFolder) -> str | None:
    """The process at work in the folder, in words, or None. Only looks."""
    try:
        if folder.lock.exists():
            with _lock_of(folder).acquire(timeout=0):
                pass
    except Timeout:
        return _holder(folder.lock) or "another process"
    except OSError:
        pass
    return None


def _lock_of(folder: RunFolder) -> FileLock:
    return FileLock(folder.lock, mode=0o644, fallback_to_soft=False)


def _holder(file: Path) -> str:
    """Who wrote the lock file, in words; empty if nobody did."""
    with contextlib.suppress(OSError, ValueError):
        holder = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(holder, dict):
            return f"process {holder.get('pid')} on {holder.get('host')} (since {holder.get('since')})"
    return ""
