"""The algorithm. One step of on-policy self-distillation, and the loop of steps.

One set of weights plays both roles, unless another teacher is asked for. The student sees a problem and samples a
completion; the teacher, under a prompt that also holds the reference solution, scores the same completion; a divergence
between their next-token distributions is minimised at every token of it. The gradient flows through the student only.

There is no reward model, no value model, no reference-model penalty and no replay buffer; whether a completion is right
is reported, and may choose which tokens count. There is no Trainer class and there are no callbacks: a step is
`train_step` below. Clocks and metrics stand around these functions (`step_report`), and so does everything that ends or
repeats an update (`interruptions`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch

from opsd_cli.data.pairing import PairedBatch, Weighed, filler_batch, pair
from opsd_cli.data.problems import Rollout
from opsd_cli.data.seeds import derive_seed
from opsd_cli.data.shared_rows import SharedRows
from opsd_cli.data.stream import PromptStream
from opsd_cli.loss.chunked_head import Objective
from opsd_cli.loss.token_weights import weigh_rollouts
from opsd_cli.loss.types import TokenLoss, TokenMixture, TokenScores, Update
from opsd_cli.sampling.samplers import Completes, Sampler, SampleRequest, checked_rollouts
from opsd_cli.settings.config import Config
from opsd_cli.settings.registry import CompletesPrompt
from opsd_cli.teachers.teachers import Teacher, score_target
from opsd_cli.training.clock import PhaseClock, compute_metrics, count_draws, phase
from opsd_cli.training.engine_protocol import Engine
from opsd_cli.training.interruptions import StopRequested, TokenBudget, UpdateGuard, make_update, stop_together
from opsd_cli.training.step_report import (
    Inspection,
    Sample,
    StepRecord,
    StepReport,
    chosen_keys,
    collect_samples,
    step_metrics,
)
from opsd_cli.training.time_budget import TimeBudget

WithFeedback = Callable[[Sequence[Rollout], Sequence[bool]], tuple[list[Rollout], dict[str, float]]]
"""For a context that shows the teacher other rollouts of the step (`sibling`, `feedback`): given the rollouts and which
are right, the same rollouts with that in the teacher's prompt, and counts to report by metric name. Other contexts
leave both as they are."""


TokenFactors = Callable[[Rollout, str, bool], list[float]]
"""A rule of the user's own: given a rollout, its text and whether it is right, a factor for each completion token."""


@dataclass(frozen=True)
class Parts:
    """Everything a step needs, already built."""

    config: Config
    engine: Engine
    teacher: Teacher | None  # None for a divergence without one
    sampler: Sampler  # decides what is completed: which prompt, or the dataset's solution
    completer: Completes  # draws tokens from the current weights
    objective: Objective
    train_prompts: PromptStream
    special_ids: frozenset[int]
    encode_completion: Callable[[str], Sequence[int]]  # for a completion that the dataset gives
    inspect: Callable[[Sequence[Rollout]], Inspection]
    with_feedback: WithFeedback
    should_stop: Callable[[], bool]
    clock: PhaseClock
    budget: TokenBudget  # of a micro-batch
    token_factors: TokenFactors | None = None  # beside the rules of `tokens`
    time: TimeBudget = field(default_factory=lambda: TimeBudget(None))


def train_step(step: int, parts: Parts, *, updates: int) -> StepReport:
    """Step number `step`, counted from 0, of a run that has made `updates` updates before it. Raises StopRequested, on
    every rank, when any was asked to stop."""
    config, ranks = parts.config, parts.engine.ranks
    torch.manual_seed(derive_seed(config.run.seed, "step", step, ranks.rank))  # dropout, if there is any
    parts.clock.begin(step)
    parts.engine.meter.take()  # and forget what was not a step's, as evaluations

    rollouts = sample(parts, step)
    inspection = grade(parts, rollouts)
    rollouts, context_counts = parts.with_feedback(rollouts, inspection.right)
    weighed = weigh(parts, rollouts, inspection)
    # One rank knows all lengths and plans who scores what: uneven rows, even work. Only rows that move are sent.
    rows = SharedRows(weighed, ranks, parts.train_prompts.prompt_at)
    batches = micro_batches(rows, parts)
    # Summed over all ranks before anything is divided: the loss is one weighted mean over the tokens of the step.
    (total_weight,) = ranks.all_sum([sum(batch.weight for batch in batches)])

    # Several updates on the same rollouts are off-policy from the second on; loss.importance_cap corrects for it.
    record, made, update = StepRecord(), 0, Update(lr=0.0, grad_norm=0.0)
    while made < config.train.updates_per_step and total_weight > 0 and not update.refused:
        once = partial(update_once, step, parts, record, denominator=total_weight, may_stop=made == 0)
        plan = partial(micro_batches, rows, parts)
        update, batches = make_update(
            step, once, batches, record,
            engine=parts.engine, budget=parts.budget, plan=plan, free=parts.completer.free,
        )  # fmt: skip
        # A refused update ends the step: the same weights and rollouts would give the same numbers again.
        if not update.refused:
            made += 1
            move_teacher(parts, updates + made)

    metrics = step_metrics(record, update, rollouts, rows.distinct, inspection, context_counts, ranks)
    metrics |= parts.clock.metrics(metrics["tokens/completion"])
    metrics |= compute_metrics(parts.engine, metrics["time/step"])
    losses, samples = record.tokens.token_losses(), list[Sample]()
    if is_shown(step + 1, config.samples.every):
        keys = chosen_keys(rows.keys, count=config.samples.count, seed=config.run.seed)
        samples = collect_samples(keys, [rollout for rollout, _ in weighed], losses, ranks)
    return StepReport(metrics, made, samples, losses, update.refused, record.suspects)


def update_once(
    step: int, parts: Parts, record: StepRecord, batches: Sequence[PairedBatch], *, denominator: float, may_stop: bool
) -> Update:
    """Accumulate the gradient of all micro-batches and make one update. `may_stop` is false from the step's second
    update on: a checkpoint is of whole steps, and the weights have changed already, so a request to stop waits for the
    end."""
    recovers = parts.config.train.halve_on_oom
    guard = UpdateGuard(parts.engine.ranks, batches, parts.should_stop, may_stop=may_stop, recovers=recovers)
    for index, batch in enumerate(batches):
        loss = guard.loss_of(batch, partial(score, parts, batch))
        last = index == len(batches) - 1
        guard.backward(partial(backward, parts, loss, denominator=denominator, last=last))
        # A later update of the step has moved the weights since.
        record.tokens.add(batch, loss, padded=parts.engine.pads, on_policy=may_stop and comparable(parts.config))
    guard.check_losses()
    return optimize(parts, step)


def score(parts: Parts, batch: PairedBatch) -> TokenLoss:
    """A micro-batch under both prompts: its part of the objective, with gradient."""
    target = score_teacher(parts, batch)
    return student_loss(parts, batch, target)


# The phases of a step: each is timed, and shown while it lasts ------------------------------------------------------


@phase("time/sample")
def sample(parts: Parts, step: int) -> list[Rollout]:
    """This rank's completions of the step's problems. Raises StopRequested, on every rank, when any must stop."""
    request = sample_request(step, parts)
    rollouts = parts.sampler.sample(parts.completer, request)
    stop_together(parts.engine.ranks, parts.should_stop)  # what was cut short is no rollout
    count_draws(parts.engine, rollouts, parts.config.sampler)
    return checked_rollouts(rollouts, request, name=parts.config.sampler.plugin_name)


@phase("grade")
def grade(parts: Parts, rollouts: Sequence[Rollout]) -> Inspection:
    """Which completions are right, and what else their text tells."""
    return parts.inspect(rollouts)


@phase("time/score")
def score_teacher(parts: Parts, batch: PairedBatch) -> TokenScores | TokenMixture | None:
    """What the student is pulled towards, without gradient."""
    return None if parts.teacher is None else score_target(parts.teacher, batch, parts.config.target)


@phase("time/update")
def student_loss(parts: Parts, batch: PairedBatch, target: TokenScores | TokenMixture | None) -> TokenLoss:
    """The divergence at every completion token, with gradient."""
    return parts.engine.student_loss(batch, target, parts.objective)


@phase("time/update")
def backward(parts: Parts, loss: TokenLoss, *, denominator: float, last: bool) -> None:
    """Add the gradient of a micro-batch to that of the update."""
    parts.engine.backward(loss.weighted_sum, denominator=denominator, last=last)


@phase("time/update")
def optimize(parts: Parts, step: int) -> Update:
    """Clip the gradient and make the update, unless it is not finite."""
    config = parts.config
    # The number decides the learning rate.
    return parts.engine.step(parts.time.scheduled_step(step, config.optim, steps=config.train.steps))


@phase("time/score")
def move_teacher(parts: Parts, update: int) -> None:
    """After update number `update` of the run. Only a moving teacher moves."""
    if parts.teacher is not None:
        parts.teacher.after_update(update)


# What the phases are given ------------------------------------------------------------------------------------------


def sample_request(step: int, parts: Parts) -> SampleRequest:
    """This rank's share of the step's problems, each with its place in the stream of all problems."""
    config, ranks = parts.config, parts.engine.ranks
    per_step = config.train.problems_per_step
    places = range(step * per_step, (step + 1) * per_step)
    placed = list(zip(places, parts.train_prompts.at(places), strict=True))
    return SampleRequest(
        prompts=placed[ranks.rank :: ranks.world_size],
        rollouts_per_problem=config.train.rollouts_per_problem,
        sampling=config.sampling,
        seed=config.run.seed,
        encode_completion=parts.encode_completion,
        should_stop=parts.should_stop,
        step=step,
        following=partial(sample_request, step + 1, parts) if step + 1 < config.train.steps else None,
    )


def comparable(config: Config) -> bool:
    """Whether the sampler and the loss speak of one distribution, so that their log-probabilities can be compared: at
    one temperature, over the whole vocabulary, under one prompt. What was drawn greedily the sampler judges at
    temperature 1."""
    sampling = config.sampling
    if isinstance(config.sampler, CompletesPrompt) and config.sampler.prompt != "student":
        return False
    if sampling.temperature == 0:
        return config.loss.temperature == 1
    return sampling.temperature == config.loss.temperature and sampling.top_k == 0 and sampling.top_p == 1


def weigh(parts: Parts, rollouts: Sequence[Rollout], inspection: Inspection) -> list[Weighed]:
    """This rank's rollouts, each with whether it counts as right and with what scales its tokens' loss before anything
    is scored. A problem's rollouts are all on one rank."""
    graded = [replace(rollout, correct=right) for rollout, right in zip(rollouts, inspection.right, strict=True)]
    own = None
    if parts.token_factors is not None:
        own = list(map(parts.token_factors, graded, inspection.texts, inspection.right))
    config = parts.config
    return weigh_rollouts(graded, tokens=config.tokens, loss=config.loss, special_ids=parts.special_ids, own=own)


def micro_batches(rows: SharedRows, parts: Parts) -> list[PairedBatch]:
    """This rank's share of what all ranks drew, in pieces that fit the budget, as many on every rank. They are on the
    model's device; nothing after this sees a batch that is not."""
    engine = parts.engine
    # Rollouts without weight are left out here, so that no rank spends a pass on tokens that carry no loss.
    shares = parts.config.train.share_prompts and engine.shares
    mine = rows.dealt(max_tokens=parts.budget.tokens, padded=engine.pads, shares=shares)
    batches = pair([batch for batch in mine if batch], shares=shares)
    # ZeRO's collectives must match, so every rank makes the same number of passes, and at least one.
    batches += [filler_batch(pad_id=0) for _ in range(len(mine) - len(batches))]
    return [batch.to(engine.device) for batch in batches]


# The loop of steps --------------------------------------------------------------------------------------------------


class StepObserver(Protocol):
    """What `fit` calls beside the step: each is given the number of steps done."""

    def report(self, step: int, report: StepReport) -> None: ...

    def evaluate(self, step: int) -> None: ...

    def save(self, step: int) -> None: ...


def fit(parts: Parts, observer: StepObserver, *, start: int, updates: int) -> None:
    """Steps `start` to `train.steps` of a run that has made `updates` updates, or as many as its seconds allow, with
    evaluation and checkpoints where they are due. A request to stop ends in a checkpoint of the last finished step and
    StopRequested."""
    config, saved, done = parts.config, start, start
    while done < config.train.steps and not parts.time.is_used_up:
        try:
            report = train_step(done, parts, updates=updates)
            parts.time.add_step(report.metrics["time/step"], parts.engine.ranks)
            done, updates = done + 1, updates + report.updates
            observer.report(done, report)
            # After the last step the run measures anyway (`rank.run`).
            if due(done, config.eval.every) and done < config.train.steps and not parts.time.is_used_up:
                observer.evaluate(done)
        # A step stops before its first update or not at all (`may_stop`), so what is saved is always whole steps.
        except StopRequested:
            observer.save(done)
            raise
        if due(done, config.checkpoint.every):
            observer.save(done)
            saved = done
    if saved < done:
        observer.save(done)


def is_shown(done: int, every: int) -> bool:
    """Whether rollouts of the step are written: of the first one too, for runs that are shorter than `every`."""
    return due(done, every) or (every > 0 and done == 1)


def due(done: int, every: int) -> bool:
    """Whether something that happens each `every` steps (0: never) happens after `done` of them."""
    return every > 0 and done % every == 0
