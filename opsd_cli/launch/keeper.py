"""The keeper of one rank on another machine: starts it once every rank's keeper has been heard, passes signals on, ends
it when another rank has failed or the network or the command is gone, and says so. No rank outlives its keeper."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from opsd_cli.launch.far_ranks import Failure, Launch, OrdersWatch, read_hub, write_hub
from opsd_cli.launch.hub import Hub
from opsd_cli.launch.link import Link, interface_of
from opsd_cli.launch.process_groups import NATIVE_CRASHES, death_of, dies_with_parent, signal_group
from opsd_cli.launch.rank_environ import Place
from opsd_cli.run.folder import RunFolder
from opsd_cli.run.heartbeat import STACKS_SIGNAL
from opsd_cli.run.rank_errors import read_error
from opsd_cli.settings.errors import ExitCode

START_SECONDS = 300.0  # for the keepers of all ranks to be there: DeepSpeed is imported first, often from afar
SETTLE_SECONDS = 2.0  # after a rank failed, for the others to end by themselves
_TICK_SECONDS = 0.1
_ASLEEP_SECONDS = 5.0  # of a tick count as silence: more, and this process was stopped, or its machine was
_SHARED = ("torch", "deepspeed", "transformers")
"""Packages whose versions must be the same on every machine: the ranks' messages and files are theirs."""


class Ended(Exception):
    """The command has asked for the end, or another keeper has: nothing is left to say but the exit code."""

    def __init__(self, code: int = ExitCode.ENVIRONMENT) -> None:
        super().__init__(code)
        self.code = code


class Child:
    """The rank's own process."""

    def __init__(self, argv: Sequence[str], log: Path, environ: Callable[[str | None], Mapping[str, str]]) -> None:
        self._argv, self._log, self._environ = argv, log, environ
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, address: str | None) -> None:
        """Start it; `address` is this machine's, as other machines see it."""
        environ = dict(self._environ(interface_of(address) if address else None))
        with open(self._log, "ab", buffering=0) as log:
            self._process = subprocess.Popen(
                self._argv, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=dies_with_parent(),
            )  # fmt: skip

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs, or has not begun."""
        return self._process.poll() if self._process else None

    def send(self, number: int) -> None:
        """Pass a signal on. Raises Ended if it asks to stop what has not begun."""
        if self._process is None and number != STACKS_SIGNAL:
            raise Ended(128 + number)
        has_registered = number != STACKS_SIGNAL or self._log.with_suffix(".stacks").exists()
        if self._process and self.code is None and has_registered:
            self._process.send_signal(number)

    def kill(self) -> None:
        if self._process:
            signal_group(self._process.pid, signal.SIGKILL)
            self._process.wait()


def versions() -> dict[str, str]:
    """What this machine has of the packages that must be the same, without importing them."""
    found = {}
    for name in _SHARED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def keep(child: Child, place: Place, folder: RunFolder, launch: Launch) -> int:
    """Run the rank to its end and return the exit code that its launcher should see. Raises Failure for what this
    keeper alone knows, and Ended where another one says it."""
    with _asked_to_end(child):
        try:
            return _first(child, place, folder, launch) if place.rank == 0 else _other(child, place, folder, launch)
        finally:
            child.kill()


def _first(child: Child, place: Place, folder: RunFolder, launch: Launch) -> int:
    """Rank 0's: the hub, and the only one that reads the command's orders."""
    refuse_used_port(place.master_port)
    watch = OrdersWatch(folder.logs, launch.attempt)
    hub, code = Hub(launch, world=place.world, versions=versions()), int(ExitCode.ENVIRONMENT)
    write_hub(folder.logs, launch.attempt, port=hub.port)
    try:
        _gather(child, hub, watch, launch)
        hub.send(start=True)
        child.start(hub.address())
        code = _watch_all(child, hub, watch, launch, folder)
    except Ended as ended:
        code = ended.code
        raise
    finally:
        child.kill()
        hub.finish(code, seconds=SETTLE_SECONDS)
        write_hub(folder.logs, launch.attempt, port=hub.port, code=code)
        hub.close()
    return code


def _gather(child: Child, hub: Hub, watch: OrdersWatch, launch: Launch) -> None:
    """Wait for the keepers of all other ranks."""
    deadline = time.monotonic() + START_SECONDS
    for _ in _ticks():
        hub.poll()
        _obey(child, hub, watch, launch)
        if not (missing := hub.missing()):
            return
        if time.monotonic() > deadline:
            others = f", nor did {len(missing) - 1} other ranks" if len(missing) > 1 else ""
            message = (
                f"did not start within {START_SECONDS:.0f} s of rank 0{others}, or cannot reach {launch.hosts[0]}, "
                "where the ranks meet; logs/deepspeed.log has what its machine said"
            )
            raise Failure(missing[0], message, code=ExitCode.ENVIRONMENT)


def _watch_all(child: Child, hub: Hub, watch: OrdersWatch, launch: Launch, folder: RunFolder) -> int:
    """Until every rank has ended, one has failed, or a machine or the command is gone."""
    failed_at: float | None = None
    for slept in _ticks():
        hub.excuse(slept)
        watch.changed_at += slept
        hub.poll()
        _obey(child, hub, watch, launch)
        codes = hub.codes if child.code is None else {0: child.code, **hub.codes}
        have_all_ended = len(codes) == len(hub.links) + 1
        if all(map(_is_fine, codes.values())):
            if have_all_ended:
                return codes[0]
            if lost := hub.lost():
                raise lost
            continue
        failed_at = failed_at or time.monotonic()
        if have_all_ended or time.monotonic() - failed_at > SETTLE_SECONDS:
            break
    if (own := child.code) is None or _is_fine(own):
        raise Ended  # the keeper of the rank that failed says why
    return _failed(own, 0, folder)


def _obey(child: Child, hub: Hub, watch: OrdersWatch, launch: Launch) -> None:
    """Pass the command's signals on. Raises Ended for the last, and for one that comes before the rank has begun."""
    for number in watch.take():
        if number == signal.SIGKILL:
            raise Ended
        hub.send(signal=number)
        child.send(number)
    if watch.is_replaced:
        raise Ended
    if time.monotonic() - watch.changed_at > launch.lost_seconds:
        message = (
            f"the opsd command gave no sign of life for {launch.lost_seconds:.0f} s (launcher.lost_seconds): it was "
            "killed or suspended, or the folder of the run is gone; the ranks were ended"
        )
        raise Failure(0, message, code=ExitCode.ENVIRONMENT)


def _other(child: Child, place: Place, folder: RunFolder, launch: Launch) -> int:
    """Any other rank's: does as rank 0's says."""
    link = _connect(place, folder, launch)
    said_end = False
    for slept in _ticks():
        link.heard_at += slept
        link.beat()
        for message in link.receive():
            if "start" in message:
                child.start(link.here)
            elif isinstance(message.get("signal"), int):
                child.send(message["signal"])
            elif "over" in message:
                if child.code is None:
                    raise Ended(message["over"])
                return child.code
        if (code := child.code) is not None and not said_end:
            said_end = True
            link.send(ended=code)
            if not _is_fine(code):
                return _failed(code, place.rank, folder)
        if link.is_closed:
            if said_end:
                return child.code or 0
            if (state := read_hub(folder.logs, launch.attempt)) and state.code is not None:
                raise Ended(state.code)
            why = f"the process that kept {launch.who(0)} is gone, and that rank with it"
            raise Failure(place.rank, why, code=ExitCode.ENVIRONMENT, is_consequence=True)
        if time.monotonic() - link.heard_at > launch.lost_seconds:
            why = f"nothing was heard of {launch.who(0)} over the network for {launch.lost_seconds:.0f} s"
            raise Failure(place.rank, why, code=ExitCode.ENVIRONMENT, is_consequence=True)
    raise AssertionError("ticks never end")


def _heed(watch: OrdersWatch, folder: RunFolder, launch: Launch) -> None:
    """Raises Ended where the command is at its end: while rank 0's keeper, which passes that on, is not there, each
    one looks for itself. It never comes where the start fails on its machine."""
    silent = time.monotonic() - watch.changed_at > launch.lost_seconds
    is_gone = False
    with contextlib.suppress(OSError):
        is_gone = not folder.logs.is_dir()  # the command takes a folder with it in which nothing has begun
    if silent or is_gone or watch.is_replaced or signal.SIGKILL in watch.take():
        raise Ended


def _connect(place: Place, folder: RunFolder, launch: Launch) -> Link:
    """A link to rank 0's keeper. Raises Failure where there is none in time."""
    deadline, problem = time.monotonic() + START_SECONDS, "it has not begun"
    watch = OrdersWatch(folder.logs, launch.attempt)
    while time.monotonic() < deadline:
        state = read_hub(folder.logs, launch.attempt)
        if state is not None and state.code is not None:
            raise Ended(state.code)
        _heed(watch, folder, launch)
        if state is not None:
            try:
                address = (place.master_addr, state.port)
                link = Link(socket.create_connection(address, timeout=launch.lost_seconds))
            except OSError as error:
                problem = str(error)
            else:
                link.send(rank=place.rank, token=launch.token, versions=versions())
                watch.close()
                return link
        time.sleep(_TICK_SECONDS)
    message = (
        f"cannot reach {launch.who(0)} at {place.master_addr} ({problem}), where the ranks meet; the first name in "
        "launcher.hostfile must lead every machine to the first"
    )
    raise Failure(place.rank, message, code=ExitCode.ENVIRONMENT)


def refuse_used_port(port: int) -> None:
    """Raise Failure if the ranks cannot meet at this port of rank 0's machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does: a port that lingers is free
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            message = (
                f"launcher.master_port={port} cannot be used there ({error.strerror}): another run or program has it; "
                "give another number"
            )
            raise Failure(0, message, code=ExitCode.CHANGE_SOMETHING) from None


def _failed(code: int, rank: int, folder: RunFolder) -> int:
    """The exit code of a rank that left a message. Raises Failure where it died without one."""
    if code >= 0 and read_error(folder, rank):
        return code
    is_bug = code >= 0 or -code in NATIVE_CRASHES
    message = f"{death_of(code)}; log: {folder.log_of(rank)}"
    raise Failure(rank, message, code=ExitCode.BUG if is_bug else ExitCode.ENVIRONMENT)


def _is_fine(code: int) -> bool:
    return code in (ExitCode.DONE, ExitCode.INTERRUPTED, ExitCode.TERMINATED)


def _ticks() -> Iterator[float]:
    """For ever, about ten times a second: for how much of the time since the last one this process was not running."""
    last = time.monotonic()
    while True:
        time.sleep(_TICK_SECONDS)
        now = time.monotonic()
        yield max(0.0, now - last - _ASLEEP_SECONDS)
        last = now


@contextlib.contextmanager
def _asked_to_end(child: Child) -> Iterator[None]:
    """SIGTERM and SIGINT, as from a machine that is shut down or a runner that gives up, are the rank's: all ranks then
    save and stop together."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda number, frame: child.send(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
