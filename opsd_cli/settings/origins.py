"""Which file and line gave each setting, so that a problem can name it. Owns the walk from group choices to
the files that Hydra merged, in its order. Reads places, never values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from opsd_cli.settings.folders import RecipeFolders
from opsd_cli.settings.recipe_file import DefaultsEntry, RecipeFile, read_recipe_file

LAST = ("method", "recipe")
"""Groups that Hydra merges after all others: a recipe's numbers win."""


@dataclass(frozen=True)
class Origin:
    """`file:line` of a setting and what the comment beside it says, there or where it was set before."""

    place: str
    comment: str


def merged_files(folders: RecipeFolders, choices: Mapping[str, str | None]) -> Iterator[RecipeFile]:
    """The files of a composition, later ones winning: config.yaml, one per group, the method, the recipe."""
    yield read_recipe_file(folders.primary, "")
    for group in (*(group for group in folders.files if group not in LAST), *LAST):
        option = choices.get(group)
        if option is not None:
            yield from with_siblings(folders, group, option)


def with_siblings(folders: RecipeFolders, group: str, option: str) -> Iterator[RecipeFile]:
    """An option's file, after the files of its own group that its defaults list builds on."""
    path = folders.files[group].get(option)
    if path is None:
        return
    file = read_recipe_file(path, group)
    for entry in file.defaults:
        if entry.group is None and entry.option not in ("_self_", option):
            yield from with_siblings(folders, group, entry.option)
    yield file


def origins(folders: RecipeFolders, choices: Mapping[str, str | None]) -> dict[str, Origin]:
    """dotted key -> where its value was written last; a group's name alone -> the file that was chosen for
    it."""
    found: dict[str, Origin] = {}
    for file in merged_files(folders, choices):
        if file.group:
            found[file.group] = Origin(file.at(1), "")
        for key in file.keys:
            before = found[key.name].comment if key.name in found else ""
            found[key.name] = Origin(file.at(key.line), key.comment or before)
    return found


def overrides_of(folders: RecipeFolders, group: str, option: str) -> Iterator[tuple[RecipeFile, DefaultsEntry]]:
    """The `override /group: option` lines of a recipe or method, its siblings' first."""
    for file in with_siblings(folders, group, option):
        yield from ((file, entry) for entry in file.defaults if entry.group is not None)
