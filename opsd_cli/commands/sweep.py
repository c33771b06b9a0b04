"""`opsd train -m`: one run after another, each in processes of its own, and a table at the end. A member that fails
does not stop the others."""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from opsd_cli.commands.flags import quote
from opsd_cli.insight.history import MEMBERS
from opsd_cli.launch.launchers import start_run
from opsd_cli.preflight import Member, config_of
from opsd_cli.run.events import Event, number, read_events
from opsd_cli.run.folder import RunFolder
from opsd_cli.run.summary import summarise
from opsd_cli.settings import compose
from opsd_cli.settings.command_line import CommandLine
from opsd_cli.settings.composition import cap_completions
from opsd_cli.settings.config import Config
from opsd_cli.settings.errors import ConfigError, ExitCode, OpsdError, display_path
from opsd_cli.settings.paths import typed_path
from opsd_cli.settings.plugin_files import use_again, used_plugins
from opsd_cli.settings.recipe_files import RecipeFolders
from opsd_cli.ui.columns import aligned
from opsd_cli.ui.display import open_display
from opsd_cli.ui.theme import interval, percent

STOPPED = (ExitCode.INTERRUPTED, ExitCode.TERMINATED)
WORST_FIRST = (*STOPPED, ExitCode.BUG, ExitCode.ENVIRONMENT, ExitCode.GUARD, ExitCode.CHANGE_SOMETHING)
NOT_RUN = -1


@dataclass(frozen=True)
class Result:
    """How one member ended."""

    name: str  # of its run folder
    swept: Sequence[str]  # settings
    code: int  # its exit code; NOT_RUN: it did not start


def run_sweep(
    line: CommandLine, members: Sequence[Member], folders: RecipeFolders, *, task: str, command: Sequence[str]
) -> int:
    """Run every member, print the table, return the worst exit code."""
    if any(member.config.launcher.plugin_name == "env" for member in members):
        raise ConfigError("launcher=env joins a single run; a sweep cannot run under torchrun or srun")
    with tempfile.TemporaryDirectory(prefix="opsd-sweep-") as scratch:
        folder = Path(scratch) / "sweep" if task == "check" else _sweep_folder(line, members[0].config)
        run_member = _Runner(line, folder, len(members), task=task, command=command).run
        words = [*line.for_hydra, f"hydra.sweep.dir={quote(str(folder.absolute()))}"]
        compose.run_sweep(words, folders, subfolder=line.last_value("hydra.sweep.subdir"), run_member=run_member)
        results = [Result(**json.loads(text)) for text in (folder / MEMBERS).read_text(encoding="utf-8").splitlines()]
        if task == "train":
            print("\n".join(table_lines(results, folder)))
    return worst_code(result.code for result in results)


def _sweep_folder(line: CommandLine, config: Config) -> Path:
    """The folder of the members' folders. Raises ConfigError if it exists: nothing is overwritten."""
    name = None if "run.name" in line.swept_keys else config.run.name
    folder = typed_path(config.run.root) / (name or time.strftime("sweep_%Y-%m-%d_%H-%M-%S"))
    if (typed := line.last_value("hydra.sweep.dir")) is not None:
        typed = re.sub(r"\$\{now:([^}]*)\}", lambda match: time.strftime(match[1]), typed)
        typed = typed.replace("${run.root}", config.run.root).replace("${run.name}", name or "sweep")
        folder = typed_path(typed)
    if folder.exists():
        raise ConfigError(f"{folder} exists and is never overwritten; give another run.name or hydra.sweep.dir")
    return folder.absolute()


class _Runner:
    """Runs members as Hydra composes them. Holds no config: a member may run in another process (hydra/launcher)."""

    def __init__(self, line: CommandLine, folder: Path, count: int, *, task: str, command: Sequence[str]) -> None:
        self._line, self._folder, self._count = line, folder, count
        self._task, self._command = task, command
        self._plugins = used_plugins()
        self._stopped = False

    def run(self, job: compose.Job) -> float:
        """Run one member; returns its accuracy, for an optimising sweeper (NaN: none)."""
        swept = tuple(o for o in job.overrides if o.split("=", 1)[0].lstrip("+") in self._line.swept_keys)
        name = self._name(job, swept)
        print(f"opsd: {job.number + 1}/{self._count} {' '.join(swept)}", file=sys.stderr)
        code = NOT_RUN if self._stopped else self._start(job, name)
        self._stopped |= code in STOPPED
        with open(self._folder / MEMBERS, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(Result(name, swept, code))) + "\n")
        after = summarise(read_events(RunFolder(self._folder / name).events), command={})["after"]
        return number(after["accuracy"]) if after else math.nan

    def _start(self, job: compose.Job, name: str) -> int:
        tree = {**job.tree, "run": {**job.tree["run"], "root": str(self._folder), "name": name}}
        cap_completions(tree, typed=self._line.typed_keys)
        try:
            use_again(self._plugins)  # in another process none has been run yet
            config = config_of(tree)
            return start_run(
                config,
                task=self._task,
                argv=self._command,
                hint=name,
                open_display=open_display,
                chosen=job.chosen,
            )
        except OpsdError as error:
            for problem in str(error).splitlines():
                print(f"opsd: {problem}", file=sys.stderr)
            return int(error.exit_code)

    def _name(self, job: compose.Job, swept: Sequence[str]) -> str:
        """A folder name inside the sweep's folder, whatever was typed or swept over."""
        name = job.subfolder
        if name is None and "run.name" in self._line.swept_keys:
            name = str(job.tree["run"]["name"])
        elif name is None:
            name = "_".join([str(job.number), *(text.split("=", 1)[1] for text in swept)])
        name = safe_name(name)
        return f"{name}_{job.number}" if (self._folder / name).exists() else name


def safe_name(text: str) -> str:
    """`text` as a run name: letters, digits, '.', '-' and '_', at most 60, and never a path out of its folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("._-")[:60] or "member"


def worst_code(codes: Iterable[int]) -> int:
    """The exit code of a sweep: 0 only if every member is done."""
    ended = set(codes)
    return next((int(code) for code in WORST_FIRST if code in ended), int(ExitCode.DONE))


def table_lines(results: Sequence[Result], folder: Path) -> list[str]:
    """One line per member: the swept settings, what it gained, retained and cost. Columns that no member has
    (retention, the teacher's prompt) are left out; a member that failed shows as much as it recorded."""
    rows = [_row(result, folder) for result in results]
    columns = [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
    named = [{name if name != "member" else "": row[name] or "-" for name in columns} for row in rows]
    return aligned(named)


def _row(result: Result, folder: Path) -> dict[str, str]:
    run = RunFolder(folder / result.name)
    summary = summarise(read_events(run.events), command={})
    status: dict[int, str] = {0: "done", NOT_RUN: "not run", **dict.fromkeys(STOPPED, "stopped")}
    return {
        "member": " ".join(result.swept) or result.name,
        "before": interval(summary["before"]),
        "after": interval(summary["after"]),
        "teacher after": _shares(summary["teacher_after"]),
        "retention": _shares(summary["retention_before"], summary["retention_after"]),
        "tokens": f"{summary['completion_tokens']:,}" if summary["steps"] else "",
        "seconds": f"{summary['training_seconds']:.0f}" if summary["steps"] else "",
        "status": status.get(result.code, f"failed, exit code {result.code}"),
        "folder": display_path(run.path),
    }


def _shares(*evaluations: Event | None) -> str:
    """The accuracies that are known, from the first to the last."""
    return " -> ".join(percent(evaluation["accuracy"]) for evaluation in evaluations if evaluation)
