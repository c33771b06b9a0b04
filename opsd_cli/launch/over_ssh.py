"""The launcher for several machines: DeepSpeed's own multi-node runner starts the ranks over ssh, MPI or SLURM, and one
local process stands for all of them."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from opsd_cli.launch.attempt import Prepared
from opsd_cli.launch.devices import Choice, Device, DeviceChoice, choose_ranks
from opsd_cli.launch.far_ranks import ATTEMPT, FarRanks
from opsd_cli.launch.launchers import Count, Seconds
from opsd_cli.launch.rank_environ import quiet_environ
from opsd_cli.launch.supervisor import RankProcess
from opsd_cli.run.folder import RunFolder
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.paths import typed_path
from opsd_cli.settings.plugin_files import words_for_ranks
from opsd_cli.settings.registry import plugin

REMOTE_RANK = Path(__file__).with_name("remote_rank.py")
_FORWARDED = (
    *("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"),
)
"""Variables that DeepSpeed's runners do not pass to other machines. Tokens are never put on a command line."""
_TOOLS = {"pdsh": "pdsh", "openmpi": "mpirun", "mpich": "mpirun", "impi": "mpirun", "slurm": "srun"}


def _ssh_options(lost_seconds: float) -> str:
    """Never ask, and notice a machine that is gone, later than the keepers of its ranks do, which can say more."""
    times = 3 + int(lost_seconds // 10)
    return f"-o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=10 -o ServerAliveCountMax={times}"


def _mpirun_words(lost_seconds: float) -> dict[tuple[str, ...], str]:
    """What mpirun is told unless launcher.runner_args has one of these words."""
    alive = {"time": int(lost_seconds) + 10, "intvl": 5, "probes": 3}  # its daemons would wait for minutes
    return {
        ("bind-to", "map-by"): "--bind-to none",  # it would tie each of two ranks to a single core
        ("plm_rsh_args",): f"--mca plm_rsh_args '{_ssh_options(lost_seconds)}'",
        ("oob_tcp_keepalive",): " ".join(f"--mca oob_tcp_keepalive_{name} {value}" for name, value in alive.items()),
    }


@plugin("launcher", "deepspeed")
class DeepSpeedLauncher:
    """Several machines through DeepSpeed's own multi-node runner, which needs a shared file system for run.root. It
    starts a keeper beside each rank: those listen to each other over the network, and to this command through the run
    folder, so that ranks end with whatever ends another rank, a machine, a link or the command. Played with pdsh and
    mpirun on two nodes of one machine (scripts/nodes.sh); mpich, impi and slurm: only the command's text."""

    hostfile: str  # lines `HOST slots=N`
    runner: Literal["pdsh", "openmpi", "mpich", "impi", "slurm"]
    runner_args: str  # passed to pdsh, mpirun or srun as they are
    master_port: Annotated[int, Field(ge=1024, le=65535)]
    device: DeviceChoice  # auto: cuda if torch can use a GPU of this machine; cuda: not checked here
    threads: Count | None  # OMP threads per rank; None: cores / ranks of the machine
    save_seconds: Seconds  # after a signal, for the ranks to save and end
    stall_seconds: Seconds | None  # without a sign of life from any rank; then all are ended; None: no limit
    lost_seconds: Annotated[
        float, Field(ge=5)
    ]  # without a word from a machine, or from the command; then all are ended

    @property
    def typed_only(self) -> dict[str, str]:
        """As `RunsWords` has it."""
        return {"launcher.runner_args": self.runner_args} if self.runner_args else {}

    def prepare(self, environ: Mapping[str, str], *, beside: int = 0) -> Prepared:
        """Raises ConfigError for an invalid host file, and where the runner's program is missing here."""
        hosts = read_hostfile(typed_path(self.hostfile).absolute())
        tool = _TOOLS[self.runner]
        if len(hosts) > 1 and shutil.which(tool, path=environ.get("PATH")) is None:
            raise ConfigError(
                f"launcher.runner={self.runner} needs {tool}, which is not on PATH here; install it, or give another "
                f"launcher.runner: {', '.join(name for name in _TOOLS if name != self.runner)}"
            )
        # A login node may lack the GPUs of the machines in the host file; each rank asks its own torch.
        choice = Choice(1, "cuda") if self.device == "cuda" else choose_ranks(None, self.device, environ=environ)

        def processes(folder: RunFolder, task: str, cwd: Path) -> list[RankProcess]:
            of_ranks = [host for host, slots in hosts.items() for _ in range(slots)]
            far = FarRanks(folder, of_ranks, lost_seconds=self.lost_seconds)
            told = {**environ, ATTEMPT: far.launch.attempt}
            argv = self.command(folder.path, task, hosts=hosts, device=choice.device, environ=told)
            here = quiet_environ(environ, device=choice.device)
            if self.runner == "pdsh":
                # What the user has there comes first, and wins.
                options = (environ.get("PDSH_SSH_ARGS_APPEND", ""), _ssh_options(self.lost_seconds))
                here["PDSH_SSH_ARGS_APPEND"] = " ".join(filter(None, options))
            return [RankProcess(0, argv, here, cwd, folder.logs / "deepspeed.log", "rank_*.error", far)]

        return Prepared(processes, choice.device, notes=choice.notes)

    def command(
        self, run: Path, task: str, *, hosts: Mapping[str, int], device: Device, environ: Mapping[str, str]
    ) -> tuple[str, ...]:
        """The words that start DeepSpeed's runner. The ranks meet at the first of the hosts."""
        master, port = next(iter(hosts)), str(self.master_port)
        options = [
            f"--hostfile={typed_path(self.hostfile).absolute()}",
            f"--launcher={self.runner}",
            f"--launcher_args={self._runner_args()}",
            f"--master_addr={master}",
            f"--master_port={port}",
            "--no_local_rank",
            "--no_ssh_check",  # of the first host alone, and with a traceback
        ]
        forwarded = [f"{name}={environ[name]}" for name in (*_FORWARDED, ATTEMPT) if name in environ]
        rank = [str(REMOTE_RANK), str(run), task, device, str(self.threads or 0), master, port]
        rank += [*forwarded, *words_for_ranks()]
        return (sys.executable, "-m", "deepspeed.launcher.runner", *options, *rank)

    def _runner_args(self) -> str:
        own = _mpirun_words(self.lost_seconds) if self.runner == "openmpi" else {}
        added = [words for names, words in own.items() if not any(name in self.runner_args for name in names)]
        return " ".join([*added, *filter(None, [self.runner_args])])


def read_hostfile(path: Path) -> dict[str, int]:
    """Host name -> ranks, from lines like `worker-1 slots=4`. Raises ConfigError with file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"launcher.hostfile {path} cannot be read: {error}") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", text)
        if text and (not match or match[1] in hosts):
            problem = "is a duplicate host" if match else "is not `HOST slots=N`"
            raise ConfigError(f"{path}:{number}: {text!r} {problem}")
        if match:
            hosts[match[1]] = int(match[2])
    if not hosts:
        raise ConfigError(f"launcher.hostfile {path} names no host; write one `HOST slots=N` per line")
    return hosts
