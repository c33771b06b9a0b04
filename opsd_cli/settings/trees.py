"""Nested settings by dotted key, `optim.lr` in `{"optim": {"lr": 1e-4}}`; and the plain YAML they are read from: text,
numbers, lists and mappings and nothing else, so that a file from a stranger is read as JSON would be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

LONGEST = 1 << 18  # characters of YAML; a frozen config has a few thousand


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in a tree of mappings; a list is one value."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def leaf_names(key: str, value: Any) -> list[str]:
    """The dotted keys that `key=value` sets: several if the value is a mapping."""
    return [name for name, _ in leaves(value, key)]


def has_key(tree: Any, key: str) -> bool:
    """Whether the tree has a dotted key (list items by number)."""
    for part in key.split("."):
        if isinstance(tree, Mapping) and part in tree:
            tree = tree[part]
        elif isinstance(tree, list) and part.isdecimal() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            return False
    return True


def set_value(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key that exists, in place; a mapping is merged, as Hydra does."""
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    if isinstance(node, list):
        node[int(last)] = value
    elif isinstance(value, Mapping) and isinstance(node.get(last), Mapping):
        for below, item in value.items():
            set_value(node[last], str(below), item)
    else:
        node[last] = value


class _PlainLoader(yaml.SafeLoader):
    """Without tags, and without aliases, which could make a short file endless."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise ValueError("it holds a YAML alias")
        if event.tag is not None:
            raise ValueError(f"it holds a YAML tag, {event.tag!r}")
        return super().compose_node(parent, index)


def plain_yaml(text: str) -> Any:
    """The value of a YAML text. Raises ValueError or yaml.YAMLError for anything that JSON could not hold."""
    if len(text) > LONGEST:
        raise ValueError(f"it has {len(text)} characters, more than a config ever has")
    try:
        value = yaml.load(text, Loader=_PlainLoader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _require_plain(value)
    return value


def _require_plain(value: Any) -> None:
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"its key {key!r} is not text")
        value = [*value.values()]
    if isinstance(value, list):
        for below in value:
            _require_plain(below)
    elif not isinstance(value, str | int | float | bool | None):
        raise ValueError(f"it holds {value!r}, which is neither text nor a number")
