"""The messages about a wrong name or value: what is wrong, and which name was probably meant."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from opsd_cli.settings.errors import ConfigError, display_path
from opsd_cli.settings.recipe_files import GROUPS, RecipeFolders, with_bases
from opsd_cli.settings.registry import did_you_mean
from opsd_cli.settings.trees import has_key, leaves

OTHER_NAMES = {
    "learning_rate": "optim.lr",
    "batch_size": "train.problems_per_step",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "max_new_tokens": "sampling.max_completion_tokens",
    "num_generations": "train.rollouts_per_problem",
    "output_dir": "run.root",
    "lora_r": "lora.rank",
    "gpus": "launcher.ranks",
    "num_gpus": "launcher.ranks",
    "world_size": "launcher.ranks",
}
"""What other trainers call some settings."""


def value_problem(key: str, error: Any, allowed: Sequence[str]) -> str:
    """One pydantic error as `section.key: what (got X)`."""
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        section, _, last = key.partition(".")
        near = did_you_mean(last, allowed, prefix=f"{section}.")
        return f"unknown key '{key}'{near} (allowed: {', '.join(allowed) or 'none'})"
    if error["type"].startswith("missing"):
        return f"{key} is missing"
    value = error["input"]
    got = f"(got {value!r})" if isinstance(value, str) else f"(got {json.dumps(value)})"
    if error["type"] == "string_pattern_mismatch":
        return f"{key}: must be letters, digits, '.', '-' and '_', at most 80, and start with a letter or digit {got}"
    if error["type"] == "string_type" and isinstance(value, int | float):
        return f"{key}: must be text {got}; quote it twice: {key}='\"{value}\"'"
    if error["type"] == "bool_type":
        return f"{key}: must be true or false {got}"
    options = re.findall(r"'([^']*)'", error["msg"]) if error["type"] == "literal_error" else ()
    near = did_you_mean(str(value), options)
    text = error["msg"][:1].lower() + error["msg"][1:]
    return f"{key}: {text.replace('input should be', 'must be')}{near} {got}"


def place_of(places: Mapping[str, str], key: str) -> str:
    """` (where)` the key was written, or else the nearest section around it; empty if that is unknown."""
    while key not in places and "." in key:
        key = key.rpartition(".")[0]
    return f" ({places[key]})" if key in places else ""


def option_problem(group: str, value: Any, folders: RecipeFolders) -> str | None:
    """What is wrong with `group=value`, or None."""
    options = folders.files[group]
    if value is None and group == "recipe":
        return None
    if value is None or value == "???":
        return f"{group} is required: {group}={' | '.join(options)}"
    name = str(value)
    if name in options:
        return None
    if yml := folders.find(group, f"{name}.yml"):
        return f"{group}={name}: rename {display_path(yml)} to .yaml; Hydra does not read .yml files"
    loader = {"model": "hf", "dataset": "jsonl"}.get(group)
    if loader and ("/" in name or os.path.exists(name)):
        return f"{group}={name}: unknown {group}; write {group}={loader} {group}.path={name}"
    near = did_you_mean(name, options)
    return f"{group}={name}: unknown {group}{near} (available: {', '.join(options)}; see `opsd recipes`)"


def key_problem(
    key: str, tree: Mapping[str, Any], *, choices: Mapping[str, str | None], folders: RecipeFolders
) -> str | None:
    """What is wrong with setting `key` in a composed tree, or None."""
    if has_key(tree, key):
        return None
    section, _, rest = key.partition(".")
    chosen = choices.get(section)
    if chosen is not None and (others := " and ".join(_options_with(key, section, folders))):
        return f"unknown key '{key}' (command line): {section}={chosen} has no {rest}; {section}={others} has"
    known = [name for name, _ in leaves(tree)]
    if chosen is not None and not any(name.startswith(f"{section}.") for name in known if name != f"{section}.name"):
        return f"unknown key '{key}' (command line): {section}={chosen} has no settings"
    return f"unknown key '{key}' (command line){_nearest(key, known)}"


def _options_with(key: str, section: str, folders: RecipeFolders) -> list[str]:
    """The options of a group whose file, or one that it builds on, has the key."""
    options = []
    for option in folders.files.get(section, {}):
        with suppress(ConfigError, RecursionError):  # broken, or it builds on itself
            if any(known.name == key for file in with_bases(folders, section, option) for known in file.keys):
                options.append(option)
    return options


def _nearest(key: str, known: list[str]) -> str:
    if "." not in key and (group := did_you_mean(key, GROUPS, cutoff=0.75)):  # more likely meant than a setting
        return group
    last = key.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == last]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6) or same[:1]
    if same and near and near[0] not in same:
        near = difflib.get_close_matches(key, same, n=1, cutoff=0.0)
    if not near and (elsewhere := OTHER_NAMES.get(re.sub(r"\W", "_", last).lower())):
        near = [elsewhere]
    elif not near:
        near = difflib.get_close_matches(last, [name.rpartition(".")[2] for name in known], n=1, cutoff=0.7)
        near = [next(name for name in known if name.rpartition(".")[2] == near[0])] if near else []
    return f" - did you mean '{near[0]}'?" if near else "; `opsd train --cfg job` prints every key"
