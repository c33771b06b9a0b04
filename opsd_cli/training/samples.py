"""Which rollouts of a step are shown to people, in samples.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opsd_cli.data.pairing import Weighed
from opsd_cli.data.problems import Rollout, RolloutKey
from opsd_cli.data.seeds import derive_seed
from opsd_cli.training.engine_protocol import RankGroup

TokenLosses = Mapping[RolloutKey, list[float]]
"""The divergence at each completion token of some rollouts."""


@dataclass(frozen=True)
class Sample:
    """A rollout to show, and the divergence at each of its completion tokens: none where it was not scored."""

    rollout: Rollout
    token_losses: list[float]


def draw_samples(
    weighed: Sequence[Sequence[Weighed]], token_losses: TokenLosses, ranks: RankGroup, *, count: int, seed: int
) -> list[Sample]:
    """`count` of the rollouts that all ranks drew (one list each), with what the rank that scored them noted.
    Collective; equal on every rank.

    They are a fair sample of the step: of all its rollouts, also those that carry no loss, and whoever drew them. Which
    ones depends on the seed and on their keys alone, so that neither ranks nor a resume change it.
    """
    drawn = {rollout.key: rollout for one in weighed for rollout, _ in one}
    chosen = sorted(sorted(drawn, key=lambda key: derive_seed(seed, "sample", *key))[:count])
    losses: dict[RolloutKey, list[float]] = {}
    for scored in ranks.gather({key: token_losses[key] for key in chosen if key in token_losses}):
        losses |= scored
    return [Sample(drawn[key], losses.get(key, [])) for key in chosen]
