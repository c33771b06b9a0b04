"""The message about a run that did not complete: which rank, what, and where to look, with the end of a log if the
message alone does not explain it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opsd_cli.launch.far_ranks import named
from opsd_cli.launch.process_groups import death_of
from opsd_cli.launch.rank_environ import Place
from opsd_cli.launch.supervisor import ATTEMPT_MARK, SUDDEN, Ended, Limits, RankProcess
from opsd_cli.run.folder import RunFolder, shell_path
from opsd_cli.run.rank_errors import RankError, first_error, read_error, write_error
from opsd_cli.safety.secrets import redact
from opsd_cli.settings.errors import ExitCode

_TAIL_LINES = 20
_TAIL_BYTES = 65536
_SMALL_BYTES = 65536
_SETTLE_SECONDS = 2.0  # for another rank's process to say that its rank was killed
_EXPLAINED = (ExitCode.CHANGE_SOMETHING, ExitCode.ENVIRONMENT, ExitCode.GUARD)
"""Exit codes of errors whose message is meant to be enough."""


@dataclass(frozen=True)
class Explained:
    """The exit code of opsd, the message ("" if all is well), the log lines that explain it."""

    code: int
    message: str = ""
    tail: tuple[str, ...] = ()


def explain(ended: Ended, folder: RunFolder, processes: Sequence[RankProcess], limits: Limits) -> Explained:
    """Say how a run ended. A failed rank's own exit code is returned if the rank left a message that says why."""
    if ended.how == "overdue":
        return Explained(
            ended.code,
            f"the ranks did not save and end within {limits.save_seconds:.0f} s and were killed "
            "(launcher.save_seconds); the previous checkpoint is unchanged",
        )
    if ended.how == "stalled":
        return Explained(ended.code, ended.detail)
    if ended.how != "failed":
        return Explained(ended.code)
    assert ended.rank is not None
    failed = next(process for process in processes if process.rank == ended.rank)
    if failed.far:
        error = _cause(first_error(folder), ended.told)
        name = f"{named(error.rank, failed.far.hosts)}: " if error else "DeepSpeed's runner: "
    else:
        error = read_error(folder, ended.rank)
        is_alone = len(processes) == 1 and processes[0].log == folder.log_of(ended.rank)
        name = "" if is_alone else f"rank {ended.rank}: "
    if error and error.exit_code in _EXPLAINED:
        return Explained(error.exit_code, name + error.message)
    is_unexplained = error is None and ended.returncode == ExitCode.ENVIRONMENT
    if is_unexplained and shutil.disk_usage(folder.path).free < _SMALL_BYTES:  # the rank could not leave its error
        return Explained(ended.code, f"{name}no disk space left for {shell_path(folder.path)}; free some, then resume")
    log = folder.log_of(error.rank) if error else failed.log
    is_bug = error is not None and folder.crash.exists()
    see = f"the traceback is in {shell_path(folder.crash)}" if is_bug else f"log: {shell_path(log)}"
    message = f"{name}{error.message if error else death_of(ended.returncode or 0)}; {see}"
    # The rank's own exit code, unless that code promises a message and there is none.
    unexplained = ExitCode.BUG if ended.returncode in _EXPLAINED else ended.code
    if failed.far:  # not ours: pdsh, mpirun or srun could not start a rank
        unexplained = ExitCode.ENVIRONMENT
    return Explained(error.exit_code if error else unexplained, message, tuple(_tail_of(log)))


def explain_by_others(explained: Explained, ended: Ended, folder: RunFolder, place: Place) -> Explained:
    """Of one process that srun or torchrun has started beside others: leave what ended its rank where they find it, and
    take from them what ended theirs. A rank that is killed takes the connections of the others with it, and srun and
    torchrun then ask these to stop; neither is why the run ended."""
    if ended.how == "failed" and read_error(folder, place.rank) is None:
        sudden = -(ended.returncode or 0) in SUDDEN
        write_error(folder, place.rank, explained.message, exit_code=explained.code, was_sudden=sudden)
    if place.world == 1 or ended.how not in ("failed", "stopped"):
        return explained
    deadline = time.monotonic() + (_SETTLE_SECONDS if ended.how == "failed" else 0.0)
    while not ((error := first_error(folder)) and error.was_sudden) and time.monotonic() < deadline:
        time.sleep(0.1)
    if error is None or error.rank == place.rank or (ended.how == "failed" and not error.was_sudden):
        return explained
    return Explained(error.exit_code, f"rank {error.rank}: {error.message}")


def _cause(*errors: RankError | None) -> RankError | None:
    """The first that is no consequence of another rank's end, else the first."""
    return min(filter(None, errors), key=lambda error: error.is_consequence, default=None)


def _tail_of(log: Path) -> list[str]:
    """The last lines of a log since its process was started; empty if it cannot be read."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    starts = [number for number, line in enumerate(lines) if line.startswith(ATTEMPT_MARK)]
    return list(map(redact, lines[starts[-1] + 1 if starts else 0 :][-_TAIL_LINES:]))
