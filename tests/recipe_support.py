"""What the tests of settings, recipes and commands share: a working folder of one's own, and checked command lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from opsd_cli.cli import main
from opsd_cli.preflight import Member, check
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.recipe_files import find_folders


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
