"""The algorithm. One step of on-policy self-distillation, and the loop of steps.

One set of weights plays both roles. The student sees a problem and samples a completion; the teacher, under a prompt
that also holds the reference solution, scores the same completion; a divergence between their next-token
distributions is minimised at every token of it. The gradient flows through the student only.

What is not here, on purpose: no reward, no advantage, no value model, no reference-model penalty, no replay buffer.
No Trainer class and no callbacks either: what happens each step is a line below.

Owns the order of things. Does not know DeepSpeed, files, which teacher or sampler it was given, or how a prompt looks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from opsd_cli.data.microbatches import shared_out
from opsd_cli.data.pairing import PairedBatch, Weighed, pair
from opsd_cli.data.problems import PromptPair, Rollout
from opsd_cli.data.seeds import derive_seed, positions_of_step
from opsd_cli.engine.zero import Update, ZeroEngine
from opsd_cli.loss.chunked_head import Factor, TokenLoss, distill
from opsd_cli.loss.divergences import Divergence
from opsd_cli.loss.token_weights import RolloutWeights, factors_of
from opsd_cli.sampling.samplers import Sampler, SampleRequest
from opsd_cli.settings.config import Config
from opsd_cli.teachers.mixtures import target_of
from opsd_cli.teachers.teachers import Teacher
from opsd_cli.testing.fault_points import reach
from opsd_cli.training.out_of_memory import OutOfMemory, TokenBudget, tokens_of, within_memory
from opsd_cli.training.samples import Sample, TokenLosses, draw_samples
from opsd_cli.training.step_metrics import PhaseClock, TokenMeter
from opsd_cli.training.stop_flag import StopRequested

Inspect = Callable[[Sequence[Rollout]], "Inspection"]
WithFeedback = Callable[[Sequence[Rollout], Sequence[bool]], tuple[list[Rollout], dict[str, float]]]
"""Given rollouts and which are right: the rollouts with what a context made of rollouts shows, and counts of it by
metric name (none where the context is written)."""


@dataclass(frozen=True)
class Inspection:
    """What is known of rollouts once their text has been read: which are right, and shares to report."""

    correct: list[bool]
    counts: dict[str, float]  # metric name -> number of these rollouts that have it


@dataclass(frozen=True)
class Parts:
    """Everything a step needs, already built."""

    config: Config
    engine: ZeroEngine
    teacher: Teacher | None  # None for a divergence without one
    sampler: Sampler
    divergence: Divergence  # over its support and with its clip
    train_prompts: Sequence[PromptPair]
    special_ids: frozenset[int]
    encode_completion: Callable[[str], Sequence[int]]
    inspect: Inspect
    with_feedback: WithFeedback
    should_stop: Callable[[], bool]
    enter: Callable[[str], None]  # told each phase as it begins
    budget: TokenBudget  # of a micro-batch


@dataclass(frozen=True)
class StepReport:
    """What one step did. Metrics are equal on every rank but for `time/` and `memory/`, which are this rank's own."""

    metrics: dict[str, float]  # by name
    updates: int  # that were made, up to train.updates_per_step; equal on every rank
    samples: list[Sample]  # drawn from the rollouts of all ranks, where the step writes any; equal on every rank
    token_losses: TokenLosses  # of what this rank scored
    refused: Literal["", "loss", "gradient"]  # what was not finite, so that an update was not made; equal on every rank
    suspects: list[Rollout]  # those of this rank that it may come from


def train_step(step: int, parts: Parts, *, updates: int) -> StepReport:
    """Step number `step` (from 0) of a run that has made `updates` updates. Raises StopRequested, on every rank, when
    any was asked to stop."""
    config, engine, ranks = parts.config, parts.engine, parts.engine.ranks
    clock, meter = PhaseClock(engine.device, lambda phase: parts.enter(f"step {step + 1}: {phase}")), TokenMeter()
    torch.manual_seed(derive_seed(config.run.seed, "step", step, ranks.rank))  # dropout, if there is any

    with clock.phase("time/sample"):
        rollouts = parts.sampler.sample(engine, sample_request(step, parts))
    assert len({r.key for r in rollouts}) == len(rollouts), "the sampler gave two rollouts one place and number"
    reach("step.sampled")
    stop_together(parts)

    parts.enter(f"step {step + 1}: grade")
    inspection = parts.inspect(rollouts)
    rollouts, context_counts = parts.with_feedback(rollouts, inspection.correct)
    weigh = rollout_weights(rollouts, inspection, parts)
    weighed = ranks.gather([(rollout, weigh(rollout)) for rollout in rollouts])
    batches = micro_batches(weighed, parts)
    (n_tokens,) = ranks.all_sum([sum(batch.weight for batch in batches)])
    update, made, overflows, suspects = Update(lr=0.0, grad_norm=0.0), 0, 0, list[Rollout]()
    while made < config.train.updates_per_step and n_tokens > 0 and not update.refused:
        mark = meter.mark()
        try:
            update, suspects = take_update(step, batches, parts, clock, meter, n_tokens, may_stop=made == 0)
        except OutOfMemory:  # the same update again, from the same rollouts
            engine.drop_gradients()
            meter.back_to(mark)
            parts.budget.halve(ranks.largest(max(map(tokens_of, batches))))
            batches = micro_batches(weighed, parts)
            continue
        if update.overflow:  # float16: the same update again, at half the scale
            meter.back_to(mark)
            overflows += 1
        elif not update.refused:
            made += 1
            move_teacher(updates + made, parts, clock)

    metrics = {} if update.refused == "loss" else meter.reduced(ranks.all_sum)
    metrics |= rollout_metrics(rollouts, inspection, context_counts, parts)
    metrics |= update_metrics(update, overflows)
    metrics |= clock.metrics(metrics["tokens/completion"])
    losses, samples = meter.token_losses(), list[Sample]()
    if due(step + 1, config.samples.every):
        samples = draw_samples(weighed, losses, ranks, count=config.samples.count, seed=config.run.seed)
    return StepReport(metrics, made, samples, losses, update.refused, suspects)


def take_update(
    step: int, batches: Sequence[PairedBatch], parts: Parts, clock: PhaseClock, meter: TokenMeter, n_tokens: float,
    *, may_stop: bool,
) -> tuple[Update, list[Rollout]]:  # fmt: skip
    """Accumulate the gradient of all micro-batches and make one update, unless something in it is not finite; and this
    rank's rollouts that this may come from: of the micro-batch whose loss it is, or all. Without `may_stop` a request
    to stop waits for the step's end: a checkpoint is of whole steps, and this one has changed the weights already."""
    engine = parts.engine
    recovers = parts.config.train.halve_on_oom and engine.ranks.any(any(len(batch.rollouts) > 1 for batch in batches))
    for index, batch in enumerate(batches):
        loss = within_memory(partial(score_batch, batch, parts, clock), recovers=recovers)
        is_finite = loss is None or bool(loss.weighted_sum.isfinite())
        stops, lacks, breaks = engine.ranks.all_sum([parts.should_stop() and may_stop, loss is None, not is_finite])
        if stops:
            raise StopRequested
        if lacks:
            raise OutOfMemory
        assert loss is not None
        if breaks:  # before backward: there the ranks would exchange what is not finite
            meter.keep_token_losses(batch, loss)
            engine.drop_gradients()
            update = Update(lr=engine.learning_rate(step), grad_norm=math.nan, refused="loss")
            return update, [] if is_finite else list(batch.rollouts)
        backward = partial(engine.backward, loss.weighted_sum, denominator=n_tokens, last=index == len(batches) - 1)
        with clock.phase("time/update"):
            done = within_memory(backward, recovers=recovers and engine.ranks.world_size == 1)
        if not done:  # with more ranks the others are in its collectives already
            raise OutOfMemory
        meter.add(batch, loss, padded=engine.pads)
    with clock.phase("time/update"):
        return engine.step(step), [rollout for batch in batches for rollout in batch.rollouts]


def update_metrics(update: Update, overflows: int) -> dict[str, float]:
    """What the step's last update was, and, in float16, how often its scale was too large."""
    metrics = {
        "optim/lr": update.lr,
        "optim/grad_norm": update.grad_norm,
        "optim/skipped": float(update.refused != ""),
    }
    if update.loss_scale is not None:
        metrics |= {"optim/loss_scale": update.loss_scale, "optim/overflows": float(overflows)}
    return metrics


def move_teacher(update: int, parts: Parts, clock: PhaseClock) -> None:
    """After update number `update` of the run. Only a moving teacher moves."""
    if parts.teacher is None:
        return
    with clock.phase("time/score"):
        parts.teacher.after_update(update)
    reach("step.teacher_moved")


def micro_batches(weighed: Sequence[Sequence[Weighed]], parts: Parts) -> list[PairedBatch]:
    """This rank's share of what all ranks drew, in pieces that fit the budget, as many on every rank. They are on the
    model's device; nothing after this sees a batch that is not."""
    engine = parts.engine
    mine = shared_out(weighed, rank=engine.ranks.rank, max_tokens=parts.budget.tokens, padded=engine.pads)
    return [batch.to(engine.device) for batch in engine.even_out(pair(mine))]


def score_batch(batch: PairedBatch, parts: Parts, clock: PhaseClock) -> TokenLoss:
    """Score one micro-batch under both prompts: its part of the objective, with gradient."""
    config, engine = parts.config, parts.engine
    with clock.phase("time/score"):
        target = None if parts.teacher is None else target_of(parts.teacher, batch, config.target)
    reach("step.scored")
    with clock.phase("time/update"):
        loss = engine.student_loss(
            batch.student,
            partial(
                distill,
                teacher=target,
                target_ids_N=batch.target_ids_N,
                weights_N=batch.weights_N,
                divergence=parts.divergence,
                temperature=config.loss.temperature,
                chunk_bytes=config.loss.chunk_mib * 2**20,
                factors=token_factors(batch, config),
                wide_logits=config.loss.logits_dtype == "float32",
            ),
        )
    return replace(loss, weighted_sum=loss.weighted_sum * math.nan) if reach("step.loss") else loss


def token_factors(batch: PairedBatch, config: Config) -> tuple[Factor, ...]:
    """What scales a token's loss once both distributions are known."""
    return factors_of(config.tokens, batch.sampler_logprobs_N, importance_cap=config.loss.importance_cap)


def rollout_weights(rollouts: Sequence[Rollout], inspection: Inspection, parts: Parts) -> RolloutWeights:
    """What scales a token's loss before anything is scored."""
    right = [rollout.key for rollout, correct in zip(rollouts, inspection.correct, strict=True) if correct]
    return RolloutWeights(
        parts.config.tokens, parts.config.loss.mask_truncated, parts.special_ids, correct=frozenset(right)
    )


def sample_request(step: int, parts: Parts) -> SampleRequest:
    """This rank's share of the step's problems, each with its place in the stream of all problems."""
    config, ranks = parts.config, parts.engine.ranks
    per_step = config.train.problems_per_step
    positions = positions_of_step(len(parts.train_prompts), step=step, per_step=per_step, seed=config.run.seed)
    placed = [(step * per_step + i, parts.train_prompts[position]) for i, position in enumerate(positions)]
    return SampleRequest(
        prompts=placed[ranks.rank :: ranks.world_size],
        rollouts_per_problem=config.train.rollouts_per_problem,
        sampling=config.sampling,
        seed=config.run.seed,
        policy_step=step,
        encode_completion=parts.encode_completion,
        should_stop=parts.should_stop,
    )


def rollout_metrics(
    rollouts: Sequence[Rollout], inspection: Inspection, context_counts: dict[str, float], parts: Parts
) -> dict[str, float]:
    """Length, truncation, accuracy and what else was counted in the step's rollouts, over all ranks."""
    counts = {
        "rollout/length_mean": float(sum(len(rollout.completion_ids) for rollout in rollouts)),
        "rollout/truncated": float(sum(rollout.finish_reason == "length" for rollout in rollouts)),
        "rollout/accuracy": float(sum(inspection.correct)),
        **inspection.counts,
        **context_counts,
    }
    number, *totals = parts.engine.ranks.all_sum([len(rollouts), *counts.values()])
    shares = {name: total / number for name, total in zip(counts, totals, strict=True)}
    return shares | {"tokens/completion": totals[0]}


def stop_together(parts: Parts) -> None:
    """Leave the step on every rank at the same place if any rank was asked to stop."""
    if parts.engine.ranks.any(parts.should_stop()):
        raise StopRequested


@dataclass(frozen=True)
class Outside:
    """What `fit` calls beside the step: each is given the number of steps done."""

    report: Callable[[int, StepReport], None]
    evaluate: Callable[[int], None]
    save: Callable[[int], None]


def fit(parts: Parts, outside: Outside, *, start: int, updates: int) -> None:
    """Steps `start` to `train.steps` of a run that has made `updates` updates, with evaluation and checkpoints where
    they are due.

    A request to stop ends in a checkpoint of the last finished step and StopRequested.
    """
    config, saved = parts.config, start
    for step in range(start, config.train.steps):
        done = step
        try:
            report = train_step(step, parts, updates=updates)
            done, updates = step + 1, updates + report.updates
            outside.report(done, report)
            reach("step.reported")
            if due(done, config.eval.every) and done < config.train.steps:
                outside.evaluate(done)
        except StopRequested:
            outside.save(done)
            raise
        if due(done, config.checkpoint.every):
            outside.save(done)
            saved = done
    if saved < config.train.steps:
        outside.save(config.train.steps)


def due(done: int, every: int) -> bool:
    """Whether something that happens each `every` steps (0: never) happens after `done` of them."""
    return every > 0 and done % every == 0
