"""Rollouts -> micro-batches in which student and teacher are aligned token by token.

The invariant that frees the rest of the program of masks and shifts:

    the same completion ids follow both prompts, so student_hidden[predict] and teacher_hidden[predict] are both
    [N, D] and correspond index by index, although their prompts differ.

Rows are concatenated, L tokens in all, without padding. A batch is made on the CPU and moved to the model's device
once, as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from opsd_cli.data.problems import Rollout


@dataclass(frozen=True)
class TokenBatch:
    """One role's rows, prompt and completion, one after another; a prompt that the row before has too stands once."""

    input_ids_L: Tensor
    predict_N: Tensor  # positions, among the L tokens, of those that a completion token follows
    lengths: tuple[int, ...]  # tokens of each row, B of them
    shared: tuple[int, ...] = ()  # of each, how many of its first tokens are the row's before it; none: rows share none

    @property
    def tokens(self) -> int:
        """L."""
        return sum(self.lengths) - sum(self.shared)

    def to(self, device: torch.device) -> TokenBatch:
        return replace(self, **_parts_on(device, self))


@dataclass(frozen=True)
class PairedBatch:
    """The same completions under both prompts, with everything indexed by completion token."""

    student: TokenBatch
    teacher: TokenBatch
    other: TokenBatch | None  # a third prompt before the same completions, for targets made of two passes
    target_ids_N: Tensor  # the completion tokens, row after row
    weights_N: Tensor  # fp32; 0 takes a token out of the loss
    weight: float  # the sum of weights_N
    sampler_logprobs_N: Tensor  # fp32; log-probability under what it was drawn from, NaN where it was not sampled
    rollout_N: Tensor  # int; which of the rollouts a token is of
    right_N: Tensor  # bool; whether that one has the right answer
    rollouts: tuple[Rollout, ...]  # empty in a batch that only keeps ranks in step

    def to(self, device: torch.device) -> PairedBatch:
        return replace(self, **_parts_on(device, self))


Weighed = tuple[Rollout, Sequence[float]]
"""A rollout, and one weight per completion token."""


def pair(batches: Sequence[Sequence[Weighed]], *, shares: bool = False) -> list[PairedBatch]:
    """Lay out each of these batches; every rollout must have a completion. `shares`: a prompt that stands in rows one
    after another stands once."""
    return [_pair_one(batch, shares=shares) for batch in batches]


def filler_batch(pad_id: int) -> PairedBatch:
    """A batch of two tokens and weight 0: for a rank that has fewer batches than another. It runs the same forwards and
    backward, with their collectives, and adds nothing."""
    row = TokenBatch(torch.tensor([pad_id, pad_id]), torch.tensor([0]), (2,))
    return PairedBatch(
        student=row,
        teacher=row,
        other=row,
        target_ids_N=torch.tensor([pad_id]),
        weights_N=torch.zeros(1),
        weight=0.0,
        sampler_logprobs_N=torch.full((1,), torch.nan),
        rollout_N=torch.zeros(1, dtype=torch.long),
        right_N=torch.zeros(1, dtype=torch.bool),
        rollouts=(),
    )


def row_length(rollout: Rollout) -> int:
    """Tokens of the longest row that a rollout becomes."""
    prompts = rollout.prompt.student_ids, rollout.prompt.teacher_ids, rollout.prompt.other_ids
    return max(map(len, prompts)) + len(rollout.completion_ids)


def shared_length(rollouts: Sequence[Rollout]) -> int:
    """Tokens of the longer role of rollouts in which a prompt that the one before has too stands once."""
    roles = zip(*((r.prompt.student_ids, r.prompt.teacher_ids, r.prompt.other_ids) for r in rollouts), strict=True)
    prompts = max(sum(len(ids) for ids, _ in groupby(role)) for role in roles)
    return prompts + sum(len(rollout.completion_ids) for rollout in rollouts)


def _pair_one(weighed: Sequence[Weighed], *, shares: bool) -> PairedBatch:
    rollouts = [rollout for rollout, _ in weighed]
    prompts = [rollout.prompt for rollout in rollouts]
    completions = [torch.tensor(rollout.completion_ids) for rollout in rollouts]
    has_other = any(prompt.other_ids for prompt in prompts)
    weights_N = torch.tensor([weight for _, weights in weighed for weight in weights], dtype=torch.float32)
    logprobs = [p for r in rollouts for p in r.logprobs or [torch.nan] * len(r.completion_ids)]
    rollout_N = torch.arange(len(rollouts)).repeat_interleave(torch.tensor([len(ids) for ids in completions]))
    batch = PairedBatch(
        student=_token_batch([prompt.student_ids for prompt in prompts], completions, shares=shares),
        # A rollout without a teacher prompt has weight 0, and still needs a row beside the others of its batch.
        teacher=_token_batch([p.teacher_ids or p.student_ids for p in prompts], completions, shares=shares),
        other=_token_batch([p.other_ids or p.student_ids for p in prompts], completions, shares=shares)
        if has_other
        else None,
        target_ids_N=torch.cat(completions),
        weights_N=weights_N,
        weight=float(weights_N.sum()),
        sampler_logprobs_N=torch.tensor(logprobs, dtype=torch.float32),
        rollout_N=rollout_N,
        right_N=torch.tensor([rollout.correct for rollout in rollouts])[rollout_N],
        rollouts=tuple(rollouts),
    )
    # A shift of one would train without an error, on the wrong tokens: check here, where rows are made.
    for role in (batch.student, batch.teacher, batch.other):
        if role is not None:
            targets_N = _follows(role, [len(ids) for ids in completions])
            assert torch.equal(targets_N, batch.target_ids_N), "the rows are not aligned"
    return batch


def _token_batch(prompts: Sequence[Sequence[int]], completions: Sequence[Tensor], *, shares: bool) -> TokenBatch:
    """Rows of prompt + completion, concatenated."""
    pieces: list[Tensor] = []
    predict, lengths, shared, start, last = [], [], [], 0, 0
    before: Sequence[int] = ()
    for prompt, completion in zip(prompts, completions, strict=True):
        assert prompt, "a prompt without tokens cannot predict anything"
        is_shared = shares and prompt == before
        if not is_shared:
            pieces.append(torch.tensor(prompt))
            start, before = start + len(prompt), prompt
            last = start - 1
        pieces.append(completion)
        # The prompt's last token predicts the completion's first; the completion's last token predicts nothing.
        predict += [torch.tensor([last]), torch.arange(start, start + len(completion) - 1)]
        lengths.append(len(prompt) + len(completion))
        shared.append(len(prompt) if is_shared else 0)
        start += len(completion)
    return TokenBatch(torch.cat(pieces), torch.cat(predict), tuple(lengths), tuple(shared) if any(shared) else ())


def whole_rows(lengths: Sequence[int], shared: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where the tokens of whole rows, W in all, one row after another, lie among the L of a batch that shares prompts:
    places_W; and the way back: back_L, of each of the L, where it is in the first row that has it."""
    places: list[Tensor] = []
    back: list[Tensor] = []
    begin = start = 0
    for length, common in zip(lengths, shared, strict=True):
        own = torch.arange(start, start + length - common)
        places.append(torch.cat([places[-1][:common], own]) if common else own)
        back.append(torch.arange(begin + common, begin + length))
        begin, start = begin + length, start + len(own)
    return torch.cat(places), torch.cat(back)


def _follows(role: TokenBatch, counts: Sequence[int]) -> Tensor:
    """The tokens that follow those that predict: of each row the last ones, as many as it has completion tokens."""
    places_W, _ = whole_rows(role.lengths, role.shared or (0,) * len(role.lengths))
    ends = torch.tensor(role.lengths).cumsum(0).tolist()
    predict_W = torch.cat([torch.arange(end - count - 1, end - 1) for end, count in zip(ends, counts, strict=True)])
    assert torch.equal(places_W[predict_W], role.predict_N), "others predict"
    return role.input_ids_L[places_W[predict_W + 1]]


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` of a tensor of the host, which does not wait for it: kernels that use it come after it."""
    # Only from page-locked memory does a GPU fetch by itself; torch keeps it until the copy is done.
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _parts_on(device: torch.device, batch: TokenBatch | PairedBatch) -> dict[str, Any]:
    """The tensors and the roles of a batch by name, copied to `device`."""
    parts = {name: part for name, part in vars(batch).items() if isinstance(part, Tensor | TokenBatch)}
    return {name: upload(part, device) if isinstance(part, Tensor) else part.to(device) for name, part in parts.items()}
