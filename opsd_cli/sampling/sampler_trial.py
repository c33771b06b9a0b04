"""Whether vLLM, or a sampling process, computes what the model computes, tried before the first step: on a few short
rows, with the weights of the run. What happens after an update shows in the metric `sampler/logprob_gap` of every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from opsd_cli.engine import agreement
from opsd_cli.engine.loading import Source, causal_of
from opsd_cli.sampling.decoder_trial import FAILURES, one_line
from opsd_cli.sampling.token_sampling import Completion, Draw, Draws
from opsd_cli.settings.config import SamplingSettings
from opsd_cli.settings.errors import ConfigError

STEPS = 4  # tokens of each row
GREEDY = SamplingSettings(max_completion_tokens=STEPS, temperature=0.0, top_p=1.0, top_k=0)
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.15}
"""How far a token's log-probability may be from the model's, in nats, mean of all. In float32 vLLM deviates by 2e-6
to 2e-5 (the bundled model, SmolLM2-135M, on a CPU); in bfloat16 the bundled model by 2e-3."""


class Lends(Protocol):
    """The weights of the run, as a model and to be handed on."""

    @property
    def source(self) -> Source: ...
    def generating(self) -> AbstractContextManager[Any]: ...
    def merged_weights(self) -> Iterator[tuple[str, Tensor]]: ...


def find_fault(build: Callable[[], Draws], weights: Lends, *, name: str = "vLLM") -> str:
    """Why what `build` makes cannot draw completions here, in words; empty where it can. Collective."""
    try:
        gap = measured_gap(build(), weights)
    except ConfigError as error:
        return str(error)
    except (*FAILURES, ImportError) as error:
        return f"{name} fails here ({one_line(error)})"
    limit = LIMITS[weights.source.dtype]
    if gap <= limit:
        return ""
    return (
        f"{name}'s log-probabilities deviate from the model's by {gap:.3g} nats a token (rounding explains {limit:g})"
    )


@torch.inference_mode()
def measured_gap(engine: Draws, weights: Lends) -> float:
    """The mean |log p_drawn - log p_model| of greedy tokens after the probe rows. Collective."""
    with weights.generating() as lm:
        rows = agreement.probe_rows(causal_of(lm))
    engine.wake(weights.merged_weights())
    try:
        draws = [Draw(row.tolist(), seed=0) for row in rows]
        completions = engine.complete(draws, sampling=GREEDY, end_ids=(), should_stop=lambda: False)
    finally:
        engine.sleep()
    with weights.generating() as lm:
        model_N = torch.cat([logprobs_after(lm, row, done) for row, done in zip(rows, completions, strict=True)])
    return float((model_N.cpu() - flat([done.logprobs for done in completions])).abs().mean())


def logprobs_after(lm: torch.nn.Module, row_S: Tensor, done: Completion) -> Tensor:
    """The model's log-probabilities [STEPS] of a completion after a row."""
    ids_n = torch.tensor(done.ids, device=row_S.device)
    logits_nV = agreement.model_logits(lm, [torch.cat([row_S, ids_n])[:-1]], last=len(ids_n))
    return logits_nV.float().log_softmax(dim=1).gather(1, ids_n.unsqueeze(1)).squeeze(1)


def flat(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor([value for row in rows for value in row])
