"""The words after a command, each checked by itself: grammar, safety, and names of options. Owns what a line
asks of Hydra and what is kept back for us. Whether a key exists depends on the choices: that is
`composition`'s business.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from opsd_cli.settings.compose import parse_override
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.folders import RecipeFolders
from opsd_cli.settings.overrides import Override, joined, leaf_names
from opsd_cli.settings.recipe_scan import hydra_override_problems, key_problems, value_problems
from opsd_cli.settings.suggestions import option_problem

OURS = ("hydra.sweep.dir", "hydra.sweep.subdir")
"""Hydra would make these folders before anyone has looked at their names, so they are resolved by us."""


@dataclass(frozen=True)
class CommandLine:
    """The overrides that passed, in order. `attempted` names every key that was typed, also those that did
    not."""

    overrides: tuple[Override, ...]
    is_sweep: bool
    attempted: frozenset[str]

    @cached_property
    def choices(self) -> list[Override]:
        """The overrides that choose an option of a group."""
        return [o for o in self.overrides if o.is_choice]

    @cached_property
    def settings(self) -> list[Override]:
        """The overrides that set a value."""
        return [o for o in self.overrides if not o.is_choice and not o.is_hydra]

    @cached_property
    def for_hydra(self) -> tuple[str, ...]:
        """The line as Hydra shall see it."""
        return tuple(o.text for o in self.overrides if o.key not in OURS)

    @cached_property
    def typed_keys(self) -> frozenset[str]:
        """The settings that were typed, mappings spelt out."""
        names = (leaf_names(o.key, value) for o in self.overrides for value in o.values)
        return frozenset(itertools.chain.from_iterable(names))

    @cached_property
    def swept_keys(self) -> frozenset[str]:
        """What the members of a sweep differ in."""
        return frozenset(o.key for o in self.overrides if o.swept)

    @property
    def sweep_folder(self) -> str | None:
        """The typed `hydra.sweep.dir`, unresolved."""
        return self._typed("hydra.sweep.dir")

    @property
    def subfolder(self) -> str | None:
        """The typed `hydra.sweep.subdir`, unresolved."""
        return self._typed("hydra.sweep.subdir")

    def _typed(self, key: str) -> str | None:
        return next((str(o.values[-1]) for o in reversed(self.overrides) if o.key == key), None)


def parse_line(
    words: Iterable[str], folders: RecipeFolders, *, multirun: bool = False
) -> tuple[CommandLine, list[str]]:
    """Parse every word and leave out those with a problem. Needs a `compose.session`; returns line and
    problems."""
    texts, problems = joined(words)
    parsed: list[Override] = []
    for text in texts:
        try:
            parsed += _spelt_out(parse_override(text, options=tuple(folders.files["recipe"])))
        except ConfigError as error:
            problems += error.problems
    is_sweep = multirun or any(o.key == "hydra.mode" and o.values == ("MULTIRUN",) for o in parsed)
    good = []
    for override in parsed:
        found = list(_problems(override, folders, is_sweep=is_sweep))
        problems += found
        good += [] if found else [override]
    return CommandLine(tuple(good), is_sweep, frozenset(o.key for o in parsed)), problems


def _spelt_out(override: Override) -> list[Override]:
    """`hydra.sweeper.params={KEY: VALUES}` is the same sweep as KEY=VALUES typed by itself, and is checked as that."""
    if not override.key.startswith("hydra.sweeper.params"):
        return [override]
    value = override.values[0]
    if override.key != "hydra.sweeper.params" or not isinstance(value, Mapping):
        raise ConfigError(f"'{override.text}': write the sweep as KEY=VALUE,VALUE instead")
    return [parse_override(f"{key}={values}") for key, values in value.items()]


def _problems(override: Override, folders: RecipeFolders, *, is_sweep: bool) -> Iterator[str]:
    """Everything that is wrong with an override by itself."""
    key, text = override.key, override.text
    if override.sign == "~":
        yield f"'{text}': nothing can be removed from a config; set it to another value"
        return
    if override.package is not None:
        yield f"'{text}': settings cannot be moved with @; write {key}=..."
        return
    if override.swept and not is_sweep:
        quoted = f"""{key}='"{text.partition("=")[2]}"'"""
        yield f"'{text}' lists several values: add -m to run each, or quote it twice: {quoted}"
    for value in override.values:
        if override.is_hydra:
            yield from hydra_override_problems(key, value)
            continue
        yield from (f"'{text}': {problem}" for problem in (*key_problems(key), *value_problems(value)))
        problem = option_problem(key, value, folders) if override.is_choice else None
        if problem:
            yield problem
        elif override.sign == "+" and override.is_choice:
            yield f"'{text}': {key} exists; write it without the +"
