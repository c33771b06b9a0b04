"""The batch step of a job of launcher=slurm: starts the ranks with srun, passes the request to save on to them before
the time limit, and queues the job again where the run is to go on. `python -m opsd_cli.launch.slurm_job RUN RESTARTS
COMMAND ...`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from opsd_cli.launch.slurm import IN_JOB
from opsd_cli.launch.slurm_queue import ask_to_save, clean_environ, facts_of, requeue
from opsd_cli.launch.start import why_complete
from opsd_cli.launch.torchrun_slurm import VARIABLES
from opsd_cli.run.folder import RunFolder, read_command, read_config
from opsd_cli.run.lock import running_process
from opsd_cli.run.rank_errors import first_error
from opsd_cli.settings.errors import ExitCode

ATTEMPTS = "attempts.jsonl"
"""In the folder `slurm` of a run: how each attempt of its jobs ended."""
_POLL_SECONDS = 0.5
_IDLE_SECONDS = 2.0  # after the last rank has let go of the run, for srun to end
_ASK_SECONDS = 5.0  # between requests to save, until SLURM takes one
_REQUEUE_SECONDS = 60.0  # for SLURM to end this attempt after it has queued the job again
_FRUITLESS = 2  # attempts one after the other that saved nothing new, after which it is not tried again


@dataclass(frozen=True)
class JobAttempt:
    """How one attempt ended."""

    job: str
    restart: int  # how often SLURM had started the job again
    code: int
    why: str  # time limit, preemption, environment, or ""
    saved: str  # the newest checkpoint
    is_new: bool  # saved by this attempt


def main(argv: Sequence[str]) -> int:
    """Run the ranks once; returns the exit code of the job, or 0 where the job was queued again."""
    folder, restarts, command = RunFolder(Path(argv[0])), int(argv[1]), list(argv[2:])
    job, restart = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    train = read_config(folder)["train"]
    task = str(read_command(folder).get("task", "train"))
    if why := why_complete(folder, task=task, steps=train["steps"], seconds=train["seconds"]):
        say(why)
        return ExitCode.DONE
    say(f"job {job}, attempt {restart + 1}, on {os.environ.get('SLURM_JOB_NODELIST', 'this machine')}")
    before = newest_checkpoint(folder)
    was_asked, returned = run_ranks(folder, command, job, environ=environ_of_ranks(os.environ, job))
    error = first_error(folder)
    code = int(error.exit_code) if error is not None and returned else returned
    facts = facts_of(job)
    saved = newest_checkpoint(folder)
    why = reason_to_go_on(code, was_asked=was_asked, facts=facts)
    attempt = JobAttempt(job, restart, code, why, saved, saved != before)
    earlier = record(folder, attempt)
    if not why:
        return code
    if refusal := why_not_again(attempt, earlier, restarts=restarts):
        say(f"{why}; {refusal}")
        return code or int(ExitCode.ENVIRONMENT)
    return go_on(job, why, saved)


def run_ranks(folder: RunFolder, command: Sequence[str], job: str, *, environ: Mapping[str, str]) -> tuple[bool, int]:
    """Start srun and wait for its end. Returns whether the time limit came near, and the exit code."""
    arrived: set[int] = set()

    def note(number: int, frame: FrameType | None) -> None:
        arrived.add(number)

    # SLURM sends SIGTERM to the ranks as well: it is theirs to save, and this process stays until they have.
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, note)
    # A session of its own: what is sent to the group of the batch script would make srun kill the ranks.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=dict(environ), start_new_session=True)
    passed_on, next_try, idle_since = False, 0.0, time.monotonic()
    while (returned := _ended(process)) is None:
        now = time.monotonic()
        if signal.SIGUSR1 in arrived and not passed_on and now >= next_try:
            say("the time limit is near: asking the run to save")
            passed_on, next_try = ask_to_save(job), now + _ASK_SECONDS
        if signal.SIGTERM not in arrived or running_process(folder) is not None:
            idle_since = now
        elif now - idle_since >= _IDLE_SECONDS:
            # It waits half a minute for a lost machine, then ends the step of its number: of the next attempt too.
            process.kill()
    return signal.SIGUSR1 in arrived, 128 - returned if returned < 0 else returned


def _ended(process: subprocess.Popen[bytes]) -> int | None:
    """The exit code, None if it has not ended after a short while."""
    try:
        return process.wait(timeout=_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def environ_of_ranks(environ: Mapping[str, str], job: str) -> dict[str, str]:
    """The job's environment: without places that are not srun's, and with what makes a command a rank."""
    kept = {name: value for name, value in environ.items() if name.startswith("SLURM") or name not in VARIABLES}
    outside = clean_environ(kept)
    return {**{name: value for name, value in kept.items() if name.startswith("SLURM")}, **outside, IN_JOB: job}


def reason_to_go_on(code: int, *, was_asked: bool, facts: Mapping[str, str]) -> str:
    """Why a run that has ended like that is to go on by itself, or "": it is done, somebody stopped it, SLURM is ending
    the job already, or another try would not help."""
    if code == ExitCode.DONE or facts.get("JobState") != "RUNNING":
        return ""
    if code == ExitCode.TERMINATED and facts.get("PreemptTime", "None") != "None":
        return "preemption"
    if code == ExitCode.TERMINATED and was_asked:
        return "time limit"
    return "environment" if code == ExitCode.ENVIRONMENT else ""


def why_not_again(attempt: JobAttempt, earlier: Sequence[JobAttempt], *, restarts: int) -> str:
    """Why the job is not queued again, or ""."""
    if attempt.restart >= restarts:
        return f"not queued again: launcher.restarts is {restarts}"
    fruitless = [*earlier, attempt][-_FRUITLESS:]
    if len(fruitless) == _FRUITLESS and not any(each.is_new for each in fruitless):
        return (
            f"not queued again: the last {_FRUITLESS} attempts saved nothing new; look for the reason in this file, "
            "or give the job more time (launcher.time) or a smaller checkpoint.every"
        )
    return ""


def go_on(job: str, why: str, saved: str) -> int:
    """Queue the job again and wait to be ended by that."""
    refused = requeue(job)
    if refused:
        say(f"{why}; SLURM does not queue the job again: {refused}")
        return ExitCode.TERMINATED
    say(f"{why}; the job is queued again and goes on from {saved or 'the beginning'}")
    time.sleep(_REQUEUE_SECONDS)
    return ExitCode.DONE


def record(folder: RunFolder, attempt: JobAttempt) -> list[JobAttempt]:
    """Add an attempt to those of the same job, and return these."""
    file = folder.slurm / ATTEMPTS
    file.parent.mkdir(exist_ok=True)
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    with open(file, "a", encoding="utf-8") as out:
        out.write(json.dumps(asdict(attempt)) + "\n")
    return [before for before in (JobAttempt(**json.loads(line)) for line in lines) if before.job == attempt.job]


def newest_checkpoint(folder: RunFolder) -> str:
    """Its name, or ""."""
    pointer = folder.checkpoints / "latest"
    return pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""


def say(text: str) -> None:
    print(f"opsd: {time.strftime('%Y-%m-%d %H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
