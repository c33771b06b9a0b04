"""Misspelt names on the command line and what was probably meant. Owns the words about options and keys that
do not exist; composes nothing.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.folders import GROUPS, RecipeFolders, shown
from opsd_cli.settings.overrides import has_key, leaves
from opsd_cli.settings.recipe_file import read_recipe_file
from opsd_cli.settings.registry import did_you_mean

ALSO_SAID = {
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


def option_problem(group: str, value: Any, folders: RecipeFolders) -> str | None:
    """What is wrong with `group=value`, or None."""
    options = folders.files[group]
    if value is None and group == "recipe":
        return None
    if value is None or value == "???":
        return f"{group} must be chosen: {group}={' | '.join(options)}"
    name = str(value)
    if name in options:
        return None
    misnamed = folders.misnamed(group, name)
    if misnamed is not None:
        return f"{group}={name}: {shown(misnamed)} must be named .yaml to be found"
    loader = {"model": "hf", "dataset": "jsonl"}.get(group)
    if loader and ("/" in name or Path(name).exists()):
        return f"{group}={name}: no such {group}; write {group}={loader} {group}.path={name}"
    near = did_you_mean(name, options)
    return f"{group}={name}: no such {group}{near} (there are: {', '.join(options)}; see `opsd recipes`)"


def key_problem(
    key: str, tree: Mapping[str, Any], *, choices: Mapping[str, str | None], folders: RecipeFolders
) -> str | None:
    """What is wrong with setting `key` in a composed tree, or None."""
    if has_key(tree, key):
        return None
    section, _, rest = key.partition(".")
    holders = _options_with(key, section, folders)
    if holders and choices.get(section) is not None:
        chosen = f"{section}={choices[section]}"
        return f"unknown key '{key}' (command line): {chosen} has no {rest}; {section}={' and '.join(holders)} has"
    known = [name for name, _ in leaves(tree)]
    return f"unknown key '{key}' (command line){_nearest(key, known)}"


def _options_with(key: str, section: str, folders: RecipeFolders) -> list[str]:
    """The options of a group whose file has the key."""
    found = []
    for option, path in folders.files.get(section, {}).items():
        try:
            file = read_recipe_file(path, section)
        except ConfigError:
            continue
        if any(known.name == key for known in file.keys):
            found.append(option)
    return found


def _nearest(key: str, known: list[str]) -> str:
    group = difflib.get_close_matches(key, GROUPS, n=1, cutoff=0.75)
    if group:  # no dot, so a group is more likely meant than a setting
        return f" - did you mean '{group[0]}'?"
    last = key.rpartition(".")[2]
    said = ALSO_SAID.get(re.sub(r"\W", "_", last).lower())
    same = [name for name in known if name.rpartition(".")[2] == last]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6) or same[:1]
    if len(same) > 0 and near and near[0] not in same:
        near = difflib.get_close_matches(key, same, n=1, cutoff=0.0)
    if not near and said:
        near = [said]
    if not near:
        near = difflib.get_close_matches(last, [name.rpartition(".")[2] for name in known], n=1, cutoff=0.7)
        near = [next(name for name in known if name.rpartition(".")[2] == near[0])] if near else []
    return f" - did you mean '{near[0]}'?" if near else "; `opsd train --cfg job` prints every key"
