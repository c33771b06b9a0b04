"""Rollouts -> micro-batches in which student and teacher are aligned token by token. Owns the layout of rows, shifting
and the one invariant that makes the rest of the program free of both:

    the same completion ids stand under both prompts, so student_hidden[predict_mask] and
    teacher_hidden[predict_mask] are both [N, D] and belong together index by index, although their prompts differ.

Rows lie one after another, L tokens in all, without padding. Knows nothing of models, divergences or ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opsd_cli.data.problems import Rollout


@dataclass(frozen=True)
class TokenBatch:
    """One role's rows, prompt and completion, one after another. `predict_mask_L` is True where the next token is a
    completion token: exactly N times."""

    input_ids_L: Tensor
    predict_mask_L: Tensor
    lengths: tuple[int, ...]  # tokens of each row, B of them; their sum is L

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch(
            self.input_ids_L.to(device, non_blocking=True),
            self.predict_mask_L.to(device, non_blocking=True),
            self.lengths,
        )


@dataclass(frozen=True)
class PairedBatch:
    """The same completions under both prompts, with everything indexed by completion token."""

    student: TokenBatch
    teacher: TokenBatch
    other: TokenBatch | None  # a third prompt before the same completions, for targets made of two passes
    target_ids_N: Tensor  # the completion tokens, row after row
    weights_N: Tensor  # fp32; 0 takes a token out of the loss
    sampler_logprobs_N: Tensor  # fp32; log-probability under what it was drawn from, NaN where nobody drew it
    row_N: Tensor  # which row (and rollout) a token belongs to
    rollouts: tuple[Rollout, ...]  # empty in a batch that only keeps ranks in step

    def to(self, device: torch.device) -> PairedBatch:
        return PairedBatch(
            student=self.student.to(device),
            teacher=self.teacher.to(device),
            other=None if self.other is None else self.other.to(device),
            target_ids_N=self.target_ids_N.to(device, non_blocking=True),
            weights_N=self.weights_N.to(device, non_blocking=True),
            sampler_logprobs_N=self.sampler_logprobs_N.to(device, non_blocking=True),
            row_N=self.row_N.to(device, non_blocking=True),
            rollouts=self.rollouts,
        )


Weighed = tuple[Rollout, Sequence[float]]
"""A rollout, and one weight per completion token."""


def pair(batches: Sequence[Sequence[Weighed]]) -> list[PairedBatch]:
    """Lay out each of these batches; every rollout must have a completion."""
    return [_paired(batch) for batch in batches]


def filler_batch(pad_id: int) -> PairedBatch:
    """A batch of two tokens and weight 0: runs the same forwards and backward as a real one and adds nothing."""
    row = TokenBatch(torch.tensor([pad_id, pad_id]), torch.tensor([True, False]), (2,))
    return PairedBatch(
        student=row,
        teacher=row,
        other=row,
        target_ids_N=torch.tensor([pad_id]),
        weights_N=torch.zeros(1),
        sampler_logprobs_N=torch.full((1,), torch.nan),
        row_N=torch.zeros(1, dtype=torch.long),
        rollouts=(),
    )


def row_length(rollout: Rollout) -> int:
    """Tokens of the longest of the rows that a rollout becomes."""
    prompts = rollout.prompt
    longest = max(len(prompts.student_ids), len(prompts.teacher_ids), len(prompts.other_ids))
    return longest + len(rollout.completion_ids)


def _paired(weighed: Sequence[Weighed]) -> PairedBatch:
    rollouts = [rollout for rollout, _ in weighed]
    completions = [torch.tensor(r.completion_ids) for r in rollouts]

    def rows(prompts: list[tuple[int, ...]]) -> TokenBatch:
        return _token_batch(prompts, completions)

    has_other = all(r.prompt.other_ids for r in rollouts)
    batch = PairedBatch(
        student=rows([r.prompt.student_ids for r in rollouts]),
        teacher=rows([r.prompt.teacher_ids or r.prompt.student_ids for r in rollouts]),
        other=rows([r.prompt.other_ids for r in rollouts]) if has_other else None,
        target_ids_N=torch.cat(completions),
        weights_N=torch.tensor([weight for _, weights in weighed for weight in weights], dtype=torch.float32),
        sampler_logprobs_N=torch.tensor(
            [p for r in rollouts for p in r.logprobs or [torch.nan] * len(r.completion_ids)], dtype=torch.float32
        ),
        row_N=torch.repeat_interleave(torch.tensor([len(c) for c in completions])),
        rollouts=tuple(rollouts),
    )
    for role in (batch.student, batch.teacher, batch.other):
        assert role is None or torch.equal(_targets(role), batch.target_ids_N), "the rows are not aligned"
    return batch


def _token_batch(prompts: Sequence[Sequence[int]], completions: Sequence[Tensor]) -> TokenBatch:
    """Rows of prompt + completion; the mask starts at the last prompt token, one before its target."""
    pieces, masks, lengths = [], [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        assert prompt, "a prompt without tokens cannot predict anything"
        length = len(prompt) + len(completion)
        mask = torch.zeros(length, dtype=torch.bool)
        mask[len(prompt) - 1 : length - 1] = True
        pieces += [torch.tensor(prompt), completion]
        masks.append(mask)
        lengths.append(length)
    return TokenBatch(torch.cat(pieces), torch.cat(masks), tuple(lengths))


def _targets(batch: TokenBatch) -> Tensor:
    """The token after every position of the predict mask, row after row. No row's last position is in the mask."""
    return batch.input_ids_L[1:][batch.predict_mask_L[:-1]]
