"""Ranks on other machines, without other machines: the keepers that each starts its rank, the hub where they meet, the
orders of the command, and what the supervisor makes of the runner's log. Real machines are in test_nodes.py."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opsd_cli.launch.exit_messages import Explained, explain
from opsd_cli.launch.far_ranks import ATTEMPT, MARK, NODES, FarRanks, Launch, get, hub_file, read_launch
from opsd_cli.launch.far_ranks import Failure as FarFailure
from opsd_cli.launch.hub import Hub
from opsd_cli.launch.keeper import refuse_used_port
from opsd_cli.launch.link import Link, interface_of
from opsd_cli.launch.runner_log import RunnerLog
from opsd_cli.launch.supervisor import Limits, RankProcess, supervise
from opsd_cli.run.folder import RunFolder
from opsd_cli.run.rank_errors import RankError, first_error, read_error

HOSTS = ("nodea", "nodeb")

# A rank that stops when it is asked to; OPSD_TEST_DO: `rank1 die` and the like, what else it does.
RANK = """
import os, pathlib, signal, sys, time
from opsd_cli.run.folder import RunFolder
from opsd_cli.run.rank_errors import write_error
rank, folder = int(os.environ["RANK"]), RunFolder(pathlib.Path(sys.argv[1]))
who, _, do = os.environ.get("OPSD_TEST_DO", "").partition(" ")
def stop(number, frame):
    (folder.logs / f"stopped_{rank}").touch()
    os._exit(128 + number)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
(folder.logs / f"begun_{rank}").write_text(os.environ.get("GLOO_SOCKET_IFNAME", "none"))
if who == f"rank{rank}" and do == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if who == f"rank{rank}" and do == "refuse":
    write_error(folder, rank, "no disk space left", exit_code=3)
    sys.exit(3)
if do == "complete":
    sys.exit(0)
if who == f"rank{rank}" and do == "vanish":
    os._exit(7)
time.sleep(60)
"""
KEEPER = """
import sys
from opsd_cli.launch import far_end, launchers
launchers.WORKER = ("-c", sys.argv[1])
raise SystemExit(far_end.main(sys.argv[2:]))
"""
# Stands where DeepSpeed's runner does, with pdsh: starts the keepers, returns their worst code.
RUNNER = """
import json, subprocess, sys
started = [subprocess.Popen(argv, env=environ) for argv, environ in json.loads(sys.argv[1])]
raise SystemExit(max(child.wait() for child in started))
"""

# The same that says something first, beside an ssh to a machine that is gone: pdsh gives each a session of its own.
HANGS = """
import subprocess, sys, time
print(sys.argv[1], flush=True)
wait = [sys.executable, "-S", "-c", "import time; time.sleep(60)", sys.argv[2], ""]
subprocess.Popen(wait, start_new_session=True)
time.sleep(60)
"""

Commands = list[tuple[list[str], dict[str, str]]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def commands_of(far: FarRanks, folder: RunFolder, *, do: str = "") -> Commands:
    """What starts the keeper of each rank, and its environment."""
    port, made = str(free_port()), []
    for rank in range(len(far.hosts)):
        place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(len(far.hosts)), "LOCAL_WORLD_SIZE": "1"}
        words = [str(folder.path), "train", "cpu", "1", "127.0.0.1", port, f"{ATTEMPT}={far.launch.attempt}"]
        argv = [sys.executable, "-c", KEEPER, RANK, *words]
        made.append((argv, {**os.environ, **place, "OPSD_TEST_DO": do}))
    return made


@pytest.fixture
def keepers(tmp_path: Path) -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """Start the keepers of a launch; nothing of them is left at the end of the test."""
    started: list[subprocess.Popen[str]] = []

    def start(far: FarRanks, folder: RunFolder, *, do: str = "") -> list[subprocess.Popen[str]]:
        for argv, environ in commands_of(far, folder, do=do):
            started.append(subprocess.Popen(argv, env=environ, text=True, stdout=subprocess.PIPE))
        return started

    yield start
    for child in started:
        child.kill()
        child.communicate()
    assert in_time(lambda: not processes_in(tmp_path)), processes_in(tmp_path)


def processes_in(folder: Path) -> list[str]:
    """Command lines that name the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if f"{folder} " in words:
                found.append(words)
    return found


def in_time(condition: Callable[[], object], seconds: float = 60.0) -> bool:
    """Whether it becomes true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def launch(tmp_path: Path, *, lost_seconds: float = 20.0) -> tuple[FarRanks, RunFolder]:
    folder = RunFolder(tmp_path)
    far = FarRanks(folder, HOSTS, lost_seconds=lost_seconds)
    far.begin()
    return far, folder


def have_begun(folder: RunFolder) -> bool:
    return all((folder.logs / f"begun_{rank}").exists() for rank in range(2))


@pytest.mark.slow
def test_ranks_start_once_all_are_there_and_a_signal_reaches_each(tmp_path: Path, keepers):
    far, folder = launch(tmp_path)
    assert far.are_gone
    started = keepers(far, folder)
    assert in_time(lambda: have_begun(folder))
    assert not far.are_gone
    far.send(signal.SIGTERM)
    assert [child.wait(60) for child in started] == [143, 143]
    assert far.are_gone
    assert all((folder.logs / f"stopped_{rank}").exists() for rank in range(2))
    assert first_error(folder) is None


@pytest.mark.slow
def test_a_rank_that_is_killed_is_said_by_its_keeper_and_the_other_is_ended(tmp_path: Path, keepers):
    far, folder = launch(tmp_path)
    started = keepers(far, folder, do="rank1 die")
    assert in_time(lambda: all(child.poll() is not None for child in started))
    assert [child.returncode for child in started] == [3, 3]
    error = first_error(folder)
    assert error is not None
    assert (error.rank, error.exit_code) == (1, 3)
    assert error.message.startswith("the process was killed by SIGKILL")
    assert far.are_gone


@pytest.mark.slow
def test_ranks_end_when_the_command_is_silent(tmp_path: Path, keepers):
    far, folder = launch(tmp_path, lost_seconds=4.0)
    started = keepers(far, folder)
    assert in_time(lambda: have_begun(folder))
    time.sleep(6.0)  # while it beats they go on
    assert [child.poll() for child in started] == [None, None]
    far._is_over.set()  # as if it had been killed
    assert in_time(lambda: all(child.poll() is not None for child in started))
    assert "the opsd command gave no sign of life for 4 s (launcher.lost_seconds)" in str(read_error(folder, 0))
    assert processes_in(tmp_path) == []


@pytest.mark.slow
def test_a_machine_that_is_silent_is_named_and_ends_its_rank_by_itself(tmp_path: Path, keepers):
    far, folder = launch(tmp_path, lost_seconds=4.0)
    first, second = keepers(far, folder)
    assert in_time(lambda: have_begun(folder))
    second.send_signal(signal.SIGSTOP)  # its machine is gone, as far as the other can tell
    assert in_time(lambda: first.poll() is not None)
    error = first_error(folder)
    assert error is not None
    assert (error.rank, first.returncode) == (1, 3)
    assert "nothing was heard of it over the network for 4 s (launcher.lost_seconds)" in error.message
    second.send_signal(signal.SIGCONT)
    assert in_time(lambda: second.poll() is not None)


@pytest.mark.slow
def test_a_stop_that_comes_before_the_ranks_begins_none(tmp_path: Path, keepers):
    far, folder = launch(tmp_path)
    far.send(signal.SIGTERM)
    started = keepers(far, folder)
    assert [child.wait(60) for child in started] == [143, 143]
    assert not (folder.logs / "begun_0").exists()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["the command ends", "the command takes the folder with it", "the command is killed"])
def test_a_rank_whose_first_one_never_comes_ends_with_the_command(tmp_path: Path, end: str):
    """As where rank 0's machine has another opsd, or its port in use."""
    far, folder = launch(tmp_path / "run", lost_seconds=3.0)
    argv, environ = commands_of(far, folder)[1]
    waiting = subprocess.Popen(argv, env=environ)
    time.sleep(5.0)  # while it beats the rank waits
    assert waiting.poll() is None
    if end == "the command is killed":
        far._is_over.set()
    else:
        far.close(seconds=0.0)
    if end == "the command takes the folder with it":
        shutil.rmtree(folder.path)
    assert waiting.wait(10) == 3
    assert not (folder.logs / "begun_1").exists()


@pytest.mark.slow
def test_another_attempt_in_the_folder_ends_the_ranks_of_the_one_before(tmp_path: Path, keepers):
    far, folder = launch(tmp_path)
    started = keepers(far, folder)
    assert in_time(lambda: have_begun(folder))
    far._is_over.set()
    later = FarRanks(folder, HOSTS, lost_seconds=20.0)
    later.begin()  # as a resume does; it waits for them
    assert [child.wait(60) for child in started] == [3, 3]
    assert first_error(folder) is None
    assert [path.name for path in folder.logs.glob("hub.*")] == [f"hub.{later.launch.attempt}"]


def supervised(tmp_path: Path, *, do: str = "", lines: tuple[str, ...] = ()) -> Explained:
    """How a command ends whose runner says `lines`, and starts the keepers unless it says any."""
    folder = RunFolder(tmp_path)
    folder.logs.mkdir()
    far = FarRanks(folder, HOSTS, lost_seconds=20.0)
    argv = [sys.executable, "-c", RUNNER, json.dumps(commands_of(far, folder, do=do))]
    if lines:
        argv = [sys.executable, "-S", "-c", HANGS, "\n".join(lines), str(tmp_path)]
    process = RankProcess(0, tuple(argv), os.environ, tmp_path, folder.logs / "deepspeed.log", "rank_*.error", far)
    limits = Limits(settle_seconds=0.3, poll_seconds=0.02, far_seconds=1.0 if lines else 10.0)
    ended = supervise([process], Silent(), limits=limits)
    return explain(ended, folder, [process], limits)


class Silent:
    def poll(self) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self, **how: object) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("do", "code", "message"),
    [
        ("all complete", 0, ""),
        ("rank1 refuse", 3, "rank 1 on nodeb: no disk space left"),
        ("rank1 die", 3, "rank 1 on nodeb: the process was killed by SIGKILL"),
        ("rank0 vanish", 1, "rank 0 on nodea: the process ended with exit code 7 and left no message; log: "),
    ],
)
def test_the_command_says_which_rank_on_which_machine(tmp_path: Path, do, code, message):
    explained = supervised(tmp_path, do=do)
    assert explained.code == code
    assert explained.message.startswith(message)
    assert processes_in(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "code", "message"),
    [
        (
            (
                "nodeb: ssh: Could not resolve hostname nodeb: Name or service not known",
                "pdsh@nodea: nodeb: ssh exited with exit code 255",
            ),
            2,
            "rank 1 on nodeb: ssh: Could not resolve hostname nodeb: Name or service not known (launcher.hostfile",
        ),
        (
            (f'nodeb: {MARK}{{"rank": 1, "exit_code": 2, "message": "/a is not there", "is_consequence": false}}',),
            2,
            "rank 1 on nodeb: /a is not there",
        ),
    ],
)
def test_what_only_the_runner_says_ends_the_run(tmp_path: Path, lines, code, message):
    explained = supervised(tmp_path, lines=lines)
    assert (explained.code, explained.message[: len(message)]) == (code, message)
    assert in_time(lambda: not processes_in(tmp_path), 5.0), processes_in(tmp_path)


def test_the_log_of_the_runner_is_read_from_this_attempt_on(tmp_path: Path):
    path = tmp_path / "deepspeed.log"
    path.write_text("pdsh@nodea: nodea: ssh exited with exit code 255\n")
    log = RunnerLog(path, HOSTS)
    log.look()
    assert log.error is None
    with open(path, "a") as file:
        file.write("nodeb: Connection to nodeb closed by remote host.\npdsh@nodea: nodeb: ssh exited")
    log.look()
    assert log.error is None
    with open(path, "a") as file:
        file.write(" with exit code 255\npdsh@nodea: nodea: ssh exited with exit code 255\n")
    log.look()
    assert log.error is not None
    assert (log.error.rank, log.error.exit_code) == (1, 3)
    assert "Connection to nodeb closed by remote host." in log.error.message


def test_what_ssh_and_mpirun_say_without_pdsh_is_found_once_the_runner_has_ended(tmp_path: Path):
    path = tmp_path / "deepspeed.log"
    log = RunnerLog(path, HOSTS)
    path.write_text(
        "Permission denied (publickey) for nodeb.\nORTE was unable to reliably start one or more daemons.\n"
    )
    log.look()
    assert log.error is None
    found = log.of_ssh()
    assert found is not None
    assert (found.rank, found.exit_code) == (1, 2)
    with open(path, "a") as file:
        file.write("  Remote daemon: [[20806,0],1] on node nodeb\n")
    log.look()
    found = log.of_ssh()
    assert found is not None
    assert (found.rank, found.exit_code, found.message[:42]) == (1, 3, "mpirun has lost the connection to nodeb (l")


def keep_alone(tmp_path: Path, far: FarRanks, *, folder: Path) -> subprocess.CompletedProcess[str]:
    """The keeper of rank 1, which sees `folder` under the name of the run's."""
    (argv, environ) = commands_of(far, RunFolder(folder))[1]
    return subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.slow
def test_a_folder_that_is_not_the_commands_is_refused(tmp_path: Path):
    far, _ = launch(tmp_path / "here")
    launch(tmp_path / "other")
    for place, problem in (("absent", "is not there"), ("other", "is another folder there")):
        done = keep_alone(tmp_path, far, folder=tmp_path / place)
        told = json.loads(done.stdout.removeprefix(MARK))
        assert (done.returncode, told["rank"], told["exit_code"]) == (2, 1, 2)
        assert f"{problem}; run.root must be on a file system that every machine shares" in told["message"]


@pytest.mark.slow
def test_another_opsd_is_refused(tmp_path: Path):
    far, folder = launch(tmp_path)
    facts = json.loads((folder.logs / NODES).read_text())
    (folder.logs / NODES).write_text(json.dumps(facts | {"opsd": "9.9.9"}))
    assert keep_alone(tmp_path, far, folder=tmp_path).returncode == 2
    assert "and the command is of opsd 9.9.9; install the same on every machine" in str(read_error(folder, 1))


def test_what_the_command_leaves_for_the_ranks_is_theirs_alone(tmp_path: Path):
    far, folder = launch(tmp_path)
    assert read_launch(folder) == far.launch
    assert (folder.logs / NODES).stat().st_mode & 0o777 == 0o600
    assert get(hub_file(folder.logs, far.launch.attempt)) is None
    (folder.logs / NODES).write_text('{"attempt": 1}')
    assert read_launch(folder) is None


OURS = Launch("a", "the token", HOSTS, "1", 20.0)


@pytest.fixture
def hub() -> Iterator[Hub]:
    opened = Hub(OURS, world=2, versions={"torch": "2.9", "deepspeed": "0.18"})
    yield opened
    opened.close()


def hello(hub: Hub, **words: object) -> Link:
    link = Link(socket.create_connection(("127.0.0.1", hub.port)))
    link.send(**{"rank": 1, "token": OURS.token, "versions": {"torch": "2.9", "deepspeed": "0.18"}, **words})
    return link


def test_only_who_has_the_token_is_let_in(hub: Hub):
    for wrong in ({"token": "another"}, {"token": None}, {"rank": 0}, {"rank": 2}, {"rank": "1"}):
        link = hello(hub, **wrong)
        assert in_time(lambda link=link: (hub.poll(), link.receive(), link.is_closed)[2]), wrong
    assert hub.missing() == [1]
    link = hello(hub)
    assert in_time(lambda: (hub.poll(), not hub.missing())[1])
    second = hello(hub)  # nobody takes its place
    assert in_time(lambda: (hub.poll(), second.receive(), second.is_closed)[2])
    assert not link.is_closed


def test_other_versions_are_named_on_both_sides(hub: Hub):
    link = hello(hub, versions={"torch": "2.8"})
    with pytest.raises(
        FarFailure, match=r"has torch 2\.8, deepspeed \(none\), and rank 0 on nodea has torch 2\.9"
    ) as caught:
        in_time(lambda: hub.poll())
    assert (caught.value.rank, caught.value.code) == (1, 2)
    link.close()


def test_a_connection_that_breaks_is_a_rank_that_is_gone(hub: Hub):
    link = hello(hub)
    assert in_time(lambda: (hub.poll(), not hub.missing())[1])
    assert hub.lost() is None
    link.close()
    assert in_time(lambda: (hub.poll(), hub.lost())[1])
    assert "the process that kept it is gone" in str(hub.lost())
    hub.codes[1] = 0  # unless it has ended
    assert hub.lost() is None


def test_a_line_that_is_no_message_closes_the_connection(hub: Hub):
    with socket.create_connection(("127.0.0.1", hub.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        stranger.settimeout(5)
        assert in_time(lambda: (hub.poll(), True)[1])
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            hub.poll()
            stranger.settimeout(0.1)
            try:
                if not stranger.recv(100):
                    break
            except TimeoutError:
                continue
        else:
            pytest.fail("the connection stays")


def test_a_port_that_is_taken_is_refused_before_a_rank_begins():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            FarFailure, match=f"launcher.master_port={port} cannot be used there .Address already in use"
        ):
            refuse_used_port(port)
    refuse_used_port(port)


def test_the_interface_is_the_one_with_the_address():
    assert interface_of("127.0.0.1") is None  # no other machine reaches it
    assert interface_of("203.0.113.7") is None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("203.0.113.7", 9))
        except OSError:
            pytest.skip("this machine has no route to another")
        assert interface_of(probe.getsockname()[0]) in {name for _, name in socket.if_nameindex()}


def test_a_consequence_never_hides_the_cause(tmp_path: Path):
    from opsd_cli.run.rank_errors import write_error

    folder = RunFolder(tmp_path)
    write_error(folder, 0, "lost the connection to another rank", exit_code=3, is_consequence=True)
    write_error(folder, 1, "killed", exit_code=3)
    write_error(folder, 1, "nothing was heard of rank 0", exit_code=3, is_consequence=True)
    assert first_error(folder) == RankError(1, "killed", 3)
