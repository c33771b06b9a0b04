"""What the YAML nodes of a recipe file say: every value below one, the lines of a defaults list, the comment beside a
value."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import yaml

ENTRY = re.compile(r"(?P<override>override\s+)?(?P<root>/?)(?P<group>[^\s@]+)(?P<package>@\S*)?$")


@dataclass(frozen=True)
class DefaultsEntry:
    """One line of a defaults list: `override /group: option`, `group: option`, or a file of the same group."""

    group: str | None  # None: a file of the same group
    option: str
    override: bool
    package: str | None
    line: int


def nodes_below(
    node: yaml.Node | None, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], yaml.Node | None, yaml.Node]]:
    """Every node below one, as (path, key node or None for a list's item, value node)."""
    if isinstance(node, yaml.MappingNode):
        children = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(str(index), None, value) for index, value in enumerate(node.value)]
    else:
        return
    for name, key, value in children:
        yield (*path, name), key, value
        yield from nodes_below(value, (*path, name))


def entries_of(item: yaml.Node) -> Iterator[DefaultsEntry]:
    """What an item of a defaults list chooses."""
    line = item.start_mark.line + 1
    if isinstance(item, yaml.ScalarNode):
        yield DefaultsEntry(None, item.value, override=False, package=None, line=line)
    if isinstance(item, yaml.MappingNode):
        for key, value in item.value:
            option = value.value if isinstance(value, yaml.ScalarNode) else value.id
            if match := ENTRY.match(str(key.value)):
                yield DefaultsEntry(match["group"], option, bool(match["override"]), match["package"], line)
            else:
                yield DefaultsEntry(str(key.value), option, override=False, package=None, line=line)


def comment_of(lines: list[str], key: yaml.Node, value: yaml.Node) -> str:
    """The comment beside a value, without its `#`: after its end, or after the `|` that opens a block of text."""
    is_block = isinstance(value, yaml.ScalarNode) and value.style in ("|", ">")
    mark = key.end_mark if is_block else value.end_mark
    rest = lines[mark.line][mark.column :] if mark.line < len(lines) else ""
    match = re.search(r"(?:^|\s)#\s*(.*)$", rest)
    return match[1].strip() if match else ""
