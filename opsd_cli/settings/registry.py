"""The registry of plug-ins: (group, name) -> frozen dataclass.

A plug-in's fields are its YAML keys; `recipes/<group>/<name>.yaml` holds the defaults. A name is the only way in:
nothing in a recipe is ever imported by path.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

from opsd_cli.settings.errors import ConfigError

T = TypeVar("T")

_REGISTRIES: dict[str, dict[str, type]] = {}


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass that pydantic validates strictly and without unknown keys."""
    cls.__pydantic_config__ = {"extra": "forbid", "strict": True, "allow_inf_nan": False}  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True)(cls)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def plugin(kind: str, name: str) -> Callable[[type[T]], type[T]]:
    """Register a settings dataclass as the option `name` of the group `kind` (for example divergence, jsd)."""

    def register(cls: type[T]) -> type[T]:
        options = _REGISTRIES.setdefault(kind, {})
        assert name not in options, f"{kind}={name} is registered twice"
        options[name] = settings(cls)
        cls.plugin_name = name  # type: ignore[attr-defined]
        return options[name]

    return register


def plugin_names(kind: str) -> tuple[str, ...]:
    """The option names of one kind, sorted."""
    return tuple(sorted(_REGISTRIES[kind]))


def find_plugin(kind: str, name: object) -> type:
    """The dataclass behind `kind=name`. Raises ConfigError with the nearest name if there is none."""
    options = _REGISTRIES[kind]
    if not isinstance(name, str) or name not in options:
        raise ConfigError(
            f"{kind}.name is {name!r}, which is not one of {', '.join(sorted(options))}"
            + did_you_mean(str(name), options)
        )
    return options[name]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" - did you mean 'x'?"` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" - did you mean '{near[0]}'?" if near else ""
