"""Write what the documentation takes from the program: docs/configuration.md from the recipes, the tables of
docs/methods.md, the glossary of metrics in docs/outputs.md.

    python scripts/make_config_reference.py            # writes what has changed
    python scripts/make_config_reference.py --check    # writes nothing; exit 1 when something is out of date

Owns the form of these parts; every word and number in them is the program's. tests/test_docs.py checks them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from opsd_cli.commands.recipes import other_frameworks  # noqa: E402
from opsd_cli.run.events import METRICS  # noqa: E402
from opsd_cli.settings.recipe_files import (  # noqa: E402
    GROUPS,
    RecipeFolders,
    builtin_folder,
    description,
    overrides_of,
    read_recipe_file,
    with_bases,
    written_out,
)
from opsd_cli.settings.recipe_scan import METHOD_OWNS, RECIPE_OWNS  # noqa: E402

DOCS = REPOSITORY / "docs"
FOLDERS = RecipeFolders(own=(), builtin=builtin_folder())
PLAIN = {"support": "full", "clip": "none", "target": "teacher", "tokens": "all"}  # options that change nothing
LONGEST_CELL = 48  # characters of a value that stands in a table; longer ones get a block of their own

HEAD = """\
# Every setting

<!-- Made by scripts/make_config_reference.py from the recipes. Do not edit: edit the recipe and run it again. -->

`GROUP=OPTION` on the command line chooses a file, `SECTION.KEY=VALUE` sets one value. The command line beats the
recipe, the recipe beats the defaults below. `opsd recipes` lists the groups, `opsd recipes show NAME` prints one,
`opsd train recipe=NAME --cfg job` prints a whole config. `null` means none; `???` is required.
"""


def main(arguments: Sequence[str]) -> int:
    """Write, or with --check compare; returns the exit code."""
    stale = [(path, text) for path, text in generated() if not path.is_file() or path.read_text("utf-8") != text]
    for path, text in stale:
        print(f"{path.relative_to(REPOSITORY)}: {'out of date' if '--check' in arguments else 'written'}")
        if "--check" not in arguments:
            path.write_text(text, encoding="utf-8")
    return int(bool(stale) and "--check" in arguments)


def generated() -> Iterator[tuple[Path, str]]:
    """Every file with a generated part, and its whole text as it should be."""
    yield DOCS / "configuration.md", "\n".join(configuration_lines()) + "\n"
    names = with_part(DOCS / "methods.md", "names", markdown_table(list(names_table())))
    yield with_part(DOCS / "methods.md", "levers", markdown_table(list(levers_table())), within=names[1])
    metrics = [("metric", "meaning"), *((f"`{name}`", meaning) for name, meaning in METRICS.items())]
    yield with_part(DOCS / "outputs.md", "metrics", markdown_table(metrics))


def with_part(path: Path, name: str, lines: Iterable[str], *, within: str | None = None) -> tuple[Path, str]:
    """A file, or a new text of it, with what stands between its two marks replaced."""
    part = "".join(f"{line}\n" for line in lines)
    marks = rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)"
    text, count = re.subn(marks, lambda m: m[1] + part + m[2], within or path.read_text("utf-8"), flags=re.DOTALL)
    assert count == 1, f"{path} has {count} parts named {name}"
    return path, text


def levers_table() -> Iterator[tuple[str, ...]]:
    """What each method chooses, by the three levers of docs/methods.md; plain choices are left out."""
    yield ("method", "where the signal sits", "what the teacher sees", "when it moves", "completions")
    for method in FOLDERS.files["method"]:
        of = chosen(method)
        signal = [of["divergence"], *(of[group] for group in PLAIN if of[group] != PLAIN[group])]
        levers = (" ".join(signal), of["context"], of["teacher"], of["sampler"])
        yield (f"`{method}`", *(f"`{lever}`" for lever in levers))


def names_table() -> Iterator[tuple[str, ...]]:
    """What the parts of a method are called elsewhere: `-` for nothing to type, `no` for no such setting."""
    frameworks, parts = other_frameworks()
    yield ("opsd", *frameworks.values())
    for part in parts:
        names = (part.names[framework] for framework in frameworks)
        yield (part.title, *("no" if name is None else upper_placeholders(name) or "-" for name in names))


def upper_placeholders(text: str) -> str:
    """`--beta {beta}` as `--beta BETA`."""
    return re.sub(r"\{(\w+)\}", lambda match: match[1].upper(), text)


def configuration_lines() -> Iterator[str]:
    """docs/configuration.md."""
    yield HEAD
    yield "## Fixed sections"
    sections = {
        key: value
        for key, value in values_in(FOLDERS.primary.read_text("utf-8")).items()
        if key not in ("defaults", "hydra")
    }
    comments = {key.name: key.comment for key in read_recipe_file(FOLDERS.primary, "").keys}
    for section, values in sections.items():
        yield from ("", f"### {section}", "")
        rows = [(f"`{section}.{key}`", cell(value), comments[f"{section}.{key}"]) for key, value in values.items()]
        yield from markdown_table([("key", "default", "meaning"), *rows])
    for group, about in GROUPS.items():
        yield from ("", f"## {group}", "", f"{about[:1].upper()}{about[1:]}.{default_of(group)}", "")
        yield from group_lines(group)


def group_lines(group: str) -> Iterator[str]:
    """One group: its options, then the keys they have."""
    files = FOLDERS.files[group]
    yield from markdown_table(
        [("option", "what it is"), *((f"`{group}={o}`", description(f)) for o, f in files.items())]
    )
    if group == "recipe":
        yield from ("", f"A recipe may choose {words(RECIPE_OWNS)}, and set numbers of the fixed sections.")
        return
    if group == "method":
        yield from ("", "A method chooses all of these, and sets nothing else.", "")
        choices = {option: chosen(option) for option in files}
        rows = [(f"`{option}`", *(choice[owned] for owned in METHOD_OWNS)) for option, choice in choices.items()]
        yield from markdown_table([("method", *METHOD_OWNS), *rows])
        return
    alike: dict[tuple[tuple[str, str], ...], dict[str, dict[str, Any]]] = {}
    for option in files:
        comments, values = comments_of(group, option), values_in(written_out(FOLDERS, group, option))
        keys = tuple((key, comments[f"{group}.{key}"]) for key in values if key != "name")
        alike.setdefault(keys, {})[option] = values
    for keys, options in alike.items():
        if keys:
            yield ""
            yield from keys_lines(group, dict(keys), options)


def keys_lines(group: str, keys: dict[str, str], options: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The keys that some options share, with the value each gives them."""
    yield f"Keys of {words([f'`{option}`' for option in options])}:"
    yield ""
    rows = [(f"`{group}.{key}`", defaults(key, options), meaning) for key, meaning in keys.items()]
    yield from markdown_table([("key", "default", "meaning"), *rows])
    for key in keys:
        long: dict[str, list[str]] = {}
        for option, values in options.items():
            if is_long(values[key]):
                long.setdefault(values[key], []).append(f"`{option}`")
        for text, names in long.items():
            yield from ("", f"`{group}.{key}` of {words(names)}:", "", "```text", text, "```")


def defaults(key: str, options: dict[str, dict[str, Any]]) -> str:
    """The value of a key, or the values with the options that give them."""
    found: dict[str, list[str]] = {}
    for option, values in options.items():
        found.setdefault("below" if is_long(values[key]) else cell(values[key]), []).append(option)
    if len(found) == 1:
        return next(iter(found))
    usual = max(found, key=lambda value: len(found[value]))
    others = [f"{value} ({', '.join(names)})" for value, names in found.items() if value != usual]
    return "; ".join([usual if len(found[usual]) > 1 else f"{usual} ({found[usual][0]})", *others])


def default_of(group: str) -> str:
    """Which option is chosen when nothing is said."""
    for entry in read_recipe_file(FOLDERS.primary, "").defaults:
        if entry.group == group:
            return "" if entry.option in ("???", "null") else f" Default: `{entry.option}`."
    return ""


def chosen(method: str) -> dict[str, str]:
    """The options that a method chooses, by group."""
    return {str(entry.group): entry.option for _, entry in overrides_of(FOLDERS, "method", method)}


def values_in(text: str) -> dict[str, Any]:
    """The values of a file as they are written in it: every scalar is text."""
    values = yaml.load(text, Loader=yaml.BaseLoader)
    assert isinstance(values, dict)
    return values


def comments_of(group: str, option: str) -> dict[str, str]:
    """What the comments say of an option's keys, each in the file that has one."""
    keys = [key for file in with_bases(FOLDERS, group, option) for key in file.keys]
    return {key.name: key.comment for key in keys if key.comment or key.name.endswith(".name")}


def is_long(value: str | list[str]) -> bool:
    return isinstance(value, str) and (len(value) > LONGEST_CELL or "\n" in value)


def cell(value: str | list[str]) -> str:
    """A value as it is typed."""
    return f"`[{', '.join(value)}]`" if isinstance(value, list) else f"`{value}`" if value else '`""`'


def words(names: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *before, last = names
    return f"{', '.join(before)} and {last}" if before else last


def markdown_table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The first row is the head."""
    head, *body = rows
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in body:
        yield f"| {' | '.join(text.replace('|', chr(92) + '|') for text in row)} |"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
