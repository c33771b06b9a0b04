"""The errors that ranks leave in the run folder when they end, where the supervisor finds them: `logs/rank_K.error`,
and with the tracebacks of bugs, `crash.txt`."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass

from opsd_cli import __version__
from opsd_cli.run.folder import RunFolder, replace_file
from opsd_cli.safety.secrets import redact


@dataclass(frozen=True)
class RankError:
    rank: int
    message: str
    exit_code: int  # that the rank is about to return
    is_consequence: bool = False  # of another rank's end
    was_sudden: bool = False  # the rank was killed; others fail as a consequence, never the other way round


def write_error(
    folder: RunFolder,
    rank: int,
    message: str,
    *,
    exit_code: int,
    is_consequence: bool = False,
    was_sudden: bool = False,
) -> None:
    """Leave the error that ends this rank where the supervisor finds it, even if the rank hangs on its way out. A
    consequence of another rank's end does not replace what the rank has said before."""
    before = read_error(folder, rank)
    if is_consequence and before and not before.is_consequence:
        return
    folder.logs.mkdir(exist_ok=True)
    record = {
        "exit_code": int(exit_code),
        "message": redact(message),
        "is_consequence": is_consequence,
        "was_sudden": was_sudden,
    }
    replace_file(folder.error_of(rank), json.dumps(record, ensure_ascii=False) + "\n")


def write_crash(folder: RunFolder, rank: int, traceback: str) -> None:
    """Add a bug's traceback to crash.txt and leave its last line as the rank's error, exit code 1."""
    with open(folder.crash, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"--- rank {rank}, {time.strftime('%Y-%m-%d %H:%M:%S')}, opsd {__version__}\n{redact(traceback)}\n")
    last = traceback.strip().splitlines()[-1:] or ["unknown error"]
    write_error(folder, rank, last[0], exit_code=1)


def read_error(folder: RunFolder, rank: int) -> RankError | None:
    """The error a rank left, or None."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads(folder.error_of(rank).read_text(encoding="utf-8"))
        is_consequence, was_sudden = (record.get(name) is True for name in ("is_consequence", "was_sudden"))
        return RankError(rank, str(record["message"]), int(record["exit_code"]), is_consequence, was_sudden)
    return None


def first_error(folder: RunFolder) -> RankError | None:
    """The error of a rank that was killed; else the one that was left first, of those that are no consequence of
    another's if there is one. None if there is none."""
    paths = sorted(folder.logs.glob("rank_*.error"), key=lambda path: path.stat().st_mtime_ns)
    errors = [error for path in paths if (error := read_error(folder, int(path.stem.removeprefix("rank_"))))]
    return min(errors, key=lambda error: (not error.was_sudden, error.is_consequence), default=None)


def clear_errors(folder: RunFolder) -> None:
    """Remove the errors, heartbeats and stacks of an earlier attempt; its crash.txt is kept under a number."""
    # A rank that is killed while it says what went wrong leaves half of its words.
    for pattern in ("rank_*.error", "rank_*.error.tmp-*", "rank_*.phase", "rank_*.stacks"):
        for path in folder.logs.glob(pattern):
            path.unlink()
    if folder.crash.exists():
        number = 1 + sum(1 for _ in folder.path.glob("crash.*.txt"))
        folder.crash.rename(folder.path / f"crash.{number}.txt")
