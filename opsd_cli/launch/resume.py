"""What may change between a run and its continuation: only what does not change which run it is (the list is
`settings.identity`'s). Pure."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.registry import did_you_mean
from opsd_cli.settings.resume_rules import MAY_CHANGE, may_change


def changed_tree(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a frozen tree with dotted keys replaced. Raises ConfigError with every key that may not
    change.

    `train.steps` may change only under a constant learning rate: a decay is a function of it.
    """
    changed = copy.deepcopy(dict(tree))
    problems = []
    for key, value in changes.items():
        section, _, field = key.partition(".")
        if not isinstance(changed.get(section), dict) or field not in changed[section]:
            keys = [f"{name}.{inner}" for name, node in tree.items() if isinstance(node, dict) for inner in node]
            problems.append(f"unknown key {key!r}{did_you_mean(key, keys)}")
        elif changed[section][field] != value:
            problems += _refusals(key, changed, value)
            changed[section][field] = value
    if problems:
        raise ConfigError(*problems)
    return changed


def _refusals(key: str, tree: Mapping[str, Any], value: Any) -> list[str]:
    section, _, field = key.partition(".")
    before = tree[section][field]
    if not may_change(key):
        return [
            f"{key} was {before!r} when the run began and cannot become {value!r} on a resume: that would be "
            f"another run; start a new one, or change only {', '.join(MAY_CHANGE)}"
        ]
    schedule = tree["optim"]["schedule"]
    if key == "train.steps" and schedule != "constant":
        return [
            f"train.steps cannot change from {before} to {value} on a resume: with optim.schedule={schedule} "
            "the learning rate depends on it; start a new run"
        ]
    return []
