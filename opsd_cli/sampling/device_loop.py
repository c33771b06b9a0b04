"""Rows that draw their own tokens on the device: model, drawing, end and bookkeeping of a token are one piece of work
without the host, captured once for each size of batch. Which rows are finished comes back a token late, so that the
device never waits for the host; a finished row draws nothing more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opsd_cli.data.pairing import upload
from opsd_cli.sampling.batch_decoder import Request
from opsd_cli.sampling.graphs import Branch, Graphs, bucket_of
from opsd_cli.sampling.paged_decoder import PagedDecoder
from opsd_cli.sampling.token_sampling import Completion, draw_token, uniforms

LIMIT_STEP = 1024  # tokens of a completion by which the tables grow


@dataclass(frozen=True)
class Tricks:
    """What makes it fast, each of which can be left out to measure it."""

    graphs: bool = True
    branches: bool = True  # in a graph, where there is an adapter
    late_read: bool = True
    draw_kernel: bool = True


class DeviceLoop:
    """A `TokenLoop` around a decoder whose forward pass does not depend on the host. Serves many calls."""

    can_refill = True
    compact_below = 1.0  # taking rows out edits a table

    def __init__(self, decoder: PagedDecoder, tricks: Tricks = Tricks()) -> None:
        self.decoder, self.tricks, self.device = decoder, tricks, decoder.device
        self.graphs = Graphs(self.device, enabled=tricks.graphs)
        decoder.forget_captured = self.graphs.clear
        decoder.branch = Branch(self.device) if self.graphs.enabled and tricks.branches else None
        self.is_end_V = torch.zeros(decoder.vocabulary, dtype=torch.bool, device=self.device)
        self.limit = torch.zeros((), dtype=torch.long, device=self.device)
        self.tables = Tables.empty(self.device)
        self._generation = -1

    def open(self, request: Request) -> int:
        decoder = self.decoder
        rows = decoder.rows_within(request.limits, request.longest_prompt, request.limit, len(request.draws))
        if self._generation != decoder.generation or not self.tables.fit(len(decoder.open_R), request.limit):
            self.graphs.clear()
            self.tables = Tables.of(len(decoder.open_R), request.limit, self.device)
            self._generation = decoder.generation
        self.request = request
        self.limit.fill_(request.limit)
        self.is_end_V.zero_()
        in_vocabulary = [i for i in request.end_ids if 0 <= i < len(self.is_end_V)]
        self.is_end_V.index_fill_(0, decoder.upload(in_vocabulary), True)
        decoder.open_R.fill_(False)
        self.reader = LateReader(len(decoder.open_R), self.device, late=self.tricks.late_read)
        self.occupant: dict[int, int] = {}  # row: place in the request of what it draws, or drew last
        self.left: list[tuple[list[int], tuple[Tensor, ...]]] = []  # places, and their rows of the tables
        self.unfinished: set[int] = set()  # rows, as far as the host knows
        return rows

    def free(self) -> None:
        """Give back the cache and everything captured, which reads it. The weights stay."""
        self.decoder.free()

    # One token --------------------------------------------------------------------------------------------------------

    def advance(self, entering: Mapping[int, int]) -> None:
        if self.unfinished:
            size = bucket_of(len(self.decoder.row_of))
            sampling = self.request.sampling
            row_B = self.decoder.rows_of_batch(size)
            key = (size, sampling.temperature, sampling.top_k, sampling.top_p)
            self.graphs.run(key, lambda: self._draw(row_B, self.decoder.forward(row_B)))
        if entering:
            self._admit(entering)
        self.reader.start(self.decoder.open_R, set(self.unfinished))

    def _draw(self, row_B: Tensor, logits_BV: Tensor) -> None:
        """Draw a token for each row that is not finished, and note it. Nothing here depends on the host."""
        tables, decoder = self.tables, self.decoder
        count_B, is_open_B = tables.count_R[row_B], decoder.open_R[row_B]
        uniform_B = tables.uniform_RL[row_B, count_B] if self.request.sampling.temperature > 0 else None
        token_B, logprob_B = self._token(logits_BV, uniform_B)
        # What a finished row draws goes to the last column, which is never read.
        column_B = count_B.where(is_open_B, tables.last_column)
        tables.id_RL[row_B, column_B] = token_B
        tables.logprob_RL[row_B, column_B] = logprob_B
        count_B = count_B + is_open_B
        tables.count_R.index_copy_(0, row_B, count_B)
        decoder.token_R.index_copy_(0, row_B, token_B)
        decoder.open_R.index_copy_(0, row_B, is_open_B & ~self.is_end_V[token_B] & (count_B < self.limit))

    def _token(self, logits_BV: Tensor, uniform_B: Tensor | None) -> tuple[Tensor, Tensor]:
        sampling = self.request.sampling
        if not (self.decoder.kernels and self.tricks.draw_kernel):
            return draw_token(logits_BV, sampling, uniform_B)
        from opsd_cli.sampling import drawing_kernels

        return drawing_kernels.draw_token(logits_BV, sampling, uniform_B)

    def _admit(self, entering: Mapping[int, int]) -> None:
        """Prefill draws into free slots, and draw the first token of each."""
        draws = [self.request.draws[i] for i in entering.values()]
        logits_nV = self.decoder.admit(list(entering), [draw.prompt_ids for draw in draws])
        rows = [self.decoder.row_of[slot] for slot in entering]
        self._set_aside(rows)
        row_n = self.decoder.upload(rows)
        self.tables.count_R.index_fill_(0, row_n, 0)
        if self.request.sampling.temperature > 0:
            streams_nL = uniforms([draw.seed for draw in draws], self.request.limit)
            self.tables.uniform_RL[row_n, : self.request.limit] = upload(streams_nL, self.device)
        self._draw(row_n, logits_nV)
        self.occupant |= zip(rows, entering.values(), strict=True)
        self.unfinished.update(rows)
        self.reader.forget(rows)

    # What the host is told ------------------------------------------------------------------------------------------

    def ended(self) -> Iterable[int]:
        finished = {row for row in self.reader.finished() if row in self.unfinished}
        self.unfinished -= finished
        slots = [slot for slot, row in enumerate(self.decoder.row_of) if row in finished]
        self.decoder.live.difference_update(slots)
        return slots

    def keep(self, slots: Sequence[int]) -> None:
        self.decoder.keep(slots)

    def _set_aside(self, rows: Sequence[int]) -> None:
        """Copy what these rows drew before they are used again; it stays on the device."""
        used = [row for row in rows if row in self.occupant]
        if used:
            row_n = self.decoder.upload(used)
            self.left.append(([self.occupant.pop(row) for row in used], self.tables.results(row_n)))

    def results(self) -> dict[int, Completion]:
        self._set_aside(list(self.occupant))
        found: dict[int, Completion] = {}
        for places, (count_n, id_nL, logprob_nL) in self.left:
            counts = count_n.tolist()
            ids, logprobs = (table_nL[:, : max(counts)].tolist() for table_nL in (id_nL, logprob_nL))
            for i, count, own, logs in zip(places, counts, ids, logprobs, strict=True):
                found[i] = self.request.completion(own[:count], logs[:count])
        self.left.clear()
        return found


@dataclass(frozen=True)
class Tables:
    """What rows have drawn, and the uniform numbers that they draw with."""

    count_R: Tensor
    id_RL: Tensor
    logprob_RL: Tensor
    uniform_RL: Tensor
    last_column: Tensor

    @classmethod
    def of(cls, rows: int, limit: int, device: torch.device) -> Tables:
        columns = -(-limit // LIMIT_STEP) * LIMIT_STEP + 1
        id_RL = torch.zeros(rows, columns, dtype=torch.long, device=device)
        return cls(
            id_RL.new_zeros(rows), id_RL, id_RL.new_zeros(rows, columns, dtype=torch.float32),
            id_RL.new_zeros(rows, columns, dtype=torch.float32), id_RL.new_full((), columns - 1),
        )  # fmt: skip

    @classmethod
    def empty(cls, device: torch.device) -> Tables:
        return cls.of(0, 0, device)

    def fit(self, rows: int, limit: int) -> bool:
        return len(self.count_R) == rows and limit < self.id_RL.shape[1]

    def results(self, row_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Counts, ids and log-probabilities of some rows, as copies."""
        return self.count_R[row_n], self.id_RL[row_n], self.logprob_RL[row_n]


class LateReader:
    """Which rows are finished, as it was a token ago: copied to the host while the next token is computed."""

    def __init__(self, rows: int, device: torch.device, *, late: bool) -> None:
        self._late = late
        module = torch.get_device_module(device)
        pinned = device.type == "cuda"
        self._free = deque(
            (torch.zeros(rows, dtype=torch.bool, pin_memory=pinned), module.Event()) for _ in range(1 + late)
        )
        self._started: deque[tuple[Tensor, torch.Event, set[int]]] = deque()

    def start(self, open_R: Tensor, rows: set[int]) -> None:
        """Copy which of these rows are open."""
        buffer, event = self._free.popleft()
        buffer.copy_(open_R, non_blocking=True)
        event.record()
        self._started.append((buffer, event, rows))

    def forget(self, rows: Iterable[int]) -> None:
        """These rows are used anew: what was read of them before does not count."""
        for *_, known in self._started:
            known.difference_update(rows)

    def finished(self) -> set[int]:
        """Rows that were finished at the start before the last one (of the last one, if it is not to be late)."""
        found: set[int] = set()
        while len(self._started) > self._late:
            buffer, event, rows = self._started.popleft()
            event.synchronize()
            is_open = buffer.tolist()
            found |= {row for row in rows if not is_open[row]}
            self._free.append((buffer, event))
        return found
