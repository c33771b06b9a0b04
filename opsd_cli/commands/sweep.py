"""`opsd train -m`: several runs, one after another or at once, and a ranked table at the end. A member that fails does
not stop the others; what an earlier run of the same sweep has finished is not run again."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from opsd_cli import __version__
from opsd_cli.commands.flags import quote
from opsd_cli.commands.members import NOT_RUN, STOPPED, Result, Runner, run_beside_each_other, say
from opsd_cli.insight.earlier_members import earlier_members
from opsd_cli.insight.history import MEMBERS
from opsd_cli.launch.rank_environ import usable_cores
from opsd_cli.launch.share import Places, at_once, visible_gpus
from opsd_cli.preflight import Member
from opsd_cli.run.events import Event, read_events
from opsd_cli.run.folder import RunFolder, shell_path, writing
from opsd_cli.run.lock import run_lock
from opsd_cli.run.summary import summarise
from opsd_cli.settings import compose
from opsd_cli.settings.command_line import CommandLine
from opsd_cli.settings.config import Config
from opsd_cli.settings.errors import ConfigError, ExitCode, display_path
from opsd_cli.settings.paths import typed_path
from opsd_cli.settings.recipe_files import RecipeFolders
from opsd_cli.settings.registry import SetsRanks
from opsd_cli.settings.trees import plain_yaml
from opsd_cli.settings.typed_config import plain_tree
from opsd_cli.ui.columns import aligned
from opsd_cli.ui.theme import interval, percent

WORST_FIRST = (*STOPPED, ExitCode.BUG, ExitCode.ENVIRONMENT, ExitCode.GUARD, ExitCode.CHANGE_SOMETHING)
SWEEP = "sweep.json"
"""In a sweep's folder: the words that make it this sweep."""
PLACES = ".places"
TRIALS = "optimization_results.yaml"
"""Written by Hydra's optuna plug-in: the best trial."""
WEEK = 7 * 24 * 60  # minutes


def run_sweep(
    line: CommandLine,
    members: Sequence[Member],
    folders: RecipeFolders,
    *,
    task: str,
    command: Sequence[str],
    parallel: int | None = None,
    anew: bool = False,
) -> int:
    """Run every member, print the table, return the worst exit code. `parallel`: how many at once, by processes of our
    own; `anew`: also those that an earlier run of this sweep has finished. Raises ConfigError."""
    way = line.last_value("hydra/launcher") or "basic"
    sweeper = line.last_value("hydra/sweeper") or "basic"
    _refuse(line, members, parallel, way=way, sweeper=sweeper)
    count = int(line.last_value("hydra.sweeper.n_trials") or 20) if sweeper == "optuna" else len(members)
    with _folder(line, members[0].config, task=task, anew=anew, count=count) as folder:
        earlier = earlier_members(folder, anew=anew)
        begin = len(_lines(folder))
        (folder / TRIALS).unlink(missing_ok=True)
        places = _places(line, members[0].config, folder, parallel, way=way, count=count)
        is_quiet = places is not None and way in ("basic", "joblib")
        if is_quiet or way.startswith("submitit"):
            say(f"`opsd watch {shell_path(folder)}` shows the members")
        runner = Runner(
            line, folder, count, task=task, command=command, earlier=earlier, places=places, quiet=is_quiet
        )  # fmt: skip
        failure = None
        if way == sweeper == "basic":
            jobs = [_job(line, member, number) for number, member in enumerate(members)]
            if places is not None:
                run_beside_each_other(runner, jobs, places)
            else:
                for job in jobs:
                    runner.run(job)
        else:
            failure = _by_hydra(line, folders, folder, runner, places, way=way, sweeper=sweeper)
        results = [Result(**json.loads(text)) for text in _lines(folder)[begin:]]
        if task == "train":
            print("\n".join([*table_lines(results, folder), *_best_trial(folder, sweeper)]))
    if failure is not None:
        raise failure
    return worst_code(result.code for result in results)


def _by_hydra(
    line: CommandLine,
    folders: RecipeFolders,
    folder: Path,
    runner: Runner,
    places: Places | None,
    *,
    way: str,
    sweeper: str,
) -> ConfigError | None:
    """Have a plug-in of Hydra's make or run the members; returns what it raised after there were results."""
    words = [*line.for_hydra, *_defaults(line, way, sweeper), f"hydra.sweep.dir={quote(str(folder))}"]
    begin = len(_lines(folder))
    try:
        with places.passing_signals_on(say) if places is not None else contextlib.nullcontext():
            compose.run_sweep(words, folders, subfolder=line.last_value("hydra.sweep.subdir"), run_member=runner.run)
    except ConfigError as error:
        if len(_lines(folder)) == begin:
            raise
        return error
    return None


def _refuse(line: CommandLine, members: Sequence[Member], parallel: int | None, *, way: str, sweeper: str) -> None:
    if way == "submitit_slurm" and shutil.which("sbatch") is None:
        raise ConfigError(
            "hydra/launcher=submitit_slurm submits to SLURM, and sbatch is not on the PATH; type it on a login node of "
            "the cluster, or use hydra/launcher=submitit_local"
        )
    launchers = {member.config.launcher.plugin_name for member in members}
    if "env" in launchers:
        raise ConfigError("launcher=env joins a single run; a sweep cannot run under torchrun or srun")
    if "slurm" in launchers:
        raise ConfigError(
            "launcher=slurm is a job for a single run; for a job of each member, in an array: "
            "hydra/launcher=submitit_slurm with launcher=local (docs/sweeps.md)"
        )
    if parallel is not None and parallel < 1:
        raise ConfigError(f"--parallel {parallel}: the members that run at once; 1 or more")
    is_parallel = way in ("joblib", "submitit_local") or (parallel or 1) > 1
    if is_parallel and "local" not in launchers:
        other = ", ".join(sorted(launchers - {"local"}))
        raise ConfigError(
            f"launcher={other} starts ranks on machines that a sweep cannot share out between members at once; leave "
            "out what runs them at once (--parallel, hydra/launcher)"
        )
    if parallel is not None and way == "joblib":
        raise ConfigError("hydra/launcher=joblib takes its number from hydra.launcher.n_jobs; leave out --parallel")
    if parallel is not None and way == "submitit_slurm":
        raise ConfigError(
            "hydra/launcher=submitit_slurm takes its number from hydra.launcher.array_parallelism; leave out --parallel"
        )
    if parallel is not None and sweeper != "basic" and way == "basic":
        raise ConfigError(
            f"hydra/sweeper={sweeper} makes its trials in batches; for {parallel} at once: hydra/launcher=joblib "
            f"hydra.launcher.n_jobs={parallel} hydra.sweeper.n_jobs={parallel}"
        )


def _places(
    line: CommandLine, config: Config, folder: Path, parallel: int | None, *, way: str, count: int
) -> Places | None:
    """Where members run at once on this machine: a place for each, and a line that says what it is."""
    asked = parallel or 1
    if way == "joblib":
        jobs = int(line.last_value("hydra.launcher.n_jobs") or -1)
        asked = jobs if jobs > 0 else max(1, usable_cores() + 1 + jobs)
    elif way == "submitit_local":
        asked = parallel or usable_cores()
    elif way != "basic" or asked == 1:
        return None
    asked = min(asked, count)
    gpus = visible_gpus(config.launcher.device, os.environ)
    ranks = config.launcher.ranks if isinstance(config.launcher, SetsRanks) else None
    runs = at_once(asked, gpus, ranks=ranks)
    places = Places(folder / PLACES, runs, gpus)
    shutil.rmtree(places.folder, ignore_errors=True)
    each = f"{places.gpus_each} GPU(s)" if gpus else f"{max(1, usable_cores() // runs)} of {usable_cores()} cores"
    fewer = f" (of {asked} asked for: there are {len(gpus)} GPUs)" if runs < asked else ""
    say(f"{runs} members at once{fewer}, {each} each")
    return places


@contextlib.contextmanager
def _folder(line: CommandLine, config: Config, *, task: str, anew: bool, count: int) -> Iterator[Path]:
    """The sweep's folder, locked; that of an earlier run of the same sweep, if there is one. Raises ConfigError if it
    is something else: nothing is overwritten."""
    if task == "check":
        with tempfile.TemporaryDirectory(prefix="opsd-sweep-") as scratch:
            yield Path(scratch)
        return
    words = [override.text for override in line.overrides if not override.is_hydra]
    folder = _named_folder(line, config)
    if folder is None:
        before = None if anew else _same_sweep(typed_path(config.run.root), words)
        folder = before or typed_path(config.run.root) / time.strftime("sweep_%Y-%m-%d_%H-%M-%S")
    folder = folder.absolute()
    is_known = (folder / SWEEP).is_file() or (folder / MEMBERS).is_file()
    if folder.exists() and not is_known:
        raise ConfigError(f"{folder} exists and is never overwritten; give another run.name or hydra.sweep.dir")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with run_lock(RunFolder(folder)):
        if is_known:
            offer = "" if anew else "; --anew runs every member again"
            say(f"going on with {shell_path(folder)}, which an earlier run of this sweep has left{offer}")
        with writing(folder):
            (folder / SWEEP).write_text(
                json.dumps({"words": words, "opsd": __version__, "members": count}), encoding="utf-8"
            )
        try:
            yield folder
        finally:
            shutil.rmtree(folder / PLACES, ignore_errors=True)


def _named_folder(line: CommandLine, config: Config) -> Path | None:
    """The folder that was typed, as run.name or hydra.sweep.dir."""
    name = None if "run.name" in line.swept_keys else config.run.name
    if (typed := line.last_value("hydra.sweep.dir")) is not None:
        typed = re.sub(r"\$\{now:([^}]*)\}", lambda match: time.strftime(match[1]), typed)
        typed = typed.replace("${run.root}", config.run.root).replace("${run.name}", name or "sweep")
        return typed_path(typed)
    return None if name is None else typed_path(config.run.root) / name


def _same_sweep(root: Path, words: Sequence[str]) -> Path | None:
    """The newest sweep below a folder that the same words made."""
    for file in sorted(root.glob(f"sweep_*/{SWEEP}"), reverse=True):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            if json.loads(file.read_text(encoding="utf-8"))["words"] == list(words):
                return file.parent
    return None


def _lines(folder: Path) -> list[str]:
    file = folder / MEMBERS
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


def _job(line: CommandLine, member: Member, number: int) -> compose.Job:
    tree, typed = plain_tree(member.config), line.last_value("hydra.sweep.subdir")
    subfolder = None if typed is None else compose.subfolder_of(typed, tree, number=number, overrides=member.typed)
    return compose.Job(tree, number, member.typed, subfolder, member.choices)


def _defaults(line: CommandLine, way: str, sweeper: str) -> Iterator[str]:
    """What suits members of ours better than the plug-ins' own defaults, unless it was typed."""
    if sweeper == "optuna" and line.last_value("hydra.sweeper.direction") is None:
        yield "hydra.sweeper.direction=maximize"  # of an accuracy
    if way == "submitit_local" and line.last_value("hydra.launcher.timeout_min") is None:
        yield f"hydra.launcher.timeout_min={WEEK}"


def _best_trial(folder: Path, sweeper: str) -> Iterator[str]:
    """What the optimising sweeper found."""
    if sweeper != "optuna":
        return
    file = folder / TRIALS
    if not file.is_file():
        yield "optuna found no best trial: no trial ended with an accuracy"
        return
    found = plain_yaml(file.read_text(encoding="utf-8"))
    if isinstance(found, dict) and isinstance(found.get("best_params"), dict):
        best = " ".join(f"{key}={value}" for key, value in found["best_params"].items())
        yield f"optuna's best trial: {best}, accuracy {percent(found.get('best_value'))} ({shell_path(file)})"


def worst_code(codes: Iterable[int]) -> int:
    """The exit code of a sweep: 0 only if every member is done."""
    ended = set(codes)
    return next((int(code) for code in WORST_FIRST if code in ended), int(ExitCode.DONE))


def table_lines(results: Sequence[Result], folder: Path) -> list[str]:
    """One line per member, the best first: the swept settings, what it gained, retained and cost. Columns that no
    member has (retention, the teacher's prompt) are left out; a member that failed shows as much as it recorded."""
    summaries = [summarise(read_events(RunFolder(folder / result.name).events), command={}) for result in results]
    pairs = sorted(zip(results, summaries, strict=True), key=lambda pair: _rank(*pair))
    rows = [_row(result, summary, folder) for result, summary in pairs]
    columns = [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
    named = [{name if name != "member" else "": row[name] or "-" for name in columns} for row in rows]
    return aligned(named)


def _rank(result: Result, summary: dict[str, Any]) -> tuple[bool, float]:
    """The best accuracy first; what failed or was not measured last, in the order in which it was run."""
    after = summary["after"]
    return result.code != 0, -after["accuracy"] if after else math.inf


def _row(result: Result, summary: dict[str, Any], folder: Path) -> dict[str, str]:
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
        "folder": display_path(folder / result.name),
    }


def _shares(*evaluations: Event | None) -> str:
    """The accuracies that are known, from the first to the last."""
    return " -> ".join(percent(evaluation["accuracy"]) for evaluation in evaluations if evaluation)
