"""How a model's completions are drawn: by the lean forward pass where it is known to answer what the model answers, by
the model's own where not. Owns that choice and its check."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from opsd_cli.engine.decoding import BatchLimits, Decoder, decode
from opsd_cli.engine.drawing import Completion, Draw
from opsd_cli.engine.lean_decoder import LeanDecoder
from opsd_cli.engine.lean_weights import causal_of, supports
from opsd_cli.engine.module_decoder import ModuleDecoder
from opsd_cli.settings.config import SamplingSettings

CHECKED_CALLS = frozenset(4**i for i in range(20))
CHECK_PROMPTS = ((7, 3, 11, 5, 2, 13, 1), (4, 9, 6))
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the logits' spread
TOLERANCE_HALF = 0.1


class Completer:
    """Draws completions from one architecture, whose weights may change between calls."""

    def __init__(self, *, pad_id: int) -> None:
        self.pad_id = pad_id
        self._calls = 0
        self._lean = True

    def complete(
        self,
        lm: nn.Module,
        draws: Sequence[Draw],
        *,
        sampling: SamplingSettings,
        end_ids: Sequence[int],
        limits: BatchLimits,
        should_stop: Callable[[], bool],
        tell_done: Callable[[int], None] = lambda done: None,
    ) -> list[Completion]:
        """One completion per draw, in order."""
        return decode(
            self.decoder(lm), draws,
            sampling=sampling, end_ids=end_ids, limits=limits, should_stop=should_stop, tell_done=tell_done,
        )  # fmt: skip

    def decoder(self, lm: nn.Module) -> Decoder:
        """The fastest that is right for these weights. Compared with the model at the calls 1, 4, 16, 64 and so on:
        an adapter, for example, is zero at the first."""
        self._calls += 1
        if self._lean and self._calls in CHECKED_CALLS:
            self._lean = supports(lm) and agrees(lm)
        return LeanDecoder(lm) if self._lean else ModuleDecoder(lm, pad_id=self.pad_id)


@torch.inference_mode()
def agrees(lm: nn.Module) -> bool:
    """Whether prefill and one step of the lean pass give the model's own logits for two prompts of different length."""
    vocabulary = causal_of(lm).get_input_embeddings().num_embeddings
    prompts = [[token % vocabulary for token in prompt] for prompt in CHECK_PROMPTS]
    decoder = LeanDecoder(lm)
    decoder.rows_within(BatchLimits(len(prompts), 1024), max(map(len, prompts)), 2, len(prompts))
    heads = [prompt[:-1] for prompt in prompts]
    made = [decoder.admit([0, 1], heads), decoder.step(torch.tensor([p[-1] for p in prompts], device=decoder.device))]
    for row, prompt in enumerate(prompts):
        whole = lm(input_ids=torch.tensor([prompt], device=decoder.device), use_cache=False).logits[0, -2:].float()
        apart = torch.stack([logits[row] for logits in made]).float() - whole
        tolerance = TOLERANCE.get(decoder.dtype, TOLERANCE_HALF)
        if not bool(apart.abs().max() <= tolerance * whole.std()):
            return False
    return True
