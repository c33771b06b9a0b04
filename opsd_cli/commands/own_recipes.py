"""What `opsd recipes` does with recipes of the user's own: copies one to edit, with its schema beside it, opens it in
an editor, validates it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from opsd_cli.settings.errors import ConfigError, OutsideError, display_path
from opsd_cli.settings.recipe_files import GROUPS, RecipeFolders
from opsd_cli.settings.registry import did_you_mean

EDITORS = ("nano", "vi")  # where neither VISUAL nor EDITOR is set


def schema_text(group: str, folders: RecipeFolders) -> str:
    """The JSON Schema of a group's files. Raises ConfigError for another name."""
    import opsd_cli.plugins  # noqa: F401 - fills the registries
    from opsd_cli.settings.schema import schema_of

    if group not in GROUPS:
        raise ConfigError(f"no group '{group}'{did_you_mean(group, GROUPS)} (groups: {', '.join(GROUPS)})")
    return json.dumps(schema_of(group, folders.builtin), indent=1) + "\n"


def write_copy(target: Path, text: bytes, *, group: str, folders: RecipeFolders, root: Path) -> None:
    """Write a copied file, with its schema in the folder beside. Raises FileExistsError, OSError."""
    from opsd_cli.settings.schema import FOLDER, with_modeline

    target.parent.mkdir(parents=True, exist_ok=True)
    depth = len(target.relative_to(root).parts) - 1
    with target.open("x", encoding="utf-8") as new:
        new.write(with_modeline(text.decode("utf-8"), depth=depth, group=group))
    schema = root / FOLDER / f"{group}.json"
    schema.parent.mkdir(exist_ok=True)
    schema.write_text(schema_text(group, folders), encoding="utf-8")


def edit(file: Path, group: str, option: str, folders: RecipeFolders) -> None:
    """Open a file of the user's own in their editor, and validate it when that ends. Raises OutsideError where no
    editor starts, ConfigError where the file is not valid."""
    named = os.environ.get("VISUAL") or os.environ.get("EDITOR") or ""
    try:
        words = shlex.split(named)
    except ValueError as error:
        raise OutsideError(
            f"VISUAL or EDITOR is {named}, which is no command ({error}); set EDITOR to your editor"
        ) from None
    for editor in [words] if words else [[name] for name in EDITORS]:
        try:
            ended = subprocess.run([*editor, str(file)], check=False)
        except OSError:  # not there, or not a program
            continue
        if ended.returncode != 0:
            raise OutsideError(
                f"{shlex.join(editor)} ended with code {ended.returncode}; {display_path(file)} is as it left it"
            )
        validate(group, option, folders)
        return
    asked = shlex.join(words) if words else " and ".join(EDITORS)
    raise OutsideError(f"{asked} cannot be started: set EDITOR to your editor")


def validate(group: str, option: str, folders: RecipeFolders) -> None:
    """Compose an option and check every setting of it; prints that it is valid. Raises ConfigError."""
    from opsd_cli.preflight import check

    words = [f"recipe={option}"] if group == "recipe" else ["recipe=quickstart", f"{group}={option}"]
    check(words, folders)
    print(f"{group}={option} is valid")


def validate_all(
    folders: RecipeFolders, find: Callable[[RecipeFolders, str], tuple[str, Path]], name: str | None
) -> None:
    """Validate one option, or all of the user's own. Raises ConfigError with every problem of all of them."""
    if name is not None:
        group, file = find(folders, name)
        validate(group, name.partition("/")[2] or file.stem, folders)
        return
    own = [
        (group, option)
        for group, options in folders.files.items()
        for option, file in options.items()
        if not file.is_relative_to(folders.builtin)
    ]
    if not own:
        print("opsd: no recipes of your own in ./recipes; `opsd recipes copy NAME` makes one", file=sys.stderr)
    problems: list[str] = []
    for group, option in own:
        try:
            validate(group, option, folders)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
