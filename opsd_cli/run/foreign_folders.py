"""What a run folder that may be a stranger's could do to whoever continues it. Owns the two refusals: links that would
lead a write out of the folder, and code that comes with a model. What a checkpoint may hold is `engine`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opsd_cli.run.folder import RunFolder, shown
from opsd_cli.settings.config import Config
from opsd_cli.settings.errors import ConfigError


def refuse_links(folder: RunFolder) -> None:
    """Raise ConfigError when anything that a continued run would write to is a link."""
    links = [path for path in _written(folder) if path.is_symlink()]
    if links:
        raise ConfigError(
            f"{shown(links[0])} is a link, and a run writes only inside its own folder; put the thing itself there"
        )


def _written(folder: RunFolder) -> Iterator[Path]:
    yield from (folder.path / name for name in ("logs", "checkpoints", "model"))
    for parent in (folder.path, folder.logs, folder.checkpoints, folder.model):
        if parent.is_dir() and not (parent.is_symlink() and parent != folder.path):
            yield from parent.iterdir()


def refuse_code(config: Config, folder: RunFolder, changes: Mapping[str, Any]) -> None:
    """Raise ConfigError when the frozen config would run a model's code and nobody has typed that now."""
    if config.model.trust_remote_code and changes.get("model.trust_remote_code") is not True:
        raise ConfigError(
            f"the config of {shown(folder.path)} runs code that comes with {config.model.path}; if you trust it, say "
            f"so: opsd train --resume {shown(folder.path)} model.trust_remote_code=true"
        )
