"""Which rollouts of a step are shown, and as what lines of samples.jsonl. Apart from the loop, which only hands them
over, and from the record, which only writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opsd_cli.data.problems import Rollout, RolloutKey
from opsd_cli.data.seeds import derive_seed

if TYPE_CHECKING:
    from opsd_cli.data.pairing import Weighed
    from opsd_cli.engine.process_group import Ranks
    from opsd_cli.rank.build import Material

TokenLosses = Mapping[RolloutKey, list[float]]
"""The divergence at each completion token of some rollouts."""


@dataclass(frozen=True)
class Sample:
    """A rollout to show, and the divergence at each of its completion tokens: none where it was not scored."""

    rollout: Rollout
    token_losses: list[float]


def draw_samples(
    weighed: Sequence[Sequence[Weighed]], token_losses: TokenLosses, ranks: Ranks, *, count: int, seed: int
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


def sample_lines(step: int, samples: Sequence[Sample], material: Material) -> Iterator[dict[str, Any]]:
    """Samples as lines of samples.jsonl: text for people, ids and numbers for programs."""
    grades = material.grade([sample.rollout for sample in samples])
    for sample, correct in zip(samples, grades, strict=True):
        rollout, problem = sample.rollout, sample.rollout.prompt.problem
        ids = list(rollout.completion_ids)
        yield {
            "step": step,
            "problem": problem.id,
            "prompt": material.tokenizer.decode(list(rollout.prompt.student_ids)),
            "teacher_prompt": material.tokenizer.decode(list(rollout.prompt.teacher_ids)),
            "completion": material.tokenizer.decode(ids),
            "completion_ids": ids,
            "finish_reason": rollout.finish_reason,
            "answer": problem.answer,
            "reward": float(correct),
            "divergence": [round(value, 5) for value in sample.token_losses],
        }
