"""The process group: who this rank is, and the few collectives the program uses outside DeepSpeed."""

from __future__ import annotations

import os
import pickle
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch.torch_version import TorchVersion

from opsd_cli.settings.errors import OpsdError

Made = TypeVar("Made")

CPU = torch.device("cpu")
BOOT = Path("/proc/sys/kernel/random/boot_id")  # of Linux: another one on every machine, the same in its containers
LONGEST = timedelta(days=7)  # stands for no limit: longer ones overflow the 32-bit milliseconds of a poll
MARGIN = timedelta(minutes=10)


_LOST = re.compile(
    r"Connection (?:closed|reset) by peer|Connection refused|Broken pipe|No route to host|remote process exit|"
    r"ncclRemoteError|NCCL.*(?:connection|socket|network error)|gloo/transport|Gloo connectFullMesh failed|"
    r"Unable to find address for: |Unable to resolve hostname",
    re.IGNORECASE,
)
"""What gloo, NCCL and the store of torch.distributed say where another rank, or the way to it, is gone."""


def lost_connection(error: BaseException) -> str:
    """The line of an error that says that another rank, or the way to it, is gone, or "": that is never this rank's own
    fault."""
    if not isinstance(error, RuntimeError | OSError) or isinstance(error, OpsdError):
        return ""
    lines = [line.strip() for line in str(error).splitlines()]
    if isinstance(error, dist.DistNetworkError):
        return next(filter(None, lines), type(error).__name__)
    return next((line for line in lines if _LOST.search(line)), "")


class Ranks:
    """This rank among all. With one rank nothing is communicated. `waiting` is entered while it waits for others.

    What ranks tell each other here is known to the host, and goes from host to host through `group` (None: the group of
    all collectives): over the GPUs it would wait for everything that they have been given to do. Every method is
    collective. What grows with the number of ranks goes through rank 0 or from one rank to another, never to all.
    """

    def __init__(
        self,
        device: torch.device,
        waiting: Callable[[], AbstractContextManager],
        *,
        rank: int,
        world_size: int,
        group: dist.ProcessGroup | None = None,
        node: Ranks | None = None,
    ) -> None:
        self._device, self._waiting, self._group = device, waiting, group
        self.rank, self.world_size = rank, world_size
        self.node = node or self  # the ranks of this machine, among themselves

    def neighbours(self, count: int) -> Ranks:
        """The `count` ranks in a row of which this is one, among themselves: the first ones, the next, and so on; their
        number divides that of all. Collective, and to be asked once: it makes a group."""
        if count in (1, self.world_size):
            return self if count == self.world_size else alone()
        first = self.rank - self.rank % count
        everyone = dist.get_process_group_ranks(self._group or dist.group.WORLD)
        # As patient as the others: `connect` has made that the default.
        group = dist.new_group(everyone[first : first + count], backend="gloo", use_local_synchronization=True)
        return Ranks(self._device, self._waiting, rank=self.rank - first, world_size=count, group=group)

    # What is equal on every rank afterwards ------------------------------------------------------------------------

    def all_sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over ranks, in float64: counts stay exact."""
        return self._reduced([float(value) for value in values], torch.float64, dist.ReduceOp.SUM)

    def largest(self, value: int) -> int:
        return int(self._reduced([value], torch.int64, dist.ReduceOp.MAX)[0])

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank: the same answer everywhere, so that ranks leave a loop together."""
        return self.all_sum([float(flag)])[0] > 0

    def refusal(self, reason: str) -> str:
        """The first rank's reason not to do something; empty if no rank has one. The same answer everywhere."""
        if not self.any(bool(reason)):
            return ""
        reasons = self.gather(reason)
        refusing = [rank for rank, reason in enumerate(reasons) if reason]
        where = "" if len(refusing) == self.world_size else f" (on rank {refusing[0]} of {self.world_size})"
        return reasons[refusing[0]] + where

    def first_of(self, value: Made | None) -> Made | None:
        """The value of the first rank that has one; None, for the price of a number, where none has."""
        if not self.any(value is not None):
            return None
        return next(value for value in self.gather(value) if value is not None)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank: for what is small and seldom asked."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self._waiting():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def from_first(self, value: Any) -> Any:
        """Rank 0's value; what the others give is not looked at."""
        if self.world_size == 1:
            return value
        values = [value if self.rank == 0 else None]
        with self._waiting():
            dist.broadcast_object_list(values, group=self._group, group_src=0, device=CPU)
        return values[0]

    def once(self, work: Callable[[], Made]) -> Made:
        """What `work` returns on rank 0, which alone does it. An error that it explains is raised on every rank."""
        made: Any = None
        if self.rank == 0:
            try:
                made = work()
            except OpsdError as error:
                made = error
        made = self.from_first(made)
        if isinstance(made, OpsdError):
            raise made
        return cast(Made, made)

    def in_turn(self, first: Callable[[], Made], others: Callable[[], Made]) -> Made:
        """What `first` returns on rank 0 and, once that is done, `others` on the other ranks. An error that rank 0
        explains is raised on every rank."""
        made: list[Made] = []
        self.once(lambda: made.append(first()))
        return made[0] if self.rank == 0 else others()

    def _reduced(self, values: Sequence[float], dtype: torch.dtype, operation: dist.ReduceOp.RedOpType) -> list[float]:
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=dtype)
        with self._waiting():
            dist.all_reduce(total, operation, group=self._group)
        return total.tolist()

    # What each rank is told alone ----------------------------------------------------------------------------------

    def to_first(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on rank 0; nothing elsewhere."""
        if self.world_size == 1:
            return [value]
        parcel = b"" if self.rank == 0 else pickle.dumps(value)
        size, sizes = torch.tensor([len(parcel)]), [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        with self._waiting():
            dist.gather(size, sizes if self.rank == 0 else None, group=self._group, group_dst=0)
        expected = {rank: int(sizes[rank]) for rank in range(1, self.world_size)} if self.rank == 0 else {}
        arrived = self.exchange({} if self.rank == 0 else {0: parcel}, expected)
        return [value, *(pickle.loads(arrived[rank]) for rank in expected)] if self.rank == 0 else []

    def hand_out(self, values: Sequence[Any]) -> Any:
        """This rank's of rank 0's values, one for each rank; those of the others are not looked at."""
        if self.world_size == 1:
            return values[0]
        parcels = {rank: pickle.dumps(value) for rank, value in enumerate(values) if rank} if self.rank == 0 else {}
        sizes = [torch.tensor([len(parcels.get(rank, b""))]) for rank in range(self.world_size)]
        size = torch.zeros(1, dtype=torch.int64)
        with self._waiting():
            dist.scatter(size, sizes if self.rank == 0 else None, group=self._group, group_src=0)
        arrived = self.exchange(parcels, {} if self.rank == 0 else {0: int(size)})
        return values[0] if self.rank == 0 else pickle.loads(arrived[0])

    def exchange(self, parcels: Mapping[int, bytes], expected: Mapping[int, int]) -> dict[int, bytes]:
        """Send each of these ranks its parcel, and return what others send to this one: from each of these ranks so
        many bytes."""
        arriving = {source: torch.empty(size, dtype=torch.uint8) for source, size in expected.items()}
        work = [dist.irecv(room, group=self._group, group_src=source) for source, room in arriving.items()]
        for target, parcel in parcels.items():
            leaving = torch.frombuffer(bytearray(parcel), dtype=torch.uint8)
            work.append(dist.isend(leaving, group=self._group, group_dst=target))
        with self._waiting():
            for transfer in work:
                assert transfer is not None, "this rank is not of the group"
                transfer.wait()
        return {source: room.numpy().tobytes() for source, room in arriving.items()}

    def barrier(self) -> None:
        if self.world_size > 1:
            with self._waiting():
                dist.barrier(group=self._group)


def patience_for(*, stall_seconds: float | None, save_seconds: float) -> timedelta:
    """How long a collective may wait. A `stall_seconds` of None means that the supervisor has no limit."""
    if stall_seconds is None:
        return LONGEST
    # Longer than the supervisor waits: it knows which rank is behind and says so, a timeout here only ends the process.
    longest = min(max(stall_seconds, save_seconds), LONGEST.total_seconds())
    return min(timedelta(seconds=longest) + MARGIN, LONGEST)


def connect(
    device: torch.device,
    waiting: Callable[[], AbstractContextManager] = nullcontext,
    *,
    patience: timedelta = timedelta(minutes=30),
    machine: str = "",
) -> Ranks:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe, on `device`. Ranks that say
    the same of `machine` (empty: what the system says) are those of a node."""
    # DeepSpeed creates groups of its own without a timeout: they get torch's default, which under NCCL is 10 minutes,
    # less than a save may take.
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = patience
    if device.type == "cuda":
        torch.cuda.set_device(device)
    bound = nccl_device(device, world_size=int(os.environ["WORLD_SIZE"]), version=torch.__version__)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience, device_id=bound)
    world_size = dist.get_world_size()
    hosts = dist.new_group(backend="gloo", timeout=patience) if device.type == "cuda" and world_size > 1 else None
    everyone = Ranks(device, waiting, rank=dist.get_rank(), world_size=world_size, group=hosts)
    machines = everyone.gather(machine or machine_name())
    neighbours = [rank for rank, name in enumerate(machines) if name == machines[everyone.rank]]
    if len(neighbours) == 1:
        everyone.node = alone()
    elif len(neighbours) < world_size:
        group = dist.new_group(neighbours, patience, "gloo", use_local_synchronization=True)
        place = neighbours.index(everyone.rank)
        everyone.node = Ranks(device, waiting, rank=place, world_size=len(neighbours), group=group)
    return everyone


def machine_name() -> str:
    """What tells this machine from others: containers of different machines may share a host name."""
    try:
        return f"{socket.gethostname()} {BOOT.read_text(encoding='ascii').strip()}"
    except OSError:
        return socket.gethostname()


def alone() -> Ranks:
    """One process without a group: the only rank."""
    return Ranks(torch.device("cpu"), nullcontext, rank=0, world_size=1)


def nccl_device(device: torch.device, *, world_size: int, version: str) -> torch.device | None:
    """The device that NCCL is bound to, so that it need not guess one; None where that does harm."""
    # A communicator of one rank cannot be split (DeepSpeed #8248).
    if device.type != "cuda" or world_size == 1:
        return None
    # Binding hangs in the versions of torch between these two (pytorch #153960).
    return None if "2.6.0" < TorchVersion(version.partition("+")[0]) < "2.7.1" else device


def disconnect() -> None:
    """Leave the process group, or torch warns at exit. Does nothing where vLLM has left it."""
    if dist.is_initialized():
        dist.destroy_process_group()
