"""Where the keepers of all ranks meet: rank 0's listens, the others connect. The hub knows who is there, what runs on
each machine, and who has fallen silent."""

from __future__ import annotations

import contextlib
import hmac
import socket
import time
from collections.abc import Mapping
from typing import Any

from opsd_cli.launch.far_ranks import Failure, Launch
from opsd_cli.launch.link import Link
from opsd_cli.settings.errors import ExitCode

_HELLO_SECONDS = 10.0  # for a connection to say who it is
_MOST_STRANGERS = 64


class Hub:
    """The links to all other ranks, those that have introduced themselves with the token of this attempt."""

    def __init__(self, launch: Launch, *, world: int, versions: Mapping[str, str]) -> None:
        self._launch, self._world, self._versions = launch, world, versions
        self._server = _listen()
        self._strangers: list[tuple[Link, float]] = []
        self.links: dict[int, Link] = {}
        self.codes: dict[int, int] = {}  # of ranks that have ended
        self.port = int(self._server.getsockname()[1])

    def poll(self) -> None:
        """Take new connections and messages. Raises Failure for a machine with other versions of what the ranks
        must share."""
        with contextlib.suppress(OSError):
            while len(self._strangers) < _MOST_STRANGERS:
                self._strangers.append((Link(self._server.accept()[0]), time.monotonic()))
        for link, since in list(self._strangers):
            messages = link.receive()
            if messages:
                self._strangers.remove((link, since))
                self._admit(link, messages[0])
            elif link.is_closed or time.monotonic() - since > _HELLO_SECONDS:
                self._strangers.remove((link, since))
                link.close()
        for rank, link in self.links.items():
            link.beat()
            for message in link.receive():
                if isinstance(message.get("ended"), int):
                    self.codes[rank] = message["ended"]

    def send(self, **message: Any) -> None:
        """Tell every other rank's keeper."""
        for link in self.links.values():
            link.send(**message)

    def missing(self) -> list[int]:
        """Ranks that have not been heard of."""
        return [rank for rank in range(1, self._world) if rank not in self.links]

    def lost(self) -> Failure | None:
        """What has happened to a machine that is gone, if one is."""
        for rank, link in self.links.items():
            if rank in self.codes:
                continue
            if link.is_closed:
                message = "the process that kept it is gone, and the rank with it"
                return Failure(rank, message, code=ExitCode.ENVIRONMENT)
            if time.monotonic() - link.heard_at > self._launch.lost_seconds:
                message = (
                    f"nothing was heard of it over the network for {self._launch.lost_seconds:.0f} s "
                    f"(launcher.lost_seconds): its machine is down, or the link between it and {self._launch.hosts[0]}"
                )
                return Failure(rank, message, code=ExitCode.ENVIRONMENT)
        return None

    def excuse(self, seconds: float) -> None:
        """This process was not running for so long: nobody else is to blame for the silence."""
        for link in self.links.values():
            link.heard_at += seconds

    def address(self) -> str | None:
        """The address of this machine at which another one has reached it."""
        return next((link.here for link in self.links.values() if not link.here.startswith("127.")), None)

    def finish(self, code: int, *, seconds: float) -> None:
        """Tell every other keeper that all is over, and give them so many seconds to end their ranks and go."""
        self.send(over=code)
        deadline = time.monotonic() + seconds
        while not all(link.is_closed for link in self.links.values()) and time.monotonic() < deadline:
            time.sleep(0.02)
            for link in self.links.values():
                link.receive()

    def close(self) -> None:
        for link in [*self.links.values(), *(link for link, _ in self._strangers)]:
            link.close()
        self._server.close()

    def _admit(self, link: Link, hello: Mapping[str, Any]) -> None:
        rank, token = hello.get("rank"), hello.get("token")
        is_one = isinstance(token, str) and hmac.compare_digest(token.encode(), self._launch.token.encode())
        if not is_one or not isinstance(rank, int) or not 0 < rank < self._world or rank in self.links:
            link.close()
            return
        self.links[rank] = link
        versions = hello.get("versions")
        theirs = versions if isinstance(versions, dict) else {}
        if other := [name for name, version in self._versions.items() if theirs.get(name) != version]:
            there = ", ".join(f"{name} {theirs.get(name) or '(none)'}" for name in other)
            here = ", ".join(f"{name} {self._versions[name]}" for name in other)
            message = f"has {there}, and {self._launch.who(0)} has {here}; install the same on every machine"
            raise Failure(rank, message, code=ExitCode.CHANGE_SOMETHING)


def _listen() -> socket.socket:
    """A listening socket at any free port. Raises OutsideError."""
    for family in (socket.AF_INET6, socket.AF_INET):  # IPv6 may be switched off
        dual = family == socket.AF_INET6
        if dual and not socket.has_dualstack_ipv6():
            continue
        with contextlib.suppress(OSError):
            server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=1024)
            server.setblocking(False)
            return server
    raise Failure(0, "no TCP port can be opened on its machine, to listen for the others", code=ExitCode.ENVIRONMENT)
