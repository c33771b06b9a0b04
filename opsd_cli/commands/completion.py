"""`opsd completion`: what a shell asks when Tab is pressed, and the few lines that make it ask. Commands, flags (from
the parsers themselves), recipe and option names, settings and run folders; imports no torch and no Hydra."""

from __future__ import annotations

import importlib
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from opsd_cli.commands import COMMANDS
from opsd_cli.commands.flags import Flags, ListFlags
from opsd_cli.settings.errors import ConfigError, ExitCode
from opsd_cli.settings.recipe_files import GROUPS, find_folders, option_files

HELP = """\
opsd completion bash                                   what the next lines evaluate
eval "$(opsd completion bash)"                         in ~/.bashrc
eval "$(opsd completion zsh)"                          in ~/.zshrc, after compinit
opsd completion fish > ~/.config/fish/completions/opsd.fish

Then Tab completes commands, flags, recipes and options (recipe=, divergence=), settings (train.) and run folders.
"""

TAKES_SETTINGS = ("train", "eval", "inspect", "generate", "doctor", "plan", "probe", "compare")
TAKES_RUNS = ("eval", "watch", "inspect", "report", "export", "generate", "runs")

SCRIPTS = {
    "bash": """\
_opsd() {
    local line="${COMP_LINE:0:COMP_POINT}" word IFS=$'\\n'
    word="${line##*[[:space:]]}"
    COMPREPLY=($(opsd completion --line "$line" 2>/dev/null))
    # bash takes what stands behind = and : for a word of its own.
    local head=""
    if [[ "$word" == *=* && "$COMP_WORDBREAKS" == *=* ]]; then head="${word%%=*}="; fi
    COMPREPLY=("${COMPREPLY[@]#"$head"}")
    if [[ ${#COMPREPLY[@]} == 1 && "${COMPREPLY[0]}" == *[=./] ]]; then compopt -o nospace; fi
}
complete -o default -F _opsd opsd
""",
    "zsh": """\
_opsd() {
    local -a found
    found=("${(@f)$(opsd completion --line "${BUFFER[1,CURSOR]}" 2>/dev/null)}")
    found=(${found:#})
    if (( $#found )); then
        compadd -S '' -- "${(@M)found:#*[=./]}"
        compadd -- "${(@)found:#*[=./]}"
    else
        _files
    fi
}
compdef _opsd opsd
""",
    "fish": """\
complete -c opsd -a "(opsd completion --line (commandline -cp | string collect) 2>/dev/null)"
""",
}


def main(arguments: list[str]) -> int:
    """Run `opsd completion ...`."""
    flags = Flags("completion")
    flags.add_argument("--line", metavar="TEXT")
    given = flags.read(arguments)
    if given.line is not None:
        for word in candidates(given.line):
            print(word)
        return ExitCode.DONE
    if len(given.words) != 1 or given.words[0] not in SCRIPTS:
        raise ConfigError(f"name a shell: opsd completion {'|'.join(SCRIPTS)}")
    print(SCRIPTS[given.words[0]], end="")
    return ExitCode.DONE


def candidates(line: str) -> list[str]:
    """What the last word of a command line, which may be unfinished, can become; sorted."""
    words = _words(line)
    unfinished = words.pop() if words and not line[-1].isspace() else ""
    if not words:
        return []
    _, *before = words
    return sorted(
        {word for word in _possible(before, unfinished) if word.startswith(unfinished) and word != unfinished}
    )


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:  # an open quote
        return line.split()


def _possible(before: list[str], unfinished: str) -> Iterator[str]:
    if not before:
        yield from (*COMMANDS, "--help", "--version")
        return
    command, *rest = before
    if command == "help" and not rest:
        yield from COMMANDS
    if command not in COMMANDS:
        return
    if unfinished.startswith("-"):
        yield from _flags(COMMANDS[command][0])
        return
    if rest and rest[-1] == "--step":
        yield from (*_steps(rest), "last", "best")
        return
    if command == "completion" and not rest:
        yield from SCRIPTS
    elif command == "recipes":
        yield from _recipe_words(rest)
    elif command in TAKES_SETTINGS:
        yield from _settings(unfinished, rest)
    if command in TAKES_RUNS or rest[-1:] in (["--resume"], ["--against"]):
        yield from _runs()
    if command in ("eval", "generate") and not rest:
        yield from find_folders().files["model"]
    if command == "runs" and not rest:
        yield "diff"
    if command == "new" and not rest:
        from opsd_cli.commands.new import DESCRIPTIONS

        yield from DESCRIPTIONS


def _flags(module: str) -> Iterator[str]:
    """The flags that a command's own parser knows."""
    Flags.lists = True
    try:
        importlib.import_module(module).main([])
    except ListFlags as listed:
        yield from listed.flags
    finally:
        Flags.lists = False


def _recipe_words(rest: list[str]) -> Iterator[str]:
    if not rest:
        yield from ("list", "show", "copy", "edit", "validate", "schema")
    elif len(rest) == 1 and rest[0] in ("show", "copy", "edit", "validate", "schema"):
        files = find_folders().files
        yield from GROUPS
        if rest[0] != "schema":
            yield from files["recipe"]
            yield from (f"{group}/{option}" for group, options in files.items() for option in options)


def _settings(unfinished: str, rest: list[str]) -> Iterator[str]:
    """`recipe=`, then the options behind it; `train.`, then its keys."""
    folders = find_folders(_value_of("--recipes", rest))
    group, found, _ = unfinished.partition("=")
    if found and group in GROUPS:
        yield from (f"{group}={option}" for option in folders.files[group])
        return
    yield from (f"{group}=" for group in GROUPS)
    keys = setting_keys(folders.builtin)
    sections = {key.partition(".")[0] + "." for key in keys}
    yield from (f"{key}=" for key in keys) if "." in unfinished else sections


def _value_of(flag: str, words: list[str]) -> str | None:
    places = [place for place, word in enumerate(words[:-1]) if word == flag]
    return words[places[-1] + 1] if places else None


def setting_keys(builtin: Path) -> list[str]:
    """Every setting by dotted key, as the recipe files have them."""
    keys = list(_keys_of(builtin / "config.yaml"))
    for group in GROUPS:
        if group not in ("recipe", "method"):
            keys += [f"{group}.{key}" for file in option_files(builtin / group) for key in _top_keys(_read(file))]
    return sorted(set(keys))


def _keys_of(file: Path) -> Iterator[str]:
    for section, values in _read(file).items():
        if isinstance(values, Mapping) and section != "hydra":
            yield from (f"{section}.{key}" for key in values)


def _top_keys(tree: Mapping[str, Any]) -> Iterator[str]:
    return (key for key in tree if key not in ("defaults", "name"))


def _read(file: Path) -> Mapping[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    tree = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)  # opsd's own files
    return tree if isinstance(tree, Mapping) else {}


def _runs() -> Iterator[str]:
    """Run folders and sweeps below ./runs, the newest hundred."""
    root = Path("runs")
    folders = [entry for entry in os.scandir(root) if entry.is_dir()] if root.is_dir() else []
    newest = sorted(folders, key=lambda entry: -entry.stat().st_mtime)[:100]
    yield from (f"runs/{entry.name}" for entry in newest)


def _steps(rest: list[str]) -> Iterator[str]:
    """The steps of the checkpoints of the run that was named."""
    for word in rest:
        for file in Path(word).glob("checkpoints/step_*/manifest.json"):
            yield str(int(file.parent.name.removeprefix("step_")))
