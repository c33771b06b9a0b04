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

_SOURCES = (
    ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),  # torchrun, and everything that imitates it
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"),
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_TASKS_PER_NODE"),
    tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE")),
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
)
"""Variables for rank, local rank, ranks in all, ranks on this machine; the first complete row is used."""


def place_of(environ: Mapping[str, str]) -> Place:
    """The place of this process among the ranks. Raises ConfigError if no launcher's variables say it."""
    for names in _SOURCES:
        if all(environ.get(name, "").isdigit() for name in names[:3]):
            rank, local_rank, world = (int(environ[name]) for name in names[:3])
            # SLURM writes `4(x2),3`; DeepSpeed and MPI call it LOCAL_SIZE.
            counts = [re.match(r"[1-9]\d*", environ.get(name, "")) for name in (names[3], "LOCAL_SIZE")]
            unknown = world if environ.get("MASTER_ADDR") in ("localhost", "127.0.0.1") else 1
            local_world = next((int(match[0]) for match in counts if match), unknown)
            return Place(rank, local_rank, world, local_world, *_meeting_point(environ, world == local_world))
    raise ConfigError(
        "launcher=env expects ranks started by torchrun, srun or mpirun, but RANK, LOCAL_RANK and WORLD_SIZE are "
        "not set (nor SLURM_PROCID, OMPI_COMM_WORLD_RANK, PMI_RANK); start it with torchrun or srun, or use "
        "launcher=local"
    )


def launch_id(environ: Mapping[str, str], place: Place) -> str:
    """A short name that all ranks of one launch derive alike and that another launch almost never has."""
    if job := environ.get("SLURM_JOB_ID"):
        return f"slurm{job}" + (f".{step}" if (step := environ.get("SLURM_STEP_ID", "0")) != "0" else "")
    facts = [environ.get("TORCHELASTIC_RUN_ID", ""), place.master_addr, str(place.master_port)]
    if place.world == place.local_world:
        facts.append(str(os.getppid()))  # torchrun's agent: the same for all ranks of one machine
    return hashlib.sha256(" ".join(facts).encode()).hexdigest()[:8]


def is_restart(environ: Mapping[str, str]) -> bool:
    """True if torchrun or SLURM started these ranks again, after a failure or a requeue."""
    counts = (environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return any(count.isdigit() and int(count) > 0 for count in counts)


def await_first_rank(path: Path, launch: str, *, seconds: float = _WAIT_SECONDS) -> RunFolder:
    """The run folder that rank 0 of this launch makes at `path`. Raises OutsideError if it is not there in time."""
    folder, deadline = RunFolder(path), time.monotonic() + seconds
    while read_command(folder).get("launch") != launch or not folder.config.exists():
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


def _meeting_point(environ: Mapping[str, str], is_one_machine: bool) -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT, or else what follows from SLURM's variables or from a single machine."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    address = environ.get("MASTER_ADDR") or ("127.0.0.1" if is_one_machine else nodes and first_host(nodes))
    if not address:
        raise ConfigError("launcher=env: MASTER_ADDR is not set; set it to the host name of rank 0's machine")
    job = environ.get("SLURM_JOB_ID", "")
    port = environ.get("MASTER_PORT") or (str(20000 + int(job) % 20000) if job.isdigit() else "29500")
    if not port.isdigit():
        raise ConfigError(f"launcher=env: MASTER_PORT is {port!r}; it must be a port number")
    return address, int(port)


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: `gpu[003-005,7],login1` is gpu003."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
    return f"{match[1]}{match[2] or ''}{match[3]}" if match else nodes
