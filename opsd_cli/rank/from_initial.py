"""How far the policy has moved from where it began, on held-out prompts: the exact KL from the initial policy along
some of the completions that an evaluation has drawn anyway."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from opsd_cli.data.microbatches import plan_microbatches
from opsd_cli.data.pairing import Weighed, filler_batch, pair
from opsd_cli.data.problems import Rollout
from opsd_cli.engine.zero import ZeroEngine
from opsd_cli.loss.chunked_head import Objective
from opsd_cli.loss.divergences import ReverseKL
from opsd_cli.settings.config import Config
from opsd_cli.teachers.teachers import Initial, Teacher
from opsd_cli.training.interruptions import TokenBudget
from opsd_cli.training.loop import Parts

COMPLETIONS = 16  # of an evaluation: two forward passes over so many rows


@dataclass(frozen=True)
class FromInitial:
    """Measures KL(policy || initial policy) per token, both under the student's prompt."""

    engine: ZeroEngine
    initial: Teacher
    objective: Objective
    budget: TokenBudget  # of a micro-batch

    def __call__(self, rollouts: Sequence[Rollout]) -> float:
        """Of this rank's rollouts of an evaluation, together with those of the others. Collective."""
        engine, ranks = self.engine, self.engine.ranks
        chosen = self._chosen([one for one in rollouts if one.completion_ids])
        alike = [replace(one, prompt=replace(one.prompt, teacher_ids=one.prompt.student_ids)) for one in chosen]
        weighed: list[list[Weighed]] = [[] for _ in range(ranks.world_size)]
        weighed[0] = [(one, [1.0] * len(one.completion_ids)) for one in alike]
        most = self.budget.tokens
        batches = pair(plan_microbatches(weighed, rank=ranks.rank, max_tokens=most, padded=engine.pads))
        count = ranks.largest(max(1, len(batches)))
        batches += [filler_batch(pad_id=0) for _ in range(count - len(batches))]
        spent = weight = 0.0
        for batch in (batch.to(engine.device) for batch in batches):
            measured = engine.compare(batch, self.initial.score(batch.teacher), self.objective)
            spent, weight = spent + float(measured.weighted_sum), weight + batch.weight
        total, tokens = ranks.all_sum([spent, weight])
        return total / tokens if tokens else 0.0

    def _chosen(self, drawn: Sequence[Rollout]) -> list[Rollout]:
        """The few of all ranks' rollouts that are looked at, on every rank: by id, so that they are the same whatever
        the number of ranks."""
        ranks = self.engine.ranks
        likely = sorted(drawn, key=id_of)[:COMPLETIONS]  # no more of one rank's can be chosen
        asked = [(name, rank) for rank, names in enumerate(ranks.to_first([*map(id_of, likely)])) for name in names]
        wanted = Counter(rank for _, rank in sorted(asked)[:COMPLETIONS])
        own = ranks.hand_out([wanted[rank] for rank in range(ranks.world_size)])
        by_rank = ranks.to_first(likely[:own])
        chosen: list[Rollout] = ranks.from_first(sorted((one for part in by_rank for one in part), key=id_of))
        return chosen


def id_of(rollout: Rollout) -> str:
    return rollout.prompt.problem.id


def from_initial(config: Config, engine: ZeroEngine, parts: Parts) -> FromInitial | None:
    """None where the initial weights are not at hand: nothing is copied for this. Under LoRA they are what lies under
    the adapter; else the teacher has them, if it is the initial one."""
    if engine.has_adapter:
        initial = Initial().build(engine)
    elif isinstance(config.teacher, Initial) and parts.teacher is not None:
        initial = parts.teacher
    else:
        return None
    rules = replace(config.tokens, gate="none", prefix_nats=0.0)
    objective = replace(parts.objective, divergence=ReverseKL(), tokens=rules, importance_cap=None, temperature=1.0)
    return FromInitial(engine, initial, objective, parts.budget)
