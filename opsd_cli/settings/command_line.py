"""The words after a command, each checked by itself: grammar, safety, names of options. Whether a setting exists
depends on the chosen options; `composition` checks that."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from opsd_cli.settings.compose import Override, parse_override
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.recipe_files import GROUPS, RecipeFolders
from opsd_cli.settings.recipe_scan import hydra_override_problems, key_problems, value_problems
from opsd_cli.settings.registry import did_you_mean
from opsd_cli.settings.suggestions import option_problem
from opsd_cli.settings.trees import leaf_names

OURS = ("hydra.sweep.dir", "hydra.sweep.subdir")
"""Hydra would make these folders before their names are checked, so we resolve them."""

KEY = re.compile(r"(\+\+|\+|~)?([A-Za-z_][\w./-]*)(@[\w.:]*)?")
BRACKETS = {"[": "]", "{": "}", "(": ")"}


@dataclass(frozen=True)
class CommandLine:
    """The overrides that passed, in order. `attempted` names every key that was typed, also those that did not."""

    overrides: tuple[Override, ...]
    is_sweep: bool
    attempted: frozenset[str]

    @property
    def for_hydra(self) -> list[str]:
        """The line as Hydra gets it."""
        return [o.text for o in self.overrides if o.key not in OURS]

    @property
    def typed_keys(self) -> frozenset[str]:
        """The settings that were typed, each key of a mapping by itself."""
        return frozenset(name for o in self.overrides for value in o.values for name in leaf_names(o.key, value))

    @property
    def swept_keys(self) -> frozenset[str]:
        """What the members of a sweep differ in."""
        return frozenset(o.key for o in self.overrides if o.swept)

    def last_value(self, key: str) -> str | None:
        """The last value that was typed for a key of Hydra's, unresolved."""
        return next((str(o.values[-1]) for o in reversed(self.overrides) if o.key == key), None)


def parse_line(
    words: Iterable[str], folders: RecipeFolders, *, multirun: bool = False
) -> tuple[CommandLine, list[str]]:
    """Parse every word and leave out those with a problem. Needs a `compose.session`; returns line and problems."""
    texts, problems = _join_pairs(words)
    parsed: list[Override] = []
    for text in texts:
        try:
            parsed += _parse(text, folders)
        except ConfigError as error:
            problems += error.problems
    is_sweep = multirun or any(o.key == "hydra.mode" and o.values == ("MULTIRUN",) for o in parsed)
    good = []
    for override in parsed:
        wrong = list(_problems(override, folders, is_sweep=is_sweep))
        problems += wrong
        good += [] if wrong else [override]
    return CommandLine(tuple(good), is_sweep, frozenset(o.key for o in parsed)), problems


def _parse(text: str, folders: RecipeFolders) -> list[Override]:
    override = parse_override(text)
    if override is None:
        raise ConfigError(_grammar_problem(text, folders))
    if not override.key.startswith("hydra.sweeper.params"):
        return [override]
    # `hydra.sweeper.params={KEY: VALUES}` is the same sweep as KEY=VALUES typed by itself, and is checked as that.
    value = override.values[0]
    if override.key != "hydra.sweeper.params" or not isinstance(value, Mapping):
        raise ConfigError(f"'{text}': write the sweep as KEY=VALUE,VALUE instead")
    return [swept for key, values in value.items() for swept in _parse(f"{key}={values}", folders)]


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
        if override.is_choice and (problem := option_problem(key, value, folders)):
            yield problem
        elif override.sign == "+" and override.is_choice:
            yield f"'{text}': {key} exists; write it without the +"


def _join_pairs(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """(overrides, problems): `lr = 3` arrives as three arguments. It is reported once, and checked as one override."""
    words = list(arguments)
    kept: list[str] = []
    problems: list[str] = []
    while words:
        word = words.pop(0)
        pieces = [word]
        if not word.startswith("-") and "=" not in word and words and words[0].startswith("="):
            pieces.append(words.pop(0))
        if pieces[-1].endswith("=") and words and "=" not in words[0] and (len(pieces) > 1 or word != "="):
            pieces.append(words.pop(0))
        kept.append("".join(pieces))
        if len(pieces) > 1:
            problems.append(f"'{' '.join(pieces)}': no spaces around '='; write {''.join(pieces)}")
    return kept, problems


def _grammar_problem(text: str, folders: RecipeFolders) -> str:
    """Plain words for a text that Hydra's grammar refuses. A bare word may have meant a recipe."""
    if text in GROUPS:
        return f"'{text}' needs a value: write {text}=NAME (see `opsd recipes`)"
    if "=" not in text:
        near = did_you_mean(text, folders.files["recipe"], prefix="recipe=", cutoff=0.75)
        return f"'{text}' is not KEY=VALUE{near}"
    key, value = text.split("=", 1)
    if key != key.strip() or value != value.strip():
        return f"'{text}': no spaces around '='; write {key.strip()}={value.strip()}"
    if not KEY.fullmatch(key):
        return f"'{text}': '{key}' is not the name of a setting; write SECTION.KEY=VALUE"
    if unclosed := _unclosed_bracket(value):
        return f"'{text}': {unclosed}"
    return f"""'{text}': the value has special characters; quote it twice: {key}='"{value}"'"""


def _unclosed_bracket(value: str) -> str | None:
    """The first bracket or quote of a value that has no partner, in words."""
    waiting: list[str] = []
    quote = ""
    for character in value:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in BRACKETS:
            waiting.append(character)
        elif character in BRACKETS.values() and (not waiting or BRACKETS[waiting.pop()] != character):
            return f"the {character} closes nothing"
    unclosed = quote or "".join(waiting[-1:])
    return f"the {unclosed} is never closed" if unclosed else None
