"""`opsd train` as a user types it, in a folder of its own: started, waited for, read back from what it left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import opsd_cli
from gpu_checks.check import Bench
from opsd_cli.run.events import read_events

POLL_SECONDS = 0.1


class Run:
    """One run folder under `bench.scratch`, and the command at work in it."""

    def __init__(self, bench: Bench, name: str) -> None:
        self.folder = bench.scratch / "runs" / name
        self.name, self.device, self.log = name, bench.device.type, bench.scratch / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, words: Sequence[str], **environment: str) -> Run:
        own = [*words, f"run.name={self.name}", f"run.root={self.folder.parent}", f"launcher.device={self.device}"]
        return self._start(["train", *own], environment)

    def resume(self, words: Sequence[str] = ()) -> Run:
        return self._start(["train", "--resume", str(self.folder), *words], {})

    def _start(self, arguments: Sequence[str], environment: dict[str, str]) -> Run:
        # What tells this process its place among ranks would make the command one rank of somebody's.
        ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        clean = {name: value for name, value in os.environ.items() if name not in ranks}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "opsd_cli", *arguments],
                env=clean | environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder.parents[1],
            )  # fmt: skip
        return self

    def wait(self) -> int:
        """The exit code, once the command has ended."""
        assert self.process is not None
        return self.process.wait()

    def wait_for(self, reached: Callable[[list[dict[str, Any]]], bool]) -> None:
        """Until its events say so, or it has ended."""
        assert self.process is not None
        while self.process.poll() is None and not reached(self.events()):
            time.sleep(POLL_SECONDS)

    def terminate(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def events(self) -> list[dict[str, Any]]:
        file = self.folder / "events.jsonl"
        return list(read_events(file)) if file.exists() else []

    def steps(self) -> list[int]:
        return [event["step"] for event in self.events() if event["kind"] == "step"]

    def accuracies(self) -> list[float]:
        """On held-out problems, in the order they were measured."""
        return [
            event["accuracy"]
            for event in self.events()
            if event["kind"] == "evaluation" and event["role"] == "student" and event["split"] != "retention"
        ]

    def weights(self) -> Tensor:
        """Of the exported model, one after another."""
        return flat_weights(self.folder / "model")

    def said(self) -> str:
        """The last thing the command printed."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else ""


def bundled_weights(name: str) -> Tensor:
    """Of a model that ships with the package."""
    return flat_weights(Path(opsd_cli.__file__).parent / "assets" / name)


def flat_weights(folder: Path) -> Tensor:
    """All weights of a saved model, in fp32, one after another."""
    stored = load_file(folder / "model.safetensors")
    return torch.cat([stored[name].float().flatten() for name in sorted(stored)])
