"""What the launcher's tests share: a small worker in place of the training, a screen that keeps what it is
told, and a config without Hydra.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

import opsd_cli.plugins  # noqa: F401
from opsd_cli.launch.launchers import LocalLauncher
from opsd_cli.launch.start import resume_run, start_run
from opsd_cli.preflight import config_of
from opsd_cli.settings.config import Config
from opsd_cli.settings.recipe_files import find_folders, written_out
from opsd_cli.settings.typed_config import PLUGINS, SECTIONS, typed_config

RECIPES = Path(__file__).parents[1] / "recipes"

WORKER = """
import json, os, pathlib, signal, sys, time, traceback
from opsd_cli.run.events import EVENTS, EventLog
from opsd_cli.run.folder import RunFolder
from opsd_cli.run.rank_errors import write_crash, write_error

def main(run, task):
    folder, rank = RunFolder(pathlib.Path(run)), int(os.environ["RANK"])
    keep = "LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS DS_ACCELERATOR".split()
    print(json.dumps({name: os.environ[name] for name in keep} | {"cwd": os.getcwd()}), flush=True)
    do = os.environ.get("OPSD_TEST_DO", "complete")
    if do == "refuse" and rank == int(os.environ["WORLD_SIZE"]) - 1:
        write_error(folder, rank, "dataset.path: no such file 'x'", exit_code=2)
        return 2
    if do == "refuse":
        time.sleep(60)
    if do == "silent":
        return 0
    if rank > 0:
        return 0
    log = EventLog(folder.events)
    log.progress("loading")
    log.write("run_started", **(dict.fromkeys(EVENTS["run_started"], 0) | {"task": task, "plan": []}))
    if do == "crash":
        try:
            raise RuntimeError("boom")
        except RuntimeError:
            print("about to crash", flush=True)
            write_crash(folder, rank, traceback.format_exc())
            return 1
    if do == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if do == "jump":  # the clock, an hour back
        now = time.time()
        time.time = lambda: now - 3600
    log.write("run_ended", outcome="completed", step=4, exit_code=0, message="")
    return 0

raise SystemExit(main(*sys.argv[1:3]))
"""


class Screen:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.quiet: bool | None = None
        self.closed: dict = {}
        self.left = ""

    def __call__(self, run: Path, *, quiet: bool) -> Screen:
        self.quiet = quiet
        return self

    def poll(self) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)

    def leave(self, text: str) -> None:
        self.left = text

    def close(self, *, code, message, tail) -> None:
        self.closed = {"code": code, "message": message, "tail": list(tail)}


def section(group: str, option: str) -> dict:
    return yaml.safe_load(written_out(find_folders(), group, option))


def config_in(root: Path, **run) -> Config:
    """The quickest config there is: the option files of the defaults list, the bundled model, generated problems."""
    numbers = yaml.safe_load((RECIPES / "config.yaml").read_text())
    options = {group: option for entry in numbers["defaults"] if entry != "_self_" for group, option in entry.items()}
    options |= {"model": "tiny", "dataset": "arithmetic"}
    known = (*SECTIONS, *PLUGINS)
    tree = {name: section(name, options[name]) if name in options else numbers[name] for name in known}
    tree["run"] |= {"root": str(root), **run}
    tree["train"]["steps"] = 4
    tree["optim"] |= {"schedule": "constant", "warmup_steps": 0}
    return typed_config(tree)


def on_cpu(config: Config, ranks: int | None = 1) -> Config:
    return replace(
        config, launcher=LocalLauncher(ranks=ranks, device="cpu", threads=None, save_seconds=5.0, stall_seconds=None)
    )


def start(config: Config, screen: Screen, *, task: str = "train", hint: str = "hint") -> int:
    return start_run(config, task=task, argv=["opsd", "train"], hint=hint, open_display=screen)


def resume(run: Path, screen: Screen, **changes) -> int:
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return resume_run(run, argv=["opsd", "--resume"], changes=changes, check=config_of, open_display=screen)
