"""One combination of group choices, composed: what is wrong with it, which settings it has, where each was written, and
the typed config it makes."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from opsd_cli.settings.command_line import OURS, CommandLine
from opsd_cli.settings.compose import Override, compose, resolve
from opsd_cli.settings.config import Config
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.recipe_files import (
    GROUPS,
    Origin,
    RecipeFolders,
    origins,
    overrides_of,
    read_recipe_file,
    with_bases,
)
from opsd_cli.settings.recipe_scan import METHOD_OWNS
from opsd_cli.settings.suggestions import key_problem, option_problem
from opsd_cli.settings.trees import leaf_names, leaves, set_value
from opsd_cli.settings.typed_config import PLUGINS, SECTIONS, typed_config

STAND_INS = {"model": "hf", "dataset": "jsonl"}
"""Chosen in place of a missing choice, so that the other problems of the line are reported too."""


@dataclass(frozen=True)
class Setting:
    """One override with one value: an item of a sweep, or all there is."""

    key: str
    value: Any
    text: str


def settings_of(override: Override) -> list[Setting]:
    """One setting for each value of an override."""
    prefix = f"{override.sign}{override.key}="
    return [
        Setting(override.key, value, prefix + text) for value, text in zip(override.values, override.texts, strict=True)
    ]


class Composition:
    """The tree of one combination of choices; its values count if nothing stands in for a choice (`is_complete`)."""

    def __init__(
        self,
        folders: RecipeFolders,
        line: CommandLine,
        chosen: Sequence[Setting],
        *,
        frozen: Mapping[str, Any] | None,
    ) -> None:
        self.folders = folders
        typed = {item.key: item.value for item in chosen}
        dangling = list(_dangling(folders, typed))
        if dangling:  # the rest can still be checked without the file that names a missing option
            typed = {group: option for group, option in typed.items() if group not in ("recipe", "method")}
        missing = _missing_groups(folders, typed)
        is_reported = bool(frozen or dangling or {"recipe", *missing} & line.attempted - typed.keys())
        self.problems = [*dangling, *(() if is_reported else _missing_problems(missing, typed, folders))]
        self.is_complete = bool(frozen) or not (missing or dangling)
        stand_ins = [f"{group}={STAND_INS[group]}" for group in missing]
        # Hydra checks settings of its own node here, unless it is going to run the line as a sweep.
        hydra = [o.text for o in line.overrides if o.is_hydra and o.key not in OURS and not line.is_sweep]
        tree, self.choices = compose([*(item.text for item in chosen if item.key in typed), *stand_ins, *hydra])
        self.problems += _leaked_keys(folders, self.choices)
        self._kept = _kept_sections(folders, typed) & (frozen or {}).keys()
        self.tree = tree | {section: (frozen or {})[section] for section in self._kept}

    @cached_property
    def origins(self) -> dict[str, Origin]:
        """Where each setting was written; unknown for the sections of a frozen config."""
        places = origins(self.folders, self.choices)
        return {key: origin for key, origin in places.items() if key.partition(".")[0] not in self._kept}

    def key_problems(self, override: Override) -> Iterator[str]:
        """Keys of an override that this composition does not have."""
        for name in dict.fromkeys(name for value in override.values for name in leaf_names(override.key, value)):
            if problem := key_problem(name, self.tree, choices=self.choices, folders=self.folders):
                yield problem
            elif override.sign == "+":
                yield f"'{override.text}': {name} exists; write it without the +"

    def config(self, settings: Sequence[Setting]) -> tuple[Config, tuple[str, ...]]:
        """The typed config with these settings, and which limits the model lowered. Raises ConfigError."""
        tree = copy.deepcopy(self.tree)
        for setting in settings:
            set_value(tree, setting.key, setting.value)
        typed = {name for setting in settings for name in leaf_names(setting.key, setting.value)}
        values = dict(leaves(tree))
        places = {  # of a value that is still required, what its comment says it is
            key: origin.comment if values.get(key) == "???" and origin.comment else origin.place
            for key, origin in self.origins.items()
        }
        places |= dict.fromkeys(typed, "command line")
        plain, broken = resolve(tree)
        if broken:
            raise ConfigError(*(f"{key}: {what} ({places.get(key, '?')})" for key, what in broken.items()))
        notes = [*cap_completions(plain, typed=typed), *correct_lag(plain, typed=typed)]
        return typed_config(plain, places=places), tuple(notes)


def cap_completions(tree: dict[str, Any], *, typed: Collection[str]) -> list[str]:
    """Lower the length limits of a plain tree in place to `model.max_completion_tokens`, because a recipe is written
    before the model is chosen; a limit that was typed stands. Returns what was lowered, in words."""
    longest = tree["model"].get("max_completion_tokens")
    notes = []
    for section in ("sampling", "eval"):
        limit = tree[section].get("max_completion_tokens")
        key = f"{section}.max_completion_tokens"
        if isinstance(longest, int) and isinstance(limit, int) and limit > longest and key not in typed:
            tree[section]["max_completion_tokens"] = longest
            notes.append(f"{key}={longest}, lowered from {limit}: the model's limit")
    return notes


LAG_CAP = 2.0


def correct_lag(tree: dict[str, Any], *, typed: Collection[str]) -> list[str]:
    """Switch the importance correction on in a plain tree where completions are drawn from older weights, because a
    recipe is written before the sampler is chosen; what was typed stands. Returns what was changed, in words."""
    key = "loss.importance_cap"
    if tree["sampler"].get("lag") != 1 or tree["loss"].get("importance_cap") is not None or key in typed:
        return []
    tree["loss"]["importance_cap"] = LAG_CAP
    return [f"{key}={LAG_CAP}: sampler.lag=1 draws completions from weights one step old"]


def _missing_groups(folders: RecipeFolders, typed: Mapping[str, Any]) -> list[str]:
    """The groups that have no default and that neither the command line nor the recipe chooses."""
    chosen = {*typed, *(entry.group for _, entry in overrides_of(folders, "recipe", str(typed.get("recipe"))))}
    defaults = read_recipe_file(folders.primary, "").defaults
    return [entry.group for entry in defaults if entry.option == "???" and entry.group and entry.group not in chosen]


def _missing_problems(missing: Sequence[str], typed: Mapping[str, Any], folders: RecipeFolders) -> Iterator[str]:
    options = {group: " | ".join(files) for group, files in folders.files.items()}
    if {"model", "dataset"} <= {*missing} and not typed.get("recipe"):
        either = f"choose a recipe: recipe={options['recipe']} (see `opsd recipes`)"
        yield f"{either}, or a model and a dataset: model=... dataset=..."
    else:
        yield from (f"{group} is required: {group}={options[group]}, or a recipe that chooses it" for group in missing)


def _dangling(folders: RecipeFolders, typed: Mapping[str, Any]) -> Iterator[str]:
    """Options that the chosen recipe or method names but that no folder has."""
    chosen = {entry.group: entry.option for entry in read_recipe_file(folders.primary, "").defaults} | dict(typed)
    for group in ("recipe", "method"):
        for file, entry in overrides_of(folders, group, str(chosen.get(group))):
            assert entry.group is not None
            if entry.group not in typed:
                chosen[entry.group] = entry.option
            if problem := option_problem(entry.group, entry.option, folders):
                yield f"{file.at(entry.line)}: {problem}"


def _kept_sections(folders: RecipeFolders, typed: Mapping[str, Any]) -> set[str]:
    """The sections of a frozen config that typed choices leave alone; never `run`, where a run is kept."""
    if "recipe" in typed:
        return set()
    by_method = {entry.group for _, entry in overrides_of(folders, "method", str(typed.get("method")))}
    return {*SECTIONS, *PLUGINS} - {"run", *typed} - by_method


def _leaked_keys(folders: RecipeFolders, choices: Mapping[str, str | None]) -> Iterator[str]:
    """Keys of the chosen recipe and method that would reach an option they were not written for: a recipe says what, a
    method says how, and neither sets keys of an option that it did not choose. Hydra would accept them silently."""
    for group in ("recipe", "method"):
        option = choices.get(group)
        if option is None:
            continue
        own = {entry.group: entry.option for _, entry in overrides_of(folders, group, option)}
        for file in with_bases(folders, group, option):
            for key in file.keys:
                section = key.name.partition(".")[0]
                if problem := _leak(group, key.name, section, own=own, chosen=choices.get(section)):
                    yield f"{file.at(key.line)}: {problem}"


def _leak(group: str, key: str, section: str, *, own: Mapping[str | None, str], chosen: str | None) -> str | None:
    if section not in GROUPS:
        return f"a method sets no numbers; {key} belongs to a recipe" if group == "method" else None
    if group == "recipe" and section in METHOD_OWNS:
        return f"a recipe does not set {key}: {section} belongs to a method; make {section}/NAME.yaml and choose it"
    if section not in own:
        return f"{key} is set without choosing a {section}; add `- override /{section}: NAME` to the defaults list"
    if own[section] != chosen:
        return (
            f"{key} was written for {section}={own[section]}, but {section}={chosen} is chosen; "
            f"put it into a {section} file of its own"
        )
    return None
