"""How DeepSpeed's files get to the disk. Owns one thing: that a rank whose disk is full still takes part in every
collective of the save, so that no other rank waits for it; the error comes when the save is over. Does not import
DeepSpeed: it stands around the writer that the engine has made."""

from __future__ import annotations

from typing import Any

from opsd_cli.engine.durable import WRITE_ERRORS
from opsd_cli.faults import reach


class PatientWriter:
    """DeepSpeed's checkpoint engine with `save` and `makedirs` that keep the first error instead of raising it."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._problem: Exception | None = None

    def save(self, state_dict: Any, path: str) -> None:
        try:
            reach("save.file")
            self._writer.save(state_dict, path)
        except WRITE_ERRORS as error:
            self._problem = self._problem or error

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            self._writer.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self._problem = self._problem or error

    def raise_problem(self) -> None:
        """Raise what went wrong since the last call, once."""
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)
