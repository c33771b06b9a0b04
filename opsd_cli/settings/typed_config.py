"""From a plain tree to the typed `Config` and back: every section an object of its shape, its values checked, with a
message for each that is not what it may be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import cache
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from opsd_cli.settings.config import Config
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.paths import expanded
from opsd_cli.settings.registry import did_you_mean, find_plugin
from opsd_cli.settings.suggestions import place_of, value_problem

PLUGINS: tuple[str, ...] = ("dataset", "divergence", "grader", "launcher", "sampler", "teacher", "token_rule")
"""Sections whose shape is chosen by their `name`: the dataclass comes from the registry."""

SECTIONS: dict[str, type] = {name: shape for name, shape in get_type_hints(Config).items() if name not in PLUGINS}
"""Sections with one shape each."""


def typed_config(tree: Mapping[str, Any], *, places: Mapping[str, str] | None = None) -> Config:
    """The typed config of a plain, resolved tree; `places`: where a dotted key was written. Raises ConfigError."""
    places = places or {}
    sections: dict[str, Any] = {}
    known = (*SECTIONS, *PLUGINS)
    problems = [
        f"unknown section '{key}'{did_you_mean(str(key), known)}{place_of(places, str(key))}"
        for key in tree
        if key not in known
    ]
    for name in known:
        if name not in tree:
            problems.append(f"section '{name}' is missing")
            continue
        try:
            sections[name] = typed_section(name, tree[name], SECTIONS.get(name), places)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return Config(**sections)


def plain_tree(config: Config) -> dict[str, Any]:
    """The inverse of `typed_config`: nested plain dicts, plug-ins with their name first."""
    tree = asdict(config)
    return tree | {kind: {"name": vars(config)[kind].plugin_name, **tree[kind]} for kind in PLUGINS}


PATHS = ("path", "chat_template", "root", "hostfile")
"""Keys of any section that may name a file or folder below the home folder, as ~/..."""


def typed_section(section: str, node: Any, shape: type | None, places: Mapping[str, str]) -> Any:
    """The section as an object of its shape (None: of the plug-in it names). Raises ConfigError with every problem."""
    if not isinstance(node, Mapping):
        raise ConfigError(f"{section} is {node!r}; it must be a group of settings{place_of(places, section)}")
    values = dict(node)
    try:
        shape = shape or find_plugin(section, values.pop("name", None))
    except ConfigError as error:
        raise ConfigError(*(f"{problem}{place_of(places, f'{section}.name')}" for problem in error.problems)) from None
    for key in PATHS:
        if isinstance(path := values.get(key), str):
            try:
                values[key] = expanded(path)
            except ConfigError as error:
                raise ConfigError(f"{section}.{key}={error}{place_of(places, f'{section}.{key}')}") from None
    missing = [f"{section}.{key}" for key, value in values.items() if value == "???"]
    problems = [f"{key} is required{place_of(places, key)}" for key in missing]
    try:
        # As JSON: strict validation of Python values would want instances and tuples where a tree has dicts and lists.
        typed = _adapter(shape).validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        allowed = [field.name for field in fields(shape)]
        for item in error.errors():
            key = ".".join([section, *(str(part) for part in item["loc"])])
            if key not in missing:
                problems.append(value_problem(key, item, allowed) + place_of(places, key))
    if problems:
        raise ConfigError(*problems)
    return typed


@cache
def _adapter(shape: type) -> TypeAdapter[Any]:
    return TypeAdapter(shape)
