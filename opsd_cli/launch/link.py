"""A connection between the keepers of two ranks: a JSON object a line, each way, and when something was last heard. It
runs over the network that the ranks use, so that silence means that this network, or the other machine, is gone."""

from __future__ import annotations

import contextlib
import fcntl
import json
import socket
import struct
import time
from typing import Any

BEAT_SECONDS = 1.0
_LONGEST = 65536  # bytes of a line; a stranger may send anything
_SIOCGIFADDR = 0x8915  # linux/sockios.h


class Link:
    """One end. Never blocks."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket, self._in, self._out = connection, b"", b""
        self._next = 0.0
        self.heard_at = time.monotonic()
        self.is_closed = False

    @property
    def here(self) -> str:
        """The address of this end."""
        return str(self._socket.getsockname()[0]).removeprefix("::ffff:")

    def send(self, **message: Any) -> None:
        self._out += json.dumps(message).encode() + b"\n"
        self._flush()

    def beat(self) -> None:
        """Say that this end is alive; called many times a second."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + BEAT_SECONDS
            if not self._out:  # what waits to be sent will do
                self.send()

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have arrived, without the beats."""
        while not self.is_closed:
            try:
                more = self._socket.recv(_LONGEST)
            except BlockingIOError:
                break
            except OSError:
                more = b""
            self._in += more
            self.is_closed = not more or len(self._in) > 2 * _LONGEST
            self.heard_at = time.monotonic()
        *lines, self._in = self._in.split(b"\n")
        self._flush()
        messages = []
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            if not isinstance(message, dict):
                self.close()
                return []
            if message:
                messages.append(message)
        return messages

    def close(self) -> None:
        self.is_closed = True
        with contextlib.suppress(OSError):
            self._socket.close()

    def _flush(self) -> None:
        try:
            while self._out and not self.is_closed:
                self._out = self._out[self._socket.send(self._out) :]
        except BlockingIOError:
            pass
        except OSError:
            self.is_closed = True


def interface_of(address: str) -> str | None:
    """The network interface with this IPv4 address; None if no interface has it, or it is the loopback's."""
    if address.startswith("127."):
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None
