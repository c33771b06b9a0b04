"""`opsd recipes`: lists the groups and their options, prints a recipe as it composes, copies one to edit; and what a
method is called in other frameworks."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from opsd_cli.commands.flags import Flags
from opsd_cli.commands.own_recipes import edit, schema_text, validate_all, write_copy
from opsd_cli.safety.terminal import escape_controls
from opsd_cli.settings.errors import ConfigError, ExitCode, OutsideError, display_path
from opsd_cli.settings.paths import typed_path
from opsd_cli.settings.recipe_files import GROUPS, RecipeFolders, description, find_folders, origins, written_out
from opsd_cli.settings.registry import did_you_mean

HELP = """\
opsd recipes                      every group and its options, one line each
opsd recipes show gsm8k           the full config of recipe=gsm8k, as it composes
opsd recipes show divergence      the options of one group
opsd recipes show divergence/jsd  one option file
opsd recipes show opsd            a method, and what it is called in TRL, verl, ms-swift, Liger and the authors' code
opsd recipes copy gsm8k           copy a recipe (or group/option) to ./recipes, to edit; never overwrites
opsd recipes copy gsm8k DIR       ... to another folder; use it with `opsd train --recipes DIR`
opsd recipes edit gsm8k           the same, opened in $EDITOR and validated when you leave it
opsd recipes validate [NAME]      compose and check a recipe, or all of your own
opsd recipes schema recipe        the JSON Schema of a group's files, for editors; a copy names its own

--recipes DIR   a folder of your own recipes, searched first; ./recipes is always searched
--plugin FILE   a Python file of your own that registers parts
"""

OTHER_FRAMEWORKS = Path(__file__).parents[1] / "assets" / "other_frameworks.yaml"
NEXT = "opsd train recipe=NAME trains; opsd recipes show NAME prints; opsd recipes copy NAME copies to edit."
WIDTH = 120  # of a line about other frameworks


def main(arguments: list[str]) -> int:
    """Run `opsd recipes ...`."""
    flags = Flags("recipes")
    flags.add_argument("--recipes")
    given = flags.read(arguments)
    folders = find_folders(given.recipes)
    match given.words:
        case [] | ["list"]:
            for group in GROUPS:
                print(escape_controls("\n".join(group_lines(folders, group))), end="\n\n")
            print(NEXT)
        case ["show", name]:
            print(escape_controls(show(folders, name)), end="")
        case ["copy", name, *rest] if len(rest) <= 1:
            copy(folders, name, typed_path(*rest or ("recipes",)))
        case ["edit", name]:
            group, file = find_option(folders, name)
            if file.is_relative_to(folders.builtin):
                root = typed_path(given.recipes or "recipes")
                file = copy(folders, name, root)
                folders = find_folders(given.recipes)
            edit(file, group, name.partition("/")[2] or file.stem, folders)
        case ["validate", *names] if len(names) <= 1:
            validate_all(folders, find_option, *(names or [None]))
        case ["schema", group]:
            print(schema_text(group, folders), end="")
        case [word, *_]:
            near = did_you_mean(word, ("list", "show", "copy", "edit", "validate", "schema"))
            raise ConfigError(f"opsd recipes {' '.join(given.words)}: unknown{near} (see `opsd recipes --help`)")
    return ExitCode.DONE


def group_lines(folders: RecipeFolders, group: str) -> Iterator[str]:
    """A group, then a line for each option: its name, its description, and its file if it is the user's own."""
    yield f"{group}=  {GROUPS[group]}"
    options = folders.files[group]
    width = max(map(len, options), default=0)
    for option, path in options.items():
        own = "" if path.is_relative_to(folders.builtin) else f"  ({display_path(path)})"
        yield f"  {option:<{width}}  {description(path)}{own}"


def show(folders: RecipeFolders, name: str) -> str:
    """A recipe composed, the options of a group, or an option's file, a method's with its names elsewhere."""
    if name in folders.files["recipe"]:
        return composed_text(folders, name)
    if name in GROUPS:
        return "\n".join(group_lines(folders, name)) + "\n"
    group, file = find_option(folders, name)
    text = text_of(folders, group, file).decode("utf-8", errors="backslashreplace")
    if group == "method":
        tree, _ = _compose(folders, "model=tiny", "dataset=arithmetic", f"method={name.removeprefix('method/')}")
        text += "\n".join(other_names(tree)) + "\n"
    return text


def text_of(folders: RecipeFolders, group: str, file: Path) -> bytes:
    """An option's file: the user's own as it is, opsd's with all that it takes over from files it builds on."""
    if not file.is_relative_to(folders.builtin):
        return file.read_bytes()
    return written_out(folders, group, file.relative_to(folders.builtin / group).with_suffix("").as_posix()).encode()


def find_option(folders: RecipeFolders, name: str) -> tuple[str, Path]:
    """(group, file) of `NAME` (a recipe, or an option name that only one group has) or `group/NAME`."""
    group, _, option = name.partition("/")
    if group in GROUPS and option in folders.files[group]:
        return group, folders.files[group][option]
    matches = [(group, options[name]) for group, options in folders.files.items() if name in options]
    if matches and (len(matches) == 1 or matches[0][0] == "recipe"):
        return matches[0]
    if matches:
        raise ConfigError(f"'{name}' is in several groups: {', '.join(f'{group}/{name}' for group, _ in matches)}")
    known = [f"{group}/{option}" for group, options in folders.files.items() for option in options]
    near = did_you_mean(name, [*folders.files["recipe"], *GROUPS]) or did_you_mean(name, known)
    raise ConfigError(f"unknown recipe or option '{name}'{near} (see `opsd recipes`)")


def composed_text(folders: RecipeFolders, recipe: str) -> str:
    """The config of a recipe as valid YAML, each key with the comment of the file it comes from."""
    tree, choices = _compose(folders, f"recipe={recipe}")
    comments = {key: origin.comment for key, origin in origins(folders, choices).items()}
    chosen = [f"{group}={choices[group]}" for group in GROUPS if choices.get(group)]
    lines = [f"# {description(folders.files['recipe'][recipe])}", f"# {' '.join(chosen)}"]
    for section, values in tree.items():
        lines += ["", f"{section}:"]
        for key, value in values.items():
            comment = comments.get(f"{section}.{key}", "")
            lines.append(f"  {key}: {_yaml(value)}" + (f" # {comment}" if comment else ""))
    return "\n".join(lines) + "\n"


def _compose(folders: RecipeFolders, *choices: str) -> tuple[dict[str, Any], dict[str, str | None]]:
    from opsd_cli.settings.compose import compose, session
    from opsd_cli.settings.recipe_scan import scan

    scan(folders)
    with session(folders):
        return compose(choices)


def _yaml(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=100_000)
    return text.removesuffix("\n").removesuffix("\n...")


def copy(folders: RecipeFolders, name: str, folder: Path) -> Path:
    """Copy an option's file into `folder/group/`, with what to type next; returns the copy."""
    group, source = find_option(folders, name)
    above = next(parent for parent in source.parents if parent.name == group)
    target = folder / group / source.relative_to(above)
    try:
        write_copy(target, text_of(folders, group, source), group=group, folders=folders, root=folder)
    except FileExistsError:
        raise ConfigError(f"{target} exists; it is never overwritten: edit it, or copy to another folder") from None
    except OSError as error:
        raise OutsideError(f"cannot write {target}: {error.strerror}") from None
    option = target.relative_to(folder / group).with_suffix("").as_posix()
    searched = "" if folder == Path("recipes") else f" --recipes {folder}"
    print(f"{target}\nedit it, then: opsd train{searched} {group}={option} (it is used instead of opsd's own {option})")
    return target


@dataclass(frozen=True)
class Part:
    """One part of a method, and what to type for it in other frameworks: "" for nothing (its default), None where there
    is no such setting. `assets/other_frameworks.yaml` says when a part applies."""

    section: str
    names: Mapping[str, str | None]
    where: Mapping[str, Any] = field(default_factory=dict)
    unless: Mapping[str, Any] = field(default_factory=dict)
    not_with: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """What opsd calls it: `divergence=jsd`, `support.side=teacher support.rest=tail`, `tokens.ramp`."""
        if self.unless:
            return " ".join(f"{self.section}.{key}" for key in self.unless)
        if self.where.keys() == {"name"}:
            return f"{self.section}={self.where['name']}"
        pairs = (f"{key}={value}".replace("True", "true") for key, value in self.where.items() if key != "name")
        return " ".join(f"{self.section}.{pair}" for pair in pairs)

    def applies(self, tree: Mapping[str, Any]) -> bool:
        """Whether a composed method has this part, and other frameworks ask for it."""
        values = tree[self.section]
        is_default = bool(self.unless) and all(values.get(key) == value for key, value in self.unless.items())
        matches = all(values.get(key) == value for key, value in self.where.items())
        return matches and not is_default and tree["divergence"]["name"] not in self.not_with


@cache
def other_frameworks() -> tuple[dict[str, str], list[Part]]:
    """The frameworks with their versions, by key, and the parts of a method."""
    table = yaml.safe_load(OTHER_FRAMEWORKS.read_text("utf-8"))
    frameworks = table["frameworks"]
    parts = []
    for part in table["parts"]:
        names = {framework: part.pop(framework, None) for framework in frameworks}
        parts.append(Part(names=names, **part))
    return frameworks, parts


def other_names(tree: Mapping[str, Any]) -> list[str]:
    """The parts of a composed method in the words of every framework, as comment lines of at most WIDTH."""
    frameworks, parts = other_frameworks()
    parts = [part for part in parts if part.applies(tree)]
    numbers: dict[str, Any] = {}
    for section in ("divergence", "teacher", "sampler", "support", "clip", "tokens"):
        numbers |= tree[section]
    numbers["decay"] = f"{1 - numbers.get('rate', 0):g}"
    numbers["on_policy"] = f"{1 - numbers.get('dataset_share', 0):g}"
    wide = max(map(len, frameworks.values()))
    lines = ["# The same in other frameworks (docs/methods.md); the teacher's prompt is written differently in each:"]
    for key, framework in frameworks.items():
        names = [name.format_map(numbers) for part in parts if (name := part.names[key])]
        missing = [part.title for part in parts if part.names[key] is None]
        names += [f"[has no {', '.join(missing)}]"] if missing else []
        lines += textwrap.wrap(
            "; ".join(names) or "-",
            WIDTH,
            initial_indent=f"#   {framework:<{wide}}  ",
            subsequent_indent="#   " + " " * (wide + 2),
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines
