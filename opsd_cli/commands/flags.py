"""What the commands share: argparse with errors of one line, and quoting for Hydra."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NoReturn

from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.plugin_files import use_plugins
from opsd_cli.settings.registry import did_you_mean

if TYPE_CHECKING:
    from opsd_cli.settings.config import Config

REFUSED = {
    "--config-path": "give a folder of your own recipes with --recipes DIR",
    "-cp": "give a folder of your own recipes with --recipes DIR",
    "--config-name": "choose a recipe with recipe=NAME",
    "-cn": "choose a recipe with recipe=NAME",
    "--experimental-rerun": "it would unpickle a file; use opsd train --resume RUN",
    "--shell-completion": "Hydra would install it for python, not for opsd",
    "-sc": "Hydra would install it for python, not for opsd",
}
"""Hydra's flags that no command takes, and what to do instead."""


class ListFlags(BaseException):
    """Raised by a parser that is only asked which flags there are, for completion in a shell."""

    def __init__(self, flags: list[str]) -> None:
        super().__init__()
        self.flags = flags


class Flags(argparse.ArgumentParser):
    """A parser without abbreviations, of `words` and the flags that a command adds. `cli` answers `--help` before."""

    lists = False  # `read` raises ListFlags and reads nothing

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"opsd {command}", add_help=False, allow_abbrev=False)
        self.add_argument("--help", "-h", action="store_true")
        self.add_argument("--plugin", action="append", metavar="FILE", default=[])
        self.add_argument("words", nargs="*")

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Flags and the other words, in any order; runs the files of --plugin. Raises ConfigError or PluginError."""
        if Flags.lists:
            raise ListFlags([flag for action in self._actions for flag in action.option_strings if flag[:2] == "--"])
        for word in arguments:
            flag = word.split("=", 1)[0]
            if flag in REFUSED:
                raise ConfigError(f"{flag} is not a flag of `{self.prog}`: {REFUSED[flag]}")
        given = self.parse_intermixed_args(list(arguments))
        if given.plugin:
            import opsd_cli.plugins  # noqa: F401 - opsd's own come first, so that their names are taken
        use_plugins(given.plugin)
        return given

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            known = [flag for action in self._actions for flag in action.option_strings]
            message = f"unknown flag {unknown[1]}{did_you_mean(unknown[1].split('=')[0], known)}"
        raise ConfigError(f"{message} (see `{self.prog} --help`)")


def step_word(text: str) -> int | Literal["last", "best"]:
    """What --step names: a checkpoint by its step, the newest, or the best by held-out accuracy. Raises ConfigError."""
    words: dict[str, Literal["last", "best"]] = {"last": "last", "best": "best"}
    if text in words:
        return words[text]
    if (step := whole_number(text)) is None:
        raise ConfigError(f"--step {text}: give the number of a step, last or best")
    return step


MOST_DIGITS = 18  # of a number that is counted with


def whole_number(text: str) -> int | None:
    """A number of digits alone; None for anything else. `str.isdigit` also takes a superscript, which `int` refuses, as
    it does thousands of digits."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS else None


def quote(text: str) -> str:
    """Any text as a string of Hydra's grammar."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def device_of(config: Config) -> str:
    """Where a command computes in its own process. Raises ConfigError for a GPU that is asked for and not there."""
    import torch

    asked = vars(config.launcher).get("device", "auto")
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("launcher.device=cuda, but torch can use no GPU here; use launcher.device=auto or cpu")
    return "cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu"
