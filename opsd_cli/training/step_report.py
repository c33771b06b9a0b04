"""What a step reports about its tokens and rollouts: averages, counts, and rollouts to show. What it takes is in
`clock`. Every metric's name is in the table `run.events.METRICS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from opsd_cli.data.pairing import PairedBatch
from opsd_cli.data.problems import Rollout, RolloutKey
from opsd_cli.data.seeds import derive_seed
from opsd_cli.loss.types import TokenLoss, Update
from opsd_cli.training.engine_protocol import RankGroup

OF_SAMPLER = ("sampler/logprob_gap", "sampler/kl")
"""Metrics that compare sampler and trainer, averaged over the tokens that were sampled, whatever their weight."""
COMPARED = "sampler/tokens"  # how many those are; no metric
TokenLosses = Mapping[RolloutKey, list[float]]
"""The divergence at each completion token of some rollouts."""


@dataclass(frozen=True)
class Sample:
    """A rollout to show, and the divergence at each of its completion tokens: none where it was not scored."""

    rollout: Rollout
    token_losses: list[float]


@dataclass(frozen=True)
class Inspection:
    """What is known of rollouts once their text has been read: which are right, and shares to report."""

    texts: list[str]  # without control tokens
    correct: list[bool]
    stated: list[bool]  # whether they state an answer at all
    counts: dict[str, float]  # metric name -> number of these rollouts that have it
    graded: bool = True  # the problems have answers; equal on every rank
    verdicts: list[bool] | None = None  # which count as right in training; None: those that are correct
    second: list[bool] | None = None  # which a second grader takes for right; None: there is none

    @property
    def right(self) -> list[bool]:
        """Which count as right for the context and for tokens.keep."""
        return self.correct if self.verdicts is None else self.verdicts


@dataclass(frozen=True)
class StepReport:
    """What one step did. Metrics are equal on every rank but for `time/`, `memory/` and `compute/`, which are this
    rank's own."""

    metrics: dict[str, float]  # by name
    updates: int  # that were made, up to train.updates_per_step; equal on every rank
    samples: list[Sample]  # drawn from the rollouts of all ranks, where the step writes any; on rank 0
    token_losses: TokenLosses  # of what this rank scored
    refused: Literal["", "loss", "gradient"]  # what was not finite, so that an update was not made; equal on every rank
    suspects: list[Rollout]  # those of this rank that it may come from


class TokenMeter:
    """Weighted sums of everything known per token, and what each token cost. Both stay on the device until the step is
    over, where each is read once."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weight, self._tokens, self._positions = 0.0, 0, 0
        self._kept: list[tuple[tuple[Rollout, ...], Tensor]] = []  # rollouts of a micro-batch, value of each token

    def add(self, batch: PairedBatch, loss: TokenLoss, *, padded: bool, on_policy: bool = False) -> None:
        """Take in a micro-batch, which lies where its loss does. `padded`: the model ran its rows as a rectangle.
        `on_policy`: its completions were drawn from the weights and the distribution that the loss computes with, so
        what the sampler says of them can be compared."""
        for role in (batch.student, batch.teacher, batch.other):
            if role is not None:
                self._tokens += role.tokens
                self._positions += len(role.lengths) * max(role.lengths) if padded else role.tokens
        for name, value_N in {"loss/objective": loss.value_N, **loss.diagnostics}.items():
            # In double: the sum runs over all tokens of a step, and stays on the device until the step is over.
            weighted = (value_N * batch.weights_N).sum().double()
            self._sums[name] = self._sums[name] + weighted if name in self._sums else weighted
        self._weight += batch.weight
        if on_policy:
            self._compare(loss.diagnostics["logprob/student"] - batch.sampler_logprobs_N)
        self.keep_token_losses(batch, loss)

    def _compare(self, log_ratio_N: Tensor) -> None:
        """Add up how far the trainer's log-probability of a token is from the sampler's: NaN for one that was not
        sampled."""
        drawn_N = ~log_ratio_N.isnan()
        log_ratio_N = log_ratio_N.nan_to_num(nan=0.0)
        for name, value_N in {
            COMPARED: drawn_N,
            "sampler/logprob_gap": log_ratio_N.abs(),
            # The mean of r - 1 - log r over tokens of the sampler is an estimate of its divergence from the trainer
            # that is never negative, token by token.
            "sampler/kl": log_ratio_N.expm1() - log_ratio_N,
        }.items():
            total = value_N.sum().double()
            self._sums[name] = self._sums[name] + total if name in self._sums else total

    def keep_token_losses(self, batch: PairedBatch, loss: TokenLoss) -> None:
        """Keep what each token cost, and add nothing to the averages."""
        self._kept.append((batch.rollouts, loss.value_N))

    def token_losses(self) -> dict[RolloutKey, list[float]]:
        """What each token of a rollout cost, by its key; in the last update where it was scored for several."""
        if not self._kept:
            return {}
        values, start = torch.cat([value_N for _, value_N in self._kept]).tolist(), 0
        losses: dict[RolloutKey, list[float]] = {}
        for rollouts, value_N in self._kept:
            place, start = start, start + len(value_N)  # a batch that only keeps ranks in step has no rollouts
            for rollout in rollouts:
                losses[rollout.key] = values[place : place + len(rollout.completion_ids)]
                place += len(rollout.completion_ids)
        return losses

    def snapshot(self) -> TokenMeter:
        """What is known so far, to go back to where micro-batches are to be forgotten."""
        copied = copy(self)
        copied._sums, copied._kept = dict(self._sums), list(self._kept)
        return copied

    def reduced(self, all_sum: Callable[[Sequence[float]], list[float]]) -> dict[str, float]:
        """Averages per completion token over all updates, micro-batches and ranks. Empty if no token carried loss."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names]).tolist()
        weight, tokens, positions, *totals = all_sum([self._weight, self._tokens, self._positions, *sums])
        by_name = dict(zip(names, totals, strict=True))
        compared = by_name.pop(COMPARED, 0.0)
        gaps = {name: by_name.pop(name) for name in OF_SAMPLER if name in by_name}
        means = {name: total / weight for name, total in by_name.items()}
        if compared:
            means |= {name: total / compared for name, total in gaps.items()}
        return means | {"tokens/scored": tokens, "tokens/padding": 1.0 - tokens / positions}


@dataclass
class StepRecord:
    """What a step notes while it is made."""

    tokens: TokenMeter = field(default_factory=TokenMeter)
    overflows: int = 0  # of the loss scale, in float16
    # Of this rank: those that a loss or gradient that is not finite may come from.
    suspects: list[Rollout] = field(default_factory=list)


def step_metrics(
    record: StepRecord,
    update: Update,
    rollouts: Sequence[Rollout],
    distinct: int,
    inspection: Inspection,
    context_counts: dict[str, float],
    ranks: RankGroup,
) -> dict[str, float]:
    """Everything but the clock's. `update` is the step's last, `rollouts` this rank's, `distinct` how many different
    completions all ranks have, which rank 0 knows. Collective."""
    metrics = {} if update.refused == "loss" else record.tokens.reduced(ranks.all_sum)
    if "entropy/teacher" in metrics:
        metrics["entropy/gap"] = metrics["entropy/student"] - metrics["entropy/teacher"]
    counts = {
        "rollout/length_mean": float(sum(len(rollout.completion_ids) for rollout in rollouts)),
        "rollout/truncated": float(sum(rollout.finish_reason == "length" for rollout in rollouts)),
        **inspection.counts,
        **context_counts,
    }
    if inspection.graded:
        counts |= {
            "rollout/accuracy": float(sum(inspection.correct)),
            "rollout/stated": float(sum(inspection.stated)),
        }
    lags = [rollout.lag for rollout in rollouts if rollout.lag is not None]
    own = (len(rollouts), distinct if ranks.rank == 0 else 0, len(lags), sum(lags))
    number, different, lagged, lag, *totals = ranks.all_sum([*own, *counts.values()])
    metrics |= {name: total / number for name, total in zip(counts, totals, strict=True)}
    metrics |= {
        "tokens/completion": totals[0],
        "rollout/distinct": different / number,
        "optim/lr": update.lr,
        "optim/grad_norm": update.grad_norm,
        "optim/update_norm": update.update_norm,
        "optim/skipped": float(update.refused != ""),
    }
    if lagged:
        metrics["sampler/lag"] = lag / lagged
    if update.loss_scale is not None:
        metrics |= {"optim/loss_scale": update.loss_scale, "optim/overflows": float(record.overflows)}
    return metrics


def chosen_keys(keys: Sequence[RolloutKey], *, count: int, seed: int) -> list[RolloutKey]:
    """`count` of a step's rollouts to show: a fair sample, also of those that carry no loss. Which ones depends on the
    seed and on their keys alone, so that neither ranks nor a resume change it."""
    return sorted(sorted(keys, key=lambda key: derive_seed(seed, "sample", *key))[:count])


def collect_samples(
    chosen: Sequence[RolloutKey], drawn: Sequence[Rollout], token_losses: TokenLosses, ranks: RankGroup
) -> list[Sample]:
    """The rollouts that rank 0 has chosen, each from the rank that drew it, with what the rank that scored it noted; on
    rank 0, and none elsewhere. Collective."""
    keys = ranks.from_first(chosen)
    own = {rollout.key: rollout for rollout in drawn if rollout.key in keys}
    parts = ranks.to_first((own, {key: token_losses[key] for key in keys if key in token_losses}))
    rollouts = {key: rollout for of_rank, _ in parts for key, rollout in of_rank.items()}
    losses = {key: values for _, scored in parts for key, values in scored.items()}
    return [Sample(rollouts[key], losses.get(key, [])) for key in chosen]
