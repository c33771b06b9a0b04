"""Rollouts -> micro-batches in which student and teacher are aligned token by token. Owns padding, shifting and the
one invariant that makes the rest of the program free of both:

    the same completion ids stand under both prompts, so student_hidden[predict_mask] and
    teacher_hidden[predict_mask] are both [N, D] and belong together index by index, although S != T.

Knows nothing of models, divergences or ranks. Rows are padded on the right: under causal attention a real token never
looks at padding, so scoring needs no attention mask at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opsd_cli.data.problems import Rollout


@dataclass(frozen=True)
class TokenBatch:
    """One role's rows. `predict_mask_BS` is True where the next token is a completion token: exactly N times."""

    input_ids_BS: Tensor
    predict_mask_BS: Tensor

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch(
            self.input_ids_BS.to(device, non_blocking=True),
            self.predict_mask_BS.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class PairedBatch:
    """The same completions under both prompts, with everything indexed by completion token."""

    student: TokenBatch  # [B, S]
    teacher: TokenBatch  # [B, T]
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


TokenWeights = Callable[[Rollout], list[float]]
"""One weight per completion token of a rollout."""


def pair(rollouts: Sequence[Rollout], *, max_tokens: int, pad_id: int, weigh: TokenWeights) -> list[PairedBatch]:
    """Micro-batches of at most `max_tokens` padded tokens in the longer role (a single longer row stands alone).

    Rows are grouped by length so that little is padded. Empty completions carry nothing and are left out.
    """
    kept = sorted((r for r in rollouts if r.completion_ids), key=_row_length)
    batches: list[list[Rollout]] = []
    for rollout in kept:
        # Lengths ascend, so the newcomer is the longest row of its batch.
        if batches and (len(batches[-1]) + 1) * _row_length(rollout) <= max_tokens:
            batches[-1].append(rollout)
        else:
            batches.append([rollout])
    return [_paired(batch, pad_id=pad_id, weigh=weigh) for batch in batches]


def filler_batch(pad_id: int) -> PairedBatch:
    """A batch of two tokens and weight 0: runs the same forwards and backward as a real one and adds nothing."""
    row = TokenBatch(torch.tensor([[pad_id, pad_id]]), torch.tensor([[True, False]]))
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


def _row_length(rollout: Rollout) -> int:
    """The longest of the rows that a rollout becomes."""
    prompts = rollout.prompt
    longest = max(len(prompts.student_ids), len(prompts.teacher_ids), len(prompts.other_ids))
    return longest + len(rollout.completion_ids)


def _paired(rollouts: Sequence[Rollout], *, pad_id: int, weigh: TokenWeights) -> PairedBatch:
    completions = [torch.tensor(r.completion_ids) for r in rollouts]

    def rows(prompts: list[tuple[int, ...]]) -> TokenBatch:
        return _token_batch(prompts, completions, pad_id=pad_id)

    has_other = all(r.prompt.other_ids for r in rollouts)
    batch = PairedBatch(
        student=rows([r.prompt.student_ids for r in rollouts]),
        teacher=rows([r.prompt.teacher_ids or r.prompt.student_ids for r in rollouts]),
        other=rows([r.prompt.other_ids for r in rollouts]) if has_other else None,
        target_ids_N=torch.cat(completions),
        weights_N=torch.tensor([weight for r in rollouts for weight in weigh(r)], dtype=torch.float32),
        sampler_logprobs_N=torch.tensor(
            [p for r in rollouts for p in r.logprobs or [torch.nan] * len(r.completion_ids)], dtype=torch.float32
        ),
        row_N=torch.repeat_interleave(torch.tensor([len(c) for c in completions])),
        rollouts=tuple(rollouts),
    )
    for role in (batch.student, batch.teacher, batch.other):
        assert role is None or torch.equal(_targets(role), batch.target_ids_N), "the rows are not aligned"
    return batch


def _token_batch(prompts: Sequence[Sequence[int]], completions: Sequence[Tensor], *, pad_id: int) -> TokenBatch:
    """Right-padded rows of prompt + completion; the mask starts at the last prompt token, one before its target."""
    width = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    input_ids_BS = torch.full((len(prompts), width), pad_id)
    predict_mask_BS = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        assert prompt, "a prompt without tokens cannot predict anything"
        end = len(prompt) + len(completion)
        input_ids_BS[row, : len(prompt)] = torch.tensor(prompt)
        input_ids_BS[row, len(prompt) : end] = completion
        predict_mask_BS[row, len(prompt) - 1 : end - 1] = True
    return TokenBatch(input_ids_BS, predict_mask_BS)


def _targets(batch: TokenBatch) -> Tensor:
    """The token after every position of the predict mask, row after row."""
    return batch.input_ids_BS[:, 1:][batch.predict_mask_BS[:, :-1]]
