"""Nodes that are namespaces: each has its own network, host name, mounts and processes, and an sshd; a switch joins
them. Killing a node's first process ends all its others, and the kernel does that when this process dies."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opsd_cli.launch.process_groups import dies_with_parent

INTERFACE = "net0"  # of each node: not eth0, which DeepSpeed and many scripts suppose
_FIRST_PROCESS = "sleep infinity & while :; do wait -n || :; sleep 1; done"  # reaps orphans, as an init does

_SSH_CONFIG = """\
Host *
  IdentityFile {keys}/user
  IdentitiesOnly yes
  UserKnownHostsFile {keys}/known_hosts
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  LogLevel ERROR
"""
_SSHD_CONFIG = """\
HostKey {keys}/host
AuthorizedKeysFile {keys}/user.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
"""


@dataclass
class Node:
    """One node. `pid` is the host's number of its first process."""

    name: str
    address: str
    holder: subprocess.Popen[bytes]
    pid: int
    folder: Path
    sshd: subprocess.Popen[bytes] | None = None

    def inside(self, *argv: str) -> list[str]:
        """The command that runs `argv` on this node."""
        return ["nsenter", "-t", str(self.pid), "-n", "-m", "-u", "-i", "-p", f"--wd={os.getcwd()}", "--", *argv]

    def run(self, script: str) -> str:
        """Run a shell script on this node; its output."""
        done = subprocess.run(self.inside("bash", "-ec", script), capture_output=True, text=True, timeout=30)
        if done.returncode:
            raise RuntimeError(f"{self.name}: {script}: {done.stderr.strip()}")
        return done.stdout

    def start_sshd(self, environ: Mapping[str, str] | None = None) -> None:
        """Listen for ssh; whatever is started over it has `environ`."""
        self.stop_sshd()
        text = _SSHD_CONFIG.format(keys=self.folder / "keys")
        if environ:
            text += "SetEnv " + " ".join(f'"{name}={value}"' for name, value in environ.items()) + "\n"
        config = self.folder / f"sshd-{self.name}"
        config.write_text(text)
        log = open(self.folder / f"sshd-{self.name}.log", "ab")  # noqa: SIM115  # the child's
        sshd = str(shutil.which("sshd"))
        self.sshd = subprocess.Popen(
            self.inside(sshd, "-D", "-e", "-f", str(config)), stderr=log, preexec_fn=dies_with_parent()
        )
        self.wait_for(lambda: ":22 " in self.run("ss -Hltn 'sport = :22' || true"), "sshd to listen")

    def stop_sshd(self) -> None:
        """End sshd with its sessions, not what was started in them."""
        for pid, words in self.processes().items():
            if words.startswith(("sshd", str(shutil.which("sshd")))):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if self.sshd is not None:
            self.sshd.wait()

    def processes(self) -> dict[int, str]:
        """The host's numbers and the command lines of what runs on this node, zombies left out."""
        mine, found = os.readlink(f"/proc/{self.pid}/ns/pid"), {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and os.readlink(entry / "ns/pid") == mine:
                    words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    if words:
                        found[int(entry.name)] = words
        return found

    def ranks(self) -> dict[int, int]:
        """Rank -> the host's number of its process."""
        found = {}
        for pid, words in self.processes().items():
            if "-m opsd_cli.rank " in words:
                with contextlib.suppress(OSError, KeyError):
                    pairs = (item.partition(b"=") for item in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
                    found[int({name: value for name, _, value in pairs}[b"RANK"])] = pid
        return found

    def leftovers(self) -> list[str]:
        """What runs here that is neither the node's first process nor its sshd."""
        own = ("bash -c " + _FIRST_PROCESS, "sleep ", "sshd", str(shutil.which("sshd")))
        return [words for words in self.processes().values() if not words.startswith(own)]

    def clear(self) -> None:
        """Kill what is left over."""
        for pid, words in self.processes().items():
            if words in self.leftovers():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def wait_for(self, condition, what: str, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name}: waited {seconds:.0f} s in vain for {what}")
            time.sleep(0.05)


@dataclass
class Network:
    """The nodes and the switch between them."""

    folder: Path
    nodes: list[Node] = field(default_factory=list)
    switch: Node | None = None

    def set_link(self, node: Node, state: str) -> None:
        """Pull a node's cable out of the switch (`down`) or plug it in again (`up`)."""
        assert self.switch is not None
        self.switch.run(f"ip link set to-{node.name} {state}")


def free_prefix() -> str:
    """The first three numbers of a network that this machine has no route to."""
    routes = subprocess.run(["ip", "-4", "route", "show", "table", "all"], capture_output=True, text=True).stdout
    return next(prefix for prefix in (f"10.77.{i}" for i in range(1, 255)) if prefix not in routes)


def _new_node(name: str, address: str, folder: Path, flags: Sequence[str]) -> Node:
    holder = subprocess.Popen(
        ["unshare", *flags, "--fork", "--kill-child=SIGKILL", "--mount-proc", "bash", "-c", _FIRST_PROCESS],
        stdin=subprocess.DEVNULL,
        preexec_fn=dies_with_parent(),
    )
    deadline = time.monotonic() + 10
    while True:
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
        if children and b"sleep infinity" in Path(f"/proc/{children[0]}/cmdline").read_bytes():
            return Node(name, address, holder, int(children[0]), folder)
        if time.monotonic() > deadline or holder.poll() is not None:
            raise RuntimeError("unshare made no namespaces")
        time.sleep(0.02)


@contextlib.contextmanager
def network(names: Sequence[str]) -> Iterator[Network]:
    """Nodes of these names that reach each other over ssh without a password, and nothing else."""
    folder = Path(tempfile.mkdtemp(prefix="opsd-nodes-"))
    made = Network(folder)
    try:
        _make_keys(folder, names)
        prefix = free_prefix()
        isolated = ("--net", "--mount", "--uts", "--ipc", "--pid")
        made.switch = _new_node("switch", "", folder, isolated)
        made.switch.run("ip link add bridge type bridge && ip link set bridge up")
        lines = ["127.0.0.1 localhost", *(f"{prefix}.{i} {name}" for i, name in enumerate(names, start=1))]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        for number, name in enumerate(names, start=1):
            node = _new_node(name, f"{prefix}.{number}", folder, isolated)
            made.nodes.append(node)
            # In the switch's network alone: `netns` is a number of this machine's processes.
            cable = f"ip link add to-{name} type veth peer name {INTERFACE} netns {node.pid}"
            ports = f"ip link set to-{name} master bridge && ip link set to-{name} up"
            into = ["nsenter", "-t", str(made.switch.pid), "-n", "--", "bash", "-ec", f"{cable} && {ports}"]
            subprocess.run(into, check=True)
            _furnish(node, folder)
            node.start_sshd()
        yield made
    finally:
        for node in [*made.nodes, *filter(None, [made.switch])]:
            node.holder.kill()
            node.holder.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _make_keys(folder: Path, names: Sequence[str]) -> None:
    keys = folder / "keys"
    keys.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)], check=True)
    public = (keys / "host.pub").read_text()
    (keys / "known_hosts").write_text("".join(f"{name} {public}" for name in names))
    (folder / "ssh_config").write_text(_SSH_CONFIG.format(keys=keys))


def _furnish(node: Node, folder: Path) -> None:
    node.run(
        f"hostname {node.name}; ip link set lo up; ip addr add {node.address}/24 dev {INTERFACE}; "
        f"ip link set {INTERFACE} up; mount --bind {folder}/hosts /etc/hosts; "
        f"mount --bind {folder}/ssh_config /etc/ssh/ssh_config; "
        "if [ -d /root/.ssh ]; then mount -t tmpfs tmpfs /root/.ssh; fi; mount -t tmpfs tmpfs /run; mkdir /run/sshd"
    )
