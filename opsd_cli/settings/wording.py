"""What a failed check of one setting says. Owns the words for pydantic's errors and for the place of a key; checks
nothing itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from opsd_cli.settings.registry import did_you_mean


def one_line(key: str, item: Any, allowed: Sequence[str]) -> str:
    """One pydantic error as `section.key: what (got X)`."""
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        section, _, last = key.partition(".")
        near = did_you_mean(last, allowed).replace("'", f"'{section}.", 1)
        return f"unknown key '{key}'{near} (allowed: {', '.join(allowed) or 'none'})"
    if item["type"].startswith("missing"):
        return f"{key} is missing"
    value = item["input"]
    got = f"(got {value!r})" if isinstance(value, str) else f"(got {json.dumps(value)})"
    if item["type"] == "string_pattern_mismatch":
        return f"{key}: must be letters, digits, '.', '-' and '_', at most 80, and start with a letter or digit {got}"
    if item["type"] == "string_type" and isinstance(value, int | float):
        return f"{key}: must be text {got}; quote it twice: {key}='\"{value}\"'"
    if item["type"] == "bool_type":
        return f"{key}: must be true or false {got}"
    options = re.findall(r"'([^']*)'", item["msg"]) if item["type"] == "literal_error" else ()
    near = did_you_mean(str(value), options)
    text = item["msg"][:1].lower() + item["msg"][1:]
    return f"{key}: {text.replace('input should be', 'must be')}{near} {got}"


def place_of(places: Mapping[str, str], key: str) -> str:
    """` (where)`, of the key itself or the nearest section around it; empty when nobody knows."""
    while key not in places and "." in key:
        key = key.rpartition(".")[0]
    return f" ({places[key]})" if key in places else ""
