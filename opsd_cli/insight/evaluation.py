"""Accuracy on held-out problems, with its uncertainty: before, during and after training, and for `opsd eval`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

from opsd_cli.data.problems import PromptPair, Rollout
from opsd_cli.data.seeds import derive_seed
from opsd_cli.sampling.batch_decoder import BatchLimits
from opsd_cli.sampling.choose_decoder import Completer
from opsd_cli.sampling.token_sampling import Draw
from opsd_cli.settings.config import EvalSettings, SamplingSettings
from opsd_cli.training.interruptions import stop_together
from opsd_cli.training.step_report import Inspection

Role = Literal["student", "teacher"]
Z_95 = 1.959963984540054


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
) -> Evaluation:
    """Complete each prompt once under `role` and count the correct answers. Collective: each rank takes its share.

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
    tokens = sum(len(done.ids) for done in completions)
    cut = sum(done.finish_reason == "length" for done in completions)
    seen = inspect(rollouts)
    correct, stated, tokens, cut = map(int, ranks.all_sum([sum(seen.correct), sum(seen.stated), tokens, cut]))
    n = len(ordered)
    low, high = wilson_interval(correct, n)
    return Evaluation(
        split=split, role=role, problems=n, correct=correct, accuracy=correct / n, low=low, high=high,
        length_mean=tokens / n, truncated=cut / n, stated=stated / n, seconds=time.perf_counter() - start,
    )  # fmt: skip


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion (Wilson 1927); `trials` at least 1."""
    share, z2 = successes / trials, Z_95**2
    middle = share + z2 / (2 * trials)
    half = Z_95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(0.0, (middle - half) / (1 + z2 / trials)), min(1.0, (middle + half) / (1 + z2 / trials))
