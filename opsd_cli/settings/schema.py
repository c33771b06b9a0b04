"""A JSON Schema of a group's recipe files, for editors: keys, types and what each key means. A file names its schema in
a comment that editors know (`# yaml-language-server: $schema=...`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from opsd_cli.settings.recipe_files import GROUPS, option_files
from opsd_cli.settings.registry import find_plugin, plugin_names
from opsd_cli.settings.typed_config import PLUGINS, SECTIONS

FOLDER = ".schema"  # beside the groups in a folder of recipes
MODELINE = "# yaml-language-server: $schema="
COMMENTED = re.compile(r"^(\s*)(\w+):[^#\n]*(?:\"[^\"]*\")?[^#\n]*#\s*(.+)$")
WITH_SECTIONS = ("recipe", "method")


def schema_of(group: str, builtin: Path) -> dict[str, Any]:
    """The schema of an option file of a group. The registries must be filled (`opsd_cli.plugins`)."""
    comments = _comments(builtin)
    if group in WITH_SECTIONS:
        sections = {section: _section(section, comments) for section in (*SECTIONS, *PLUGINS)}
        shape: dict[str, Any] = {"type": "object", "properties": sections, "additionalProperties": False}
    else:
        shape = _section(group, comments)
    shape["properties"] = {
        "defaults": {"type": "array", "description": "what the file builds on, and the options it chooses"},
        **shape["properties"],
    }
    title = f"opsd: {group}= ({GROUPS[group]})"
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": title, **shape}


def _section(section: str, comments: Mapping[str, str]) -> dict[str, Any]:
    """One section as an object in which nothing is required: a file gives what it changes."""
    shapes = [SECTIONS[section]] if section in SECTIONS else [find_plugin(section, n) for n in plugin_names(section)]
    properties: dict[str, Any] = {}
    for shape in shapes:
        made = TypeAdapter(shape).json_schema(ref_template="#/{model}")
        for key, value in made.get("properties", {}).items():
            held = properties.setdefault(key, {"anyOf": []})
            plain = {name: part for name, part in value.items() if name != "title"}
            if plain not in held["anyOf"]:
                held["anyOf"].append(plain)
    for key, value in properties.items():
        value["anyOf"].append({"const": "???"})  # to be given by whoever builds on the file
        if comment := comments.get(f"{section}.{key}"):
            value["description"] = comment
    if section in PLUGINS:
        properties["name"] = {"type": "string", "examples": list(plugin_names(section))}
    return {"type": "object", "properties": properties, "additionalProperties": section in PLUGINS}


def _comments(builtin: Path) -> dict[str, str]:
    """What opsd's own files say of each key, by dotted key."""
    found: dict[str, str] = {}
    section = ""
    for line in (builtin / "config.yaml").read_text(encoding="utf-8").splitlines():
        if re.match(r"^\w+:", line):
            section = line.partition(":")[0]
        if (match := COMMENTED.match(line)) and match[1]:
            found[f"{section}.{match[2]}"] = match[3]
    for group in GROUPS:
        for file in option_files(builtin / group) if group not in WITH_SECTIONS else ():
            for line in file.read_text(encoding="utf-8").splitlines():
                if (match := COMMENTED.match(line)) and not match[1]:
                    found.setdefault(f"{group}.{match[2]}", match[3])
    return found


def with_modeline(text: str, *, depth: int, group: str) -> str:
    """A recipe file's text with the comment that names its schema, `depth` folders up, as its second line: the first
    one describes the file."""
    first, newline, rest = text.partition("\n")
    return f"{first}{newline}{MODELINE}{'../' * depth}{FOLDER}/{group}.json\n{rest}"
