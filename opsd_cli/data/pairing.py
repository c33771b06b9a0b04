"""Rollouts -> micro-batches in which student and teacher are aligned token by token. Owns the layout of rows, shifting
and the one invariant that makes the rest of the program free of both:

    the same completion ids stand under both prompts, so student_hidden[predict] and teacher_hidden[predict] are both
    [N, D] and belong together index by index, although their prompts differ.

Rows lie one after another, L tokens in all, without padding. Batches are made on the CPU and moved to the model's
device as a whole, once. Knows nothing of models, divergences or ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opsd_cli.data.problems import Rollout


@dataclass(frozen=True)
class TokenBatch:
    """One role's rows, prompt and completion, one after another."""

    input_ids_L: Tensor
    predict_N: Tensor  # places, among the L tokens, of those that a completion token follows
    lengths: tuple[int, ...]  # tokens of each row, B of them; their sum is L

    def to(self, device: torch.device) -> TokenBatch:
        """From the CPU to `device`, with every tensor."""
        return replace(self, **_tensors_on(device, self))


@dataclass(frozen=True)
class PairedBatch:
    """The same completions under both prompts, with everything indexed by completion token."""

    student: TokenBatch
    teacher: TokenBatch
    other: TokenBatch | None  # a third prompt before the same completions, for targets made of two passes
    target_ids_N: Tensor  # the completion tokens, row after row
    weights_N: Tensor  # fp32; 0 takes a token out of the loss
    weight: float  # the sum of weights_N
    sampler_logprobs_N: Tensor  # fp32; log-probability under what it was drawn from, NaN where nobody drew it
    rollouts: tuple[Rollout, ...]  # empty in a batch that only keeps ranks in step

    def to(self, device: torch.device) -> PairedBatch:
        """From the CPU to `device`, with every tensor, those of the roles too."""
        roles: dict[str, Any] = {
            name: part.to(device) for name, part in vars(self).items() if isinstance(part, TokenBatch)
        }
        return replace(self, **roles, **_tensors_on(device, self))


Weighed = tuple[Rollout, Sequence[float]]
"""A rollout, and one weight per completion token."""


def pair(batches: Sequence[Sequence[Weighed]]) -> list[PairedBatch]:
    """Lay out each of these batches; every rollout must have a completion."""
    return [_paired(batch) for batch in batches]


def filler_batch(pad_id: int) -> PairedBatch:
    """A batch of two tokens and weight 0: runs the same forwards and backward as a real one and adds nothing."""
    row = TokenBatch(torch.tensor([pad_id, pad_id]), torch.tensor([0]), (2,))
    return PairedBatch(
        student=row,
        teacher=row,
        other=row,
        target_ids_N=torch.tensor([pad_id]),
        weights_N=torch.zeros(1),
        weight=0.0,
        sampler_logprobs_N=torch.full((1,), torch.nan),
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
    weights_N = torch.tensor([weight for _, weights in weighed for weight in weights], dtype=torch.float32)
    batch = PairedBatch(
        student=rows([r.prompt.student_ids for r in rollouts]),
        teacher=rows([r.prompt.teacher_ids or r.prompt.student_ids for r in rollouts]),
        other=rows([r.prompt.other_ids for r in rollouts]) if has_other else None,
        target_ids_N=torch.cat(completions),
        weights_N=weights_N,
        weight=float(weights_N.sum()),
        sampler_logprobs_N=torch.tensor(
            [p for r in rollouts for p in r.logprobs or [torch.nan] * len(r.completion_ids)], dtype=torch.float32
        ),
        rollouts=tuple(rollouts),
    )
    for role in (batch.student, batch.teacher, batch.other):
        assert role is None or torch.equal(_targets(role), batch.target_ids_N), "the rows are not aligned"
    return batch


def _token_batch(prompts: Sequence[Sequence[int]], completions: Sequence[Tensor]) -> TokenBatch:
    """Rows of prompt + completion; the last token of the prompt is the first that predicts."""
    pieces, places, lengths, start = [], [], [], 0
    for prompt, completion in zip(prompts, completions, strict=True):
        assert prompt, "a prompt without tokens cannot predict anything"
        length = len(prompt) + len(completion)
        pieces += [torch.tensor(prompt), completion]
        places.append(torch.arange(start + len(prompt) - 1, start + length - 1))
        lengths.append(length)
        start += length
    return TokenBatch(torch.cat(pieces), torch.cat(places), tuple(lengths))


def _targets(batch: TokenBatch) -> Tensor:
    """The token after every place that predicts, row after row. No row's last token predicts."""
    return batch.input_ids_L[batch.predict_N + 1]


def _tensors_on(device: torch.device, batch: TokenBatch | PairedBatch) -> dict[str, Any]:
    """The tensors of a batch by name, on their way to `device`. The host does not wait for them: memory that is not
    pinned has been copied by the driver when this returns, and what uses them there comes after them."""
    tensors = {name: part for name, part in vars(batch).items() if isinstance(part, Tensor)}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
