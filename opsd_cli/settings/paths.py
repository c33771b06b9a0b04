"""Paths as people type them: `~` is somebody's home, and no name is longer than a disk can hold. In one place, because
either would end in an exception of Python wherever such a path is first used."""

from __future__ import annotations

import os
from pathlib import Path

from opsd_cli.settings.errors import ConfigError

LONGEST_NAME = 255  # bytes of one part of a path
LONGEST_PATH = 4095
SHOWN = 60  # characters


def expanded(typed: str) -> str:
    """The path with `~` and `~user` written out. Raises ConfigError where there is no such user, and for what is too
    long to be the name of a file."""
    text = os.path.expanduser(typed)
    if text.startswith("~"):
        raise ConfigError(f"{typed[:SHOWN]}: there is no user {text.split('/')[0][1:]!r}, whose home it begins with")
    longest = max(text.split("/"), key=lambda name: len(os.fsencode(name)))
    if len(os.fsencode(longest)) > LONGEST_NAME or len(os.fsencode(text)) > LONGEST_PATH:
        raise ConfigError(
            f"{typed[:SHOWN]}... is no path: it has {len(os.fsencode(text))} bytes and a part with "
            f"{len(os.fsencode(longest))}; at most {LONGEST_PATH}, and {LONGEST_NAME} for a part"
        )
    return text


def typed_path(typed: str | Path) -> Path:
    """The same as a Path."""
    return Path(expanded(str(typed)))
