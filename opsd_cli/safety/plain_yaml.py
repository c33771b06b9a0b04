"""YAML that holds nothing but text, numbers, lists and mappings: a file from a stranger is read as JSON would be."""

from __future__ import annotations

from typing import Any

import yaml

LONGEST = 1 << 18  # characters; a frozen config has a few thousand


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
