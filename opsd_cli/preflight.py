"""A command line against the recipes, before anything heavy is imported: every problem at once, one line
each. Owns the order of the checks (files, grammar, names, values, what goes together) and the runs that a command
stands for.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import opsd_cli.plugins  # noqa: F401 - fills the registries
from opsd_cli.checks import checked
from opsd_cli.settings.command_line import CommandLine, parse_line
from opsd_cli.settings.compose import MOST_MEMBERS, session
from opsd_cli.settings.composition import Composition, items
from opsd_cli.settings.config import Config, typed_config
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.folders import RecipeFolders
from opsd_cli.settings.model_limits import cap_completions
from opsd_cli.settings.recipe_scan import scan


@dataclass(frozen=True)
class Member:
    """One run that a command stands for; a sweep has several. `swept` says what sets it apart."""

    config: Config
    swept: tuple[str, ...]


def check(
    words: Iterable[str],
    folders: RecipeFolders,
    *,
    multirun: bool = False,
    values: bool = True,
    frozen: Mapping[str, Any] | None = None,
) -> tuple[CommandLine, list[Member]]:
    """Check everything that can be checked without torch. Without `values` (for `--cfg`), names only and no
    members. `frozen` is the config of a run whose sections stand for those that no typed choice touches.

    Raises ConfigError with every problem found, each once.
    """
    scan(folders)
    members: list[Member] = []
    with session(folders):
        line, problems = parse_line(words, folders, multirun=multirun)
        count = math.prod(len(override.values) for override in line.overrides)
        if count > MOST_MEMBERS:
            raise ConfigError(f"this sweep has {count:,} runs; one sweep has at most {MOST_MEMBERS:,}", *problems)
        for chosen in itertools.product(*map(items, line.choices)):
            base = Composition(folders, chosen, attempted=line.attempted, frozen=frozen)
            problems += base.problems
            known = []
            for override in line.settings:
                found = list(base.key_problems(override))
                problems += found
                known += [] if found else [override]
            if not values or not base.is_whole:
                continue
            for picked in itertools.product(*map(items, known)):
                swept = tuple(item.text for item in (*chosen, *picked) if item.swept)
                members += _typed(base, picked, swept, problems)
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return line, members


def _typed(base: Composition, picked: Any, swept: tuple[str, ...], problems: list[str]) -> Iterator[Member]:
    try:
        yield Member(checked(base.typed(picked)), swept)
    except ConfigError as error:
        problems += error.problems


def settled(tree: dict[str, Any], *, typed: Collection[str]) -> tuple[Config, list[str]]:
    """The typed config of a resolved tree, and in words what the model's limits changed in it."""
    tree = copy.deepcopy(tree)
    notes = cap_completions(tree, typed=typed)
    return checked(typed_config(tree)), notes
