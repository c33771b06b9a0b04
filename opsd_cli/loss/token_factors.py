"""Token rules that need both distributions: constant factors of a token's value and gradient, inside the loss. They do
not change how many tokens the average is over. Importing it does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from opsd_cli.data.pairing import PairedBatch
from opsd_cli.loss.aligned import AlignedTokens, measure
from opsd_cli.settings.config import TokenSettings

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Gate:
    """A factor between `gate_low` and `gate_high` by a measure of the token (`loss.aligned.measure`).

    `gate_width` = 0: `gate_high` where the measure is above `gate_min`, else `gate_low`. A token exactly at the bound
    does not pass: with privilege and 0, none at which the context changes nothing. Above 0 the change is gradual:
    low + (high - low) * sigmoid((measure - gate_min) / gate_width). Below 0 a factor pushes the student away from the
    target.
    """

    settings: TokenSettings

    name = "tokens/passed_gate"

    def __call__(self, tokens: AlignedTokens, chunk: slice) -> Tensor:
        rules = self.settings
        measure_n = measure(rules.gate, tokens)
        if rules.gate_width > 0:
            passed_n = ((measure_n - rules.gate_min) / rules.gate_width).sigmoid()
        else:
            passed_n = (measure_n > rules.gate_min).to(measure_n.dtype)
        return rules.gate_low + (rules.gate_high - rules.gate_low) * passed_n


@dataclass(frozen=True)
class EntropyPrefix:
    """Factor 1 while the teacher's entropy, summed over the tokens before, is below `nats`; 0 from there to the
    completion's end (OG-OPSD, 2610.05070). Completions in `exempt_N` keep all their tokens.

    It adds up along a micro-batch, so it is made for each, and asked for its tokens once each and in order."""

    rollout_N: Tensor
    exempt_N: Tensor | None
    nats: float
    spent_R: Tensor  # fp64; of each rollout so far

    name = "tokens/in_prefix"

    @staticmethod
    def of(batch: PairedBatch, settings: TokenSettings) -> EntropyPrefix:
        from torch import float64

        exempt_N = batch.right_N if settings.prefix_of == "wrong" else None
        spent_R = batch.weights_N.new_zeros(max(1, len(batch.rollouts)), dtype=float64)
        return EntropyPrefix(batch.rollout_N, exempt_N, settings.prefix_nats, spent_R)

    def __call__(self, tokens: AlignedTokens, chunk: slice) -> Tensor:
        rollout_n = self.rollout_N[chunk]
        entropy_n = tokens.teacher_entropy_n.double().clamp(min=0.0)
        before_n = entropy_n.cumsum(0) - entropy_n
        # Where a rollout begins, what the rows of other rollouts have added up to is taken off. Sums never fall, so the
        # largest beginning so far is the last.
        begins_n = rollout_n != rollout_n.roll(1)
        begins_n[0] = True
        before_n = before_n - before_n.where(begins_n, before_n.new_zeros(())).cummax(0).values
        before_n = before_n + self.spent_R[rollout_n]
        # A maximum, not a sum: its result does not depend on the order in which a GPU adds.
        self.spent_R.scatter_reduce_(0, rollout_n, before_n + entropy_n, "amax")
        inside_n = before_n < self.nats
        if self.exempt_N is not None:
            inside_n = inside_n | self.exempt_N[chunk]
        return inside_n.to(tokens.teacher_entropy_n.dtype)


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


Factor = Gate | EntropyPrefix | Importance
"""A constant factor for each token of a chunk, and the name under which its mean is reported."""


def factors_of(settings: TokenSettings, batch: PairedBatch, *, importance_cap: float | None) -> tuple[Factor, ...]:
    """The factors that are switched on, for one micro-batch."""
    factors: list[Factor] = [] if settings.gate == "none" else [Gate(settings)]
    if settings.prefix_nats > 0:
        factors.append(EntropyPrefix.of(batch, settings))
    if importance_cap is not None:
        factors.append(Importance(batch.sampler_logprobs_N, importance_cap))
    return tuple(factors)
