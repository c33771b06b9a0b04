"""Drawing completions in a batch whose rows change: finished rows leave, waiting prompts enter. When they do is decided
here, once; what a row is and how its tokens are drawn is left to a `TokenLoop`. `decode` draws with any `Decoder`.

Each completion has its own stream of uniform numbers, so what is drawn depends on its seed and its prompt, not on which
other rows share its batch (up to floating point).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from opsd_cli.data.problems import FinishReason
from opsd_cli.sampling.token_sampling import Completion, Draw, draw_token, uniforms
from opsd_cli.settings.config import SamplingSettings
from opsd_cli.settings.errors import GuardError

REFILL_AT = 0.25  # share of free rows at which waiting prompts enter


@dataclass(frozen=True)
class BatchLimits:
    """What bounds the memory of the key-value cache: rows, and rows x positions (a single longer row stands alone)."""

    max_rows: int
    cache_tokens: int


@dataclass(frozen=True)
class Request:
    """What one call draws: completions, how, what ends them, and what bounds the memory."""

    draws: Sequence[Draw]
    sampling: SamplingSettings
    end_ids: frozenset[int]
    limits: BatchLimits

    @property
    def limit(self) -> int:
        return self.sampling.max_completion_tokens

    @property
    def longest_prompt(self) -> int:
        return max(len(draw.prompt_ids) for draw in self.draws)

    def completion(self, ids: Sequence[int], logprobs: Sequence[float]) -> Completion:
        """A row that has come to its end, or was cut. Raises GuardError where the logits were not finite numbers."""
        # Checked here and not at every token, where it would make the host wait for the device.
        if not all(map(math.isfinite, logprobs)):
            raise GuardError(
                "cannot draw a token: the model's logits are NaN or infinite; check the weights, or raise "
                f"sampling.temperature (now {self.sampling.temperature}) if it is above 0 but tiny"
            )
        reason: FinishReason = "stop" if ids and ids[-1] in self.end_ids else "length"
        return Completion(tuple(ids), reason, tuple(logprobs))


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


class TokenLoop(Protocol):
    """Rows (slots) that draw their own tokens."""

    can_refill: bool  # whether draws may enter while others run
    compact_below: float  # share of live rows below which it pays to take the others out

    def open(self, request: Request) -> int:
        """Begin a call. Returns how many rows there may be."""

    def advance(self, entering: Mapping[int, int]) -> None:
        """Draw the next token of every row, and the first of the draws that enter: slot to place in the request. With
        no live row, slots are 0 .. n-1 and there are no others."""

    def ended(self) -> Iterable[int]:
        """Slots whose rows were found to be finished since the last call. It may be told some tokens late; a finished
        row draws nothing more."""

    def keep(self, slots: Sequence[int]) -> None:
        """Only these (ascending) remain, and are slots 0 .. n-1 from now on."""

    def results(self) -> dict[int, Completion]:
        """What was drawn, by place in the request; rows that are not finished are cut here."""


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
    """`run_loop` with a decoder that gives logits."""
    request = Request(draws, sampling, frozenset(end_ids), limits)
    return run_loop(HostLoop(decoder), request, should_stop=should_stop, report_done=report_done)


def run_loop(
    loop: TokenLoop,
    request: Request,
    *,
    should_stop: Callable[[], bool],
    report_done: Callable[[int], None] = lambda done: None,
) -> list[Completion]:
    """One completion per draw, in order.

    `should_stop` is called once per token; if it returns True, what is unfinished is cut there (finish_reason length),
    which a caller that asked to stop throws away. `report_done` is called with the number of finished completions when
    it has grown. Raises GuardError where the model's logits are not finite numbers.
    """
    if not request.draws:
        return []
    with torch.inference_mode():
        run = _Run(loop, request)
        reported = 0
        while run.live or run.waiting:
            run.one_token()
            if run.done > reported:
                reported = run.done
                report_done(reported)
            if (run.live or run.waiting) and should_stop():
                break
        found = loop.results()
    return [found.get(i, Completion((), "length", ())) for i in range(len(request.draws))]


class _Run:
    """Which draws of one call wait and which slots are live. Slots of finished rows stay in the batch, and are
    computed, until they are refilled or taken out."""

    def __init__(self, loop: TokenLoop, request: Request) -> None:
        self.loop = loop
        # Taken from the end: the longest prompts enter first, so that later ones fit in the columns already in use.
        # The sort is stable: rollouts of one problem, which stand together, enter together and share its prefill.
        self.waiting = sorted(range(len(request.draws)), key=lambda i: len(request.draws[i].prompt_ids))
        self.max_rows = loop.open(request)
        self.is_live: list[bool] = []  # of each slot
        self.live = self.done = 0

    def one_token(self) -> None:
        """Draw the next token of every row, and the first one of those that enter."""
        slots = self._entering()
        # Compacting may copy the cache, so it is not done where the free rows will be refilled.
        awaits_refill = bool(self.waiting) and self.loop.can_refill
        if not slots and not awaits_refill and self.live < self.loop.compact_below * len(self.is_live):
            kept = [slot for slot, live in enumerate(self.is_live) if live]
            self.loop.keep(kept)
            self.is_live = [True] * len(kept)
        if slots and not self.live:
            self.is_live = [False] * len(slots)
        self.loop.advance({slot: self.waiting.pop() for slot in slots})
        for slot in slots:
            self.is_live[slot] = True
        self.live += len(slots)
        for slot in self.loop.ended():
            self.is_live[slot] = False
            self.live, self.done = self.live - 1, self.done + 1

    def _entering(self) -> list[int]:
        """Slots for waiting draws, if it is time to let them in."""
        if not self.waiting:
            return []
        if not self.live:
            return list(range(min(self.max_rows, len(self.waiting))))
        free = [slot for slot, live in enumerate(self.is_live) if not live]
        # Not one by one: a prefill of several prompts costs little more than that of one, and all rows wait for it.
        enough = min(len(self.waiting), max(1, int(REFILL_AT * len(self.is_live))))
        return free[: len(self.waiting)] if self.loop.can_refill and len(free) >= enough else []


@dataclass
class _Row:
    """A completion in progress: which draw it is of, and the tokens so far."""

    index: int
    ids: list[int] = field(default_factory=list)
    finished: bool = False


class HostLoop:
    """Any decoder: the host draws from its logits and looks at every token."""

    compact_below = 0.75  # because it copies the cache

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.can_refill = decoder, decoder.can_refill

    def open(self, request: Request) -> int:
        self.request = request
        rows = self.decoder.rows_within(request.limits, request.longest_prompt, request.limit, len(request.draws))
        self.rows: list[_Row] = []
        self.made: dict[int, Completion] = {}
        # Drawn numbers and results stay on the device, and are read back when rows finish, not at every token. One
        # column more than tokens: where rows that are finished write.
        device = self.decoder.device
        self.uniform_BL = torch.zeros(rows, request.limit + 1, device=device)
        self.logprob_BL = torch.zeros(rows, request.limit + 1, device=device)
        self.count_b1 = torch.zeros(0, 1, dtype=torch.long, device=device)
        self.token_b = torch.zeros(0, dtype=torch.long, device=device)
        return rows

    def advance(self, entering: Mapping[int, int]) -> None:
        # The step before the admission: rows that enter have their first logits from the prefill.
        runs = any(not row.finished for row in self.rows)
        logits_bV = self.decoder.step(self.token_b) if runs else None
        if entering:
            logits_bV = self._admit(entering, logits_bV)
        assert logits_bV is not None, "nothing runs and nothing enters"
        uniform_b, sampling = None, self.request.sampling
        if sampling.temperature > 0:
            uniform_b = self.uniform_BL[: len(self.rows)].gather(1, self.count_b1).squeeze(1)
        self.token_b, logprob_b = draw_token(logits_bV, sampling, uniform_b)
        self.logprob_BL[: len(self.rows)].scatter_(1, self.count_b1, logprob_b.unsqueeze(1))
        self.count_b1.add_(1).clamp_(max=self.request.limit)

    def ended(self) -> Iterable[int]:
        # The one wait for the device per token: which rows end decides what runs next.
        found = []
        for slot, (row, token) in enumerate(zip(self.rows, self.token_b.tolist(), strict=True)):
            if row.finished:
                continue
            row.ids.append(token)
            if token in self.request.end_ids or len(row.ids) == self.request.limit:
                row.finished = True
                self.decoder.release(slot)
                found.append(slot)
        return found

    def _admit(self, entering: Mapping[int, int], logits_bV: Tensor | None) -> Tensor:
        """Start draws in free slots. Returns the logits of all rows."""
        self._collect()
        slots, draws = list(entering), [self.request.draws[i] for i in entering.values()]
        # No row was live, so the batch is a new one.
        if logits_bV is None:
            self.rows = [_Row(0) for _ in slots]
            self.count_b1 = self.count_b1.new_zeros(len(slots), 1)
        first_nV = self.decoder.admit(slots, [draw.prompt_ids for draw in draws])
        for slot, i in entering.items():
            self.rows[slot] = _Row(i)
        slot_n = torch.tensor(slots, device=self.decoder.device)
        self.count_b1[slot_n] = 0
        if self.request.sampling.temperature > 0:
            streams = uniforms([draw.seed for draw in draws], self.request.limit)
            self.uniform_BL[slot_n, : self.request.limit] = streams.to(self.decoder.device)
        return first_nV if logits_bV is None else logits_bV.index_copy_(0, slot_n, first_nV)

    def _collect(self, *, unfinished: bool = False) -> None:
        """Turn finished rows into completions, before their slots are used again."""
        slots = [
            slot for slot, row in enumerate(self.rows) if row.index not in self.made and (row.finished or unfinished)
        ]
        if not slots:
            return
        logprobs = self.logprob_BL[torch.tensor(slots, device=self.decoder.device)].tolist()
        for slot, values in zip(slots, logprobs, strict=True):
            row = self.rows[slot]
            self.made[row.index] = self.request.completion(row.ids, values[: len(row.ids)])

    def keep(self, slots: Sequence[int]) -> None:
        self._collect()
        self.decoder.keep(slots)
        self.rows = [self.rows[slot] for slot in slots]
        keep_n = torch.tensor(slots, device=self.decoder.device)
        self.token_b, self.count_b1 = self.token_b[keep_n], self.count_b1[keep_n]
        for table_BL in (self.uniform_BL, self.logprob_BL):
            table_BL[: len(slots)] = table_BL[keep_n]

    def results(self) -> dict[int, Completion]:
        self._collect(unfinished=True)
        return self.made
