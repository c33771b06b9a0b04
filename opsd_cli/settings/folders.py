"""Where recipe files are: the built-in folder, the user's own, and which file answers `group=option`. Owns
the search order and the words that `opsd recipes` shows. Reads no settings and knows nothing of Hydra.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from opsd_cli.settings.errors import ConfigError

GROUPS: dict[str, str] = {
    "recipe": "what to train: model, data, numbers",
    "method": "how: teacher, context, sampler, divergence, support, clip, target, tokens",
    "model": "which language model",
    "dataset": "which problems",
    "context": "what each role is shown",
    "divergence": "what is made small",
    "sampler": "where completions come from",
    "teacher": "whose weights answer as teacher",
    "support": "the part of the vocabulary",
    "clip": "what is done about large divergences",
    "target": "what the student is pulled towards",
    "tokens": "which tokens carry loss",
    "guard": "what is done when a run drifts",
    "optim": "optimizer and schedule",
    "zero": "how DeepSpeed shards",
    "lora": "adapters or all weights",
    "launcher": "how the ranks are started",
}
"""Every config group, in the order of the defaults list's reader, and what choosing one decides."""

PRIMARY = "config.yaml"


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
        """group -> option -> the file that answers."""
        found: dict[str, dict[str, Path]] = {group: {} for group in GROUPS}
        for folder in self.all:
            for group, options in found.items():
                for path in option_files(folder / group):
                    options.setdefault(path.relative_to(folder / group).with_suffix("").as_posix(), path)
        return {group: dict(sorted(options.items())) for group, options in found.items()}

    @property
    def primary(self) -> Path:
        """opsd's own `config.yaml`: every fixed section and the defaults list."""
        return self.builtin / PRIMARY

    def misnamed(self, group: str, option: str) -> Path | None:
        """The `.yml` file that was probably meant: Hydra reads `.yaml` only."""
        candidates = [folder / group / f"{option}.yml" for folder in self.all]
        return next((path for path in candidates if path.is_file()), None)


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
    """The search order of this command: `--recipes`, `./recipes`, opsd's own, `--config-dir`. Raises
    ConfigError for a folder that does not exist."""
    builtin = builtin_folder()
    own = [_existing("--recipes", recipes)] if recipes else []
    local = Path("recipes")
    if local.is_dir() and not any(local.samefile(folder) for folder in (*own, builtin)):
        own.append(local.resolve())
    extra = (_existing("--config-dir", config_dir),) if config_dir else ()
    return RecipeFolders(own=tuple(own), builtin=builtin, extra=extra)


def _existing(flag: str, folder: str) -> Path:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ConfigError(f"{flag} {folder}: no such folder")
    return path.resolve()


def shown(path: Path) -> str:
    """A path as a message names it: relative to the working folder when it lies inside."""
    here = Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else str(path)


def description(path: Path) -> str:
    """The one-line description of an option file: its first comment that is no `# @package` header."""
    return next(iter(header_comments(path)), "")


def header_comments(path: Path) -> list[str]:
    """The comment lines at the top of a file, without their `#`, headers for Hydra left out."""
    comments: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.startswith("#"):
            break
        if not re.match(r"#\s*@", line):
            comments.append(line[1:].strip())
    return comments
