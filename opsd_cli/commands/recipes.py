"""`opsd recipes`: what there is to choose from. Lists the groups, prints a recipe as it composes, copies one
to edit. Reads recipe files; trains nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from opsd_cli.commands.flags import Flags
from opsd_cli.settings.errors import ConfigError, ExitCode, OutsideError
from opsd_cli.settings.folders import GROUPS, RecipeFolders, description, find_folders, shown
from opsd_cli.settings.registry import did_you_mean
from opsd_cli.settings.terminal_text import inert

HELP = """\
opsd recipes                      every group and its options, one line each
opsd recipes show gsm8k           the whole config of recipe=gsm8k, as it composes
opsd recipes show divergence      the options of one group
opsd recipes show divergence/jsd  one option file
opsd recipes show opsd            a method, and what it is called in TRL, verl, ms-swift, Liger and the authors' code
opsd recipes copy gsm8k           copy a recipe (or group/option) to ./recipes, to edit; never overwrites
opsd recipes copy gsm8k DIR       ... to another folder; use it with `opsd train --recipes DIR`

--recipes DIR   a folder of your own recipes, searched first; ./recipes is always searched
"""


def main(arguments: list[str]) -> int:
    """Run `opsd recipes ...`."""
    flags = Flags("recipes")
    flags.add_argument("words", nargs="*")
    flags.add_argument("--recipes")
    given = flags.read(arguments)
    if given.help:
        print(HELP, end="")
        return ExitCode.DONE
    folders = find_folders(given.recipes)
    match given.words:
        case [] | ["list"]:
            print(inert("\n".join(listing(folders))))
        case ["show", name]:
            print(inert(shown_text(folders, name)), end="")
        case ["copy", name, *rest] if len(rest) <= 1:
            copy(folders, name, Path(*rest or ("recipes",)))
        case [word, *_]:
            near = did_you_mean(word, ("list", "show", "copy"))
            raise ConfigError(f"opsd recipes {' '.join(given.words)}: not understood{near} (see `opsd recipes --help`)")
    return ExitCode.DONE


def listing(folders: RecipeFolders) -> Iterator[str]:
    """The lines of `opsd recipes`."""
    for group, about in GROUPS.items():
        yield f"{group}=  {about}"
        yield from group_lines(folders, group)
        yield ""
    yield "opsd train recipe=NAME trains; opsd recipes show NAME prints; opsd recipes copy NAME copies to edit."


def group_lines(folders: RecipeFolders, group: str) -> Iterator[str]:
    """One line for each option of a group: its name, its description, and its folder when it is the user's
    own."""
    options = folders.files[group]
    width = max(map(len, options), default=0)
    for option, path in options.items():
        own = "" if path.is_relative_to(folders.builtin) else f"  ({shown(path)})"
        yield f"  {option:<{width}}  {description(path)}{own}"


def shown_text(folders: RecipeFolders, name: str) -> str:
    """What `opsd recipes show NAME` prints: a recipe composed, the options of a group, or an option's file; below a
    method what it is called elsewhere."""
    if name in folders.files["recipe"]:
        return composed_text(folders, name)
    if name in GROUPS:
        return "\n".join([f"{name}=  {GROUPS[name]}", *group_lines(folders, name)]) + "\n"
    group, file = find_option(folders, name)
    text = file.read_text(encoding="utf-8", errors="backslashreplace")
    return text + elsewhere(folders, name.removeprefix("method/")) if group == "method" else text


def find_option(folders: RecipeFolders, name: str) -> tuple[str, Path]:
    """(group, file) of `NAME` (a recipe, or an option name that only one group has) or `group/NAME`."""
    group, _, option = name.partition("/")
    if group in GROUPS and option in folders.files[group]:
        return group, folders.files[group][option]
    found = [(group, options[name]) for group, options in folders.files.items() if name in options]
    if found and (len(found) == 1 or found[0][0] == "recipe"):
        return found[0]
    if found:
        raise ConfigError(f"'{name}' is in several groups: {', '.join(f'{group}/{name}' for group, _ in found)}")
    known = [f"{group}/{option}" for group, options in folders.files.items() for option in options]
    near = did_you_mean(name, [*folders.files["recipe"], *GROUPS]) or did_you_mean(name, known)
    raise ConfigError(f"no recipe or option '{name}'{near} (see `opsd recipes`)")


def composed_text(folders: RecipeFolders, recipe: str) -> str:
    """The config of a recipe as valid YAML, each key with the comment of the file it comes from."""
    from opsd_cli.settings.compose import composed, session
    from opsd_cli.settings.origins import origins
    from opsd_cli.settings.recipe_scan import scan

    scan(folders)
    with session(folders):
        result = composed([f"recipe={recipe}"])
    comments = {key: origin.comment for key, origin in origins(folders, result.choices).items()}
    chosen = [f"{group}={result.choices[group]}" for group in GROUPS if result.choices.get(group)]
    lines = [f"# {description(folders.files['recipe'][recipe])}", f"# {' '.join(chosen)}"]
    for section, values in result.tree.items():
        lines += ["", f"{section}:"]
        lines += [_line(key, value, comments.get(f"{section}.{key}", "")) for key, value in values.items()]
    return "\n".join(lines) + "\n"


def elsewhere(folders: RecipeFolders, method: str) -> str:
    """A method in the words of other frameworks, as comment lines."""
    from opsd_cli.settings.compose import composed, session
    from opsd_cli.settings.dialects import dialect_lines
    from opsd_cli.settings.recipe_scan import scan

    scan(folders)
    with session(folders):
        tree = composed(["model=tiny", "dataset=arithmetic", f"method={method}"]).tree
    return "\n".join(dialect_lines(tree)) + "\n"


def _line(key: str, value: Any, comment: str) -> str:
    return f"  {key}: {_yaml(value)}" + (f" # {comment}" if comment else "")


def _yaml(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=100_000)
    return text.removesuffix("\n").removesuffix("\n...")


def copy(folders: RecipeFolders, name: str, folder: Path) -> None:
    """Copy an option's file into `folder/group/`, with what to type next."""
    group, source = find_option(folders, name)
    target = folder / group / source.relative_to(_folder_of(source, group)).as_posix()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as old, target.open("xb") as new:
            shutil.copyfileobj(old, new)
    except FileExistsError:
        raise ConfigError(f"{target} exists; it is never overwritten: edit it, or copy to another folder") from None
    except OSError as error:
        raise OutsideError(f"cannot write {target}: {error.strerror}") from None
    option = target.relative_to(folder / group).with_suffix("").as_posix()
    searched = "" if folder == Path("recipes") else f" --recipes {folder}"
    print(f"{target}\nedit it, then: opsd train{searched} {group}={option} (it is found before opsd's own {option})")


def _folder_of(source: Path, group: str) -> Path:
    """The group's folder that a file stands in, however deep."""
    return next(parent for parent in source.parents if parent.name == group)
