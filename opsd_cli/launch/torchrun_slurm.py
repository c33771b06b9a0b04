"""Ranks started by torchrun, srun or mpirun: their place, read from environment variables, and how they agree on one
run folder without talking to each other."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

from opsd_cli.launch.devices import Device
from opsd_cli.launch.rank_environ import Place
from opsd_cli.run.folder import RunFolder, read_command
from opsd_cli.settings.errors import ConfigError, OutsideError

_WAIT_SECONDS = 120.0

_SLURM_STEP = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE")

_SOURCES = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),  # torchrun, and everything that imitates it
    tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE")),
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
    _SLURM_STEP,  # last: what mpirun starts inside a job inherits these from a daemon of its own
)
"""Variables for rank, local rank, ranks in all, ranks on this machine; the first complete row is used."""

VARIABLES = frozenset(name for names in _SOURCES for name in names) | {"MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE"}
"""What a process may take its place from."""

_FIRST_PORT, _PORTS = 15000, 15000
"""Where ranks of a SLURM job meet: below the ports that Linux gives to connections that leave a machine."""


def place_of(environ: Mapping[str, str]) -> Place:
    """The place of this process among the ranks. Raises ConfigError if no launcher's variables say it."""
    for names in _SOURCES:
        if all(environ.get(name, "").isdigit() for name in names[:3]):
            rank, local_rank, world = (int(environ[name]) for name in names[:3])
            local_world = _local_world(environ, names, world)
            is_one_machine = world == local_world
            return Place(rank, local_rank, world, local_world, *_meeting_point(environ, is_one_machine, names))
    if "SLURM_JOB_ID" in environ and "SLURM_STEP_ID" not in environ:
        raise ConfigError(
            f"launcher=env: this is the batch script of SLURM job {environ['SLURM_JOB_ID']}, and only srun starts "
            "ranks; put srun before the command, or use launcher=slurm, which writes the batch script itself"
        )
    raise ConfigError(
        "launcher=env expects ranks started by torchrun, srun or mpirun, but RANK, LOCAL_RANK and WORLD_SIZE are "
        "not set (nor SLURM_STEP_NUM_TASKS, OMPI_COMM_WORLD_RANK, PMI_RANK); start it with torchrun or srun, or use "
        "launcher=local"
    )


def _local_world(environ: Mapping[str, str], names: tuple[str, ...], world: int) -> int:
    """Ranks on this machine. SLURM lists them by node, `4(x2),3`; DeepSpeed and MPI call it LOCAL_SIZE."""
    if names is _SLURM_STEP:
        counts = _expanded(environ.get(names[3], ""))
        node = environ.get("SLURM_NODEID", "0")
        if node.isdigit() and int(node) < len(counts):
            return counts[int(node)]
    listed = (environ.get(name, "") for name in (names[3], "LOCAL_SIZE"))
    unknown = world if environ.get("MASTER_ADDR") in ("localhost", "127.0.0.1") else 1
    return next((int(count) for count in listed if count.isdigit() and int(count)), unknown)


def _expanded(counts: str) -> list[int]:
    """`4(x2),3` is [4, 4, 3]."""
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(count) for count, times in groups for _ in range(int(times or 1))]


def launch_id(environ: Mapping[str, str], place: Place) -> str:
    """A short name that all ranks of one launch derive alike and that another launch almost never has."""
    if job := environ.get("SLURM_JOB_ID"):
        return f"slurm{job}" + (f".{step}" if (step := environ.get("SLURM_STEP_ID", "0")) != "0" else "")
    facts = [environ.get("TORCHELASTIC_RUN_ID", ""), place.master_addr, str(place.master_port)]
    if place.world == place.local_world:
        facts.append(str(os.getppid()))  # torchrun's agent: the same for all ranks of one machine
    return hashlib.sha256(" ".join(facts).encode()).hexdigest()[:8]


def restarts(environ: Mapping[str, str]) -> str:
    """How often SLURM and torchrun have started these ranks again, after a requeue or a failure: `1.0`; empty if they
    have not."""
    counts = [environ.get(name, "0") or "0" for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")]
    return "" if set(counts) == {"0"} else ".".join(counts)


def attempt_id(environ: Mapping[str, str], place: Place) -> str:
    """`launch_id`, and after a restart which one it is: what an earlier attempt has left is not taken for its own."""
    again = restarts(environ)
    return launch_id(environ, place) + (f"+{again}" if again else "")


def is_attempt_of(recorded: object, launch: str) -> bool:
    """Whether an attempt's id, from a run folder, belongs to this launch."""
    return isinstance(recorded, str) and recorded.partition("+")[0] == launch


def await_first_rank(path: Path, attempt: str, *, seconds: float = _WAIT_SECONDS) -> RunFolder:
    """The run folder that rank 0 of this attempt makes at `path`. Raises OutsideError if it is not there in time."""
    folder, deadline = RunFolder(path), time.monotonic() + seconds
    while read_command(folder).get("launch") != attempt or not folder.config.exists():
        if time.monotonic() > deadline:
            raise OutsideError(
                f"rank 0 made no run folder {path} within {seconds:.0f} s; look at rank 0's message, and check "
                "that run.root is on a file system that every machine shares"
            )
        time.sleep(0.05)
    return folder


def refuse_other_device(folder: RunFolder, place: Place, device: Device) -> None:
    """Raise OutsideError if this rank would run on another kind of device than rank 0: they could not communicate."""
    first = read_command(folder).get("device", device)
    if first != device:
        raise OutsideError(
            f"rank {place.rank} would run on {device} and rank 0 runs on {first}; check torch on the machine "
            f"without a GPU, or set launcher.device=cpu on every rank"
        )


def _meeting_point(environ: Mapping[str, str], is_one_machine: bool, names: tuple[str, ...]) -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT, or else what follows from SLURM's variables or from a single machine."""
    step = environ.get("SLURM_STEP_NODELIST") if names is _SLURM_STEP else None  # under mpirun that of its daemons
    nodes = step or environ.get("SLURM_JOB_NODELIST")
    address = environ.get("MASTER_ADDR") or ("127.0.0.1" if is_one_machine else nodes and first_host(nodes))
    if not address:
        raise ConfigError("launcher=env: MASTER_ADDR is not set; set it to the host name of rank 0's machine")
    port = environ.get("MASTER_PORT") or str(_port_of_step(environ))
    if not port.isdigit():
        raise ConfigError(f"launcher=env: MASTER_PORT is {port!r}; it must be a port number")
    return address, int(port)


def _port_of_step(environ: Mapping[str, str]) -> int:
    """A port that every rank of a SLURM step derives alike, and another step beside it does not."""
    job, step = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_STEP_ID", "0")
    if not job.isdigit():
        return 29500
    return _FIRST_PORT + (int(job) + 997 * (int(step) if step.isdigit() else 0)) % _PORTS


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: `rack[1-2]n[003-005,7],login1` is rack1n003."""
    match = re.match(r"(?:[^,\[\]]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", match[0] if match else nodes)
