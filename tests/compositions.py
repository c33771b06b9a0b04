"""Used by conftest: each choice of options is composed by Hydra once in a process of the tests, as long as the files of
the user's own folders are the same (those that ship are changed by no test), and each file that ships is looked through
once. It is a third of a second each time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hydra

from opsd_cli.settings import recipe_scan
from opsd_cli.settings.compose import OwnFoldersFirst
from opsd_cli.settings.recipe_files import RecipeFile, builtin_folder

_compose, _file_problems = hydra.compose, recipe_scan._file_problems
_composed: dict[tuple[object, ...], Any] = {}
MOST_FILES = 20
_problems: dict[tuple[str, str, str], list[tuple[int, str]]] = {}


def remember() -> None:
    """From here on, in this process."""
    hydra.compose, recipe_scan._file_problems = compose, file_problems


def compose(name: str, overrides: list[str], **how: Any) -> Any:
    own = [contents(folder) for folder in (*OwnFoldersFirst.before, *OwnFoldersFirst.after)]
    if None in own:
        return _compose(name, overrides=overrides, **how)
    key = (name, *overrides, str(how), len(OwnFoldersFirst.before), *own)
    if key not in _composed:
        _composed[key] = _compose(name, overrides=overrides, **how)
    return _composed[key]


def contents(folder: Path) -> tuple[tuple[str, bytes], ...] | None:
    """What lies in a user's folder; None where that is much, or more than files and folders."""
    paths = [Path(place, name) for place, folders, files in os.walk(folder) for name in (*folders, *files)]
    if len(paths) > MOST_FILES or any(path.is_symlink() or not (path.is_dir() or path.is_file()) for path in paths):
        return None
    return tuple((str(path.relative_to(folder)), path.read_bytes()) for path in sorted(paths) if path.is_file())


def file_problems(file: RecipeFile) -> Iterator[tuple[int, str]]:
    if _shipped() not in file.path.parents:
        return _file_problems(file)
    key = (str(file.path), file.group, file.text)
    if key not in _problems:
        _problems[key] = list(_file_problems(file))
    return iter(_problems[key])


@cache
def _shipped() -> Path:
    return builtin_folder()
