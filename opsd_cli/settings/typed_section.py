"""One section of a plain tree, as the typed object that it is to be: its values checked, with a message for each that
is not what it may be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.paths import expanded
from opsd_cli.settings.registry import find_plugin
from opsd_cli.settings.suggestions import place_of, value_problem

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
