"""`opsd new`: writes a part that works as it is, for the user to change: a Python file, its recipe, its test."""

from __future__ import annotations

import re
from pathlib import Path

from opsd_cli.commands.flags import Flags
from opsd_cli.settings.errors import ConfigError, ExitCode, OutsideError
from opsd_cli.settings.recipe_files import find_folders
from opsd_cli.settings.registry import did_you_mean

HELP = """\
opsd new divergence NAME     what is minimised, as its value: NAME.py, recipes/divergence/NAME.yaml and test_NAME.py
opsd new token_rule NAME     which tokens count, and how much
opsd new context NAME        what the teacher is shown (a recipe and its test)
opsd new teacher NAME        whose distribution the student is pulled towards
opsd new sampler NAME        where completions come from
opsd new grader NAME         which completions are right
opsd new dataset NAME        problems from anywhere

The files work as they are, in the current folder; change them. Nothing is overwritten. A part is used when you name its
file: opsd train ... --plugin NAME.py
"""

SKELETONS = Path(__file__).parents[1] / "assets" / "skeletons"
DESCRIPTIONS = {
    "divergence": "Both KLs, weighted",
    "token_rule": "Digits count more",
    "context": "The teacher sees the worked solution",
    "teacher": "Initial and current weights, mixed",
    "sampler": "The shortest of several completions",
    "grader": "The last line is the answer",
    "dataset": "Sums of two numbers",
}
"""kind -> the line that `opsd recipes` shows of a new part."""

NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
WORD = re.compile(r"\b(?:NAME|CLASS|DESCRIPTION)\b|(?<=test_)NAME")


def main(arguments: list[str]) -> int:
    """Run `opsd new KIND NAME`. Raises ConfigError for another kind, an impossible name, or a file that exists."""
    words = Flags("new").read(arguments).words
    if len(words) != 2:
        raise ConfigError(f"opsd new KIND NAME: KIND is one of {', '.join(DESCRIPTIONS)} (see `opsd new --help`)")
    kind, name = words
    if kind not in DESCRIPTIONS:
        near = did_you_mean(kind, DESCRIPTIONS)
        raise ConfigError(f"opsd new {kind}: unknown kind{near} (kinds: {', '.join(DESCRIPTIONS)})")
    if not NAME.fullmatch(name):
        raise ConfigError(f"opsd new {kind} {name}: a name has small letters, digits and _, and begins with a letter")
    folders = find_folders()
    taken = folders.files[kind].get(name)
    if taken is not None and taken.is_relative_to(folders.builtin):
        raise ConfigError(
            f"opsd new {kind} {name}: opsd has a {kind}={name}, which yours would hide; choose another name"
        )
    files = skeleton(kind, name)
    if there := [path for path in files if path.exists()]:
        raise ConfigError(f"{there[0]} exists; it is never overwritten: choose another name")
    for path, text in files.items():
        _write(path, text)
        print(path)
    print(f"change them, then:\n  python -m pytest test_{name}.py\n  {command(kind, name)}")
    return ExitCode.DONE


def skeleton(kind: str, name: str) -> dict[Path, str]:
    """The files of a new part, by path below the current folder."""
    paths = {"py": Path(f"{name}.py"), "yaml": Path("recipes", kind, f"{name}.yaml"), "test": Path(f"test_{name}.py")}
    words = {"NAME": name, "CLASS": "".join(part.capitalize() for part in name.split("_")) or "Part"}
    words["DESCRIPTION"] = DESCRIPTIONS[kind]
    found = {path: SKELETONS / f"{kind}.{suffix}.txt" for suffix, path in paths.items()}
    return {
        path: WORD.sub(lambda match: words[match[0]], file.read_text("utf-8"))
        for path, file in found.items()
        if file.is_file()
    }


def command(kind: str, name: str) -> str:
    """What trains with a new part, on the bundled model."""
    flag = "" if kind == "context" else f" --plugin {name}.py"
    what = f"model=tiny dataset={name}" if kind == "dataset" else f"recipe=quickstart {kind}={name}"
    return f"opsd train {what} train.steps=5{flag}"


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise OutsideError(f"cannot write {path}: {error.strerror}") from None
