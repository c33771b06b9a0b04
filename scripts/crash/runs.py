"""Small real runs that are made to die and are continued. Owns the run that is repeated, how its ranks are started (one
process has everything imported and forks a child per rank, which is what makes a hundred crashes take minutes), and
what must be equal at the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from opsd_cli.launch.process_groups import dies_with_parent
from opsd_cli.rank import entry
from opsd_cli.run.events import read_events
from opsd_cli.run.folder import RunFolder, write_config
from opsd_cli.settings.compose import compose, resolve, session
from opsd_cli.settings.recipe_files import find_folders
from opsd_cli.settings.typed_config import plain_tree, typed_config
from opsd_cli.testing import fault_points

CHOICES = ("recipe=quickstart", "teacher=ema_fast")
NUMBERS = (
    "train.problems_per_step=4", "train.micro_batch_tokens=256", "sampling.max_completion_tokens=16",
    "eval.problems=4", "eval.max_completion_tokens=16", "samples.every=1",
    "dataset.train_problems=40", "dataset.validation_problems=8", "dataset.test_problems=8",
    "dataset.retention_problems=4", "optim.warmup_steps=2",
    "loss.mask_truncated=false", "guard.window=1", "guard.length_ratio=1.0001",
)  # fmt: skip
OF_AN_ATTEMPT = ("checkpoints/latest was missing", "there is no checkpoint to resume from")
"""Warnings that say where an attempt began."""
COUNTS = "reached.json"
OUT_OF_TIME = -99


def preload() -> None:
    """Import what a rank imports while it works, so that the forked ranks find it there."""
    import deepspeed  # noqa: F401
    import transformers  # noqa: F401
    from transformers.models.qwen3 import modeling_qwen3  # noqa: F401


def make_run(folder: Path, steps: int) -> RunFolder:
    """A run folder as the launcher leaves it before the ranks start. Four checkpoints, each with an evaluation."""
    with session(find_folders()):
        tree, problems = resolve(compose(CHOICES)[0])
    assert not problems, problems
    every = max(1, steps // 4)
    own = (f"train.steps={steps}", f"eval.every={every}", f"checkpoint.every={every}")
    for item in (*NUMBERS, *own):
        key, _, text = item.partition("=")
        section, leaf = key.split(".")
        tree[section][leaf] = json.loads(text)
    run = RunFolder(folder)
    run.logs.mkdir(parents=True)
    write_config(run, plain_tree(typed_config(tree)))
    return run


def copy_start(original: RunFolder, folder: Path) -> RunFolder:
    """A new run folder with the config of another."""
    run = RunFolder(folder)
    run.logs.mkdir(parents=True)
    shutil.copy(original.config, run.config)
    return run


def attempt(run: RunFolder, fault: str = "", *, ranks: int = 1, seconds: float = 120) -> list[int]:
    """One attempt at a run: the exit code of each rank, negative for a signal, OUT_OF_TIME if it had to be ended.

    When a rank dies of a signal the others are killed, as the supervisor does; those that fail must end by themselves.
    """
    port = free_port()
    children = {start_rank(run, fault, rank, ranks, port): rank for rank in range(ranks)}
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while children:
        done, status = os.waitpid(-1, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            codes[children.pop(done)] = code
        else:
            time.sleep(0.02)
        if time.monotonic() > deadline or any(code < 0 for code in codes.values()):
            for child, rank in children.items():
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                codes[rank] = OUT_OF_TIME if time.monotonic() > deadline else -signal.SIGKILL
            children = {}
    return [codes[rank] for rank in range(ranks)]


def start_rank(run: RunFolder, fault: str, rank: int, ranks: int, port: int) -> int:
    """Fork a child that is this rank; its id."""
    prepare = dies_with_parent()
    child = os.fork()
    if child:
        return child
    assert prepare is not None
    prepare()
    log = os.open(run.log_of(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), fault_points.VARIABLE: fault,
    }  # fmt: skip
    try:
        code = entry.main([str(run.path), "train"])
        if rank == 0 and code == 0:
            (run.path / COUNTS).write_text(json.dumps(fault_points.reached()))
    except BaseException:
        sys.excepthook(*sys.exc_info())  # the worker's own, as at the end of a process
        code = 1
    os._exit(code)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def differences(expected: RunFolder, got: RunFolder, *, stopped: bool = False) -> list[str]:
    """What is not as in the run that was never interrupted, in words. A run that was `stopped` has made a checkpoint
    more, and its event, and so has kept another one of the last two."""
    found = []
    weights, other = (load_file(run.model / "model.safetensors") for run in (expected, got))
    if weights.keys() != other.keys() or not all(weights[name].equal(other[name]) for name in weights):
        found.append("weights differ")
    for what, read in (("events", event_lines), ("samples", sample_lines), ("summary", summary_of)):
        was, now = read(expected), read(got)
        if stopped and what == "events":
            was, now = ([line for line in lines if line["kind"] != "checkpoint"] for lines in (was, now))
        if was != now:
            found.append(f"{what} differ: {first_difference(was, now)}")
    left = [str(path.relative_to(got.path)) for path in got.path.rglob("*") if is_leftover(path)]
    if left:
        found.append(f"left over: {', '.join(left)}")
    if not stopped and checkpoints_of(expected) != checkpoints_of(got):
        found.append(f"checkpoints: {checkpoints_of(got)}, not {checkpoints_of(expected)}")
    return found


def event_lines(run: RunFolder) -> list[dict[str, Any]]:
    """The events as they must repeat: without clock and memory, and without what belongs to an attempt rather than to
    the run (phases, the start of an attempt, which checkpoint it began from)."""
    lines = []
    for event in read_events(run.events):
        is_attempts = event["kind"] in ("progress", "run_started")
        if is_attempts or (event["kind"] == "warning" and event["message"].startswith(OF_AN_ATTEMPT)):
            continue
        event = {key: value for key, value in event.items() if key not in ("time", "seconds")}
        if "metrics" in event:
            event["metrics"] = timeless(event["metrics"])
        lines.append(event)
    return lines


def sample_lines(run: RunFolder) -> list[Any]:
    """The samples, each line parsed."""
    return [json.loads(line) for line in run.samples.read_text(encoding="utf-8").splitlines()]


def summary_of(run: RunFolder) -> list[Any]:
    """The summary without clock, memory and command."""
    summary = json.loads(run.summary.read_text(encoding="utf-8"))
    kept = {key: value for key, value in summary.items() if not key.endswith(("_seconds", "_gib")) and key != "command"}
    kept["run"] = None
    kept["last_step"] = timeless(kept["last_step"])
    return [strip_seconds(kept)]


def strip_seconds(value: Any) -> Any:
    """A tree without the keys that hold wall time."""
    if isinstance(value, dict):
        return {key: strip_seconds(item) for key, item in value.items() if key != "seconds"}
    return [strip_seconds(item) for item in value] if isinstance(value, list) else value


def timeless(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics that must repeat."""
    clocked = ("time/", "memory/", "compute/", "tokens/per_second")
    return {name: value for name, value in metrics.items() if not name.startswith(clocked)}


def first_difference(was: list[Any], now: list[Any]) -> str:
    """The first line that differs, short."""
    for number, (old, new) in enumerate(zip(was, now, strict=False), start=1):
        if old != new:
            return f"line {number} is {str(new)[:120]}, not {str(old)[:120]}"
    return f"{len(now)} lines, not {len(was)}"


def is_leftover(path: Path) -> bool:
    """Whether a file or folder is half of something."""
    return path.suffix in (".part", ".new", ".old") or ".tmp-" in path.name


def checkpoints_of(run: RunFolder) -> list[str]:
    """What lies in checkpoints/."""
    return sorted(path.name for path in run.checkpoints.iterdir())
