"""Python files of the user's own that register plug-ins: named by the person who types, with --plugin FILE, and by
nobody else. A recipe, a run folder or a checkpoint never names one: a rank runs the copies whose sha256 the launcher
hands it."""

from __future__ import annotations

import hashlib
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from opsd_cli.settings.errors import ConfigError, OpsdError, PluginError, display_path
from opsd_cli.settings.registry import forget_module

LARGEST = 1 << 20  # bytes of a plug-in file
SHOWN_DIGITS = 12  # of a sha256, in names and messages


@dataclass(frozen=True)
class PluginFile:
    """A file that was run in this process."""

    path: Path  # as the person named it; absolute
    text: bytes
    module: str  # its name in sys.modules

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text).hexdigest()

    @property
    def copy_name(self) -> str:
        """Of its copy in a run folder: another text is another file, so that no copy is ever replaced."""
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", self.path.stem).strip("-")[:40] or "plugin"
        return f"{stem}-{self.sha256[:SHOWN_DIGITS]}.py"


_used: list[PluginFile] = []


def used_plugins() -> tuple[PluginFile, ...]:
    """The files that this command or rank was given."""
    return tuple(_used)


def use_plugins(files: Sequence[str | Path]) -> tuple[PluginFile, ...]:
    """Run these files, in order, and no others: what earlier ones have registered is forgotten. Raises ConfigError for
    a file that cannot be read, PluginError with file and line for one that fails."""
    texts = [(path, _read(path)) for path in dict.fromkeys(Path(file).expanduser().absolute() for file in files)]
    return _use(texts)


def use_again(plugins: Sequence[PluginFile]) -> None:
    """Run files that another process of the same command was given, with the text that it read."""
    _use([(plugin.path, plugin.text) for plugin in plugins])


def use_copies(folder: Path, words: Sequence[str], *, typed: Mapping[str, str]) -> None:
    """In a rank: run copies in `folder`, each named by SHA256:FILE. `typed`, by sha256, is where the person has the
    file, for messages. Raises ConfigError for a copy that is not what was named."""
    texts = []
    for word in words:
        sha256, _, name = word.partition(":")
        path = folder / Path(name).name
        text = _read(path)
        if hashlib.sha256(text).hexdigest() != sha256:
            raise ConfigError(f"{display_path(path)} was changed after the run started; start the run again")
        texts.append((Path(typed.get(sha256, path)), text))
    _use(texts)


def words_for_ranks() -> tuple[str, ...]:
    """What a rank is told, after its task: see `use_copies`."""
    return tuple(f"{plugin.sha256}:{plugin.copy_name}" for plugin in _used)


def _use(texts: Sequence[tuple[Path, bytes]]) -> tuple[PluginFile, ...]:
    if [(plugin.path, plugin.text) for plugin in _used] == list(texts):
        return used_plugins()
    for plugin in _used:
        forget_module(plugin.module)
        sys.modules.pop(plugin.module, None)
    _used.clear()
    for number, (path, text) in enumerate(texts):
        plugin = PluginFile(path, text, f"opsd_plugin_{number}")
        _used.append(plugin)
        _run(plugin)
    return used_plugins()


def _read(path: Path) -> bytes:
    if path.suffix != ".py":
        raise ConfigError(f"--plugin {display_path(path)}: a plug-in is a Python file, NAME.py")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--plugin {display_path(path)} cannot be read: {error.strerror}") from None
    if len(text) > LARGEST:
        raise ConfigError(f"--plugin {display_path(path)} has {len(text):,} bytes; at most {LARGEST:,}")
    return text


def _run(plugin: PluginFile) -> None:
    module = ModuleType(plugin.module)
    module.__file__ = str(plugin.path)
    sys.modules[plugin.module] = module  # dataclasses look their module up there
    with plugin_faults():
        try:
            code = compile(plugin.text, str(plugin.path), "exec")
        except (SyntaxError, ValueError) as error:
            line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
            raise PluginError(f"{display_path(plugin.path)}{line}: {_told(error)}") from None
        exec(code, vars(module))


class plugin_faults:
    """Turns an error that came through a plug-in file into a PluginError of one line that names its place there. Errors
    that did not, and requests to stop, pass."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Exception) or isinstance(error, PluginError):
            return
        place = _place_in_plugin(error)
        if place is not None:
            told = str(error) if isinstance(error, OpsdError) else _told(error)
            raise PluginError(f"{place}: {told}") from error


def _place_in_plugin(error: BaseException) -> str | None:
    """`FILE:LINE, in FUNCTION` of the innermost line of a plug-in file that the error came through."""
    files = {str(plugin.path): plugin.path for plugin in _used}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename in files:
            inside = "" if frame.name == "<module>" else f", in {frame.name}"
            return f"{display_path(files[frame.filename])}:{frame.lineno}{inside}"
    return None


def _told(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}" if text else type(error).__name__
