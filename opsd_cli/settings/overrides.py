"""What was typed after the command, one `KEY=VALUE` at a time. Owns the plain words about a slip in one, and
how a value is put into a tree of settings. The grammar itself is Hydra's; `compose` asks Hydra's parser.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from opsd_cli.settings.folders import GROUPS

KEY = re.compile(r"(\+\+|\+|~)?([A-Za-z_][\w./-]*)(@[\w.:]*)?")
BRACKETS = {"[": "]", "{": "}", "(": ")"}


@dataclass(frozen=True)
class Override:
    """One parsed override. `values` has one item, or every item of a sweep; `texts` says each as Hydra would
    type it."""

    text: str
    sign: str  # "", "+", "++" or "~"
    key: str
    package: str | None
    values: tuple[Any, ...]
    texts: tuple[str, ...]
    swept: bool

    @property
    def is_choice(self) -> bool:
        """Chooses an option of one of our groups, rather than setting a value."""
        return self.key in GROUPS and not any(isinstance(value, Mapping) for value in self.values)

    @property
    def is_hydra(self) -> bool:
        """Concerns Hydra's own node."""
        return re.match(r"hydra\b", self.key) is not None


def joined(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """(overrides, problems): `lr = 3` reaches us as three arguments. They are named once and checked as one."""
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
            problems.append(f"'{' '.join(pieces)}': no blanks around '='; write {''.join(pieces)}")
    return kept, problems


def slip(text: str, options: Iterable[str] = ()) -> str:
    """Plain words for a text that Hydra's grammar refuses. `options` are names a bare word may have meant."""
    if "=" not in text:
        return _not_a_pair(text, options)
    key, value = text.split("=", 1)
    if key != key.strip() or value != value.strip():
        return f"'{text}': no blanks around '='; write {key.strip()}={value.strip()}"
    if not KEY.fullmatch(key):
        return f"'{text}': '{key}' is not the name of a setting; write SECTION.KEY=VALUE"
    unclosed = _unclosed(value)
    if unclosed:
        return f"'{text}': {unclosed}"
    return f"""'{text}': the value has characters with a meaning of their own; quote it twice: {key}='"{value}"'"""


def _not_a_pair(text: str, options: Iterable[str]) -> str:
    if text in GROUPS:
        return f"'{text}' needs a value: write {text}=NAME (see `opsd recipes`)"
    near = difflib.get_close_matches(text, list(options), n=1, cutoff=0.75)
    hint = f" - did you mean 'recipe={near[0]}'?" if near else ""
    return f"'{text}' is not KEY=VALUE{hint}"


def _unclosed(value: str) -> str | None:
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


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in a tree of mappings; a list is one value."""
    if not isinstance(tree, Mapping):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))


def has_key(tree: Any, key: str) -> bool:
    """Whether a dotted key (list items by number) stands in the tree."""
    for part in key.split("."):
        if isinstance(tree, Mapping) and part in tree:
            tree = tree[part]
        elif isinstance(tree, list) and part.isdecimal() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            return False
    return True


def with_value(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set one dotted key that is known to exist, in place; a mapping is merged, as Hydra does."""
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    if isinstance(node, list):
        node[int(last)] = value
    elif isinstance(value, Mapping) and isinstance(node.get(last), Mapping):
        for below, item in value.items():
            with_value(node[last], str(below), item)
    else:
        node[last] = value


def leaf_names(key: str, value: Any) -> list[str]:
    """The dotted keys that `key=value` sets: one, or those of a mapping."""
    return [name for name, _ in leaves(value, key)] if isinstance(value, Mapping) else [key]
