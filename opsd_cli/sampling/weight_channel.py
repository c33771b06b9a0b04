"""What a rank and a sampling process beside it tell each other: messages over a pair of sockets, and weights by
broadcast in a process group of their own, over NCCL between GPUs and over gloo on a CPU. Nothing above the group knows
which.
"""

from __future__ import annotations

import json
import select
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LENGTH = struct.Struct("!Q")  # of a message in bytes, before it
SENDER = 0  # place of the rank that sends in the group


class Messages:
    """JSON objects over one end of a socket pair. Every method raises EOFError when the other end is gone."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, kind: str, **content: Any) -> None:
        data = json.dumps({"kind": kind, **content}).encode()
        try:
            self._end.sendall(LENGTH.pack(len(data)) + data)
        except (BrokenPipeError, ConnectionResetError):
            raise EOFError from None

    def receive(self) -> dict[str, Any]:
        """The next message; waits for it."""
        (length,) = LENGTH.unpack(self._exactly(LENGTH.size))
        return dict(json.loads(self._exactly(length)))

    def has_one(self, seconds: float = 0.0) -> bool:
        """Whether a message has begun to arrive, or the other end is gone; waits at most that long."""
        # Nothing is read ahead of a message, so the socket knows.
        return bool(select.select([self._end], [], [], seconds)[0])

    def close(self) -> None:
        self._end.close()

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            try:
                piece = self._end.recv(min(count - len(data), 2**20))
            except ConnectionResetError:
                raise EOFError from None
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)


class WeightChannel:
    """The group in which the rank that sends (place 0) hands weights to `size` - 1 sampling processes. They meet in
    `folder`, which only their user can read."""

    def __init__(self, folder: Path, device: torch.device, *, place: int, size: int, patience: timedelta) -> None:
        store = dist.FileStore(str(folder / "meeting"), size)
        # Built by hand: a process has one default group, which is that of the ranks.
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = patience
            self._group: Any = dist.ProcessGroupNCCL(store, place, size, options)
        else:
            self._group = dist.ProcessGroupGloo(store, place, size, patience)
        self._options = dist.BroadcastOptions()
        self._options.rootRank = SENDER

    def broadcast(self, tensor: Tensor) -> None:
        """Fill a contiguous tensor with the sender's."""
        # As bytes, which every backend carries.
        self._group.broadcast([tensor.view(-1).view(torch.uint8)], self._options).wait()


def send_weights(weights: Iterable[tuple[str, Tensor]], channel: WeightChannel, peers: Sequence[Messages]) -> None:
    """Hand every tensor to all peers, one after another."""
    for name, tensor in weights:
        for peer in peers:
            peer.send("weight", name=name, shape=list(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."))
        channel.broadcast(tensor.detach().contiguous())
    for peer in peers:
        peer.send("sent")


def receive_weights(messages: Messages, channel: WeightChannel, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """What `send_weights` sends, on `device`."""
    while (message := messages.receive())["kind"] == "weight":
        tensor = torch.empty(message["shape"], dtype=getattr(torch, message["dtype"]), device=device)
        channel.broadcast(tensor)
        yield message["name"], tensor
