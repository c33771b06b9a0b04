"""Accuracy on held-out problems, with its uncertainty: before, during and after training, and for `opsd eval`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

from opsd_cli.data.problems import FinishReason, PromptPair, Rollout
from opsd_cli.data.seeds import derive_seed
from opsd_cli.insight.paired import wilson_interval
from opsd_cli.sampling.batch_decoder import BatchLimits
from opsd_cli.sampling.choose_decoder import Completer
from opsd_cli.sampling.token_sampling import Draw
from opsd_cli.settings.config import EvalSettings, SamplingSettings
from opsd_cli.training.interruptions import stop_together
from opsd_cli.training.step_report import Inspection

Role = Literal["student", "teacher"]


@dataclass(frozen=True)
class Evaluation:
    """Counted over all ranks. `low` and `high` bound the accuracy: 95 % Wilson interval."""

    split: str
    role: Role
    problems: int
    correct: int
    accuracy: float
    low: float
    high: float
    length_mean: float  # completion tokens
    truncated: float  # share cut by the length limit
    stated: float  # share that states an answer, right or wrong
    seconds: float
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
) -> tuple[Evaluation, list[Outcome], list[Rollout]]:
    """Complete each prompt once under `role` and count the correct answers; with what became of each prompt, in their
    order, and this rank's rollouts. Collective: each rank takes its share, and all know all outcomes.

    Raises StopRequested on every rank if any is asked to stop.
    """
    start, ranks = time.perf_counter(), completer.ranks
    sampling = SamplingSettings(
        max_completion_tokens=settings.max_completion_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
    )
    ids_of = attrgetter(f"{role}_ids")
    # Dealt out in order of length, so that every rank has as much to do.
    ordered = sorted(prompts, key=lambda pair: (len(ids_of(pair)), pair.problem.id))
    share = ordered[ranks.rank :: ranks.world_size]
    completions = completer.complete(
        [Draw(ids_of(pair), derive_seed(seed, "evaluation", pair.problem.id)) for pair in share],
        sampling=sampling,
        limits=BatchLimits(settings.max_rows, settings.cache_tokens),
        should_stop=should_stop,
        report_done=lambda done: progress(min(len(ordered), done * ranks.world_size)),
    )
    # Before grading: after a request to stop, what was cut short is no answer.
    stop_together(ranks, should_stop)
    rollouts = [
        Rollout(pair, done.ids, done.finish_reason, done.logprobs)
        for pair, done in zip(share, completions, strict=True)
    ]
    seen = inspect(rollouts)
    mine = [
        Outcome(rollout.prompt.problem.id, correct, stated, rollout.finish_reason, len(rollout.completion_ids), text)
        for rollout, correct, stated, text in zip(rollouts, seen.correct, seen.stated, seen.texts, strict=True)
    ]
    found = {outcome.problem: outcome for part in ranks.gather(mine) for outcome in part}
    outcomes = [found[pair.problem.id] for pair in prompts]
    return summed_up(outcomes, role=role, split=split, seconds=time.perf_counter() - start), outcomes, rollouts


def summed_up(outcomes: Sequence[Outcome], *, role: Role, split: str, seconds: float) -> Evaluation:
    """What the outcomes say together."""
    n, correct = len(outcomes), sum(outcome.correct for outcome in outcomes)
    low, high = wilson_interval(correct, n)
    return Evaluation(
        split=split, role=role, problems=n, correct=correct, accuracy=correct / n, low=low, high=high,
        length_mean=sum(outcome.tokens for outcome in outcomes) / n,
        truncated=sum(outcome.finish_reason == "length" for outcome in outcomes) / n,
        stated=sum(outcome.stated for outcome in outcomes) / n,
        seconds=seconds,
    )  # fmt: skip
