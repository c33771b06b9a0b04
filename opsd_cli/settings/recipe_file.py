"""One recipe file as it is written: keys with their lines, comments and defaults list. Owns reading YAML into
places; what a file may say is `guard`'s business, what it means Hydra's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import yaml

from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.folders import builtin_folder, shown

LARGEST_FILE = 1 << 16  # bytes; a recipe has a few hundred, and reading a long one takes long

HEADER = re.compile(r"#\s*@\s*(\w*)\s*(\S*)")
ENTRY = re.compile(r"(?P<override>override\s+)?(?P<root>/?)(?P<group>[^\s@]+)(?P<package>@\S*)?$")

Path_ = tuple[str, ...]
Visit = tuple[Path_, yaml.Node | None, yaml.Node]


@dataclass(frozen=True)
class DefaultsEntry:
    """One line of a defaults list: `override /group: option`, `group: option`, or a sibling's name (group
    None)."""

    group: str | None
    option: str
    override: bool
    package: str | None
    line: int


@dataclass(frozen=True)
class Key:
    """A key that holds a value (not a mapping): its dotted name, its line, the comment beside it."""

    name: str
    line: int
    comment: str


@dataclass(frozen=True)
class RecipeFile:
    """A recipe file, parsed to YAML nodes (never to Python objects)."""

    path: Path
    group: str  # the folder it stands in; empty for config.yaml
    text: str
    root: yaml.MappingNode | None  # None: nothing but comments

    def at(self, line: int) -> str:
        """`file:line`, as messages name it."""
        return f"{shown(self.path)}:{line}"

    @cached_property
    def headers(self) -> list[tuple[int, str, str]]:
        """(line, keyword, value) of every `# @keyword value` comment, wherever it stands."""
        found = ((number, HEADER.match(line.strip())) for number, line in enumerate(self.text.splitlines(), 1))
        return [(number, match[1], match[2]) for number, match in found if match]

    @property
    def is_global(self) -> bool:
        """The keys stand at the top of the config, not under the group's name."""
        return not self.group or any(value == "_global_" for _, _, value in self.headers)

    @cached_property
    def keys(self) -> list[Key]:
        """Every key that holds a value, under its full dotted name, in file order."""
        prefix = () if self.is_global else (self.group,)
        lines = self.text.splitlines()
        found = []
        for path, key, value in self.nodes():
            if key is None or path[0] in ("defaults", "hydra") or isinstance(value, yaml.MappingNode):
                continue
            found.append(Key(".".join((*prefix, *path)), key.start_mark.line + 1, _comment(lines, key, value)))
        return found

    @cached_property
    def defaults(self) -> list[DefaultsEntry]:
        """The defaults list, in order; empty when there is none."""
        pairs = self.root.value if self.root else []
        lists = [value for key, value in pairs if key.value == "defaults" and isinstance(value, yaml.SequenceNode)]
        return [entry for node in lists for item in node.value for entry in _entries(item)]

    def nodes(self) -> Iterator[Visit]:
        """Every node below the root as (path, key node or None for a list's item, value node)."""
        return _visit((), self.root) if self.root else iter(())


def read_recipe_file(path: Path, group: str) -> RecipeFile:
    """Parse one file. Raises ConfigError naming file, line and column when it is no YAML mapping."""
    text = _text(path)
    try:
        root = _root(text, is_own=path.is_relative_to(builtin_folder()))
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax_problem(path, error)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{shown(path)}: broken YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{shown(path)}: nested too deeply for a recipe") from None
    if root is not None and not isinstance(root, yaml.MappingNode):
        kind = "sequence" if isinstance(root, yaml.SequenceNode) else "scalar"
        raise ConfigError(f"{shown(path)}:1: a recipe file holds `key: value` lines, not a {kind}")
    return RecipeFile(path, group, text, root)


def loader_of(path: Path) -> type[yaml.SafeLoader] | type[yaml.CSafeLoader]:
    """What reads a file: libyaml, ten times faster, for opsd's own; for a stranger's the very parser that Hydra will
    use, because two that disagree about a file would let it show one thing to the guard and another to Hydra."""
    return _loader(is_own=path.is_relative_to(builtin_folder()))


def _loader(*, is_own: bool) -> type[yaml.SafeLoader] | type[yaml.CSafeLoader]:
    return yaml.CSafeLoader if is_own and yaml.__with_libyaml__ else yaml.SafeLoader


@lru_cache(maxsize=1024)
def _root(text: str, *, is_own: bool) -> yaml.Node | None:
    """The nodes of a text; nobody changes them."""
    return yaml.compose(text, Loader=_loader(is_own=is_own))


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{shown(path)}: cannot be read ({error.strerror})") from None
    if len(content) > LARGEST_FILE:
        raise ConfigError(f"{shown(path)}: {len(content)} bytes; a recipe file has at most {LARGEST_FILE}")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{shown(path)}:{line}: not UTF-8 text") from None


def _syntax_problem(path: Path, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"{shown(path)}:{mark.line + 1}:{mark.column + 1}" if mark else shown(path)
    hint = " (indent with spaces, never tabs)" if "'\\t'" in (error.problem or "") else ""
    return f"{place}: broken YAML: {error.problem or error.context}{hint}"


def _visit(path: Path_, node: yaml.Node) -> Iterator[Visit]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below = (*path, str(key.value))
            yield below, key, value
            yield from _visit(below, value)
    if isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            below = (*path, str(index))
            yield below, None, value
            yield from _visit(below, value)


def _entries(item: yaml.Node) -> Iterator[DefaultsEntry]:
    line = item.start_mark.line + 1
    if isinstance(item, yaml.ScalarNode):
        yield DefaultsEntry(None, item.value, override=False, package=None, line=line)
    if isinstance(item, yaml.MappingNode):
        for key, value in item.value:
            match = ENTRY.match(str(key.value))
            group = match["group"] if match else str(key.value)
            override = bool(match and match["override"])
            package = match["package"] if match else None
            option = value.value if isinstance(value, yaml.ScalarNode) else value.id
            yield DefaultsEntry(group, option, override=override, package=package, line=line)


def _comment(lines: list[str], key: yaml.Node, value: yaml.Node) -> str:
    """The comment beside a value, without its `#`: after its end, or after the `|` that opens a block of
    text."""
    is_block = isinstance(value, yaml.ScalarNode) and value.style in ("|", ">")
    mark = key.end_mark if is_block else value.end_mark
    rest = lines[mark.line][mark.column :] if mark.line < len(lines) else ""
    match = re.search(r"(?:^|\s)#\s*(.*)$", rest)
    return match[1].strip() if match else ""
