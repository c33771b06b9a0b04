"""The choice of a decoder: the fastest whose logits are the model's own, tried on the model at hand. The fast forward
pass, else the model's own forward with its cache, else the same without a cache; a model on which none is right is
refused. All ranks choose together, because drawing is collective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from opsd_cli.engine import agreement
from opsd_cli.engine.loading import causal_of
from opsd_cli.engine.process_group import Ranks
from opsd_cli.sampling.batch_decoder import BatchLimits, Decoder, decode
from opsd_cli.sampling.decoder_trial import find_fault
from opsd_cli.sampling.hf_decoder import HFDecoder
from opsd_cli.sampling.llama_decoder import LlamaDecoder
from opsd_cli.sampling.llama_weights import supports
from opsd_cli.sampling.samplers import Weights
from opsd_cli.sampling.token_sampling import Completion, Draw
from opsd_cli.sampling.whole_row_decoder import WholeRowDecoder
from opsd_cli.settings.config import SamplingSettings
from opsd_cli.settings.errors import DataError

CHECKED_CALLS = frozenset(4**i for i in range(1, 20))
STEPS = 3  # tokens decoded one by one, after the rest of each row as its prompt


class Completer:
    """Draws completions from weights that may change between calls.

    Every rank calls it equally often, as sampling and evaluation do, with as many draws as it has, or none. `warn` is
    called when the choice of the decoder changes during a run.
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
        self._refusal: str | None = None  # why not the fast pass; None: not decided yet
        self._keeps_cache = True  # where the fast pass is refused

    def complete(
        self,
        draws: Sequence[Draw],
        *,
        sampling: SamplingSettings,
        limits: BatchLimits,
        should_stop: Callable[[], bool],
        report_done: Callable[[int], None] = lambda done: None,
    ) -> list[Completion]:
        """One completion per draw, in order. Ranks may bring different numbers of draws. `report_done` is called from
        time to time with how many of this rank's are finished."""
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
        """The fastest that is right for these weights on every rank."""
        self._calls += 1
        before = self._refusal
        # Compared again at the calls 4, 16, 64 and so on: an adapter, for example, is zero at the first.
        if before is None or self._calls in CHECKED_CALLS:
            self._choose(lm)
        if before == "" and self._refusal:
            self._warn(f"from here on completions are drawn by the model's own forward pass: {self._refusal}")
        if not self._refusal:
            return LlamaDecoder(lm)
        return HFDecoder(lm, pad_id=self.pad_id) if self._keeps_cache else WholeRowDecoder(lm)

    def _choose(self, lm: nn.Module) -> str:
        # Once refused it stays refused: a decoder that came back would change the numbers of a run once more.
        if not self._refusal:
            model_type = causal_of(lm).config.model_type
            unknown = f"the fast pass does not know this architecture ({model_type}, or this variant of it)"
            self._refusal = self.ranks.refusal(find_disagreement(lm) if supports(lm) else unknown)
            if self._refusal:
                self._refusal += self._choose_slow(lm)
        return self._refusal

    def _choose_slow(self, lm: nn.Module) -> str:
        """Decide whether the model's own forward keeps a cache; why not, in words. Raises DataError, on every rank,
        where it is wrong either way."""
        fault = self.ranks.refusal(find_fault(lm, HFDecoder(lm, pad_id=self.pad_id)))
        self._keeps_cache = not fault
        if not fault:
            return ""
        if still := self.ranks.refusal(find_fault(lm, WholeRowDecoder(lm))):
            raise DataError(
                f"no completion can be drawn from this model (type {causal_of(lm).config.model_type}): {still}; use "
                "another model"
            )
        return f"; without a cache, every token by a pass over its whole row: {fault}"


@torch.inference_mode()
def find_disagreement(lm: nn.Module) -> str:
    """How the fast pass differs from the model, in words; empty where it gives the model's own logits.

    In bfloat16 the rounding of 28 layers is as large as what a wrong rotation in one of them changes. So each layer is
    also run alone, straight between the embedding and the head, where rounding is small and hides nothing.
    """
    causal, decoder = causal_of(lm), LlamaDecoder(lm)
    rows, layer_limit, last = agreement.probe_rows(causal), agreement.LAYER_LIMITS[causal.dtype], STEPS + 1
    model_NV = agreement.model_logits(lm, rows, last=last)
    median = agreement.deviation(fast_logits(decoder, rows), model_NV).median()
    padded_NV = agreement.model_logits(lm, rows, last=last, padded=True)
    limit = agreement.model_limit(agreement.deviation(padded_NV, model_NV).median(), causal.dtype)
    if not median <= limit:
        return f"the fast pass deviates from the model {agreement.describe(median, limit)}"
    fast_layers, model_layers, model_norm = decoder.layers, causal.model.layers, causal.model.norm
    by_layer = []
    for number, (fast_layer, model_layer) in enumerate(zip(fast_layers, model_layers, strict=True)):
        # One layer, and no final norm: it magnifies what rounding does to outlier dimensions.
        decoder.layers = [fast_layer]
        decoder.final_norm = nn.Identity()  # type: ignore[assignment]
        causal.model.layers, causal.model.norm = nn.ModuleList([model_layer]), nn.Identity()
        try:
            model_NV = agreement.model_logits(lm, rows, last=last)
        finally:
            causal.model.layers, causal.model.norm = model_layers, model_norm
        difference = agreement.overall(agreement.deviation(fast_logits(decoder, rows), model_NV))
        # One layer may round worse than the others, but only so much; most must stay within the plain limit.
        limit = agreement.WORST_LAYER_FACTOR * layer_limit
        if not difference <= limit:
            worst = agreement.describe(difference, limit)
            return f"the fast pass deviates from the model, in layer {number} alone, {worst}"
        by_layer.append(difference)
    median = torch.stack(by_layer).median()
    if not median <= layer_limit:
        return f"the fast pass deviates from the model, in most layers, {agreement.describe(median, layer_limit)}"
    fault = find_fault(lm, LlamaDecoder(lm))
    return f"the fast pass fails its trial: {fault}" if fault else ""


def fast_logits(decoder: LlamaDecoder, rows: Sequence[Tensor]) -> Tensor:
    """Logits of the fast pass [N, V] at the last STEPS + 1 positions of each row."""
    prompts = [row[:-STEPS].tolist() for row in rows]
    longest = max(map(len, prompts))
    decoder.rows_within(BatchLimits(len(rows), cache_tokens=2**31), longest, STEPS, len(rows))
    # The first position comes from the prefill, the others from single steps: both ways through a layer are compared.
    logits = [decoder.admit(range(len(rows)), prompts)]
    logits += [decoder.step(torch.stack([row[place] for row in rows])) for place in range(-STEPS, 0)]
    for slot in range(len(rows)):
        decoder.release(slot)
    return torch.stack(logits, dim=1).flatten(0, 1)
