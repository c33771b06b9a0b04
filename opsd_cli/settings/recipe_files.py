"""Recipe files: where they are searched, what stands in one, and which of them gave a setting. Files are read as YAML
nodes with their lines, never as Python objects, so that a problem can name its place before Hydra reads anything."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import yaml

from opsd_cli.settings.errors import ConfigError, display_path
from opsd_cli.settings.paths import typed_path
from opsd_cli.settings.recipe_nodes import DefaultsEntry, comment_of, entries_of, nodes_below

GROUPS: dict[str, str] = {
    "recipe": "what to train: model, data, numbers",
    "method": "how: teacher, context, sampler, divergence, support, clip, target, tokens, token_rule",
    "model": "which language model",
    "dataset": "which problems",
    "context": "what each role is shown",
    "divergence": "what is minimised",
    "sampler": "where completions come from",
    "teacher": "which weights the teacher uses",
    "support": "the part of the vocabulary",
    "clip": "how large divergences are limited",
    "target": "what the student is pulled towards",
    "tokens": "which tokens carry loss",
    "token_rule": "a rule of your own beside those of tokens",
    "grader": "which completions are right",
    "guard": "what happens when a run drifts",
    "optim": "optimizer and schedule",
    "zero": "how DeepSpeed shards",
    "lora": "adapters or all weights",
    "launcher": "how the ranks are started",
    "track": "where else a run is shown",
}
"""Every config group, in the order in which `opsd recipes` lists them, and what choosing one decides."""

PRIMARY = "config.yaml"
MERGED_LAST = ("method", "recipe")
"""Groups that Hydra merges after all others: a recipe's numbers win."""

LARGEST_FILE = 1 << 16  # bytes; a recipe has a few hundred, and reading a long one takes long
HEADER = re.compile(r"#\s*@\s*(\w*)\s*(\S*)")


@dataclass(frozen=True)
class RecipeFolders:
    """The folders that are searched, first match wins: the user's own, opsd's, then those of `--config-dir`."""

    own: tuple[Path, ...]
    builtin: Path
    extra: tuple[Path, ...] = ()

    @property
    def all(self) -> tuple[Path, ...]:
        return (*self.own, self.builtin, *self.extra)

    @cached_property
    def files(self) -> dict[str, dict[str, Path]]:
        """group -> option -> the file that wins. A file named `_NAME` is not an option: options build on it."""
        options: dict[str, dict[str, Path]] = {group: {} for group in GROUPS}
        for folder in self.all:
            for group, files in options.items():
                for path in option_files(folder / group):
                    if not path.name.startswith("_"):
                        files.setdefault(path.relative_to(folder / group).with_suffix("").as_posix(), path)
        return {group: dict(sorted(files.items())) for group, files in options.items()}

    def find(self, group: str, file: str) -> Path | None:
        """The file that `NAME.yaml` means in a defaults list of the group, which may be one that is not an option."""
        candidates = [folder / group / file for folder in self.all]
        # os.path: of a name that is too long it only says that there is no such file.
        return next((path for path in candidates if os.path.isfile(path)), None)

    @property
    def primary(self) -> Path:
        """opsd's own `config.yaml`: every fixed section and the defaults list."""
        return self.builtin / PRIMARY


def option_files(folder: Path) -> Iterator[Path]:
    """Every `.yaml` file under a group's folder, in name order. Linked folders are not entered."""
    for parent, names, files in os.walk(folder):
        names.sort()
        yield from (Path(parent) / name for name in sorted(files) if name.endswith(".yaml"))


def builtin_folder() -> Path:
    """opsd's own recipes: inside the package when installed from a wheel, else at the top of the checkout."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "_recipes"
    return packaged if packaged.is_dir() else package.parent / "recipes"


def find_folders(recipes: str | None = None, config_dir: str | None = None) -> RecipeFolders:
    """The search order: `--recipes`, `./recipes`, opsd's own, `--config-dir`. Raises ConfigError if one is missing."""

    def existing(flag: str, folder: str) -> Path:
        path = typed_path(folder)
        if not path.is_dir():
            raise ConfigError(f"{flag} {folder}: no such folder")
        return path.resolve()

    builtin, local = builtin_folder(), Path("recipes")
    own = [existing("--recipes", recipes)] if recipes else []
    if local.is_dir() and not any(local.samefile(folder) for folder in (*own, builtin)):
        own.append(local.resolve())
    extra = (existing("--config-dir", config_dir),) if config_dir else ()
    return RecipeFolders(own=tuple(own), builtin=builtin, extra=extra)


def description(path: Path) -> str:
    """The one-line description of an option file: its first comment that is not a `# @package` header."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    comments = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return next((line[1:].strip() for line in comments if not re.match(r"#\s*@", line)), "")


@dataclass(frozen=True)
class Key:
    """A key that holds a value (not a mapping): its dotted name, its line, the comment beside it."""

    name: str
    line: int
    comment: str


@dataclass(frozen=True)
class RecipeFile:
    path: Path
    group: str  # the folder it stands in; empty for config.yaml
    text: str
    root: yaml.MappingNode | None  # None: nothing but comments

    def at(self, line: int) -> str:
        """`file:line`, as messages name it."""
        return f"{display_path(self.path)}:{line}"

    @cached_property
    def headers(self) -> list[tuple[int, str, str]]:
        """(line, keyword, value) of every `# @keyword value` comment, wherever it stands."""
        matches = ((number, HEADER.match(line.strip())) for number, line in enumerate(self.text.splitlines(), 1))
        return [(number, match[1], match[2]) for number, match in matches if match]

    @cached_property
    def keys(self) -> list[Key]:
        """Every key that holds a value, under its full dotted name, in file order."""
        is_global = not self.group or any(value == "_global_" for _, _, value in self.headers)
        prefix = () if is_global else (self.group,)
        lines = self.text.splitlines()
        return [
            Key(".".join((*prefix, *path)), key.start_mark.line + 1, comment_of(lines, key, value))
            for path, key, value in nodes_below(self.root)
            if key is not None and path[0] not in ("defaults", "hydra") and not isinstance(value, yaml.MappingNode)
        ]

    @cached_property
    def defaults(self) -> list[DefaultsEntry]:
        """The defaults list, in order; empty if there is none."""
        pairs = self.root.value if self.root else []
        lists = [value for key, value in pairs if key.value == "defaults" and isinstance(value, yaml.SequenceNode)]
        return [entry for node in lists for item in node.value for entry in entries_of(item)]


def read_recipe_file(path: Path, group: str) -> RecipeFile:
    """Parse one file. Raises ConfigError naming file, line and column if it is not a YAML mapping."""
    shown = display_path(path)
    try:
        content = path.read_bytes()
        if len(content) > LARGEST_FILE:
            raise ConfigError(f"{shown}: {len(content)} bytes; a recipe file has at most {LARGEST_FILE}")
        text = content.decode("utf-8")
        root = _parse(text, path)
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{shown}:{line}: not UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{shown}:{mark.line + 1}:{mark.column + 1}" if mark else shown
        hint = " (indent with spaces, never tabs)" if "'\\t'" in (error.problem or "") else ""
        raise ConfigError(f"{place}: broken YAML: {error.problem or error.context}{hint}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{shown}: broken YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{shown}: nested too deeply for a recipe") from None
    if root is not None and not isinstance(root, yaml.MappingNode):
        kind = "sequence" if isinstance(root, yaml.SequenceNode) else "scalar"
        raise ConfigError(f"{shown}:1: a recipe file holds `key: value` lines, not a {kind}")
    return RecipeFile(path, group, text, root)


def loader_of(path: Path) -> type[yaml.SafeLoader] | type[yaml.CSafeLoader]:
    """The parser for a file: libyaml, ten times faster, for opsd's own; for other files the parser that Hydra will use,
    because two parsers that disagree would let a file show one thing to the scan and another to Hydra."""
    is_own = path.is_relative_to(builtin_folder())
    return yaml.CSafeLoader if is_own and yaml.__with_libyaml__ else yaml.SafeLoader


@lru_cache(maxsize=1024)
def _parse(text: str, path: Path) -> yaml.Node | None:
    return yaml.compose(text, Loader=loader_of(path))


@dataclass(frozen=True)
class Origin:
    """`file:line` of a setting, and the comment beside it, there or where it was set before."""

    place: str
    comment: str


def origins(folders: RecipeFolders, choices: Mapping[str, str | None]) -> dict[str, Origin]:
    """dotted key -> where its value was written last; a group's name alone -> the file that was chosen for it."""
    places: dict[str, Origin] = {}
    # In Hydra's order of merging, later files winning.
    files = [read_recipe_file(folders.primary, "")]
    for group in (*(group for group in folders.files if group not in MERGED_LAST), *MERGED_LAST):
        option = choices.get(group)
        files += with_bases(folders, group, option) if option is not None else ()
    for file in files:
        if file.group:
            places[file.group] = Origin(file.at(1), "")
        for key in file.keys:
            before = places[key.name].comment if key.name in places else ""
            places[key.name] = Origin(file.at(key.line), key.comment or before)
    return places


def with_bases(folders: RecipeFolders, group: str, option: str) -> Iterator[RecipeFile]:
    """An option's file, after the files of its own group that its defaults list builds on."""
    path = folders.find(group, f"{option}.yaml")
    if path is None:
        return
    file = read_recipe_file(path, group)
    for entry in file.defaults:
        if entry.group is None and entry.option not in ("_self_", option):
            yield from with_bases(folders, group, entry.option)
    yield file


def overrides_of(folders: RecipeFolders, group: str, option: str) -> Iterator[tuple[RecipeFile, DefaultsEntry]]:
    """The `override /group: option` lines of a recipe or method, those of the files it builds on first."""
    for file in with_bases(folders, group, option):
        yield from ((file, entry) for entry in file.defaults if entry.group is not None)


def written_out(folders: RecipeFolders, group: str, option: str) -> str:
    """An option's file with all it takes over from the files it builds on: what it chooses, every key, the comments."""
    *bases, file = with_bases(folders, group, option)
    if not bases:
        return file.text
    lines: dict[str, str] = {}
    comments: dict[str, str] = {}
    for each in (*bases, file):
        for key in each.keys:
            line = each.text.splitlines()[key.line - 1]
            known = comments.setdefault(key.name, key.comment)
            lines[key.name] = line if key.comment or not known else f"{line} # {known}"
    chosen = {entry.group: entry.option for _, entry in overrides_of(folders, group, option)}
    overrides = [f"  - override /{other}: {name}" for other, name in chosen.items()]
    head = itertools.takewhile(lambda line: line.startswith("#"), file.text.splitlines())
    return "\n".join([*head, *(["defaults:", *overrides] if overrides else []), *lines.values()]) + "\n"
