"""`opsd train -m`: one run after another, each in processes of its own, and a table at the end. Owns the
sweep's folder, its members' names, and what a failing member means for the others: nothing.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from opsd_cli.commands.sweep_table import NOT_RUN, STOPPED, Result, accuracy_after, table_lines
from opsd_cli.launch.launchers import start_run
from opsd_cli.preflight import Member, settled
from opsd_cli.run.folder import RunFolder
from opsd_cli.settings.command_line import CommandLine
from opsd_cli.settings.compose import Job, run
from opsd_cli.settings.config import Config
from opsd_cli.settings.errors import ConfigError, ExitCode, OpsdError
from opsd_cli.settings.folders import RecipeFolders
from opsd_cli.ui.display import open_display

WORST_FIRST = (*STOPPED, ExitCode.BUG, ExitCode.ENVIRONMENT, ExitCode.GUARD, ExitCode.CHANGE_SOMETHING)
MEMBERS = "members.jsonl"


def run_sweep(
    line: CommandLine, members: Sequence[Member], folders: RecipeFolders, *, task: str, command: Sequence[str]
) -> int:
    """Run every member, print the table, return the worst exit code."""
    if any(member.config.launcher.plugin_name == "env" for member in members):
        raise ConfigError("launcher=env takes part in one run; start a sweep without torchrun or srun around it")
    with tempfile.TemporaryDirectory(prefix="opsd-sweep-") as scratch:
        folder = Path(scratch) / "sweep" if task == "check" else _sweep_folder(line, members[0].config)
        job = _Runner(line, folder, len(members), task=task, command=command).run
        words = ["--multirun", *line.for_hydra, f"hydra.sweep.dir='{_escaped(folder)}'"]
        run(words, folders, subfolder=line.subfolder, job=job)
        results = _results(folder)
        if task == "train":
            print("\n".join(table_lines(results, folder)))
    return worst_code(result.code for result in results)


def _sweep_folder(line: CommandLine, config: Config) -> Path:
    """Where the members' folders go. Raises ConfigError when it exists: nothing is overwritten."""
    name = None if "run.name" in line.swept_keys else config.run.name
    folder = Path(config.run.root).expanduser() / (name or time.strftime("sweep_%Y-%m-%d_%H-%M-%S"))
    if line.sweep_folder is not None:
        typed = re.sub(r"\$\{now:([^}]*)\}", lambda match: time.strftime(match[1]), line.sweep_folder)
        typed = typed.replace("${run.root}", config.run.root).replace("${run.name}", name or "sweep")
        folder = Path(typed).expanduser()
    if folder.exists():
        raise ConfigError(f"{folder} exists and is never overwritten; give another run.name or hydra.sweep.dir")
    return folder.absolute()


class _Runner:
    """Runs members as Hydra composes them. Holds no config: a member may run in another process
    (hydra/launcher)."""

    def __init__(self, line: CommandLine, folder: Path, count: int, *, task: str, command: Sequence[str]) -> None:
        self._line, self._folder, self._count = line, folder, count
        self._task, self._command = task, command
        self._stopped = False

    def run(self, job: Job) -> float:
        """Run one member; returns its accuracy, which an optimising sweeper looks at (NaN: none)."""
        assert job.number is not None
        swept = tuple(o for o in job.overrides if o.split("=", 1)[0].lstrip("+") in self._line.swept_keys)
        name = self._name(job, swept)
        print(f"opsd: {job.number + 1}/{self._count} {' '.join(swept)}", file=sys.stderr)
        code = NOT_RUN if self._stopped else self._start(job, name)
        self._stopped |= code in STOPPED
        with open(self._folder / MEMBERS, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(Result(name, swept, code))) + "\n")
        return accuracy_after(RunFolder(self._folder / name))

    def _start(self, job: Job, name: str) -> int:
        tree = {**job.tree, "run": {**job.tree["run"], "root": str(self._folder), "name": name}}
        try:
            config, _ = settled(tree, typed=self._line.typed_keys)
            return start_run(config, task=self._task, argv=self._command, hint=name, open_display=open_display)
        except OpsdError as error:
            for problem in str(error).splitlines():
                print(f"opsd: {problem}", file=sys.stderr)
            return int(error.exit_code)

    def _name(self, job: Job, swept: Sequence[str]) -> str:
        """A folder name inside the sweep's folder, whatever was typed or swept over."""
        if job.subfolder is not None:
            name = safe_name(job.subfolder)
        elif "run.name" in self._line.swept_keys:
            name = safe_name(str(job.tree["run"]["name"]))
        else:
            name = safe_name("_".join([str(job.number), *(text.split("=", 1)[1] for text in swept)]))
        return f"{name}_{job.number}" if (self._folder / name).exists() else name


def safe_name(text: str) -> str:
    """`text` as a run name: letters, digits, '.', '-' and '_', at most 60, and never a step out of its
    folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("._-")[:60] or "member"


def worst_code(codes: Iterable[int]) -> int:
    """The exit code of a sweep: 0 only when every member is done."""
    found = set(codes)
    return next((int(code) for code in WORST_FIRST if code in found), int(ExitCode.DONE))


def _results(folder: Path) -> list[Result]:
    lines = (folder / MEMBERS).read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return [Result(item["name"], tuple(item["swept"]), item["code"]) for item in found]


def _escaped(folder: Path) -> str:
    return str(folder.absolute()).replace("\\", "\\\\").replace("'", "\\'")
