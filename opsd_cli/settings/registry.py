"""The registry of plug-ins: (group, name) -> frozen dataclass.

A plug-in's fields are its YAML keys; `recipes/<group>/<name>.yaml` holds the defaults. A name is the only way in:
nothing in a recipe is ever imported by path.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, dataclass_transform, overload

from opsd_cli.settings import parts
from opsd_cli.settings.errors import ConfigError

T = TypeVar("T")
DatasetT = TypeVar("DatasetT", bound=parts.Dataset)
DivergenceT = TypeVar("DivergenceT", bound=parts.Divergence)
LauncherT = TypeVar("LauncherT", bound=parts.Launcher)
SamplerT = TypeVar("SamplerT", bound=parts.Sampler)
TeacherT = TypeVar("TeacherT", bound=parts.Teacher)

_REGISTRIES: dict[str, dict[str, type]] = {}


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass that pydantic validates strictly and without unknown keys."""
    cls.__pydantic_config__ = {"extra": "forbid", "strict": True, "allow_inf_nan": False}  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True)(cls)


@overload
def plugin(kind: Literal["dataset"], name: str) -> Callable[[type[DatasetT]], type[DatasetT]]: ...
@overload
def plugin(kind: Literal["divergence"], name: str) -> Callable[[type[DivergenceT]], type[DivergenceT]]: ...
@overload
def plugin(kind: Literal["launcher"], name: str) -> Callable[[type[LauncherT]], type[LauncherT]]: ...
@overload
def plugin(kind: Literal["sampler"], name: str) -> Callable[[type[SamplerT]], type[SamplerT]]: ...
@overload
def plugin(kind: Literal["teacher"], name: str) -> Callable[[type[TeacherT]], type[TeacherT]]: ...
@dataclass_transform(frozen_default=True, kw_only_default=True)
def plugin(kind: str, name: str) -> Callable[[type[Any]], type[Any]]:
    """Register a settings dataclass as the option `name` of the group `kind` (for example divergence, jsd). Type
    checkers hold the class to what `parts` asks of its kind."""

    def register(cls: type[Any]) -> type[Any]:
        options = _REGISTRIES.setdefault(kind, {})
        assert name not in options, f"{kind}={name} is registered twice"
        options[name] = settings(cls)
        cls.plugin_name = name
        return options[name]

    return register


def plugin_names(kind: str) -> tuple[str, ...]:
    """The option names of one kind, sorted."""
    return tuple(sorted(_REGISTRIES[kind]))


def find_plugin(kind: str, name: object) -> type[Any]:
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
