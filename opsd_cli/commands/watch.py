"""`opsd watch`: the screen of a run, or a table of several, from another terminal or after their end. Only reads the
run folders."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opsd_cli.commands.flags import Flags
from opsd_cli.settings.errors import ConfigError, ExitCode
from opsd_cli.settings.paths import typed_path

if TYPE_CHECKING:
    from opsd_cli.run.folder import RunFolder

HELP = """\
opsd watch               follow what is running under ./runs
opsd watch runs/NAME     follow a run that is going on, or see how one ended
opsd watch runs/SWEEP    the members of a sweep as a table: which run, wait, failed, are done
opsd watch A B ...       several runs or sweeps as one table

Ctrl-C stops watching, not the runs. RUN is a run folder, a sweep's folder, or a name under ./runs.
"""

ROOT = Path("runs")
SWEEP_FILES = ("sweep.json", "members.jsonl", "multirun.yaml")
_POLL_SECONDS = 0.1


def main(arguments: list[str]) -> int:
    """Show runs until they end; exit code 0 however they ended. Raises ConfigError if there is no such run."""
    from opsd_cli.run.folder import RunFolder

    words = Flags("watch").read(arguments).words
    folders = [_folder(word) for word in words] or _running()
    if len(folders) == 1 and (folders[0] / "config.yaml").is_file():
        return _follow_one(RunFolder(folders[0]))
    return _follow_several(folders)


def _folder(word: str) -> Path:
    """The run or the sweep that a word names."""
    from opsd_cli.insight.history import find_runs
    from opsd_cli.run.folder import open_run_folder

    for path in (typed_path(word), ROOT / word):
        is_sweep = any((path / name).is_file() for name in SWEEP_FILES) or (path.is_dir() and any(find_runs(path)))
        if is_sweep and not (path / "config.yaml").is_file():
            return path.absolute()
    return open_run_folder(word).path


def _running() -> list[Path]:
    """What runs under ./runs: sweeps as a whole, and single runs."""
    from opsd_cli.insight.history import find_runs
    from opsd_cli.run.folder import RunFolder
    from opsd_cli.run.lock import running_process

    folders = []
    for folder in sorted(ROOT.iterdir()) if ROOT.is_dir() else ():
        inside = [path for _, path in find_runs(folder)] if folder.is_dir() else []
        if any(running_process(RunFolder(path)) is not None for path in (folder, *inside)):
            folders.append(folder)
    if not folders:
        raise ConfigError(
            f"nothing is running under ./{ROOT}; name a run to see how it ended: opsd watch runs/NAME (opsd runs lists "
            "them)"
        )
    return [folder.absolute() for folder in folders]


def _follow_one(folder: RunFolder) -> int:
    from opsd_cli.launch.submit import JobWatch, last_job
    from opsd_cli.run.lock import running_process
    from opsd_cli.ui.display import open_display

    display = open_display(folder.path, replay=True)
    job = JobWatch(number) if (number := last_job(folder)) else None
    try:
        while True:
            is_running = running_process(folder) is not None  # before poll, so that its last events are read
            if job is not None and not is_running:  # it may wait in a queue
                if news := job.look():
                    display.note(news)
                is_running = not job.state.is_over
            display.poll()
            if not is_running:
                break
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        display.leave(f"no longer watching; {folder.name} goes on")
        return ExitCode.DONE
    ended = display.view.ended
    if ended is None:
        display.close(code=ExitCode.ENVIRONMENT, message=f"{folder.name} is not running and has not ended", tail=[])
    else:
        failed = ended["outcome"] == "failed"
        display.close(code=ended["exit_code"], message=ended["message"] if failed else "", tail=[])
    return ExitCode.DONE


def _follow_several(folders: Sequence[Path]) -> int:
    from opsd_cli.insight.history import find_runs, told_apart
    from opsd_cli.ui.fleet import LOOK_SECONDS, Fleet, FleetScreen

    def find() -> list[tuple[str, Path]]:
        found = [(folder, name, path) for folder in folders for name, path in find_runs(folder)]
        alone = len(folders) == 1
        names = {path: name if alone or folder == path else f"{folder.name}/{name}" for folder, name, path in found}
        return [(name, path) for path, name in told_apart(names).items()]

    single = folders[0] if len(folders) == 1 else None
    fleet = Fleet(find, title=single.name if single else "watching", sweep=single)
    screen = FleetScreen(fleet)
    try:
        while True:
            fleet.look()
            screen.show()
            if fleet.is_over:
                break
            time.sleep(LOOK_SECONDS)
    except KeyboardInterrupt:
        screen.close("no longer watching; the runs go on")
        return ExitCode.DONE
    screen.close()
    return ExitCode.DONE
