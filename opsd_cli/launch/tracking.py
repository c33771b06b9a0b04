"""The process that sends a run to a tracker while it goes on. It only reads the run folder: nothing that happens to it
touches the training, and how it ended is told in a line."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from opsd_cli.run.folder import RunFolder, shell_path
from opsd_cli.settings.config import TrackSettings
from opsd_cli.settings.errors import ConfigError

FOLLOWER = ("-P", "-m", "opsd_cli.insight.track")  # -P: a file wandb.py of the working folder is not the package
PATIENCE_SECONDS = 30.0
"""How long a run that has ended waits for what is left to be sent."""


def require_tracker(kind: str) -> None:
    """Raise ConfigError if the tracker's package is not installed."""
    if kind != "none" and find_spec(kind) is None:
        raise ConfigError(f"track={kind} needs the package {kind}: pip install {kind} (or opsd-cli[{kind}])")


@contextlib.contextmanager
def tracked(folder: RunFolder, settings: TrackSettings, *, note: Callable[[str], None]) -> Iterator[None]:
    """Send the run to a tracker for the length of the block; afterwards `note` one line if that did not work."""
    if settings.to == "none":
        yield
        return
    log = folder.logs / f"track_{settings.to}.log"
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, *FOLLOWER, str(folder.path), settings.to, settings.project],
            stdin=subprocess.PIPE, stdout=output, stderr=output,
            # Ctrl-C is for the run: what is left is sent after it has stopped. The GPUs are the run's too.
            start_new_session=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        yield
    finally:
        note_of = _outcome(process, settings.to, log)
        if note_of:
            note(note_of)


def _outcome(process: subprocess.Popen[bytes], kind: str, log: Path) -> str:
    assert process.stdin is not None
    process.stdin.close()  # its sign that the run has ended
    try:
        code = process.wait(timeout=PATIENCE_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        return f"{kind} is still being sent what is left, by process {process.pid}; it ends by itself"
    if code == 0:
        return ""
    return f"{kind} was not sent everything (exit code {code}): see {shell_path(log)}; the run itself is not affected"
