"""What a look ahead has found: findings of three levels, collected while the looking goes on. A run stops at its first
error; a doctor notes it and looks on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

from opsd_cli.safety.terminal import escape_line
from opsd_cli.settings.errors import ExitCode, OpsdError
from opsd_cli.settings.memory_errors import is_out_of_memory

Level = Literal["ok", "warning", "error"]
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, in one line."""

    area: str  # machine, data, model, prompts, teacher, run
    name: str  # stable, for programs
    level: Level
    message: str
    change: str = ""  # what to change; errors that a run would raise say it in their message
    code: int = ExitCode.CHANGE_SOMETHING  # that an error leaves


@dataclass
class Findings:
    """The findings so far, in the order in which things were looked at."""

    found: list[Finding] = field(default_factory=list)

    def add(self, area: str, name: str, level: Level, message: str, change: str = "") -> None:
        """Note a finding; text of models and data in it is made one plain line."""
        self.found.append(Finding(area, name, level, escape_line(message), escape_line(change)))

    def attempt(self, area: str, name: str, look: Callable[[], T]) -> T | None:
        """What `look` returns; None where it raises what a run would end with, which becomes a finding."""
        try:
            return look()
        except OpsdError as error:
            for line in str(error).splitlines():
                self.found.append(Finding(area, name, "error", escape_line(line), code=error.exit_code))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            message = f"out of memory ({escape_line(str(error).strip().partition(chr(10))[0])})"
            change = "use a smaller model, adapters (lora=r16) or shorter rows (sampling.max_completion_tokens)"
            self.found.append(Finding(area, name, "error", message, change, code=ExitCode.ENVIRONMENT))
        return None

    def count(self, level: Level) -> int:
        return sum(one.level == level for one in self.found)

    @property
    def exit_code(self) -> ExitCode:
        """0 without errors; else 3 where all errors come from outside, and 2."""
        codes = {one.code for one in self.found if one.level == "error"}
        if not codes:
            return ExitCode.DONE
        return ExitCode.ENVIRONMENT if codes == {ExitCode.ENVIRONMENT} else ExitCode.CHANGE_SOMETHING

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        counts = {f"{level}s": self.count(level) for level in ("error", "warning")}
        rows = [{key: value for key, value in asdict(one).items() if key != "code"} for one in self.found]
        return {**counts, "exit_code": int(self.exit_code), "findings": rows}
