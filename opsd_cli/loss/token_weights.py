"""Token rules that a step's rollouts alone decide: which completion tokens carry loss, and how much. They are weights
before anything is scored, and count in the average. Importing it does not import torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from opsd_cli.data.pairing import Weighed
from opsd_cli.data.problems import Rollout
from opsd_cli.settings.config import LossSettings, TokenSettings


@dataclass(frozen=True)
class RolloutWeights:
    """One weight per completion token. All rules multiply."""

    settings: TokenSettings
    mask_truncated: bool
    special_ids: Collection[int]  # ids of control tokens; the end of the sequence is never among them

    def __call__(self, rollout: Rollout) -> list[float]:
        rules, count = self.settings, len(rollout.completion_ids)
        wanted = {"all": None, "correct": True, "wrong": False}[rules.keep]
        # Without a teacher's prompt there was nothing privileged to show (`data.contexts`), so nothing to learn from.
        if (
            not rollout.prompt.teacher_ids
            or (self.mask_truncated and rollout.finish_reason == "length")
            or (wanted is not None and rollout.correct is not wanted)
        ):
            return [0.0] * count
        is_whole = rules.first == 0 or (rules.prefix_of == "wrong" and rollout.correct)
        stop = count if is_whole else rules.first
        weights = ramp(count, rules.ramp)
        for place, token in enumerate(rollout.completion_ids):
            if not rules.skip_first <= place < stop or (rules.skip_special and token in self.special_ids):
                weights[place] = 0.0
        return weights


def ramp(count: int, slope: float) -> list[float]:
    """Weights that rise linearly from 1 - slope at the first token to 1 + slope at the last; their mean is 1."""
    if count == 1 or slope == 0:
        return [1.0] * count
    return [1.0 - slope + 2.0 * slope * place / (count - 1) for place in range(count)]


def weigh_rollouts(
    rollouts: Sequence[Rollout],
    *,
    tokens: TokenSettings,
    loss: LossSettings,
    special_ids: Collection[int],
    own: Sequence[Sequence[float]] | None = None,
) -> list[Weighed]:
    """Each rollout with the weights of its tokens: the token rules and the factors of a rule of the user's `own`, then
    what `loss.reduction` makes equal, then the weight of a problem by its pass rate. All rollouts of a problem must be
    among them."""
    weigh = RolloutWeights(tokens, loss.mask_truncated, special_ids)
    weighed = [(rollout, weigh(rollout)) for rollout in rollouts]
    if own is not None:
        weighed = [
            (rollout, [weight * factor for weight, factor in zip(weights, factors, strict=True)])
            for (rollout, weights), factors in zip(weighed, own, strict=True)
        ]
    if loss.reduction == "token" and not any(tokens.pass_powers):
        return list(weighed)
    groups: dict[int, list[tuple[Rollout, list[float]]]] = defaultdict(list)
    for one in weighed:
        groups[one[0].place].append(one)
    scales = {place: pass_weight(group, tokens.pass_powers) for place, group in groups.items()}
    if loss.reduction == "problem":
        scales = {place: scales[place] / (sum(sum(w) for _, w in group) or 1.0) for place, group in groups.items()}
    return [
        (rollout, [scales[rollout.place] * weight for weight in reduced(weights, loss.reduction)])
        for rollout, weights in weighed
    ]


def reduced(weights: list[float], reduction: str) -> list[float]:
    """The weights of a completion; under the mean over sequences they sum to 1, unless all are 0."""
    total = sum(weights) if reduction == "sequence" else 1.0
    return [weight / (total or 1.0) for weight in weights]


def pass_weight(group: Sequence[tuple[Rollout, list[float]]], powers: tuple[float, float]) -> float:
    """p^a (1 - p)^b of the share p of right ones among a problem's rollouts: with a = b = 0.5 the standard deviation of
    a right answer (SC-SDPO, 2605.27765)."""
    passed = sum(rollout.correct for rollout, _ in group) / len(group)
    return float(passed ** powers[0] * (1.0 - passed) ** powers[1])
