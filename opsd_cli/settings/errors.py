"""The errors a user can cause or meet, each with the exit code that a scheduler sees. A message is one line: what is
wrong, where, the value, what is allowed, what to do next. `OPSD_DEBUG=1` shows the traceback."""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path

from opsd_cli.safety.terminal import escape_line


class ExitCode(IntEnum):
    """What the `opsd` process returns."""

    DONE = 0
    BUG = 1  # ours; a traceback is in the run folder
    CHANGE_SOMETHING = 2  # the user must change a setting, a file or a name
    ENVIRONMENT = 3  # hub down, disk full, out of memory, a rank lost: retrying may help
    GUARD = 4  # a guard stopped the run: non-finite numbers, collapse, unusable checker
    INTERRUPTED = 130  # SIGINT, with a checkpoint saved
    TERMINATED = 143  # SIGTERM, with a checkpoint saved


class OpsdError(Exception):
    """Base of every error that is shown as one line."""

    exit_code: ExitCode = ExitCode.BUG


class ConfigError(OpsdError, ValueError):
    """A setting, a recipe or a command line is wrong. Holds every problem, one line each."""

    exit_code = ExitCode.CHANGE_SOMETHING

    def __init__(self, *problems: str) -> None:
        self.problems: tuple[str, ...] = tuple(map(escape_line, problems))
        super().__init__("\n".join(self.problems))


class PluginError(OpsdError, RuntimeError):
    """A file of the user's own (`--plugin FILE`) failed; the message names file and line."""

    exit_code = ExitCode.CHANGE_SOMETHING


class DataError(OpsdError, ValueError):
    """A dataset, a chat template, a model folder or a checkpoint is invalid."""

    exit_code = ExitCode.CHANGE_SOMETHING


class OutsideError(OpsdError, RuntimeError):
    """Something outside failed (hub, disk, memory, another rank): retrying may help."""

    exit_code = ExitCode.ENVIRONMENT


class LostRankError(OutsideError):
    """The connection to another rank is gone: a consequence of that rank's end, which it or its keeper explains."""


class GuardError(OpsdError, RuntimeError):
    """A guard stopped the run before it did harm."""

    exit_code = ExitCode.GUARD


def display_path(path: Path) -> str:
    """A path as a message names it: relative if it lies below the working directory."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) and path != here else path)
