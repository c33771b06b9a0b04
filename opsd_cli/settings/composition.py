"""One combination of group choices, composed: what is wrong with it, which keys it has and where each was
written. Owns the step from a line that is right in itself to a typed config.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from opsd_cli.settings.compose import composed, resolved
from opsd_cli.settings.config import PLUGINS, SECTIONS, Config, typed_config
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.folders import RecipeFolders
from opsd_cli.settings.model_limits import cap_completions
from opsd_cli.settings.origins import Origin, origins, overrides_of
from opsd_cli.settings.overrides import Override, leaf_names, leaves, with_value
from opsd_cli.settings.ownership import leaked_keys
from opsd_cli.settings.recipe_file import read_recipe_file
from opsd_cli.settings.suggestions import key_problem, option_problem

STAND_INS = {"model": "hf", "dataset": "jsonl"}
"""Chosen in place of a missing choice, so that the other problems of the line are found as well."""


@dataclass(frozen=True)
class Setting:
    """One override with one value: an item of a sweep, or all there is."""

    key: str
    value: Any
    text: str
    swept: bool


def items(override: Override) -> list[Setting]:
    """The settings an override stands for."""
    prefix = f"{override.sign}{override.key}="
    return [
        Setting(override.key, value, prefix + text, override.swept)
        for value, text in zip(override.values, override.texts, strict=True)
    ]


class Composition:
    """The tree of one combination of choices. `is_whole` says that its values mean something: nothing stands
    in."""

    def __init__(
        self,
        folders: RecipeFolders,
        chosen: Sequence[Setting],
        *,
        attempted: Collection[str],
        frozen: Mapping[str, Any] | None,
    ) -> None:
        self.folders = folders
        typed = {item.key: item.value for item in chosen}
        dangling = list(_dangling(folders, typed))
        if dangling:  # the rest can still be checked without the file that names what is not there
            typed = {group: option for group, option in typed.items() if group not in ("recipe", "method")}
        missing = list(_missing(folders, typed))
        is_named = bool(frozen or dangling or {"recipe", *missing} & {*attempted} - typed.keys())
        self.problems = [*dangling, *(() if is_named else _missing_problems(missing, typed, folders))]
        self.is_whole = bool(frozen) or not (missing or dangling)
        stand_ins = [f"{group}={STAND_INS[group]}" for group in missing]
        result = composed([*(item.text for item in chosen if item.key in typed), *stand_ins])
        self.choices = result.choices
        self.problems += leaked_keys(folders, self.choices)
        self._kept = _kept_sections(folders, typed) & (frozen or {}).keys()
        self.tree = result.tree | {section: (frozen or {})[section] for section in self._kept}

    @cached_property
    def origins(self) -> dict[str, Origin]:
        """Where each setting was written; nothing is known of the sections of a frozen config."""
        found = origins(self.folders, self.choices)
        return {key: origin for key, origin in found.items() if key.partition(".")[0] not in self._kept}

    def key_problems(self, override: Override) -> Iterator[str]:
        """Keys of an override that this composition does not have."""
        names = itertools.chain.from_iterable(leaf_names(override.key, value) for value in override.values)
        for name in dict.fromkeys(names):
            problem = key_problem(name, self.tree, choices=self.choices, folders=self.folders)
            if problem:
                yield problem
            elif override.sign == "+":
                yield f"'{override.text}': {name} exists; write it without the +"

    def typed(self, settings: Sequence[Setting]) -> Config:
        """The typed config with these settings applied. Raises ConfigError with every problem."""
        tree = copy.deepcopy(self.tree)
        keys: set[str] = set()
        for setting in settings:
            with_value(tree, setting.key, setting.value)
            keys |= {*leaf_names(setting.key, setting.value)}
        places = _places(tree, self.origins, typed=keys)
        plain, broken = resolved(tree)
        if broken:
            raise ConfigError(*(f"{key}: {what} ({places.get(key, '?')})" for key, what in broken.items()))
        cap_completions(plain, typed=keys)
        return typed_config(plain, places=places)


def _places(tree: Mapping[str, Any], found: Mapping[str, Origin], *, typed: Collection[str]) -> dict[str, str]:
    """Where each setting was written; for one that must be given, what its comment says it is."""
    values = dict(leaves(tree))
    places = {}
    for key, origin in found.items():
        is_open = values.get(key) == "???" and origin.comment
        places[key] = origin.comment if is_open else origin.place
    return {**places, **dict.fromkeys(typed, "command line")}


def _missing(folders: RecipeFolders, typed: Mapping[str, Any]) -> Iterator[str]:
    """The groups that have no default and that neither the command line nor the recipe chooses."""
    chosen = {entry.group for _, entry in overrides_of(folders, "recipe", str(typed.get("recipe")))}
    for entry in read_recipe_file(folders.primary, "").defaults:
        if entry.option == "???" and entry.group is not None and entry.group not in {*typed, *chosen}:
            yield entry.group


def _missing_problems(missing: Sequence[str], typed: Mapping[str, Any], folders: RecipeFolders) -> Iterator[str]:
    if {"model", "dataset"} <= {*missing} and not typed.get("recipe"):
        recipes = " | ".join(folders.files["recipe"])
        yield (
            f"choose a recipe: recipe={recipes} (see `opsd recipes`), or a model and a dataset: model=... dataset=..."
        )
        return
    for group in missing:
        options = " | ".join(folders.files[group])
        yield f"{group} must be chosen: {group}={options}, or a recipe that chooses it"


def _dangling(folders: RecipeFolders, typed: Mapping[str, Any]) -> Iterator[str]:
    """Options that the chosen recipe or method names but that no folder has."""
    primary = read_recipe_file(folders.primary, "").defaults
    chosen: dict[str | None, Any] = {entry.group: entry.option for entry in primary}
    chosen.update(typed.items())
    for group in ("recipe", "method"):
        for file, entry in overrides_of(folders, group, str(chosen.get(group))):
            assert entry.group is not None
            if entry.group not in typed:
                chosen[entry.group] = entry.option
            problem = option_problem(entry.group, entry.option, folders)
            if problem:
                yield f"{file.at(entry.line)}: {problem}"


def _kept_sections(folders: RecipeFolders, typed: Mapping[str, Any]) -> set[str]:
    """The sections of a frozen config that typed choices leave alone; where a run is kept is never among
    them."""
    if "recipe" in typed:
        return set()
    by_method = {entry.group for _, entry in overrides_of(folders, "method", str(typed.get("method")))}
    return {*SECTIONS, *PLUGINS} - {"run", *typed} - by_method
