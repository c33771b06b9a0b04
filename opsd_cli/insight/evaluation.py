"""Accuracy on held-out problems, with its uncertainty: before, during and after training, and for `opsd eval`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from operator import attrgetter
from typing import Literal

from opsd_cli.data.problems import FinishReason, PromptPair, Rollout
from opsd_cli.data.seeds import derive_seed
from opsd_cli.data.stated_answers import agreeing, stated_by
from opsd_cli.insight.at_k import Vote, average_at, ladder, majority_at, pass_at
from opsd_cli.sampling.batch_decoder import BatchLimits
from opsd_cli.sampling.choose_decoder import Completer
from opsd_cli.sampling.token_sampling import Draw
from opsd_cli.settings.config import EvalSettings, SamplingSettings
from opsd_cli.training.interruptions import stop_together
from opsd_cli.training.step_report import Inspection

Role = Literal["student", "teacher"]
KEPT_TOGETHER = 4  # times eval.max_rows: completions after which an evaluation that is kept writes down what it has


@dataclass(frozen=True)
class Evaluation:
    """Counted over all ranks. `low` and `high` bound the accuracy: 95 % Wilson interval."""

    split: str
    role: Role
    problems: int
    correct: int  # completions
    accuracy: float  # of one completion: avg@k where there are k of each problem
    low: float
    high: float
    length_mean: float  # completion tokens
    truncated: float  # share cut by the length limit
    stated: float  # share that states an answer, right or wrong
    seconds: float
    samples: int | None = None  # completions of each problem, where there are several
    at_k: dict[str, tuple[float, float, float]] | None = None  # pass@k and maj@k with their intervals, of several
    disagreements: int | None = None  # completions that a second grader graded otherwise; None: there is none
    kl_from_initial: float | None = None  # KL(policy || initial policy) per token, nats; None: not measured


@dataclass(frozen=True)
class Outcome:
    """One completion of an evaluation."""

    problem: str  # id
    correct: bool
    stated: bool  # an answer, right or wrong
    finish_reason: FinishReason
    tokens: int
    completion: str  # text as it was graded
    sample: int = 0  # which completion of the problem
    said: str | None = None  # the answer that it states
    second: bool | None = None  # what a second grader says; None: there is none


def evaluate(
    completer: Completer,
    prompts: Sequence[PromptPair],
    *,
    role: Role,
    split: str,
    settings: EvalSettings,
    seed: int,
    inspect: Callable[[Sequence[Rollout]], Inspection],
    should_stop: Callable[[], bool],
    progress: Callable[[int], None],
    kept: Sequence[Outcome] = (),
    keep: Callable[[Sequence[Outcome]], None] | None = None,
) -> tuple[Evaluation, list[Outcome], list[Rollout]]:
    """Complete each prompt (`eval.samples` times) under `role` and count the correct answers; with what became of each,
    in the order of the prompts, on rank 0, and this rank's rollouts. Collective: each rank takes its share. `kept` are
    outcomes of an earlier attempt, which are not made again; `keep` is given new ones as they come, on rank 0.

    Raises StopRequested on every rank if any is asked to stop.
    """
    start, ranks = time.perf_counter(), completer.ranks
    found = {(outcome.problem, outcome.sample): outcome for outcome in kept}
    jobs = [(pair, sample) for pair in prompts for sample in range(settings.samples)]
    jobs = [job for job in jobs if (job[0].problem.id, job[1]) not in found]
    ids_of = attrgetter(f"{role}_ids")
    # Dealt out in order of length, so that every rank has as much to do.
    jobs.sort(key=lambda job: (len(ids_of(job[0])), job[0].problem.id, job[1]))
    at_once = len(jobs) if keep is None else KEPT_TOGETHER * settings.max_rows * ranks.world_size
    rollouts: list[Rollout] = []

    def report(before: int, most: int, done: int) -> None:
        progress(before + min(most, done * ranks.world_size))

    for first in range(0, len(jobs), max(1, at_once)):
        some = jobs[first : first + at_once]
        share = some[ranks.rank :: ranks.world_size]
        completions = completer.complete(
            [Draw(ids_of(pair), seed_of(seed, pair.problem.id, sample)) for pair, sample in share],
            sampling=sampling_of(settings),
            limits=BatchLimits(settings.max_rows, settings.cache_tokens),
            should_stop=should_stop,
            report_done=partial(report, len(found), len(some)),
        )
        # Before grading: after a request to stop, what was cut short is no answer.
        stop_together(ranks, should_stop)
        drawn = [
            Rollout(pair, done.ids, done.finish_reason, done.logprobs)
            for (pair, _), done in zip(share, completions, strict=True)
        ]
        by_rank = ranks.to_first(_outcomes(drawn, [number for _, number in share], inspect))
        new = [outcome for part in by_rank for outcome in part]
        if keep is not None and ranks.rank == 0:
            keep(new)
        found |= {(outcome.problem, outcome.sample): outcome for outcome in new}
        rollouts += drawn
    evaluation, outcomes = None, list[Outcome]()
    if ranks.rank == 0:
        outcomes = [found[pair.problem.id, sample] for pair in prompts for sample in range(settings.samples)]
        evaluation = summed_up(outcomes, role=role, split=split, seconds=time.perf_counter() - start)
    return ranks.from_first(evaluation), outcomes, rollouts


def sampling_of(settings: EvalSettings) -> SamplingSettings:
    """How an evaluation draws."""
    return SamplingSettings(
        max_completion_tokens=settings.max_completion_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
    )


def seed_of(seed: int, problem: str, sample: int) -> int:
    """What decides a completion's draws: the same whatever else is measured, on however many ranks."""
    return derive_seed(seed, "evaluation", problem, *([sample] if sample else []))


def _outcomes(
    rollouts: Sequence[Rollout], samples: Sequence[int], inspect: Callable[[Sequence[Rollout]], Inspection]
) -> list[Outcome]:
    seen = inspect(rollouts)
    return [
        Outcome(
            problem=rollout.prompt.problem.id, correct=correct, stated=stated, finish_reason=rollout.finish_reason,
            tokens=len(rollout.completion_ids), completion=text, sample=sample,
            said=stated_by(text, rollout.prompt.problem.answer or "0"), second=second,
        )
        for rollout, sample, correct, stated, text, second in zip(
            rollouts, samples, seen.correct, seen.stated, seen.texts, seen.second or repeat(None, len(rollouts)),
            strict=True,
        )
    ]  # fmt: skip


def summed_up(outcomes: Sequence[Outcome], *, role: Role, split: str, seconds: float) -> Evaluation:
    """What the outcomes say together: those of a problem stand together, as many of each."""
    n, correct = len(outcomes), sum(outcome.correct for outcome in outcomes)
    samples = 1 + max(outcome.sample for outcome in outcomes)
    families = [outcomes[start : start + samples] for start in range(0, n, samples)]
    average = average_at([[outcome.correct for outcome in family] for family in families])
    graded_twice = [outcome for outcome in outcomes if outcome.second is not None]
    return Evaluation(
        split=split, role=role, problems=len(families), correct=correct, accuracy=correct / n,
        low=average.low, high=average.high,
        length_mean=sum(outcome.tokens for outcome in outcomes) / n,
        truncated=sum(outcome.finish_reason == "length" for outcome in outcomes) / n,
        stated=sum(outcome.stated for outcome in outcomes) / n,
        seconds=seconds,
        samples=samples if samples > 1 else None,
        at_k=at_every_k(families) if samples > 1 else None,
        disagreements=sum(one.second != one.correct for one in graded_twice) if graded_twice else None,
    )  # fmt: skip


def at_every_k(families: Sequence[Sequence[Outcome]]) -> dict[str, tuple[float, float, float]]:
    """pass@k and maj@k of several completions of each problem, at every k of the ladder, with their intervals."""
    right = [[outcome.correct for outcome in family] for family in families]
    votes = []
    for family in families:
        groups = agreeing([outcome.said for outcome in family])
        number = {place: group for group, places in enumerate(groups) for place in places}
        votes.append([Vote(number.get(place), outcome.correct) for place, outcome in enumerate(family)])
    found: dict[str, tuple[float, float, float]] = {}
    for k in ladder(len(right[0]))[1:]:
        for name, estimate in ((f"pass@{k}", pass_at(right, k)), (f"maj@{k}", majority_at(votes, k))):
            found[name] = (estimate.value, estimate.low, estimate.high)
    return found
