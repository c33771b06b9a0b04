"""What is done to runs in a cluster, and what must have come of each: one function for each line of the table."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from opsd_cli.run.events import read_events
from opsd_cli.run.folder import RunFolder
from slurm.cluster import Cluster, output_of

OPSD = [sys.executable, "-m", "opsd_cli"]
SHORT = ["recipe=quickstart", "eval.before=false", "eval.problems=8", "dataset.retention_problems=0"]
SHORT += ["dataset.train_problems=200", "train.problems_per_step=4", "launcher.device=cpu", "launcher.threads=1"]
STEPS = 30
JOB = ["launcher=slurm", "launcher.nodes=2", f"train.steps={STEPS}", "optim.schedule=constant"]
_PATIENCE_SECONDS = 600.0


@dataclass(frozen=True)
class World:
    """Where the runs of a check are."""

    cluster: Cluster
    runs: Path

    def folder(self, name: str) -> RunFolder:
        return RunFolder(self.runs / name)

    def train(self, name: str, *words: str, by: Sequence[str] = ()) -> subprocess.Popen[str]:
        """Start `opsd train`, as it is or by srun; what it prints goes to NAME.out beside the runs."""
        own = [f"run.name={name}", f"run.root={self.runs}"]
        return self.start(name, [*by, *OPSD, "train", *SHORT, *words, *own])

    def start(self, name: str, words: Sequence[str]) -> subprocess.Popen[str]:
        with open(self.runs / f"{name}.out", "a", encoding="utf-8") as out:
            return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, text=True, cwd=self.runs)

    def submit(self, name: str, *words: str) -> subprocess.Popen[str]:
        return self.train(name, *JOB, *words)

    def steps(self, name: str) -> list[int]:
        return [event["step"] for event in read_events(self.folder(name).events) if event["kind"] == "step"]

    def wait_for_step(self, name: str, step: int) -> None:
        self.until(lambda: any(done >= step for done in self.steps(name)), f"step {step} of {name}")

    def until(self, is_so: Callable[[], bool], what: str) -> None:
        self.cluster.wait_for(is_so, what, seconds=_PATIENCE_SECONDS)

    def job(self, name: str) -> str:
        return json.loads((self.folder(name).slurm / "jobs.jsonl").read_text().splitlines()[-1])["job"]

    def attempts(self, name: str) -> list[str]:
        """Why each attempt of the jobs of a run ended, as the batch step has recorded it."""
        file = self.folder(name).slurm / "attempts.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [attempt["why"] or str(attempt["code"]) for attempt in map(json.loads, lines)]

    def start_again_now(self, name: str) -> None:
        """A job that was queued again waits two minutes; as its owner may, have it wait no longer."""
        job = self.job(name)
        self.until(lambda: "PENDING" in output_of("squeue", "-h", "-j", job, "-o", "%T"), f"job {job} queued again")
        output_of("scontrol", "update", f"JobId={job}", "StartTime=now")

    def ended(self, process: subprocess.Popen[str]) -> int:
        """Its exit code; -1 if it is still there when patience ends."""
        try:
            return process.wait(timeout=_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return -1

    def result(self, name: str) -> str:
        """What a complete run has learnt: its steps, and the loss of the last one to the last digit."""
        events = read_events(self.folder(name).events)
        steps = [event for event in events if event["kind"] == "step"]
        if not steps or events[-1]["kind"] != "run_ended" or events[-1]["outcome"] != "completed":
            return f"not complete: {events[-1]['kind'] if events else 'no events'}"
        once = [event["step"] for event in steps] == list(range(1, len(steps) + 1))
        loss = next(value for key, value in steps[-1]["metrics"].items() if key.startswith("loss"))
        return f"{len(steps)} steps{'' if once else ' (not each once)'}, loss {loss:.9g}"

    def kill_rank(self, name: str, rank: int) -> None:
        """kill -9 to the process of one rank, not to the opsd that watches over it."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                environ = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            is_rank = b"opsd_cli.rank" in words and str(self.folder(name).path).encode() in words
            if is_rank and f"RANK={rank}".encode() in environ:
                os.kill(int(folder.name), signal.SIGKILL)
                return
        raise RuntimeError(f"rank {rank} of {name} is not there")


def smallest(world: World) -> str:
    code = world.ended(world.submit("smallest", "train.steps=2", "eval.problems=0"))
    return f"exit {code}, {world.result('smallest').partition(',')[0]}"


def array(world: World) -> str:
    """A sweep as an array of one's own: every task is a run, and one of them loses its rank and goes on."""
    words = [*OPSD, "train", *SHORT, "launcher=env", f"run.root={world.runs}", "train.steps=10", "checkpoint.every=2"]
    own = "run.seed=$SLURM_ARRAY_TASK_ID run.name=seed_$SLURM_ARRAY_TASK_ID"
    wrap = f"srun {shlex.join(words)} {own} || scontrol requeue $SLURM_JOB_ID"
    options = ["--parsable", "--array=1-3%2", "--requeue", "--ntasks=1", f"--output={world.runs}/array-%a.out"]
    job = output_of("sbatch", *options, f"--wrap={wrap}").strip()
    world.wait_for_step("seed_2", 4)
    world.kill_rank("seed_2", 0)
    task = output_of("squeue", "-h", "-j", f"{job}_2", "-o", "%A").strip()
    world.until(lambda: "PENDING" in output_of("squeue", "-h", "-j", f"{job}_2", "-o", "%T"), "task 2 queued again")
    output_of("scontrol", "update", f"JobId={job}_2", "StartTime=now")
    world.until(lambda: not output_of("squeue", "-h", "-j", job, "-o", "%T").strip(), "the end of the array")
    ends = [world.result(f"seed_{number}").partition(",")[0] for number in (1, 2, 3)]
    return f"{', '.join(ends)}{'' if task else ' (no task)'}"


def srun_one_node(world: World) -> str:
    return _by_srun(world, "srun_1x2", "-N1", "-n2")


def srun_two_nodes(world: World) -> str:
    return _by_srun(world, "srun_2x1", "-N2", "-n2")


def srun_two_by_two(world: World) -> str:
    return _by_srun(world, "srun_2x2", "-N2", "-n4")


def _by_srun(world: World, name: str, *shape: str) -> str:
    code = world.ended(world.train(name, "launcher=env", "train.steps=3", by=["srun", *shape]))
    ranks = next((e["ranks"] for e in read_events(world.folder(name).events) if e["kind"] == "run_started"), 0)
    return f"exit {code}, {ranks} ranks, {world.result(name).partition(',')[0]}"


def srun_rank_killed(world: World) -> str:
    process = world.train("srun_killed", "launcher=env", f"train.steps={STEPS}", by=["srun", "-N2", "-n2"])
    world.wait_for_step("srun_killed", 3)
    world.kill_rank("srun_killed", 1)
    code = world.ended(process)
    said = read_events(world.folder("srun_killed").events)[-1].get("message", "")
    return f"exit {code}, {said.partition(';')[0]}"


def left_alone(world: World) -> str:
    code = world.ended(world.submit("alone"))
    return f"exit {code}, {world.result('alone')}"


def rank_killed(world: World) -> str:
    process = world.submit("killed", "checkpoint.every=5")
    world.wait_for_step("killed", 7)
    world.kill_rank("killed", 1)
    world.start_again_now("killed")
    return _ended(world, "killed", process)


def time_limit(world: World) -> str:
    process = world.submit("limit", "launcher.time=0:02:00", "launcher.signal_seconds=30", "train.steps=2000")
    world.until(lambda: "time limit" in world.attempts("limit"), "a time limit")
    world.start_again_now("limit")
    saved = len(world.steps("limit"))
    process.send_signal(signal.SIGINT)  # leaves the job alone
    left = world.ended(process)
    world.wait_for_step("limit", saved + 1)
    output_of("scancel", world.job("limit"))
    world.until(lambda: len(world.attempts("limit")) == 2, "the end of the job")
    steps = world.steps("limit")
    once = "each once" if steps == list(range(1, len(steps) + 1)) else f"not each once: {steps}"
    return f"{', '.join(world.attempts('limit'))}; steps {once}; Ctrl-C while following: exit {left}"


def preemption(world: World) -> str:
    process = world.submit("preempted", "launcher.partition=low")
    world.wait_for_step("preempted", 5)
    output_of("sbatch", "--partition=high", "--nodes=2", "--ntasks=8", "--output=/dev/null", "--wrap=sleep 5")
    world.start_again_now("preempted")
    return _ended(world, "preempted", process)


def cancelled(world: World) -> str:
    process = world.submit("cancelled")
    world.wait_for_step("cancelled", 5)
    output_of("scancel", world.job("cancelled"))
    code = world.ended(process)
    again = world.ended(world.start("cancelled", [*OPSD, "train", "--resume", str(world.folder("cancelled").path)]))
    return f"exit {code}, resumed: exit {again}, {world.result('cancelled')}"


def node_failed(world: World) -> str:
    process = world.submit("node", "checkpoint.every=5")
    world.wait_for_step("node", 7)
    world.cluster.stop_node("n2")
    world.until(lambda: world.cluster.states()["n2"].startswith("down"), "n2 down")
    world.cluster.start_node("n2")  # SLURM queues the job again by itself
    return _ended(world, "node", process)


def complete(world: World) -> str:
    job, before = world.job("alone"), world.folder("alone").events.read_bytes()
    said = output_of("scontrol", "requeue", job).strip()
    world.start_again_now("alone")
    world.until(lambda: "COMPLETED" in output_of("squeue", "-h", "-j", job, "-t", "all", "-o", "%T"), "its end")
    log = (world.folder("alone").slurm / f"job-{job}.log").read_text()
    same = world.folder("alone").events.read_bytes() == before
    return (
        f"{said or 'queued again'}: {'nothing was run' if same else 'it ran'}, {log.count('is complete')} line says so"
    )


def _ended(world: World, name: str, process: subprocess.Popen[str]) -> str:
    code = world.ended(process)
    return f"{', '.join(world.attempts(name))}; exit {code}, {world.result(name)}"


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    what: str
    run: Callable[[World], str]  # does it, and says what was seen
    expects: Callable[[World], str]  # what is to be seen


def _as_alone(before: str) -> Callable[[World], str]:
    return lambda world: f"{before}, {world.result('alone')}"


CHECKS = {
    check.run.__name__: check
    for check in (
        Check("launcher=slurm, two steps", smallest, lambda world: "exit 0, 2 steps"),
        Check("srun, two ranks on a node", srun_one_node, lambda world: "exit 0, 2 ranks, 3 steps"),
        Check("srun, two nodes", srun_two_nodes, lambda world: "exit 0, 2 ranks, 3 steps"),
        Check("srun, two nodes with two ranks each", srun_two_by_two, lambda world: "exit 0, 4 ranks, 3 steps"),
        Check(
            "srun: kill -9 to a rank",
            srun_rank_killed,
            lambda world: "exit 3, rank 1: the process was killed by SIGKILL",
        ),
        Check("launcher=slurm, left alone", left_alone, lambda world: f"exit 0, {world.result('alone')}"),
        Check("kill -9 to a rank", rank_killed, _as_alone("environment, 0; exit 0")),
        Check(
            "the time limit comes near",
            time_limit,
            lambda world: "time limit, 143; steps each once; Ctrl-C while following: exit 0",
        ),
        Check("a job of higher priority", preemption, _as_alone("preemption, 0; exit 0")),
        Check("scancel, then --resume", cancelled, _as_alone("exit 143, resumed: exit 0")),
        Check("a node loses power", node_failed, _as_alone("3, 0; exit 0")),
        Check("an array of three, a rank killed", array, lambda world: "10 steps, 10 steps, 10 steps"),
        Check(
            "a complete run is queued again",
            complete,
            lambda world: "queued again: nothing was run, 1 line says so",
        ),
    )
}
"""By name; the later ones compare with `left_alone`, and `complete` queues its job again."""
