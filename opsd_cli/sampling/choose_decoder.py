"""How a model's completions are drawn: by the fast forward pass where it is known to answer what the model answers, by
the model's own where not. All ranks choose together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from opsd_cli.engine.agreement import ONE_LAYER, WORST_LAYER, allowed, deviation, in_words, overall, probe_rows
from opsd_cli.engine.process_group import Ranks
from opsd_cli.sampling.batch_decoder import BatchLimits, Decoder, decode
from opsd_cli.sampling.hf_decoder import HFDecoder
from opsd_cli.sampling.llama_decoder import LlamaDecoder
from opsd_cli.sampling.llama_weights import causal_of, supports
from opsd_cli.sampling.samplers import Weights
from opsd_cli.sampling.token_sampling import Completion, Draw
from opsd_cli.settings.config import SamplingSettings

CHECKED_CALLS = frozenset(4**i for i in range(1, 20))
STEPS = 3  # decoded one by one, after the rest of each row as its prompt


class Completer:
    """Draws completions from weights that may change between calls.

    Every rank calls it equally often, as sampling and evaluation do, with as many draws as it has, or none: the choice
    of the decoder is collective. `warn` is told when the choice changes while completions are drawn.
    """

    def __init__(
        self,
        weights: Weights,
        ranks: Ranks,
        *,
        end_ids: Sequence[int],
        pad_id: int | None,
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.weights, self.ranks, self.end_ids = weights, ranks, tuple(end_ids)
        self.pad_id = self.end_ids[0] if pad_id is None else pad_id
        self._warn = warn
        self._calls = 0
        self._refusal: str | None = None  # None: not decided yet

    def complete(
        self,
        draws: Sequence[Draw],
        *,
        sampling: SamplingSettings,
        limits: BatchLimits,
        should_stop: Callable[[], bool],
        report_done: Callable[[int], None] = lambda done: None,
    ) -> list[Completion]:
        """One completion per draw, in order. Ranks may bring different numbers of draws. `report_done` is told now and
        then how many of this rank's are finished."""
        with self.weights.generating() as lm:
            return decode(
                self.decoder(lm), draws,
                sampling=sampling, end_ids=self.end_ids, limits=limits,
                should_stop=should_stop, report_done=report_done,
            )  # fmt: skip

    def choose_decoder(self) -> str:
        """Decide how completions are drawn; why not by the fast pass, empty where by it. Collective."""
        with self.weights.generating() as lm:
            return self._choose(lm)

    def decoder(self, lm: nn.Module) -> Decoder:
        """The fastest that is right for these weights on every rank. Compared with the model at the first call and at
        the calls 4, 16, 64 and so on: an adapter, for example, is zero at the first."""
        self._calls += 1
        before = self._refusal
        if before is None or self._calls in CHECKED_CALLS:
            self._choose(lm)
        if before == "" and self._refusal:
            self._warn(f"from here on completions are drawn by the model's own forward pass: {self._refusal}")
        return HFDecoder(lm, pad_id=self.pad_id) if self._refusal else LlamaDecoder(lm)

    def _choose(self, lm: nn.Module) -> str:
        """What was refused once stays refused."""
        if not self._refusal:
            self._refusal = self.ranks.refusal(why_not_fast(lm))
        return self._refusal


def why_not_fast(lm: nn.Module) -> str:
    """Why this rank cannot draw this model's completions with the fast pass; empty where it can."""
    if not supports(lm):
        return (
            f"the fast pass does not know this architecture ({causal_of(lm).config.model_type}, or this variant of it)"
        )
    return disagreement(lm)


@torch.inference_mode()
def disagreement(lm: nn.Module) -> str:
    """How the fast pass differs from the model, in words; empty where it gives the model's own logits.

    In bfloat16 the rounding of 28 layers is as large as what a wrong rotation in one of them changes. So each layer is
    also run alone, straight between the embedding and the head, where rounding is small and dilutes nothing.
    """
    causal, decoder = causal_of(lm), LlamaDecoder(lm)
    rows, limit = probe_rows(causal), ONE_LAYER[causal.dtype]
    expected_NV = model_logits(lm, rows)
    middle = deviation(fast_logits(decoder, rows), expected_NV).median()
    whole_limit = allowed(deviation(padded_logits(lm, rows), expected_NV).median(), causal.dtype)
    if not middle <= whole_limit:
        return f"the fast pass deviates from the model {in_words(middle, whole_limit)}"
    # The last norm magnifies what rounding does to dimensions with outliers.
    decoder.final_norm = nn.Identity()  # type: ignore[assignment]
    found = []
    for number, (layer, module) in enumerate(zip(decoder.layers, causal.model.layers, strict=True)):
        decoder.layers = [layer]
        with only_layer(causal, module):
            found.append(overall(deviation(fast_logits(decoder, rows), model_logits(lm, rows))))
        if not found[-1] <= WORST_LAYER * limit:
            worst = in_words(found[-1], WORST_LAYER * limit)
            return f"the fast pass deviates from the model, in layer {number} alone, {worst}"
    middle = torch.stack(found).median()
    return (
        "" if middle <= limit else f"the fast pass deviates from the model, in most layers, {in_words(middle, limit)}"
    )


@contextmanager
def only_layer(causal: Any, layer: nn.Module) -> Iterator[None]:
    """The same model with this one of its layers, and without the norm after the last."""
    decoder = causal.model
    layers, norm = decoder.layers, decoder.norm
    decoder.layers, decoder.norm = nn.ModuleList([layer]), nn.Identity()
    try:
        yield
    finally:
        decoder.layers, decoder.norm = layers, norm


def fast_logits(decoder: LlamaDecoder, rows: Sequence[Tensor]) -> Tensor:
    """Logits of the fast pass [N, V] at the last STEPS + 1 positions of each row: the first from the prefill."""
    prompts = [row[:-STEPS].tolist() for row in rows]
    longest = max(map(len, prompts))
    decoder.rows_within(BatchLimits(len(rows), cache_tokens=2**31), longest, STEPS, len(rows))
    made = [decoder.admit(range(len(rows)), prompts)]
    made += [decoder.step(torch.stack([row[place] for row in rows])) for place in range(-STEPS, 0)]
    for slot in range(len(rows)):
        decoder.release(slot)
    return torch.stack(made, dim=1).flatten(0, 1)


def model_logits(lm: nn.Module, rows: Sequence[Tensor]) -> Tensor:
    """The model's own at the same positions, row by row."""
    kept = STEPS + 1
    return torch.cat([lm(input_ids=row[None], use_cache=False, logits_to_keep=kept).logits[0] for row in rows])


def padded_logits(lm: nn.Module, rows: Sequence[Tensor]) -> Tensor:
    """The model's own at the same positions, all rows in one rectangle: what rounding alone may change."""
    logits_BSV = lm(input_ids=nn.utils.rnn.pad_sequence(list(rows), batch_first=True), use_cache=False).logits
    return torch.cat(
        [logits_SV[len(row) - STEPS - 1 : len(row)] for logits_SV, row in zip(logits_BSV, rows, strict=True)]
    )
