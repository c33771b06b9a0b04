"""The process group: who this rank is and what all ranks agree on. Owns the few collectives the program uses outside
DeepSpeed, so that no other file imports torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = timedelta(minutes=30)  # ranks wait for each other while one evaluates, saves or downloads


class Ranks:
    """This rank among all. With one rank nothing is communicated. `waiting` is open while it waits for the others."""

    def __init__(self, device: torch.device, waiting: Callable[[], AbstractContextManager]) -> None:
        self._device, self._waiting = device, waiting
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def all_sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over ranks, in float64."""
        if self.world_size == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64, device=self._device)
        with self._waiting():
            dist.all_reduce(total)
        return total.tolist()

    def largest(self, value: int) -> int:
        """The maximum over ranks."""
        return max(self.gather(value))

    def any(self, flag: bool) -> bool:
        """Whether any rank says so: the same answer everywhere, so that ranks leave a loop together."""
        return self.all_sum([float(flag)])[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's plain value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self._waiting():
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            with self._waiting():
                dist.barrier()


def connect(device: torch.device, waiting: Callable[[], AbstractContextManager] = nullcontext) -> Ranks:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return Ranks(device, waiting)


def disconnect() -> None:
    """Leave the process group; without it torch warns at exit."""
    dist.destroy_process_group()
