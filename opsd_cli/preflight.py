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
from opsd_cli.settings.compose import MOST_MEMBERS, session
from opsd_cli.settings.composition import Composition, settings_of
from opsd_cli.settings.config import Config
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.recipe_files import RecipeFolders
from opsd_cli.settings.recipe_scan import scan
from opsd_cli.settings.typed_config import typed_config


@dataclass(frozen=True)
class Member:
    """One run that a command stands for; a sweep has several."""

    config: Config
    choices: Mapping[str, str | None]  # group -> option
    notes: tuple[str, ...]  # what the user should know about the config


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
    with session(folders):
        line, problems = parse_line(words, folders, multirun=multirun)
        count = math.prod(len(override.values) for override in line.overrides)
        if count > MOST_MEMBERS:
            raise ConfigError(f"this sweep has {count:,} runs; one sweep has at most {MOST_MEMBERS:,}", *problems)
        choices = [override for override in line.overrides if override.is_choice]
        settings = [override for override in line.overrides if not override.is_choice and not override.is_hydra]
        for chosen in itertools.product(*map(settings_of, choices)):
            base = Composition(folders, line, chosen, frozen=frozen)
            problems += base.problems
            known = []
            for override in settings:
                unknown = list(base.key_problems(override))
                problems += unknown
                known += [] if unknown else [override]
            if not values or not base.is_complete:
                continue
            for picked in itertools.product(*map(settings_of, known)):
                try:
                    config, notes = base.config(picked)
                    members.append(Member(check_config(config), base.choices, notes))
                except ConfigError as error:
                    problems += error.problems
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return line, members


def config_of(tree: Mapping[str, Any]) -> Config:
    """The typed and checked config of a resolved tree. Raises ConfigError."""
    return check_config(typed_config(tree))
