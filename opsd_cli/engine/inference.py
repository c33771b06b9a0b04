"""A model that only answers: the policy without training state, for `opsd eval`. Owns nothing but the move to the
device; completions are drawn by `decoding`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from opsd_cli.engine.policy import Source, load_causal
from opsd_cli.engine.process_group import Ranks
from opsd_cli.sampling.batch_decoder import BatchLimits
from opsd_cli.sampling.choose_decoder import Completer
from opsd_cli.sampling.token_sampling import Completion, Draw
from opsd_cli.settings.config import SamplingSettings


class InferenceEngine:
    """A whole copy of the weights on every rank."""

    def __init__(self, source: Source, ranks: Ranks, *, device: torch.device, pad_id: int) -> None:
        self.ranks = ranks
        self._completer = Completer(ranks, pad_id=pad_id)
        self.causal = load_causal(source).requires_grad_(False).to(device)
        self.end_ids: tuple[int, ...] = ()

    def choose_decoder(self) -> str:
        """Decide how completions are drawn; why not by the fast pass, empty where by it. Collective."""
        return self._completer.choose(self.causal)

    def complete(
        self,
        draws: Sequence[Draw],
        *,
        sampling: SamplingSettings,
        limits: BatchLimits,
        should_stop: Callable[[], bool],
        tell_done: Callable[[int], None] = lambda done: None,
    ) -> list[Completion]:
        """One completion per draw. Ranks may bring different numbers of draws."""
        return self._completer.complete(
            self.causal, draws, sampling=sampling, end_ids=self.end_ids, limits=limits,
            should_stop=should_stop, tell_done=tell_done,
        )  # fmt: skip
