"""The process group: who this rank is, and the few collectives the program uses outside DeepSpeed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch.torch_version import TorchVersion

from opsd_cli.settings.errors import OpsdError

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
    all collectives): over the GPUs it would wait for everything that they have been given to do.
    """

    def __init__(
        self,
        device: torch.device,
        waiting: Callable[[], AbstractContextManager],
        *,
        rank: int,
        world_size: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._device, self._waiting, self._group = device, waiting, group
        self.rank, self.world_size = rank, world_size

    def all_sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over ranks, in float64: counts stay exact."""
        if self.world_size == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64)
        with self._waiting():
            dist.all_reduce(total, group=self._group)
        return total.tolist()

    def largest(self, value: int) -> int:
        return max(self.gather(value))

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank: the same answer everywhere, so that ranks leave a loop together."""
        return self.all_sum([float(flag)])[0] > 0

    def refusal(self, reason: str) -> str:
        """The first rank's reason not to do something; empty if no rank has one. The same answer everywhere."""
        reasons = self.gather(reason)
        refusing = [rank for rank, reason in enumerate(reasons) if reason]
        if not refusing:
            return ""
        where = "" if len(refusing) == self.world_size else f" (on rank {refusing[0]} of {self.world_size})"
        return reasons[refusing[0]] + where

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self._waiting():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            with self._waiting():
                dist.barrier(device_ids=None if self._device.index is None else [self._device.index])


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
) -> Ranks:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe, on `device`."""
    # DeepSpeed creates groups of its own without a timeout: they get torch's default, which under NCCL is 10 minutes,
    # less than a save may take.
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = patience
    if device.type == "cuda":
        torch.cuda.set_device(device)
    bound = nccl_device(device, world_size=int(os.environ["WORLD_SIZE"]), version=torch.__version__)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience, device_id=bound)
    world_size = dist.get_world_size()
    hosts = dist.new_group(backend="gloo", timeout=patience) if device.type == "cuda" and world_size > 1 else None
    return Ranks(device, waiting, rank=dist.get_rank(), world_size=world_size, group=hosts)


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
