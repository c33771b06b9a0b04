"""Token rules: which completion tokens carry loss, and how much. Rules that a rollout alone decides are weights before
anything is scored, and count in the average; those that need both distributions are factors inside the loss, and do not
change the count. Importing it does not import torch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opsd_cli.data.problems import Rollout, RolloutKey
from opsd_cli.loss.divergences import AlignedTokens, rowwise_dot
from opsd_cli.settings.config import TokenSettings

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RolloutWeights:
    """One weight per completion token. All rules multiply."""

    settings: TokenSettings
    mask_truncated: bool
    special_ids: Collection[int]  # ids of control tokens; the end of the sequence is never among them
    correct: Collection[RolloutKey] = ()  # those with the right answer, where `keep` asks for it

    def __call__(self, rollout: Rollout) -> list[float]:
        count = len(rollout.completion_ids)
        wanted = {"all": None, "correct": True, "wrong": False}[self.settings.keep]
        # Without a teacher's prompt there was nothing privileged to show (`data.contexts`), so nothing to learn from.
        if (
            not rollout.prompt.teacher_ids
            or (self.mask_truncated and rollout.finish_reason == "length")
            or (wanted is not None and (rollout.key in self.correct) is not wanted)
        ):
            return [0.0] * count
        weights = ramp(count, self.settings.ramp)
        for place, token in enumerate(rollout.completion_ids):
            if place < self.settings.skip_first or (self.settings.skip_special and token in self.special_ids):
                weights[place] = 0.0
        return weights


def ramp(count: int, slope: float) -> list[float]:
    """Weights that rise linearly from 1 - slope at the first token to 1 + slope at the last; their mean is 1."""
    if count == 1 or slope == 0:
        return [1.0] * count
    return [1.0 - slope + 2.0 * slope * place / (count - 1) for place in range(count)]


@dataclass(frozen=True)
class Gate:
    """Factor 1 for tokens that pass, 0 for the others.

    student_entropy, teacher_entropy: entropy of that role's distribution above `gate_min` nats
    privilege: log q(y) - log p(y) of the sampled token above `gate_min`: the context supports what was said

    A token exactly at `gate_min` does not pass: with 0, none at which the context changes nothing.
    """

    settings: TokenSettings

    name = "tokens/passed_gate"

    def __call__(self, tokens: AlignedTokens, chunk: slice) -> Tensor:
        measure_n = {
            "student_entropy": lambda: -rowwise_dot(tokens.student_probs_nV, tokens.student_logprobs_nV),
            "teacher_entropy": lambda: -rowwise_dot(tokens.teacher_probs_nV, tokens.teacher_logprobs_nV),
            "privilege": lambda: tokens.at_target(tokens.log_ratio_nV),
        }[self.settings.gate]()
        return (measure_n > self.settings.gate_min).to(measure_n.dtype)


@dataclass(frozen=True)
class Importance:
    """min(p_now(y) / p_sampler(y), cap): corrects for completions drawn from another distribution than the one that is
    trained (truncated sampling, a second update on the same rollouts). Token-level, as in SDPO and verl."""

    sampler_logprobs_N: Tensor
    cap: float

    name = "tokens/importance"

    def __call__(self, tokens: AlignedTokens, chunk: slice) -> Tensor:
        log_ratio_n = tokens.at_target(tokens.student_logprobs_nV) - self.sampler_logprobs_N[chunk]
        # The clamp keeps exp finite for a token that the sampler hardly ever drew; the cap is applied after it.
        factor_n = log_ratio_n.clamp(min=-20.0, max=20.0).exp().clamp(max=self.cap)
        return factor_n.nan_to_num(nan=1.0)  # a completion from the dataset was not sampled


Factor = Gate | Importance
"""A constant factor for each token of a chunk, and the name under which its mean is reported."""


def factors_of(
    settings: TokenSettings, sampler_logprobs_N: Tensor, *, importance_cap: float | None
) -> tuple[Factor, ...]:
    """The factors that are switched on."""
    factors: list[Factor] = [] if settings.gate == "none" else [Gate(settings)]
    if importance_cap is not None:
        factors.append(Importance(sampler_logprobs_N, importance_cap))
    return tuple(factors)
