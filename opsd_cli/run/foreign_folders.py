"""A run folder may come from someone else: its config is read as data only, and links that would lead a write out of
the folder are refused. (What its checkpoints may hold, the engine checks.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from opsd_cli.settings.errors import ConfigError, display_path

LARGEST_FILE = 1 << 18  # characters; a frozen config has a few thousand
PLAIN = (str, int, float, bool, type(None))


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
    if len(text) > LARGEST_FILE:
        raise ValueError(f"it has {len(text)} characters, more than a config ever has")
    try:
        value = yaml.load(text, Loader=_PlainLoader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _require_plain(value)
    return value


def _require_plain(value: Any) -> None:
    if isinstance(value, dict):
        for key, below in value.items():
            if not isinstance(key, str):
                raise ValueError(f"its key {key!r} is not text")
            _require_plain(below)
    elif isinstance(value, list):
        for below in value:
            _require_plain(below)
    elif not isinstance(value, PLAIN):
        raise ValueError(f"it holds {value!r}, which is neither text nor a number")


def refuse_links(folder: Path) -> None:
    """Raise ConfigError if anything that a resumed run would write to is a symbolic link."""
    below = [folder / name for name in ("logs", "checkpoints", "model")]
    entered = [folder, *(path for path in below if path.is_dir() and not path.is_symlink())]
    for path in (*below, *(entry for parent in entered for entry in parent.iterdir())):
        if path.is_symlink():
            raise ConfigError(
                f"{display_path(path)} is a symbolic link, and a run writes only inside its own folder; replace it "
                "with the file itself"
            )
