"""A model that only answers: the policy without training state, for `opsd eval`. Owns nothing but the move to the
device; completions are drawn by `decoding`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from opsd_cli.engine.decoding import Completion, Draw, decode
from opsd_cli.engine.policy import Source, load_causal
from opsd_cli.engine.ranks import Ranks
from opsd_cli.settings.config import SamplingSettings


class InferenceEngine:
    """A whole copy of the weights on every rank."""

    def __init__(self, source: Source, ranks: Ranks, *, device: torch.device, pad_id: int) -> None:
        self.ranks, self.pad_id = ranks, pad_id
        self.causal = load_causal(source).requires_grad_(False).to(device)
        self.end_ids: tuple[int, ...] = ()

    def complete(
        self,
        draws: Sequence[Draw],
        *,
        sampling: SamplingSettings,
        max_rows: int,
        should_stop: Callable[[], bool],
    ) -> list[Completion]:
        """One completion per draw. Ranks may bring different numbers of draws."""
        return decode(
            self.causal, draws, sampling=sampling, end_ids=self.end_ids, pad_id=self.pad_id,
            max_rows=max_rows, should_stop=should_stop,
        )  # fmt: skip
