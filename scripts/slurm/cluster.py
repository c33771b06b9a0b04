"""A SLURM cluster on this machine: slurmctld and munged on a head, slurmd on nodes, each a set of Linux namespaces with
its own name, processes and network, joined by a bridge that exists nowhere else. Ends with the process that made it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from opsd_cli.launch.process_groups import dies_with_parent

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare", "nsenter", "ip", "mount")
NETWORK = "10.77.0"
CPUS = 4
_START_SECONDS = 30.0
_SBIN = ("/usr/sbin", "/sbin", "/usr/local/sbin")
_INSIDE = "OPSD_CLUSTER_INSIDE"
_NAMESPACES = ("--pid", "--net", "--mount", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc")

CONFIG = """\
ClusterName=opsd
SlurmctldHost=head({network}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait={kill_wait}
MinJobAge=600
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL Default=NO MaxTime=60 PriorityTier=9 PreemptMode=OFF
"""


def missing_tools() -> list[str]:
    """What this machine lacks for a cluster: programs, or root."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *_SBIN])
    lacking = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    return [*(["root"] if os.geteuid() else []), *lacking]


def inside_namespaces(arguments: Sequence[str]) -> int | None:
    """Run this program again as the first process of namespaces of its own and return its exit code; None if it is that
    already. Whatever it starts ends with it, it ends with this process, and no address, mount or host name of the
    machine changes."""
    if os.environ.get(_INSIDE):
        return None
    environ = os.environ | {_INSIDE: "1", "PATH": os.pathsep.join([os.environ.get("PATH", os.defpath), *_SBIN])}
    # unshare itself takes no SIGTERM; killed, it takes its child with it.
    words = ["unshare", *_NAMESPACES, sys.executable, *arguments]
    process = subprocess.Popen(words, env=environ, preexec_fn=dies_with_parent())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: process.kill())
    return process.wait()


class Cluster:
    """A running cluster. `root` holds its configuration, logs and state."""

    def __init__(self, root: Path, *, nodes: int, kill_wait: int, grace: int) -> None:
        self.root = root
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self._inits: dict[str, subprocess.Popen[bytes]] = {}
        self._daemons: list[subprocess.Popen[bytes]] = []
        lines = [
            f"NodeName={name} NodeAddr={self._address(name)} CPUs={CPUS} RealMemory=16000 State=UNKNOWN"
            for name in self.names
        ]
        for folder in ("state", "spool"):
            (root / folder).mkdir()
        text = CONFIG.format(network=NETWORK, root=root, nodes="\n".join(lines), kill_wait=kill_wait, grace=grace)
        (root / "slurm.conf").write_text(text)
        os.environ["SLURM_CONF"] = str(root / "slurm.conf")

    def start(self) -> None:
        """Head and nodes; returns when the scheduler calls every node idle. Raises RuntimeError otherwise."""
        _run("hostname", "head")
        _run("ip", "link", "set", "lo", "up")
        _run("ip", "link", "add", "br0", "type", "bridge")
        _run("ip", "addr", "add", f"{NETWORK}.1/24", "dev", "br0")
        _run("ip", "link", "set", "br0", "up")
        hosts = ["127.0.0.1 localhost", f"{NETWORK}.1 head", *(f"{self._address(name)} {name}" for name in self.names)]
        (self.root / "hosts").write_text("\n".join(hosts) + "\n")
        _run("mount", "--bind", str(self.root / "hosts"), "/etc/hosts")
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        own = [f"--{what}={self.root}/munge.{what}" for what in ("socket", "seed-file", "pid-file", "log-file")]
        self._start(["munged", "--foreground", "--force", f"--key-file={key}", *own], "munged")
        self._start(["slurmctld", "-D"], "slurmctld")
        for name in self.names:
            self.start_node(name)
        self.wait_for(lambda: self.states() == dict.fromkeys(self.names, "idle"), "idle nodes")

    def start_node(self, name: str) -> None:
        """A machine: namespaces with one first process, a cable to the bridge, and slurmd."""
        init = subprocess.Popen(["unshare", *_NAMESPACES, "sh", "-c", f"hostname {name}; exec sleep infinity"])
        self._inits[name] = init
        self.wait_for(lambda: self._output_of(name, "hostname") == name, f"node {name}")
        inside = _child_of(init.pid)
        _run("ip", "link", "add", f"to_{name}", "type", "veth", "peer", "name", "eth0", "netns", str(inside))
        _run("ip", "link", "set", f"to_{name}", "master", "br0", "up")
        for words in (
            ("ip", "link", "set", "lo", "up"),
            ("ip", "addr", "add", f"{self._address(name)}/24", "dev", "eth0"),
            ("ip", "link", "set", "eth0", "up"),
        ):
            _run(*self.on(name, *words))
        self._start(self.on(name, "slurmd", "-D", "-N", name), f"slurmd-{name}")

    def stop_node(self, name: str) -> None:
        """Pull the plug: every process of the node is killed and its cable is gone."""
        init = self._inits.pop(name)
        os.kill(_child_of(init.pid), signal.SIGKILL)
        init.wait()
        subprocess.run(["ip", "link", "delete", f"to_{name}"], stderr=subprocess.DEVNULL, check=False)

    def on(self, name: str, *words: str) -> list[str]:
        """The words that run a command on a node."""
        return ["nsenter", "--all", f"--target={_child_of(self._inits[name].pid)}", *words]

    def states(self) -> dict[str, str]:
        """What the scheduler says of each node."""
        lines = output_of("sinfo", "-h", "-N", "-p", "low", "-o", "%N %T").splitlines()
        return dict(line.split(maxsplit=1) for line in lines)

    def wait_for(self, is_so: Callable[[], bool], what: str, *, seconds: float = _START_SECONDS) -> None:
        """Raises RuntimeError, with the ends of the logs, if it does not become so in time."""
        deadline = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > deadline:
                raise RuntimeError(f"no {what} within {seconds:.0f} s\n{self.logs()}")
            time.sleep(0.1)

    def logs(self, lines: int = 15) -> str:
        """The ends of the daemons' logs."""
        files = [*sorted(self.root.glob("*.log")), self.root / "munged.out", self.root / "slurmctld.out"]
        files = [file for file in files if file.exists()]
        ends = ["\n".join(file.read_text(errors="replace").splitlines()[-lines:]) for file in files]
        return "\n".join(f"--- {file.name}\n{end}" for file, end in zip(files, ends, strict=True) if end)

    def close(self) -> None:
        for process in (*self._daemons, *self._inits.values()):
            process.kill()
            process.wait()

    def _address(self, name: str) -> str:
        return f"{NETWORK}.{10 + int(name[1:])}"

    def _output_of(self, name: str, *words: str) -> str:
        try:
            return output_of(*self.on(name, *words)).strip()
        except IndexError:  # its first process has not been born
            return ""

    def _start(self, words: Sequence[str], name: str) -> None:
        with open(self.root / f"{name}.out", "ab") as out:
            self._daemons.append(subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out))


@contextlib.contextmanager
def cluster(*, nodes: int = 2, kill_wait: int = 30, grace: int = 30) -> Iterator[Cluster]:
    """A cluster in namespaces that were entered. Raises RuntimeError if it does not come up."""
    with tempfile.TemporaryDirectory(prefix="opsd-slurm-") as root:
        made = Cluster(Path(root), nodes=nodes, kill_wait=kill_wait, grace=grace)
        try:
            made.start()
            yield made
        finally:
            made.close()


def output_of(*words: str) -> str:
    """What a command prints; its complaints go with it where it fails."""
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else done.stdout + done.stderr


def _child_of(process: int) -> int:
    """The process that an `unshare --fork` has started."""
    return int(Path(f"/proc/{process}/task/{process}/children").read_text().split()[0])


def _run(*words: str) -> None:
    subprocess.run(words, check=True)
