"""What an earlier run of a sweep has left of its members, and which is the one that is about to run: a member
is known by its settings, not by its place or its name."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from opsd_cli import __version__
from opsd_cli.insight.history import History, find_runs, try_read
from opsd_cli.run.plugin_copies import recorded_plugins
from opsd_cli.settings.errors import ExitCode
from opsd_cli.settings.plugin_files import used_plugins
from opsd_cli.settings.trees import leaves

SAYS_NOTHING = ("run.name", "run.root", "prompts.date")
"""Settings in which a member may differ from an earlier one and be the same, like those of launcher and track."""


@dataclass(frozen=True)
class Earlier:
    """A member that an earlier run of the sweep has left."""

    name: str
    settings: Mapping[str, Any]
    state: Literal["finished", "begun", "failed", "running"]
    code: int
    why_again: str  # what stands against taking it as it is; empty: nothing

    @property
    def is_taken(self) -> bool:
        return self.state == "finished" and not self.why_again


def earlier_members(folder: Path, *, anew: bool) -> list[Earlier]:
    """What is in a sweep's folder."""
    runs = (try_read(path, name=name, points=1) for name, path in find_runs(folder))
    return [_earlier(run, anew=anew) for run in runs if run is not None]


def _earlier(run: History, *, anew: bool) -> Earlier:
    ended = next(iter(reversed(run.of_kind("run_ended"))), {})
    code = int(ended.get("exit_code", ExitCode.BUG))
    has_checkpoint = (run.folder.checkpoints / "latest").is_file()
    state: Literal["finished", "begun", "failed", "running"] = "failed"
    if run.state == "running":
        state = "running"
    elif run.state == "completed" or code == ExitCode.GUARD:  # the guard would stop it again in the same place
        state = "finished"
    elif has_checkpoint and (run.state in ("stopped", "lost") or code == ExitCode.ENVIRONMENT):
        state = "begun"
    version, given = str(run.command.get("opsd")), {plugin.sha256 for plugin in used_plugins()}
    why_again = f"failed with exit code {code}" if state == "failed" and ended else ""
    if version != __version__:
        why_again = f"was run by opsd {version}"
    elif recorded_plugins(run.folder).keys() != given:
        why_again = "was run with other plug-ins"
    elif anew:
        why_again = "--anew"
    settings = dict(json.loads(json.dumps(dict(run.settings))))
    return Earlier(run.folder.name, settings, state, code, why_again or ("left no checkpoint" * (state == "failed")))


def find_same(earlier: Sequence[Earlier], tree: Mapping[str, Any], *, swept: Collection[str]) -> Earlier | None:
    """The member of before that has the settings of a plain tree; what was `swept` over tells members apart."""
    settings = dict(json.loads(json.dumps(dict(leaves(tree)))))
    silent = {key for key in SAYS_NOTHING if key not in swept}
    if settings.get("prompts.date") is not None:
        silent.discard("prompts.date")
    for before in earlier:
        differing = {key for key in {*settings, *before.settings} if settings.get(key) != before.settings.get(key)}
        if "run.name" in swept and before.name == safe_name(str(settings["run.name"])):
            differing.discard("run.name")
        if all(key in silent or (key.startswith(("launcher.", "track.")) and key not in swept) for key in differing):
            return before
    return None


def safe_name(text: str) -> str:
    """`text` as a run name: letters, digits, '.', '-' and '_', at most 60, and never a path out of its folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("._-")[:60] or "member"
