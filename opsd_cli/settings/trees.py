"""Nested settings by dotted key: `optim.lr` in `{"optim": {"lr": 1e-4}}`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


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
