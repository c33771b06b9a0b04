"""The trial that every decoder must pass on the model at hand before it draws a completion: rows of several lengths are
admitted, repeated, dropped, moved and refilled, and what comes back at every token must be the model's own logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from subprocess import SubprocessError

import torch
from torch import Tensor, nn

from opsd_cli.engine import agreement
from opsd_cli.engine.loading import causal_of
from opsd_cli.sampling.batch_decoder import BatchLimits, Decoder
from opsd_cli.settings.memory_errors import is_out_of_memory

STEPS = 3  # tokens after each change of the rows
ROW_FACTOR = 3.0  # over the limit for a whole model: a row's few positions round further (5.7 % in bf16 on an H100)


@dataclass
class _Text:
    """A row's tokens so far, and the logits after its prompt and after each later token, with the part of the trial."""

    ids: list[int]
    answers: list[tuple[str, Tensor]] = field(default_factory=list)


@dataclass
class _Trial:
    """The rows of a decoder as a run would change them."""

    decoder: Decoder
    part: str = ""
    rows: list[_Text] = field(default_factory=list)
    texts: list[_Text] = field(default_factory=list)  # of all rows there were
    live: list[bool] = field(default_factory=list)

    def admit(self, slots: list[int], prompts: list[list[int]]) -> None:
        logits_nV = self.decoder.admit(slots, prompts)
        for slot, prompt, logits_V in zip(slots, prompts, logits_nV, strict=True):
            text = _Text(list(prompt), [(self.part, logits_V.clone())])
            self.texts.append(text)
            if slot == len(self.rows):
                self.rows.append(text)
                self.live.append(True)
            self.rows[slot], self.live[slot] = text, True

    def step(self, number: int, vocabulary: int) -> None:
        """One token more of every row, another one for each."""
        tokens = [(31 * number + 17 * slot + 5) % vocabulary for slot in range(len(self.rows))]
        logits_bV = self.decoder.step(torch.tensor(tokens, device=self.decoder.device))
        for row, is_live, token, logits_V in zip(self.rows, self.live, tokens, logits_bV, strict=True):
            if is_live:
                row.ids.append(token)
                row.answers.append((self.part, logits_V.clone()))

    def release(self, slot: int) -> None:
        self.decoder.release(slot)
        self.live[slot] = False

    def drop(self) -> None:
        """Take the free rows out of the batch."""
        keep = [slot for slot, is_live in enumerate(self.live) if is_live]
        self.decoder.keep(keep)
        self.rows, self.live = [self.rows[slot] for slot in keep], [True] * len(keep)


FAILURES = (
    RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, OSError, SubprocessError,
)  # fmt: skip
"""What a pass that does not fit a model or a machine raises: which, depends on the architecture and on the compiler."""


def one_line(error: Exception) -> str:
    """What failed. Raises the error itself where memory ran out, which says nothing of a decoder."""
    if is_out_of_memory(error):
        raise error
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@torch.inference_mode()
def find_fault(lm: nn.Module, decoder: Decoder) -> str:
    """What is wrong when rows change in this decoder, in words; empty where its logits are the model's own. The trial
    leaves no row behind."""
    causal = causal_of(lm)
    vocabulary = len(causal.get_input_embeddings().weight)
    prompts = [row.tolist() for row in agreement.probe_rows(causal)]
    try:
        trial = _run(decoder, prompts, vocabulary)
    except FAILURES as error:
        return f"its cache does not survive a batch whose rows change ({one_line(error)})"
    places: list[tuple[str, int]] = []  # part of the trial and row of each answer
    found, wanted = [], []
    for number, text in enumerate(trial.texts):
        # Answers follow each other without a gap, from the end of the prompt to the end of the row.
        row_S = torch.tensor(text.ids, device=decoder.device)
        wanted.append(agreement.model_logits(lm, [row_S], last=len(text.answers)))
        for part, logits_V in text.answers:
            places.append((part, number))
            found.append(logits_V)
    return _judge(lm, places, torch.stack(found), torch.cat(wanted))


def _run(decoder: Decoder, prompts: list[list[int]], vocabulary: int) -> _Trial:
    """Admit, repeat, drop, refill."""
    long, middle, short, shortest = prompts
    trial, number = _Trial(decoder, "when rows of several lengths run together"), count(1)

    def steps(wanted: int) -> None:
        for _ in range(wanted):
            trial.step(next(number), vocabulary)

    decoder.rows_within(BatchLimits(6, cache_tokens=2**31), len(long), 6 * STEPS, 12)
    # The longest enter first, and rows of one prompt stand together, as `batch_decoder` has it.
    trial.admit([0, 1, 2, 3, 4], [long, middle, short, short, shortest])
    steps(STEPS)
    trial.part = "after rows have left"
    trial.release(0)
    trial.release(3)
    trial.drop()
    steps(STEPS)
    if decoder.can_refill:
        trial.part = "after a row has entered beside others"
        trial.release(1)
        steps(1)
        trial.admit([1], [middle[3:]])
        steps(STEPS)
    for slot, is_live in enumerate(trial.live):
        if is_live:
            trial.release(slot)
    return trial


def _judge(lm: nn.Module, places: list[tuple[str, int]], found_NV: Tensor, wanted_NV: Tensor) -> str:
    """The part of the trial in which some row's logits are another's, in words; empty where there is none."""
    causal = causal_of(lm)
    rows = agreement.probe_rows(causal)
    padded_NV, alone_NV = (agreement.model_logits(lm, rows, last=STEPS + 1, padded=padded) for padded in (True, False))
    noise = agreement.deviation(padded_NV, alone_NV).max()
    limit = ROW_FACTOR * agreement.model_limit(noise, causal.dtype)  # rows that are mixed up are apart by all there is
    deviation_N = agreement.deviation(found_NV, wanted_NV)
    for place in dict.fromkeys(places):
        is_here_N = torch.tensor([other == place for other in places], device=deviation_N.device)
        # The median over a row's positions: in a mixture of experts rounding may send a single token to another expert.
        median = deviation_N[is_here_N].median()
        if not median <= limit:
            return f"its logits deviate from the model's, {place[0]}, {agreement.describe(median, limit)}"
    return ""
