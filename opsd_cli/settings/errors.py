"""The errors a user can cause or meet, each with the exit code a scheduler sees. Owns no behaviour.

A message is one line: what is wrong, where, what was got, what is allowed, what to do next. A traceback is
never part of it; `OPSD_DEBUG=1` shows one.
"""

from __future__ import annotations

from enum import IntEnum

from opsd_cli.settings.terminal_text import one_line


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
    """A setting, a recipe or a command line is wrong. Holds every problem found, one line each."""

    exit_code = ExitCode.CHANGE_SOMETHING

    def __init__(self, *problems: str) -> None:
        self.problems: tuple[str, ...] = tuple(map(one_line, problems))
        super().__init__("\n".join(self.problems))


class DataError(OpsdError, ValueError):
    """A dataset, a chat template, a model folder or a checkpoint is not what it must be."""

    exit_code = ExitCode.CHANGE_SOMETHING


class OutsideError(OpsdError, RuntimeError):
    """Something outside failed (hub, disk, memory, another rank): retrying may help."""

    exit_code = ExitCode.ENVIRONMENT


class GuardError(OpsdError, RuntimeError):
    """A guard stopped the run before it did harm."""

    exit_code = ExitCode.GUARD
