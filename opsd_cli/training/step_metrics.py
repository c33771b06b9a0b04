"""What a step measures about itself: seconds by phase, and token averages over micro-batches and ranks. Owns no name
that is not in the table of `events.METRICS`, and no decision."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from opsd_cli.data.pairing import PairedBatch
from opsd_cli.data.problems import Rollout, RolloutKey
from opsd_cli.loss.chunked_head import TokenLoss


class PhaseClock:
    """Wall seconds by phase; on a GPU each phase ends when its work has ended."""

    def __init__(self, device: torch.device, enter: Callable[[str], None]) -> None:
        self._device, self._enter = device, enter  # which is told the phase that begins
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self._enter(name.removeprefix("time/"))
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._seconds[name] += time.perf_counter() - start

    def metrics(self, completion_tokens: float) -> dict[str, float]:
        """Seconds of each phase and of the whole step, tokens per second, and the peak of memory so far."""
        whole = time.perf_counter() - self._start
        return {
            **self._seconds,
            "time/step": whole,
            "tokens/per_second": completion_tokens / whole,
            "memory/peak_gib": peak_bytes(self._device) / 2**30,
        }


class TokenMeter:
    """Weighted sums of everything known per token, and what each token cost. Both stay on the device until the step is
    over, where each is read once."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weight = 0.0
        self._tokens, self._positions = 0, 0
        self._kept: list[tuple[tuple[Rollout, ...], Tensor]] = []  # rollouts of a micro-batch, value of each token

    def add(self, batch: PairedBatch, loss: TokenLoss, *, padded: bool) -> None:
        """Take in a micro-batch, which lies where its loss does. `padded`: the model ran its rows as a rectangle."""
        for role in (batch.student, batch.teacher, batch.other):
            if role is not None:
                self._tokens += sum(role.lengths)
                self._positions += len(role.lengths) * max(role.lengths) if padded else sum(role.lengths)
        for name, value_N in {"loss/objective": loss.value_N, **loss.diagnostics}.items():
            weighted = (value_N * batch.weights_N).sum().double()
            self._sums[name] = self._sums[name] + weighted if name in self._sums else weighted
        self._weight += batch.weight
        self.keep_token_losses(batch, loss)

    def keep_token_losses(self, batch: PairedBatch, loss: TokenLoss) -> None:
        """Keep what each token cost, and add nothing to the averages."""
        self._kept.append((batch.rollouts, loss.value_N))

    def token_losses(self) -> dict[RolloutKey, list[float]]:
        """What each token of a rollout cost, by its key; in the last update where it was scored for several."""
        if not self._kept:
            return {}
        values, start = torch.cat([value_N for _, value_N in self._kept]).tolist(), 0
        losses: dict[RolloutKey, list[float]] = {}
        for rollouts, value_N in self._kept:
            place, start = start, start + len(value_N)  # a batch that only keeps ranks in step has no rollouts
            for rollout in rollouts:
                losses[rollout.key] = values[place : place + len(rollout.completion_ids)]
                place += len(rollout.completion_ids)
        return losses

    def mark(self) -> TokenMeter:
        """What is known so far, for `back_to`."""
        kept = TokenMeter()
        kept.back_to(self)
        return kept

    def back_to(self, mark: TokenMeter) -> None:
        """Forget the micro-batches since."""
        self._sums, self._weight = dict(mark._sums), mark._weight
        self._tokens, self._positions = mark._tokens, mark._positions
        self._kept = list(mark._kept)

    def reduced(self, all_sum: Callable[[Sequence[float]], list[float]]) -> dict[str, float]:
        """Averages per completion token over all updates, micro-batches and ranks. Empty if no token carried loss."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names]).tolist()
        weight, tokens, positions, *totals = all_sum([self._weight, self._tokens, self._positions, *sums])
        means = {name: total / weight for name, total in zip(names, totals, strict=True)}
        return means | {"tokens/scored": tokens, "tokens/padding": 1.0 - tokens / positions}


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has used so far: of its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kibibytes on Linux
