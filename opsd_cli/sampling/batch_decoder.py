"""Drawing completions in a batch whose rows change: finished rows leave, waiting prompts enter. How the model runs is
left to a `Decoder`, so that every decoder is fed the same way.

Each completion has its own stream of uniform numbers, so what is drawn depends on its seed and its prompt, not on which
other rows share its batch (up to floating point).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from opsd_cli.data.problems import FinishReason
from opsd_cli.sampling.token_sampling import Completion, Draw, draw_token, uniforms
from opsd_cli.settings.config import SamplingSettings
from opsd_cli.settings.errors import GuardError

REFILL_AT = 0.25  # share of free rows at which waiting prompts enter
COMPACT_BELOW = 0.75  # share of live rows below which the free ones are taken out of the batch


@dataclass(frozen=True)
class BatchLimits:
    """What bounds the memory of the key-value cache: rows, and rows x positions (a single longer row stands alone)."""

    max_rows: int
    cache_tokens: int


class Decoder(Protocol):
    """One model with a cache of some rows (slots). Logits come back for the last position of each."""

    device: torch.device
    can_refill: bool  # whether prompts may enter while others run

    def rows_within(self, limits: BatchLimits, longest_prompt: int, limit: int, draws: int) -> int:
        """How many rows the cache may have. Called first, and once: the cache may be allocated here."""

    def admit(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Put prompts into free slots, [n, V]. With no live row, slots are 0 .. n-1 and there are no others."""

    def step(self, token_b: Tensor) -> Tensor:
        """Append a token to every slot, [b, V]; tokens and logits of free slots have no meaning."""

    def release(self, slot: int) -> None:
        """The row is finished, its slot free."""

    def keep(self, slots: Sequence[int]) -> None:
        """Only these (ascending) remain, and are slots 0 .. n-1 from now on."""


def decode(
    decoder: Decoder,
    draws: Sequence[Draw],
    *,
    sampling: SamplingSettings,
    end_ids: Sequence[int],
    limits: BatchLimits,
    should_stop: Callable[[], bool],
    report_done: Callable[[int], None] = lambda done: None,
) -> list[Completion]:
    """One completion per draw, in order.

    `should_stop` is called once per token; if it returns True, what is unfinished is cut there (finish_reason length),
    which a caller that asked to stop throws away. `report_done` is called with the number of finished completions when
    it has grown. Raises GuardError where the model's logits are not finite numbers.
    """
    if not draws:
        return []
    with torch.inference_mode():
        run = _Run(decoder, draws, sampling, frozenset(end_ids), limits)
        reported = 0
        while run.live or run.waiting:
            run.one_token()
            if (run.live or run.waiting) and should_stop():
                run.cut()
            if len(run.completions) > reported:
                reported = len(run.completions)
                report_done(reported)
    return [run.completions[i] for i in range(len(draws))]


@dataclass
class _Row:
    """A completion in progress: which draw it is of, and the tokens so far."""

    index: int
    ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None  # None: not finished


class _Run:
    """All draws of one call. Slots of finished rows stay in the batch, and are computed, until they are refilled or
    taken out."""

    def __init__(
        self,
        decoder: Decoder,
        draws: Sequence[Draw],
        sampling: SamplingSettings,
        end_ids: frozenset[int],
        limits: BatchLimits,
    ) -> None:
        self.decoder, self.draws, self.sampling, self.end_ids = decoder, draws, sampling, end_ids
        self.completions: dict[int, Completion] = {}
        # Taken from the end: the longest prompts enter first, so that later ones fit in the columns already in use.
        # The sort is stable: rollouts of one problem, which stand together, enter together and share its prefill.
        self.waiting = sorted(range(len(draws)), key=lambda i: len(draws[i].prompt_ids))
        self.limit = sampling.max_completion_tokens
        longest = max(len(draw.prompt_ids) for draw in draws)
        self.max_rows = decoder.rows_within(limits, longest, self.limit, len(draws))
        self.rows: list[_Row] = []
        self.live = 0
        # Drawn numbers and results stay on the device, and are read back when rows finish, not at every token. One
        # column more than tokens: where rows that are finished write.
        self.uniform_BL = torch.zeros(self.max_rows, self.limit + 1, device=decoder.device)
        self.logprob_BL = torch.zeros(self.max_rows, self.limit + 1, device=decoder.device)
        self.count_b1 = torch.zeros(0, 1, dtype=torch.long, device=decoder.device)
        self.token_b = torch.zeros(0, dtype=torch.long, device=decoder.device)

    def one_token(self) -> None:
        """Draw the next token of every row, and the first one of those that enter."""
        entering = self._entering()
        # Compacting copies the cache, so it is not done where the free rows will be refilled.
        awaits_refill = bool(self.waiting) and self.decoder.can_refill
        if not entering and not awaits_refill and self.live < COMPACT_BELOW * len(self.rows):
            self._compact()
        # The step before the admission: rows that enter have their first logits from the prefill.
        logits_bV = self.decoder.step(self.token_b) if self.live else None
        if entering:
            logits_bV = self._admit(entering, logits_bV)
        assert logits_bV is not None, "nothing runs and nothing enters"
        b = len(self.rows)
        uniform_b = None
        if self.sampling.temperature > 0:
            uniform_b = self.uniform_BL[:b].gather(1, self.count_b1).squeeze(1)
        self.token_b, logprob_b = draw_token(logits_bV, self.sampling, uniform_b)
        self.logprob_BL[:b].scatter_(1, self.count_b1, logprob_b.unsqueeze(1))
        self.count_b1.add_(1).clamp_(max=self.limit)
        # The one wait for the device per token: which rows end decides what runs next.
        for slot, (row, token) in enumerate(zip(self.rows, self.token_b.tolist(), strict=True)):
            if row.finish_reason:
                continue
            row.ids.append(token)
            if token in self.end_ids or len(row.ids) == self.limit:
                row.finish_reason = "stop" if token in self.end_ids else "length"
                self.live -= 1
                self.decoder.release(slot)
        if not self.live:
            self._collect()

    def _entering(self) -> list[int]:
        """Slots for waiting draws, if it is time to let them in."""
        if not self.waiting:
            return []
        if not self.live:
            return list(range(min(self.max_rows, len(self.waiting))))
        free = [slot for slot, row in enumerate(self.rows) if row.finish_reason]
        # Not one by one: a prefill of several prompts costs little more than that of one, and all rows wait for it.
        enough = min(len(self.waiting), max(1, int(REFILL_AT * len(self.rows))))
        return free[: len(self.waiting)] if self.decoder.can_refill and len(free) >= enough else []

    def _admit(self, slots: list[int], logits_bV: Tensor | None) -> Tensor:
        """Start the longest waiting draws in `slots`. Returns the logits of all rows."""
        self._collect()
        indices = [self.waiting.pop() for _ in slots]
        # No row was live, so the batch is a new one.
        if logits_bV is None:
            self.rows = [_Row(0) for _ in slots]
            self.count_b1 = self.count_b1.new_zeros(len(slots), 1)
        first_nV = self.decoder.admit(slots, [self.draws[i].prompt_ids for i in indices])
        for slot, i in zip(slots, indices, strict=True):
            self.rows[slot] = _Row(i)
        self.live += len(slots)
        slot_n = torch.tensor(slots, device=self.decoder.device)
        self.count_b1[slot_n] = 0
        if self.sampling.temperature > 0:
            streams = uniforms([self.draws[i].seed for i in indices], self.limit)
            self.uniform_BL[slot_n, : self.limit] = streams.to(self.decoder.device)
        return first_nV if logits_bV is None else logits_bV.index_copy_(0, slot_n, first_nV)

    def _collect(self) -> None:
        """Turn finished rows into completions, before their slots are used again."""
        slots = [slot for slot, row in enumerate(self.rows) if row.finish_reason and row.index not in self.completions]
        if not slots:
            return
        logprobs = self.logprob_BL[torch.tensor(slots, device=self.decoder.device)].tolist()
        for slot, values in zip(slots, logprobs, strict=True):
            row = self.rows[slot]
            logprobs_t = tuple(values[: len(row.ids)])
            # Checked here and not at every token, where it would make the host wait for the device.
            if not all(map(math.isfinite, logprobs_t)):
                raise GuardError(
                    "cannot draw a token: the model's logits are NaN or infinite; check the weights, or raise "
                    f"sampling.temperature (now {self.sampling.temperature}) if it is above 0 but tiny"
                )
            self.completions[row.index] = Completion(tuple(row.ids), row.finish_reason, logprobs_t)

    def _compact(self) -> None:
        self._collect()
        keep = [slot for slot, row in enumerate(self.rows) if not row.finish_reason]
        self.decoder.keep(keep)
        self.rows = [self.rows[slot] for slot in keep]
        keep_n = torch.tensor(keep, device=self.decoder.device)
        self.token_b, self.count_b1 = self.token_b[keep_n], self.count_b1[keep_n]
        for table_BL in (self.uniform_BL, self.logprob_BL):
            table_BL[: len(keep)] = table_BL[keep_n]

    def cut(self) -> None:
        """End everything here."""
        for row in self.rows:
            row.finish_reason = row.finish_reason or "length"
        self._collect()
        self.completions |= {i: Completion((), "length", ()) for i in self.waiting}
        self.waiting, self.live = [], 0
