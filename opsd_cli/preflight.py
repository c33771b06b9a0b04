"""A command line checked against the recipes before anything heavy is imported: every problem at once, one line each.
Returns the runs that the command stands for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import opsd_cli.plugins  # noqa: F401 - fills the registries
from opsd_cli.checks import check_config
from opsd_cli.settings.command_line import CommandLine, parse_line
from opsd_cli.settings.compose import MOST_MEMBERS, Override, session
from opsd_cli.settings.composition import Composition, settings_of
from opsd_cli.settings.config import Config
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.idle_settings import idle_settings
from opsd_cli.settings.recipe_files import RecipeFolders
from opsd_cli.settings.recipe_scan import scan
from opsd_cli.settings.typed_config import typed_config


@dataclass(frozen=True)
class Member:
    """One run that a command stands for; a sweep has several."""

    config: Config
    choices: Mapping[str, str | None]  # group -> option
    notes: tuple[str, ...]  # what the user should know about the config
    typed: tuple[str, ...]  # its settings as Hydra would type them


@dataclass(frozen=True)
class _Base:
    """One combination of group choices, with what is wrong with it."""

    composition: Composition
    problems: tuple[str, ...]
    known: frozenset[str]  # the typed settings that it has

    @classmethod
    def of(cls, composition: Composition, overrides: Iterable[Override]) -> _Base:
        settings = [override for override in overrides if not override.is_choice]
        unknown = {override.key: list(composition.key_problems(override)) for override in settings}
        problems = itertools.chain(composition.problems, *unknown.values())
        return cls(composition, tuple(problems), frozenset(key for key, wrong in unknown.items() if not wrong))


def check(
    words: Iterable[str],
    folders: RecipeFolders,
    *,
    multirun: bool = False,
    values: bool = True,
    frozen: Mapping[str, Any] | None = None,
) -> tuple[CommandLine, list[Member]]:
    """Check everything that can be checked without torch. Without `values` (for `--cfg`), names only and no members.
    `frozen` is the config of a run; its sections are used where no typed choice touches them. Raises ConfigError with
    every problem, each once."""
    scan(folders)
    members: list[Member] = []
    idle: list[set[str]] = []  # what each of them ignores
    with session(folders):
        line, problems = parse_line(words, folders, multirun=multirun)
        last: dict[str, Override] = {}
        for override in line.overrides:
            if not override.is_hydra:
                last.pop(override.key, None)  # of a key that was typed twice the last counts
                last[override.key] = override
        count = math.prod(len(override.values) for override in last.values())
        if count > MOST_MEMBERS:
            raise ConfigError(f"this sweep has {count:,} runs; one sweep has at most {MOST_MEMBERS:,}", *problems)
        bases: dict[tuple[str, ...], _Base] = {}
        for picked in itertools.product(*map(settings_of, last.values())):
            chosen = [item for item in picked if last[item.key].is_choice]
            choice = tuple(item.text for item in chosen)
            if choice not in bases:  # composed once, however many members differ in settings only
                bases[choice] = _Base.of(Composition(folders, line, chosen, frozen=frozen), last.values())
                problems += bases[choice].problems
            base = bases[choice]
            if not values or not base.composition.is_complete:
                continue
            settings = [item for item in picked if item.key in base.known]
            try:
                config, notes = base.composition.config(settings)
                typed = tuple(item.text for item in picked)
                members.append(Member(check_config(config), base.composition.choices, notes, typed))
                idle.append(set(idle_settings(config, line.typed_keys)))
            except ConfigError as error:
                problems += error.problems
    if idle:  # a sweep may switch off in one member what counts in another
        problems += sorted(set.intersection(*idle))
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return line, members


def config_of(tree: Mapping[str, Any]) -> Config:
    """The typed and checked config of a resolved tree. Raises ConfigError."""
    return check_config(typed_config(tree))
