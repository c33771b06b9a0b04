"""How DeepSpeed's files get to the disk and back. Owns two things: that a rank whose disk is full still takes part in
every collective of the save, so that no other rank waits for it (the error comes when the save is over); and the words
for a file that would run code. Does not import DeepSpeed: it stands around the writer that the engine has made."""

from __future__ import annotations

import pickle
import re
from typing import Any

from opsd_cli.engine.atomic_files import WRITE_ERRORS
from opsd_cli.settings.errors import DataError
from opsd_cli.testing.fault_points import reach

_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")  # in torch's refusal


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

    def load(self, path: str, map_location: Any = None) -> Any:
        """Raises DataError for a file that holds more than tensors and plain values."""
        try:
            return self._writer.load(path, map_location=map_location)
        except pickle.UnpicklingError as error:
            named = _GLOBAL.search(str(error))
            what = named.group(1) if named else "something that is no tensor"
            raise DataError(
                f"{path} is refused: it holds {what}, and a checkpoint must hold tensors and plain values only; it "
                "was not written by opsd, or has been changed since"
            ) from None

    def raise_problem(self) -> None:
        """Raise what went wrong since the last call, once."""
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)
