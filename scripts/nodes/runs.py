"""Runs on the nodes and on this machine: one very short training, how it is started, watched, and compared."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import load_file

from nodes.network import Network, Node
from opsd_cli.run.events import read_events
from opsd_cli.run.folder import RunFolder

STEPS, SAVED_EVERY = 6, 2
WORDS = (
    "recipe=quickstart", f"train.steps={STEPS}", "train.problems_per_step=4", "train.micro_batch_tokens=256",
    "sampling.max_completion_tokens=16",
    "eval.problems=8", "eval.max_completion_tokens=16", f"eval.every={SAVED_EVERY}",
    "dataset.train_problems=40", "dataset.validation_problems=8", "dataset.test_problems=8",
    "dataset.retention_problems=4", "optim.warmup_steps=2", "loss.mask_truncated=false",
    f"checkpoint.every={SAVED_EVERY}", "launcher.device=cpu", "launcher.threads=1",
)  # fmt: skip
_MPIRUN = "launcher.runner_args=--allow-run-as-root"


@dataclass
class Command:
    """An opsd command that runs, on a node."""

    node: Node
    child: subprocess.Popen[bytes]
    folder: RunFolder
    said: Path  # what it says on stderr

    @property
    def pid(self) -> int:
        """This machine's number of the command itself; nsenter's child, not nsenter."""
        found = [pid for pid, words in self.node.processes().items() if "-m opsd_cli train" in words]
        return min(found)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float) -> int | None:
        """Its exit code, negative for a signal; None where it did not end in time, and was killed."""
        try:
            return self.child.wait(seconds)
        except subprocess.TimeoutExpired:
            self.send(9)
            self.child.wait(10)
            return None

    def last_line(self) -> str:
        """Its error, or else what it said last."""
        lines = [line for line in self.lines() if line.strip()]
        errors = [line.removeprefix("opsd: ") for line in lines if line.startswith("opsd: ")]
        return (errors or lines or [""])[-1]

    def lines(self) -> list[str]:
        return self.said.read_text(errors="replace").splitlines()


def start(network: Network, name: str, words: Sequence[str], *, node: Node, environ: Mapping[str, str] = {}) -> Command:
    """Start `opsd train` on a node; `--resume` among the words continues the run of this name."""
    root = shared(network)
    folder = RunFolder(root / name)
    if "--resume" in words:
        words = [word for given in words for word in ((given, str(folder.path)) if given == "--resume" else (given,))]
    else:
        words = [*words, f"run.root={root}", f"run.name={name}"]
    argv = [sys.executable, "-m", "opsd_cli", "train", *words]
    own = {"PATH": os.environ["PATH"], "HOME": str(network.folder), "LANG": "C.UTF-8", **environ}
    said = network.folder / f"{name}.said"
    with open(said, "wb") as file:
        child = subprocess.Popen(node.inside(*argv), env=own, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    return Command(node, child, folder, said)


def over(network: Network, runner: str, slots: int, *, hosts: Sequence[str] = ()) -> list[str]:
    """The words of a launch on the nodes, `slots` ranks on each."""
    names = hosts or [node.name for node in network.nodes[:2]]
    hostfile = network.folder / f"hostfile-{slots}-{'-'.join(names)}"
    hostfile.write_text("".join(f"{name} slots={slots}\n" for name in names))
    words = ["launcher=deepspeed", f"launcher.hostfile={hostfile}", f"launcher.runner={runner}"]
    return [*words, *typed_again(runner)]


def typed_again(runner: str) -> list[str]:
    """What a resume wants typed again."""
    return [_MPIRUN] if runner == "openmpi" else []


def shared(network: Network) -> Path:
    root = network.folder / "shared"
    root.mkdir(exist_ok=True)
    return root


def run_locally(network: Network, name: str, words: Sequence[str], *, ranks: int) -> RunFolder:
    """The same training on one node, by launcher=local."""
    command = start(network, name, [*WORDS, f"launcher.ranks={ranks}", *words], node=network.nodes[0])
    code = command.wait(600)
    if code != 0:
        raise RuntimeError(f"the local run {name} ended in {code}: {command.last_line()}")
    return command.folder


def largest_difference(one: RunFolder, other: RunFolder) -> float:
    """Of any weight of the two models; 0 where they are equal to the bit."""
    weights, others = (load_file(folder.model / "model.safetensors") for folder in (one, other))
    assert weights.keys() == others.keys()
    return max(float(abs(weights[name] - others[name]).max()) for name in weights)


def steps_done(folder: RunFolder) -> int:
    return max((event["step"] for event in read_events(folder.events) if event["kind"] == "step"), default=0)


def phase_of(folder: RunFolder, rank: int = 0) -> str:
    with contextlib.suppress(OSError):
        if found := re.match(r'\["([^"]*)"', (folder.logs / f"rank_{rank}.phase").read_text()):
            return found[1]
    return ""


def wait_until(condition: Callable[[], bool], command: Command, seconds: float = 240.0) -> bool:
    """Whether it became true while the command ran."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline or command.child.poll() is not None:
            return False
        time.sleep(0.02)
    return True
