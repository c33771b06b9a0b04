"""The lock of a run folder: one process at a time works in it. The kernel holds it (flock), so a holder that
dies, however it dies, frees it. Owns `run.lock` and the words about its holder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import time
from dataclasses import dataclass
from typing import Any

from opsd_cli.run.folder import RunFolder
from opsd_cli.settings.errors import ConfigError, OutsideError

_PATIENCE_SECONDS = 0.5  # `opsd watch` looks at the lock by taking it for an instant
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}


@dataclass
class RunLock:
    """A held lock. `note` is a sentence when an earlier holder had died without letting go, else None."""

    note: str | None
    _file: int

    def release(self) -> None:
        """Let go. The file stays, empty: removing it would race with the next holder."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)
        os.close(self._file)


def lock_run(folder: RunFolder) -> RunLock:
    """Take the folder's lock. Raises ConfigError with the holder's pid and host when another one has it."""
    try:
        file = os.open(folder.lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OutsideError(f"cannot write {folder.lock}: {error.strerror} (errno {error.errno})") from None
    note = None
    try:
        _flock_within(file, _PATIENCE_SECONDS)
    except BlockingIOError:
        held_by = _words(_read_holder(file))
        os.close(file)
        raise ConfigError(
            f"run folder {folder.path} is in use by {held_by}; "
            "wait for that run, or end it with SIGTERM (it saves first)"
        ) from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            os.close(file)
            raise OutsideError(f"cannot lock {folder.lock}: {error.strerror} (errno {error.errno})") from None
        note = f"the file system of {folder.path} has no locks: make sure that no other process works in it"
    before = _read_holder(file)
    if before and note is None:
        note = f"{_words(before)} ended without unlocking {folder.name}; its lock is taken over"
    _write_holder(file)
    return RunLock(note, file)


def running_process(folder: RunFolder) -> str | None:
    """The process at work in the folder, in words, or None. Only looks."""
    try:
        file = os.open(folder.lock, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _words(_read_holder(file))
    except OSError:
        return None
    finally:
        os.close(file)
    return None


def _flock_within(file: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.02)


def _write_holder(file: int) -> None:
    holder = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(holder).encode(), 0)


def _read_holder(file: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(file, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _words(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} (since {holder.get('since')})"
