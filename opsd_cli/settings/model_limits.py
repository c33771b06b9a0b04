"""The longest completion a model is made for. Owns one rule: `model.max_completion_tokens` lowers the
recipe's limits, because a recipe is written before the model is chosen; a limit that was typed stands.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

LIMITS = ("sampling", "eval")


def cap_completions(tree: dict[str, Any], *, typed: Collection[str]) -> list[str]:
    """Lower the limits of a plain tree in place where the model asks for it; returns what was lowered, in
    words."""
    longest = tree["model"].get("max_completion_tokens")
    notes = []
    for section in LIMITS:
        limit = tree[section].get("max_completion_tokens")
        key = f"{section}.max_completion_tokens"
        if isinstance(longest, int) and isinstance(limit, int) and limit > longest and key not in typed:
            tree[section]["max_completion_tokens"] = longest
            notes.append(f"{key}={longest} instead of {limit}: the model is made for no longer completions")
    return notes
