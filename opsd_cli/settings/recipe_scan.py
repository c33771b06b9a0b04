"""Refuses recipe files and overrides that are more than data: anything that Hydra would import, call or read from the
environment, or that would change which files are searched. Hydra runs code that its own `hydra` node names (callbacks,
logging factories), and its block-list stops only well-known names. So every file that a choice can reach is read here,
as YAML nodes, before Hydra starts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from opsd_cli.safety.secrets import holds_secret
from opsd_cli.settings.errors import ConfigError, display_path
from opsd_cli.settings.recipe_files import (
    GROUPS,
    PRIMARY,
    RecipeFile,
    RecipeFolders,
    loader_of,
    option_files,
    read_recipe_file,
)
from opsd_cli.settings.recipe_nodes import DefaultsEntry, nodes_below
from opsd_cli.settings.registry import did_you_mean

FORBIDDEN_KEYS = frozenset({"hydra", "_target_", "_args_", "_partial_", "_recursive_", "_convert_", "()", "class"})
RECIPE_OWNS = ("model", "dataset", "method", "optim", "zero", "lora", "grader")
METHOD_OWNS = ("teacher", "context", "sampler", "divergence", "support", "clip", "target", "tokens", "token_rule")
DEEPEST = 20  # a setting stands two deep
OPTION_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
PLAIN_REFERENCE = re.compile(r"\$\{[A-Za-z0-9_.]+\}")

PLACES = (("run", "root"), ("run", "name"))
INSIDE = re.compile(r"(?!.*\.\.)(null|[A-Za-z0-9_][A-Za-z0-9_./ -]*)?")
"""A user may keep runs anywhere; a recipe only below the working folder."""

TYPED_ONLY = (("launcher", "sbatch"), ("launcher", "setup"), ("launcher", "runner_args"))
"""Settings that a job, or the program that starts the ranks, takes as they are."""

EXTRAS = {
    "joblib": "hydra-joblib-launcher",
    "submitit": "hydra-submitit-launcher",
    "optuna": "hydra-optuna-sweeper",
}
"""Extras of opsd's, each with the plug-in of Hydra's that it is for."""

PLUGIN_CHOICES = {
    "hydra/launcher": {"basic": "", "joblib": "joblib", "submitit_local": "submitit", "submitit_slurm": "submitit"},
    "hydra/sweeper": {"basic": "", "optuna": "optuna"},
    "hydra/sweeper/sampler": dict.fromkeys(("tpe", "random", "grid", "cmaes", "nsgaii", "motpe"), "optuna"),
}
"""Groups of Hydra's own that a command line may choose from (how the members of a sweep are made and run), with the
extra that each option needs."""

SWEEP_KEYS = ("hydra.sweep.dir", "hydra.sweep.subdir", "hydra.mode", "hydra.launcher", "hydra.sweeper")
SWEEP_NAMES = {
    "hydra.sweep.dir": re.compile(r"\$\{(now:[^${}]*|run\.root|run\.name)\}"),
    "hydra.sweep.subdir": re.compile(r"\$\{(hydra\.job\.(num|id|override_dirname)|[A-Za-z0-9_.]+)\}"),
}
"""Resolvers that may name a sweep's folders; those that read the environment may not."""


def scan(folders: RecipeFolders) -> None:
    """Read every file that a choice can reach. Raises ConfigError with every problem of every file."""
    problems: list[str] = []
    for folder in folders.all:
        if folder != folders.builtin:
            problems += _misplaced_files(folder, folders.primary)
        for group in GROUPS:
            for path in option_files(folder / group):
                try:
                    file = read_recipe_file(path, group)
                    problems += [f"{file.at(line)}: {problem}" for line, problem in _file_problems(file)]
                except ConfigError as error:
                    problems += error.problems
    if problems:
        raise ConfigError(*problems)


def _misplaced_files(folder: Path, primary: Path) -> Iterator[str]:
    """A user's folder may hold groups only: a `config.yaml` of its own would replace opsd's defaults."""
    own, shown = folder / PRIMARY, display_path(folder)
    if own.is_file() and own.read_bytes() != primary.read_bytes():
        yield f"{display_path(own)}: would replace opsd's own {PRIMARY}; keep recipes in {shown}/recipe/"
    if (folder / "hydra").exists():
        yield f"{display_path(folder / 'hydra')}: recipes cannot configure Hydra itself; remove it"


def _file_problems(file: RecipeFile) -> Iterator[tuple[int, str]]:
    """What is wrong in a file, with the line."""
    for line, keyword, value in file.headers:
        if keyword == "package" and value != "_global_":
            yield line, f"`@package {value}` is not allowed in a recipe; only `@package _global_` is"
    tokens = list(_token_problems(file))
    yield from tokens
    if tokens:  # following YAML aliases may never end
        return
    yield from _node_problems(file)
    for entry in file.defaults:
        if problem := _entry_problem(entry, file.group):
            yield entry.line, problem


def _token_problems(file: RecipeFile) -> Iterator[tuple[int, str]]:
    for token in yaml.scan(file.text, Loader=loader_of(file.path)):
        line = token.start_mark.line + 1
        if isinstance(token, yaml.TagToken):
            yield line, f"YAML tags ({''.join(filter(None, token.value))}) are not allowed in a recipe"
        if isinstance(token, yaml.AnchorToken | yaml.AliasToken):
            yield line, "YAML anchors and aliases are not allowed in a recipe; write the value out"


def _node_problems(file: RecipeFile) -> Iterator[tuple[int, str]]:
    seen: set[tuple[str, ...]] = set()
    for path, key, value in nodes_below(file.root):
        line, name = (key or value).start_mark.line + 1, ".".join(path)
        if len(path) == DEEPEST:
            yield line, "nested too deeply for a recipe"
        if key is not None and not isinstance(key, yaml.ScalarNode):
            yield line, "a key is a word, not a list or a mapping"
        elif key is not None:
            if path in seen:
                yield line, f"duplicate key '{name}'"
            seen.add(path)
            yield from ((line, problem) for problem in key_problems(path[-1]))
        if key is not None and (file.group, *path)[-2:] in TYPED_ONLY and value.value:
            yield line, f"a recipe may not say what a launcher runs; set launcher.{path[-1]} on the command line"
        if isinstance(value, yaml.ScalarNode):
            yield from ((line, problem) for problem in value_problems(value.value))
            if (file.group, *path)[-2:] in PLACES and not INSIDE.fullmatch(value.value):
                yield line, f"a recipe keeps its runs below the working folder; type {name}=..."
            if path[-1] == "trust_remote_code" and value.value.lower() != "false":
                setting = "model.trust_remote_code=true"
                yield line, f"a recipe may not turn trust_remote_code on; set it on the command line: {setting}"


def _entry_problem(entry: DefaultsEntry, group: str) -> str | None:
    allowed = {"recipe": RECIPE_OWNS, "method": METHOD_OWNS}.get(group, ())
    if not OPTION_NAME.fullmatch(entry.option):
        return f"{entry.option!r} is not the name of an option"
    if entry.group is None:
        return None
    if entry.package is not None:
        return f"'{entry.group}{entry.package}' would move settings to another place; write `override /{entry.group}`"
    if entry.group in allowed:
        return None if entry.override else f"write `- override /{entry.group}: {entry.option}`"
    if entry.group not in GROUPS:
        return f"unknown group {entry.group!r}{did_you_mean(entry.group, GROUPS)}"
    owns = ", ".join(allowed) or "no other group"
    owner = f"; /{entry.group} belongs to a method" if group == "recipe" and entry.group in METHOD_OWNS else ""
    return f"a {group} file may not override /{entry.group} (it may override {owns}){owner}"


def key_problems(key: str) -> Iterator[str]:
    """What is wrong with a key, in a file or an override: names that make Hydra import or call something."""
    for part in key.split("."):
        if part in FORBIDDEN_KEYS:
            yield f"the key {part!r} is not allowed: recipes are data and never name code"


def value_problems(value: Any) -> Iterator[str]:
    """What is wrong with a value, or inside it: secrets, NULs, interpolations other than a plain reference."""
    if isinstance(value, str):
        if holds_secret(value):
            yield (
                "a value looks like a secret, and no setting needs one: use `hf auth login` or the variable HF_TOKEN "
                "for the hub; if it was in a file, revoke it"
            )
        if "\0" in value:
            yield f"{value!r} is not allowed: it holds a NUL character"
        if "${" in PLAIN_REFERENCE.sub("", value):
            yield f"{value!r} is not allowed: only plain references such as ${{train.steps}} are, no resolvers"
    elif isinstance(value, Mapping):
        for key, below in value.items():
            yield from key_problems(str(key))
            yield from value_problems(below)
    elif isinstance(value, list | tuple):
        for below in value:
            yield from value_problems(below)


def hydra_override_problems(key: str, value: Any) -> Iterator[str]:
    """What is wrong with an override of Hydra's own node, of which only the settings of a sweep are allowed."""
    if key in PLUGIN_CHOICES:
        if (extra := PLUGIN_CHOICES[key].get(str(value))) is None:
            yield f"{key}={value}: choose one of {', '.join(PLUGIN_CHOICES[key])}"
        elif extra and not any(metadata.distributions(name=EXTRAS[extra])):
            yield f"{key}={value} needs a package: pip install 'opsd-cli[{extra}]'"
    elif key.startswith(("hydra.run", "hydra.output_subdir")):
        yield f"{key}: opsd makes its own run folders; use run.root and run.name"
    elif key == "hydra.sweeper.custom_search_space":
        yield f"{key} would name code; write the search space as KEY=interval(...) and KEY=VALUE,VALUE"
    elif key == "hydra.searchpath":
        yield f"{key}: give your recipe folder with --recipes DIR"
    elif not any(key == known or key.startswith(f"{known}.") for known in SWEEP_KEYS):
        yield f"{key} belongs to Hydra and cannot be set (allowed: {', '.join(SWEEP_KEYS)})"
    else:
        yield from key_problems(key.removeprefix("hydra."))
        allowed = SWEEP_NAMES.get(key)
        yield from value_problems(allowed.sub("", value) if allowed and isinstance(value, str) else value)
