"""The environment a rank is started with: its place among the ranks, its share of the cores, quiet libraries."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from opsd_cli.launch.devices import Device
from opsd_cli.launch.share import share_of
from opsd_cli.settings.errors import ConfigError

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
"""The folder from which `import opsd_cli` works: site-packages, or the root of a source tree."""


@dataclass(frozen=True)
class Place:
    """A rank's place among the others, and where they meet."""

    rank: int
    local_rank: int
    world: int
    local_world: int
    master_addr: str
    master_port: int


def usable_cores() -> int:
    """Cores this process may use: its affinity, lowered by the quota of its container."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def free_port(environ: Mapping[str, str]) -> int:
    """A TCP port of 127.0.0.1 that is free now. Of runs at once each takes another remainder: between the asking and
    the binding in a rank, another run's launcher cannot be given the same."""
    place, runs = share_of(environ)
    with contextlib.ExitStack() as probes:
        while True:
            probe = probes.enter_context(socket.socket())  # kept, so that the next one is another
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
            if port // 2 % runs == place:  # halved: Linux gives out odd ports alone while there are any
                return port


def threads_asked(environ: Mapping[str, str]) -> int:
    """What the user's OMP_NUM_THREADS asks for; 0 where it is not set. Of a list (`4,2`: threads of each level of
    nested parallel regions) the first. Raises ConfigError where it is no such list."""
    asked = environ.get("OMP_NUM_THREADS", "").strip()
    if not asked:
        return 0
    try:
        number = int(asked.split(",")[0])
    except ValueError:
        number = 0
    if number < 1:
        raise ConfigError(f"OMP_NUM_THREADS is {asked!r}; it must be a number of threads, or be unset")
    return number


def rank_environ(
    environ: Mapping[str, str], place: Place, *, device: Device, threads: int | None, beside: int = 0
) -> dict[str, str]:
    """The environment of one rank: `quiet_environ`, its place and its share of the cores, which `beside` processes want
    too. Variables that the user has set for threads, warnings and network interfaces win over our defaults."""
    _, runs = share_of(environ)
    processes = (place.local_world + beside) * runs
    share = threads or threads_asked(environ) or max(1, usable_cores() // processes)
    own = {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(place.world),
        "LOCAL_WORLD_SIZE": str(place.local_world),
        "MASTER_ADDR": place.master_addr,
        "MASTER_PORT": str(place.master_port),
        "OMP_NUM_THREADS": str(share),
        "RAYON_NUM_THREADS": str(share),  # of the tokenizer
    }
    is_one_machine = place.world == place.local_world and "lo" in {name for _, name in socket.if_nameindex()}
    # The host's own name may not resolve: on one machine the loopback interface works.
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if is_one_machine else {}
    return {**loopback, **quiet_environ(environ, device=device), **own}


def quiet_environ(environ: Mapping[str, str], *, device: Device) -> dict[str, str]:
    """`environ` for any process of a run: the chosen device, quiet libraries, our package and tools on the paths."""
    defaults = {
        "PYTHONWARNINGS": "ignore",
        "PYTHONFAULTHANDLER": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    }
    own = {
        "DS_ACCELERATOR": device,
        "TOKENIZERS_PARALLELISM": "true",
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8:backslashreplace",
        # DeepSpeed looks for ninja on PATH, and a virtual environment may be used without being activated.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), environ.get("PATH", os.defpath)]),
    }
    if device == "cpu":
        own["CUDA_VISIBLE_DEVICES"] = ""
        # Threads that spin while they wait for each other block another process that wants a core: a step took 2 to
        # 6 times longer on busy cores (docs/notes/lab-notes.md). A short spin costs little on free ones.
        defaults["GOMP_SPINCOUNT"] = "1000"
    if PACKAGE_ROOT.name not in ("site-packages", "dist-packages"):
        own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), environ.get("PYTHONPATH")]))
    return {**defaults, **environ, **own}
