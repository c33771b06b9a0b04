"""What the tests of settings, recipes and commands share: a working folder of one's own, and checked command lines."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from opsd_cli.cli import main
from opsd_cli.preflight import Member, check
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.recipe_files import find_folders, overrides_of, written_out


def members_of(*words: str, multirun: bool = False) -> list[Member]:
    """The runs that a command line stands for, in the current working folder."""
    return check(words, find_folders(), multirun=multirun)[1]


def config_of(*words: str):
    """The config of a command line that stands for one run."""
    (member,) = members_of(*words)
    return member.config


def problems_of(*words: str, multirun: bool = False) -> tuple[str, ...]:
    """Everything that is wrong with a command line; empty when nothing is."""
    try:
        members_of(*words, multirun=multirun)
    except ConfigError as error:
        return error.problems
    return ()


def only_problem_of(*words: str, multirun: bool = False) -> str:
    """The one thing that is wrong with a command line."""
    problems = problems_of(*words, multirun=multirun)
    assert len(problems) == 1, problems
    return problems[0]


@cache
def section(group: str, option: str) -> dict[str, Any]:
    """The settings of an option that ships, those that it takes over included, as its files say them."""
    tree: dict[str, Any] = yaml.safe_load(written_out(find_folders(), group, option))
    return tree


def sections_of_method(method: str) -> dict[str, dict[str, Any]]:
    """What a method that ships chooses. test_recipes holds what Hydra composes for every method against this, so that
    other tests need not compose them all: each takes a third of a second."""
    chosen = {entry.group: entry.option for _, entry in overrides_of(find_folders(), "method", method)}
    return {group: deepcopy(section(group, option)) for group, option in chosen.items() if group is not None}


def write_recipe(folder: Path, name: str, text: str) -> Path:
    """A recipe file of the user's own: `name` is `group/option`."""
    path = folder / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def opsd(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run a command in this process: exit code, stdout, stderr."""
    capsys.readouterr()
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, out, err
