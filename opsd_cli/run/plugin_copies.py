"""The copies of plug-in files in a run folder: what a rank runs, and by which a resume knows what the run was started
with. A folder never decides that code is run; the person names the file again."""

from __future__ import annotations

import shlex
from pathlib import Path

from opsd_cli.run.folder import RunFolder, read_command, shell_path, writing
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.plugin_files import SHOWN_DIGITS, used_plugins


def copy_plugins(folder: RunFolder) -> list[dict[str, str]]:
    """Copy the plug-in files of this command into the run folder; returns what command.json records of them."""
    plugins = used_plugins()
    with writing(folder.plugins):
        if plugins:
            folder.plugins.mkdir(exist_ok=True)
        for plugin in plugins:
            (folder.plugins / plugin.copy_name).write_bytes(plugin.text)
    return [{"file": str(plugin.path), "copy": plugin.copy_name, "sha256": plugin.sha256} for plugin in plugins]


def recorded_plugins(folder: RunFolder) -> dict[str, str]:
    """sha256 -> where the person had the file, of the plug-ins that the run was last started with."""
    entries = read_command(folder).get("plugins", [])
    plain = [entry for entry in entries if isinstance(entry, dict)]
    return {str(entry.get("sha256")): str(entry.get("file")) for entry in plain}


def plugin_flags(folder: RunFolder) -> str:
    """What is to be typed after a command about this run, with a blank before it; empty without plug-ins. Only a file
    that the person has named is named: a folder from somebody else could propose any."""
    given = {plugin.sha256: shell_path(plugin.path) for plugin in used_plugins()}
    return "".join(f" --plugin {given.get(sha256, 'FILE')}" for sha256 in recorded_plugins(folder))


def require_plugins(folder: RunFolder, *, command: str, accept_changed: bool) -> None:
    """Raise ConfigError unless this command was given the plug-ins that the run was started with, unchanged or with the
    change accepted. The run folder cannot name them itself: what is in it may come from somebody else."""
    recorded, given = recorded_plugins(folder), {plugin.sha256: plugin.path for plugin in used_plugins()}
    missing = recorded.keys() - given.keys()
    if not missing:
        return
    flags = " ".join(f"--plugin {shlex.quote(file)}" for file in recorded.values())
    if len(given) < len(recorded):
        raise ConfigError(
            f"{shell_path(folder.path)} was started with a plug-in, and no folder can name the code that is run: name "
            f"it again, {command} {flags} (copies as they were: {shell_path(folder.plugins)})"
        )
    if not accept_changed:
        now = ", ".join(sha256[:SHOWN_DIGITS] for sha256 in given)
        then = ", ".join(sha256[:SHOWN_DIGITS] for sha256 in sorted(missing))
        changed = ", ".join(Path(recorded[sha256]).name for sha256 in sorted(missing))
        raise ConfigError(
            f"the plug-in {changed} is not the file that {shell_path(folder.path)} was started with (sha256 {then}, "
            f"now {now}); use the copy in {shell_path(folder.plugins)}, or add --accept-changed-plugin"
        )
