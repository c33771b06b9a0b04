"""What is asked of SLURM's own commands: submit a job, how it stands, queue it again, signal it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opsd_cli.launch.torchrun_slurm import VARIABLES
from opsd_cli.safety.terminal import escape_line
from opsd_cli.settings.errors import ConfigError, OutsideError

_PATIENCE_SECONDS = 60.0
_OUTSIDE = re.compile(
    r"contact|timed? ?out|temporar|connect|establish|lookup|communication|socket|credential|try again", re.IGNORECASE
)
"""Words of SLURM's about itself and not about the job."""
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_TIME_FORMAT")
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
AT_WORK = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "SUSPENDED", "STOPPED", "RESIZING")


@dataclass(frozen=True)
class JobState:
    """How a job stands, in SLURM's words."""

    name: str  # like RUNNING
    reason: str = ""  # why it waits
    nodes: str = ""

    @property
    def is_over(self) -> bool:
        return self.name not in (*WAITING, *AT_WORK)

    def __str__(self) -> str:
        about = self.nodes if self.name in AT_WORK else self.reason.strip("()")
        return self.name.lower().replace("_", " ") + (f" ({about})" if about and about != "None" else "")


GONE = JobState("GONE")
"""Of a job that SLURM has forgotten: it ended a while ago."""


def require_slurm() -> None:
    """Raises ConfigError where there are no commands of SLURM's."""
    if lacking := [command for command in ("sbatch", "squeue", "scancel") if shutil.which(command) is None]:
        raise ConfigError(
            f"launcher=slurm submits to SLURM, and {lacking[0]} is not on the PATH; type it on a login node of the "
            "cluster, or use launcher=local"
        )


def submit(words: Sequence[str]) -> str:
    """Run sbatch; returns the job's number. Raises ConfigError with SLURM's words where it refuses the job,
    OutsideError where it does not answer."""
    done = _run(words, environ=clean_environ(os.environ))
    job = done.stdout.strip().partition(";")[0]  # NUMBER, or NUMBER;CLUSTER
    if done.returncode == 0 and job.isdigit():
        return job
    said = escape_line(" ".join((done.stderr or done.stdout).split())) or f"exit code {done.returncode}"
    if "gres" in said:
        said += "; on a cluster without GPUs: launcher.device=cpu"
    raise (OutsideError if _OUTSIDE.search(said) else ConfigError)(f"sbatch refused the job: {said}")


def clean_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """Without what another job, torchrun or mpirun has left: sbatch hands its environment on, and the ranks would take
    it for theirs."""
    return {
        name: value
        for name, value in environ.items()
        if name in _KEPT or not (name.startswith(("SLURM_", "SLURMD_", "OPSD_SLURM_")) or name in VARIABLES)
    }


def state_of(job: str) -> JobState | None:
    """How a job stands; None where SLURM does not answer now."""
    done = _run(["squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T|%r|%N"])
    if done.returncode:
        return GONE if "Invalid job id" in done.stderr else None
    lines = done.stdout.strip().splitlines()
    return JobState(*lines[0].split("|", 2)) if lines else GONE


def facts_of(job: str) -> dict[str, str]:
    """What `scontrol show job` says, by name; empty where SLURM does not answer now."""
    done = _run(["scontrol", "--oneliner", "show", "job", job])
    return dict(re.findall(r"(\w+)=(\S*)", done.stdout)) if done.returncode == 0 else {}


def ask_to_save(job: str) -> bool:
    """SIGTERM to every rank of a job, and not to its batch script."""
    return _run(["scancel", "--signal=TERM", job]).returncode == 0


def requeue(job: str) -> str:
    """Queue a running job again, which ends this attempt; returns why that was refused, or ""."""
    done = _run(["scontrol", "requeue", job])
    return "" if done.returncode == 0 else " ".join((done.stderr or done.stdout).split()) or "no reason was given"


def _run(words: Sequence[str], *, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            words, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            check=False, timeout=_PATIENCE_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(list(words), 1, "", f"{words[0]}: no contact: {error}")
