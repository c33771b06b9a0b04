"""The words after a command, each checked by itself: grammar, safety, names of options. Whether a setting exists
depends on the chosen options; `composition` checks that."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from opsd_cli.settings.compose import Override, parse_override
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.recipe_files import GROUPS, RecipeFolders
from opsd_cli.settings.recipe_scan import hydra_override_problems, key_problems, value_problems
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
        """The line as Hydra gets it."""
        return tuple(o.text for o in self.overrides if o.key not in OURS)

    @cached_property
    def typed_keys(self) -> frozenset[str]:
        """The settings that were typed, each key of a mapping by itself."""
        names = (leaf_names(o.key, value) for o in self.overrides for value in o.values)
        return frozenset(itertools.chain.from_iterable(names))

    @cached_property
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
    texts, problems = join_pairs(words)
    parsed: list[Override] = []
    for text in texts:
        try:
            parsed += _parse(text, recipes=folders.files["recipe"])
        except ConfigError as error:
            problems += error.problems
    is_sweep = multirun or any(o.key == "hydra.mode" and o.values == ("MULTIRUN",) for o in parsed)
    good = []
    for override in parsed:
        wrong = list(_problems(override, folders, is_sweep=is_sweep))
        problems += wrong
        good += [] if wrong else [override]
    return CommandLine(tuple(good), is_sweep, frozenset(o.key for o in parsed)), problems


def _parse(text: str, *, recipes: Iterable[str] = ()) -> list[Override]:
    override = parse_override(text)
    if override is None:
        raise ConfigError(grammar_problem(text, recipes))
    if not override.key.startswith("hydra.sweeper.params"):
        return [override]
    # `hydra.sweeper.params={KEY: VALUES}` is the same sweep as KEY=VALUES typed by itself, and is checked as that.
    value = override.values[0]
    if override.key != "hydra.sweeper.params" or not isinstance(value, Mapping):
        raise ConfigError(f"'{text}': write the sweep as KEY=VALUE,VALUE instead")
    return [swept for key, values in value.items() for swept in _parse(f"{key}={values}")]


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


def join_pairs(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
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


def grammar_problem(text: str, recipes: Iterable[str] = ()) -> str:
    """Plain words for a text that Hydra's grammar refuses. A bare word may have meant one of the `recipes`."""
    if "=" not in text:
        if text in GROUPS:
            return f"'{text}' needs a value: write {text}=NAME (see `opsd recipes`)"
        near = difflib.get_close_matches(text, list(recipes), n=1, cutoff=0.75)
        hint = f" - did you mean 'recipe={near[0]}'?" if near else ""
        return f"'{text}' is not KEY=VALUE{hint}"
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
    if quote:
        return f"the {quote} is never closed"
    return f"the {waiting[-1]} is never closed" if waiting else None
