"""How a run that did not complete is put into words: one message that says which rank, what, and where to
look, and the end of a log when the message alone does not explain it. Reads the run folder; prints nothing.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opsd_cli.launching.supervisor import Ended, Limits, RankProcess
from opsd_cli.run_folder import RunFolder, first_error, shown
from opsd_cli.settings.errors import ExitCode

_TAIL_LINES = 20
_TAIL_BYTES = 65536
_EXPLAINED = (ExitCode.CHANGE_SOMETHING, ExitCode.ENVIRONMENT, ExitCode.GUARD)
"""Exit codes of errors whose message is meant to be enough."""


@dataclass(frozen=True)
class Explained:
    """An ended run in words: the exit code of opsd, the message ("" if all is well), the log lines that
    explain it.
    """

    code: int
    message: str = ""
    tail: tuple[str, ...] = ()


def explain(ended: Ended, folder: RunFolder, processes: Sequence[RankProcess], limits: Limits) -> Explained:
    """Say how a run ended. A failed rank's exit code counts as it is if the rank left a message that says
    why.
    """
    if ended.how == "overdue":
        return Explained(
            ended.code,
            f"the ranks did not save and end within {limits.save_seconds:.0f} s and were killed "
            "(launcher.save_seconds); the checkpoint before stays as it is",
        )
    if ended.how != "failed":
        return Explained(ended.code)
    assert ended.rank is not None
    rank, text = first_error(folder) or (ended.rank, None)
    is_alone = len(processes) == 1 and processes[0].log == folder.log_of(rank)
    name = "" if is_alone else f"rank {rank}: "
    if text and ended.code in _EXPLAINED:
        return Explained(ended.code, name + text)
    log = folder.log_of(rank) if text else next(item.log for item in processes if item.rank == ended.rank)
    found_in = f"the traceback is in {shown(folder.crash)}" if folder.crash.exists() else f"log: {shown(log)}"
    is_unexplained = ended.code in _EXPLAINED and ended.returncode == ended.code
    code = ExitCode.BUG if is_unexplained else ended.code
    return Explained(code, f"{name}{text or _death_of(ended)}; {found_in}", tuple(tail_of(log)))


def tail_of(log: Path) -> list[str]:
    """The last lines of a log; empty when it cannot be read."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            return file.read().decode("utf-8", "replace").splitlines()[-_TAIL_LINES:]
    except OSError:
        return []


def _death_of(ended: Ended) -> str:
    code = ended.returncode or 0
    if code >= 0:
        return f"the process ended with exit code {code} and left no message"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = "; the out-of-memory killer does that (see dmesg)" if -code == signal.SIGKILL else ""
    return f"the process was killed by {name}{hint}"
