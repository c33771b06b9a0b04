"""What may happen to a run on two nodes, what is promised then, and how it is made to happen."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import opsd_cli
from nodes.network import Network
from nodes.runs import Command, phase_of, steps_done
from opsd_cli.settings.errors import ExitCode

LOST = 30.0  # launcher.lost_seconds
# Rank 1 waits here in the fourth step, or all do in the second save or evaluation, so that there is time to harm them.
IN_A_STEP = {"OPSD_FAULT": "rank1:stall@step.before_update:4:5"}
IN_A_LONG_STEP = {"OPSD_FAULT": "rank1:stall@step.before_update:4:120"}
IN_A_SAVE = {"OPSD_FAULT": "rank1:stall@save.engine:2:5"}
IN_AN_EVALUATION = {"OPSD_FAULT": "rank1:stall@eval.decoded:3+:3"}


def in_the_fourth_step(command: Command) -> bool:
    return steps_done(command.folder) == 3


def in_the_second_save(command: Command) -> bool:
    return steps_done(command.folder) == 4 and phase_of(command.folder).startswith("saving")


def in_an_evaluation(command: Command) -> bool:
    return phase_of(command.folder).startswith("evaluating at step 2")


def is_training(command: Command) -> bool:
    return steps_done(command.folder) >= 1


@dataclass(frozen=True)
class Fault:
    """One row. `seconds` are promised from the harm (or the start, where nothing is done later) to the end of the
    command, and `orphan_seconds` from there to the end of the last process on any node."""

    name: str
    code: int  # of the command
    message: str  # a pattern of its last line
    seconds: float
    runner: str = "pdsh"
    prepare: Callable[[Network], None] | None = None  # before the start
    environ: Mapping[str, str] = field(default_factory=dict)  # of what is started on the nodes
    far_environ: Mapping[str, str] = field(default_factory=dict)  # and on the second alone
    when: Callable[[Command], bool] | None = None
    harm: Callable[[Network, Command], None] | None = None
    mend: Callable[[Network], None] | None = None  # before the run is resumed
    orphan_seconds: float = 15.0
    hosts: tuple[str, ...] = ()
    typed_on: int = 0  # the number of the node
    words: tuple[str, ...] = ()
    stays_until_mended: str = "none"  # begins the words of a process that is not ours and may outlast the cut
    goes_on: bool = True  # the run is resumed, and ends as if nothing had happened; else it left no folder

    @property
    def longest_orphan(self) -> float:
        """What a machine is about to start when another is refused takes a moment to see that."""
        return self.orphan_seconds if self.goes_on else 15.0


def kill_first_rank(network: Network, command: Command) -> None:
    os.kill(network.nodes[0].ranks()[0], signal.SIGKILL)


def cut_first(network: Network, command: Command) -> None:
    network.set_link(network.nodes[0], "down")


def join_first(network: Network) -> None:
    network.set_link(network.nodes[0], "up")


def kill_far_rank(network: Network, command: Command) -> None:
    os.kill(network.nodes[1].ranks()[1], signal.SIGKILL)


def cut(network: Network, command: Command | None = None) -> None:
    network.set_link(network.nodes[1], "down")


def join(network: Network) -> None:
    network.set_link(network.nodes[1], "up")


def signalled(number: int) -> Callable[[Network, Command], None]:
    return lambda network, command: command.send(number)


def stop_far_sshd(network: Network, command: Command) -> None:
    network.nodes[1].stop_sshd()


def start_far_sshd(network: Network) -> None:
    network.nodes[1].start_sshd()


def stop_far_listener(network: Network, command: Command) -> None:
    sshd = network.nodes[1]
    os.kill(next(pid for pid, words in sshd.processes().items() if "[listener]" in words), signal.SIGKILL)


LISTENS = "s = socket.create_server(('', 29500))"


def occupy_port(network: Network) -> None:
    # Bound again though connections of the rows before have only just ended.
    node = network.nodes[0]
    node.run(f'setsid -f python3 -c "import socket, time; {LISTENS}; time.sleep(600)" </dev/null >/dev/null 2>&1')
    node.wait_for(lambda: "29500" in node.run("ss -Hltn sport = 29500"), "a listener at the master port")


def clear_first(network: Network) -> None:
    network.nodes[0].clear()


def unshare_root(network: Network) -> None:
    network.nodes[1].run(f"mkdir -p {network.folder}/shared; mount -t tmpfs tmpfs {network.folder}/shared")


def share_root(network: Network) -> None:
    network.nodes[1].run(f"umount {network.folder}/shared")


def name_themselves_locally(network: Network) -> None:
    """Each node's own name leads to 127.0.1.1, as Debian's installer writes it."""
    for node in network.nodes:
        lines = [line for line in (network.folder / "hosts").read_text().splitlines() if not line.endswith(node.name)]
        own = network.folder / f"hosts-{node.name}"
        own.write_text("\n".join([*lines, f"127.0.1.1 {node.name}"]) + "\n")
        node.run(f"mount --bind {own} /etc/hosts")


def name_themselves_again(network: Network) -> None:
    for node in network.nodes:
        node.run("umount /etc/hosts")


def put_over(original: Path, was: str, now: str) -> Callable[[Network], None]:
    """Have the second node read a file with other text in it; the file itself stays as it is."""

    def prepare(network: Network) -> None:
        other = network.folder / f"other-{original.name}"
        other.write_text(original.read_text().replace(was, now))
        network.nodes[1].run(f"mount --bind {other} {original}")

    return prepare


def take_off(original: Path) -> Callable[[Network], None]:
    return lambda network: network.nodes[1].run(f"umount {original}") and None


def forget_host_key(network: Network) -> None:
    known = network.folder / "keys" / "known_hosts"
    known.write_text(known.read_text().replace("nodeb ", "forgotten "))


def remember_host_key(network: Network) -> None:
    known = network.folder / "keys" / "known_hosts"
    known.write_text(known.read_text().replace("forgotten ", "nodeb "))


OPSD = Path(opsd_cli.__file__)
TORCH = next(path for path in map(Path, metadata.files("torch") or ()) if path.name == "METADATA")
TORCH_FACTS = Path(str(metadata.distribution("torch").locate_file(TORCH)))
FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"
TWO_HOURS_LATE = {"LD_PRELOAD": FAKETIME, "FAKETIME": "-2h"}

FAULTS = (
    Fault("rank killed on the far node", ExitCode.ENVIRONMENT, r"^rank 1 on nodeb: .*killed by SIGKILL", 15.0,
          environ=IN_A_STEP, when=in_the_fourth_step, harm=kill_far_rank),
    Fault("the same under mpirun", ExitCode.ENVIRONMENT, r"^rank 1 on nodeb: .*killed by SIGKILL", 15.0,
          runner="openmpi", environ=IN_A_STEP, when=in_the_fourth_step, harm=kill_far_rank),
    Fault("far link down in a step", ExitCode.ENVIRONMENT, r"^rank 1 on nodeb: .*network", LOST + 20,
          environ=IN_A_STEP, when=in_the_fourth_step, harm=cut, mend=join, orphan_seconds=LOST),
    Fault("far link down in a save", ExitCode.ENVIRONMENT, r"^rank 1 on nodeb: .*network", LOST + 20,
          environ=IN_A_SAVE, when=in_the_second_save, harm=cut, mend=join, orphan_seconds=LOST),
    Fault("far link down in an evaluation", ExitCode.ENVIRONMENT, r"^rank 1 on nodeb: .*network", LOST + 20,
          environ=IN_AN_EVALUATION, when=in_an_evaluation, harm=cut, mend=join, orphan_seconds=LOST),
    Fault("far link down under mpirun", ExitCode.ENVIRONMENT, r"^rank 1 on nodeb: .*network", LOST + 20,
          runner="openmpi", environ=IN_A_STEP, when=in_the_fourth_step, harm=cut, mend=join, orphan_seconds=LOST,
          stays_until_mended="orted "),  # mpirun's daemon: until TCP gives up, or the link is back
    Fault("typed on a machine without ranks", ExitCode.DONE, "", 300.0, typed_on=2),
    Fault("rank 0 killed, typed elsewhere", ExitCode.ENVIRONMENT, r"^rank 0 on nodea: .*killed by SIGKILL", 15.0,
          typed_on=2, environ=IN_A_STEP, when=in_the_fourth_step, harm=kill_first_rank),
    Fault("first link down, typed elsewhere", ExitCode.ENVIRONMENT, r"nodea", LOST + 20,
          typed_on=2, environ=IN_A_STEP, when=in_the_fourth_step, harm=cut_first, mend=join_first, orphan_seconds=LOST),
    Fault("Ctrl-C", ExitCode.INTERRUPTED, "resume", 40.0,
          environ=IN_A_STEP, when=in_the_fourth_step, harm=signalled(signal.SIGINT)),
    Fault("SIGTERM", ExitCode.TERMINATED, "resume", 40.0,
          environ=IN_A_STEP, when=in_the_fourth_step, harm=signalled(signal.SIGTERM)),
    Fault("SIGTERM under mpirun", ExitCode.TERMINATED, "resume", 40.0,
          runner="openmpi", environ=IN_A_STEP, when=in_the_fourth_step, harm=signalled(signal.SIGTERM)),
    Fault("the command killed (-9)", 137, "", 1.0,
          environ=IN_A_LONG_STEP, when=in_the_fourth_step, harm=signalled(signal.SIGKILL), orphan_seconds=LOST + 10),
    Fault("the command killed under mpirun", 137, "", 1.0, runner="openmpi",
          environ=IN_A_LONG_STEP, when=in_the_fourth_step, harm=signalled(signal.SIGKILL), orphan_seconds=LOST + 10),
    Fault("far sshd and its sessions gone", ExitCode.ENVIRONMENT, "nodeb.*ssh", 20.0,
          environ=IN_A_STEP, when=in_the_fourth_step, harm=stop_far_sshd, mend=start_far_sshd),
    Fault("far sshd listens no more", ExitCode.DONE, "", 300.0,
          environ=IN_A_STEP, when=in_the_fourth_step, harm=stop_far_listener, mend=start_far_sshd),
    Fault("clocks two hours apart", ExitCode.DONE, "", 300.0, far_environ=TWO_HOURS_LATE),
    Fault("own names lead to 127.0.1.1", ExitCode.DONE, "", 300.0,
          prepare=name_themselves_locally, mend=name_themselves_again),
    Fault("a wrong GLOO_SOCKET_IFNAME", ExitCode.ENVIRONMENT, "cannot meet .*nodea.*GLOO_SOCKET_IFNAME", 300.0,
          environ={"GLOO_SOCKET_IFNAME": "lo"}),
    Fault("an error on the far rank", ExitCode.BUG, r"^rank 1 on nodeb: RuntimeError: .*traceback is in", 300.0,
          environ={"OPSD_FAULT": "rank1:raise@step.before_update:4"}),
    Fault("a full disk on the far rank", ExitCode.ENVIRONMENT, r"^rank [01] on node[ab]: .*rank 1: .*No space", 300.0,
          environ={"OPSD_FAULT": "rank1:enospc@save.file:3"}),
    Fault("a rank that stalls", ExitCode.ENVIRONMENT, r"rank 1 on nodeb is the slowest", 240.0,
          environ={"OPSD_FAULT": "rank1:stall@step.before_update:4"}, words=("launcher.stall_seconds=60",)),
    Fault("a name that does not resolve", ExitCode.CHANGE_SOMETHING, r"nodec.*resolve", 60.0,
          hosts=("nodea", "nodec"), goes_on=False),
    Fault("no ssh to a host", ExitCode.CHANGE_SOMETHING, r"nodeb.*Host key verification failed", 60.0,
          prepare=forget_host_key, mend=remember_host_key, goes_on=False),
    Fault("the master port is in use", ExitCode.CHANGE_SOMETHING, r"nodea.*launcher.master_port=29500.* in use", 60.0,
          prepare=occupy_port, mend=clear_first, goes_on=False),
    Fault("run.root is not shared", ExitCode.CHANGE_SOMETHING, r"rank 1 on nodeb: .*run.root.*share", 60.0,
          prepare=unshare_root, mend=share_root, goes_on=False),
    Fault("another opsd on the far node", ExitCode.CHANGE_SOMETHING, r"rank 1 on nodeb.*opsd 9\.9\.9", 60.0,
          prepare=put_over(OPSD, f'"{opsd_cli.__version__}"', '"9.9.9"'), mend=take_off(OPSD), goes_on=False),
    Fault("another torch on the far node", ExitCode.CHANGE_SOMETHING, r"rank 1 on nodeb.*torch 2\.0\.0", 60.0,
          prepare=put_over(TORCH_FACTS, f"\nVersion: {metadata.version('torch')}", "\nVersion: 2.0.0"),
          mend=take_off(TORCH_FACTS), goes_on=False),
)  # fmt: skip
