"""Rollouts looked at token by token: what either role expected, what the loss made of it. Computed where the loss is,
by standing in for its divergence for one pass, so that what is shown is what is trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from opsd_cli.data.pairing import PairedBatch
from opsd_cli.data.problems import Rollout
from opsd_cli.insight.samples import RolloutView, TokenView, token_class
from opsd_cli.loss.aligned import AlignedTokens
from opsd_cli.loss.chunked_head import Objective
from opsd_cli.loss.divergences import Divergence
from opsd_cli.loss.types import TokenLoss


@dataclass
class _Watching:
    """A divergence that notes what it is asked about, and answers as the one it stands in for."""

    inner: Divergence
    plain: Divergence  # without support and clip
    k: int
    seen: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def needs_teacher(self) -> bool:
        return self.inner.needs_teacher

    def value_and_gradient(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        student, teacher = tokens.student_probs_nV.topk(self.k, dim=1), tokens.teacher_probs_nV.topk(self.k, dim=1)
        for name, value in {
            "divergence": self.plain.value_and_gradient(tokens)[0],
            "forward_kl": tokens.forward_kl_n,
            "reverse_kl": tokens.reverse_kl_n,
            "student_probability": tokens.at_target(tokens.student_probs_nV),
            "teacher_probability": tokens.at_target(tokens.teacher_probs_nV),
            "student_entropy": tokens.student_entropy_n,
            "teacher_entropy": tokens.teacher_entropy_n,
            "student_ids": student.indices,
            "teacher_ids": teacher.indices,
            "student_probs": student.values,
            "teacher_probs": teacher.values,
        }.items():
            self.seen.setdefault(name, []).append(value.detach().cpu())
        return self.inner.value_and_gradient(tokens)


NUMBERS = ("divergence", "forward_kl", "reverse_kl", "student_entropy", "teacher_entropy")
PROBABILITIES = ("student_probability", "teacher_probability")


def look(
    rollouts: Sequence[Rollout],
    batch: PairedBatch,
    *,
    objective: Objective,
    plain: Divergence,
    run: Callable[[Objective], TokenLoss],
    pieces: Callable[[Sequence[int]], list[str]],
    decode: Callable[[Sequence[int]], str],
    k: int = 6,
) -> list[RolloutView]:
    """Each rollout of a batch, token by token. `run` computes the loss of the batch under an objective; `plain` is the
    divergence without support and clip; `pieces` and `decode` make text of ids."""
    watching = _Watching(objective.divergence, plain, k)
    loss = run(replace(objective, divergence=watching))
    seen = {name: torch.cat(parts) for name, parts in watching.seen.items()}
    counted = (loss.value_N * batch.weights_N).tolist()
    views, start = [], 0
    for rollout in rollouts:
        end = start + len(rollout.completion_ids)
        texts = pieces(rollout.completion_ids)
        tokens = [
            _token(seen, place, texts[place - start], rollout.completion_ids[place - start], decode)
            | {"loss": counted[place], "weight": float(batch.weights_N[place])}
            for place in range(start, end)
        ]
        problem, start = rollout.prompt.problem, end
        views.append(
            RolloutView(
                problem=problem.id,
                student_prompt=decode(rollout.prompt.student_ids),
                teacher_prompt=decode(rollout.prompt.teacher_ids),
                completion=decode(rollout.completion_ids),
                answer=problem.answer,
                correct=rollout.correct,
                finish_reason=rollout.finish_reason,
                tokens=tuple(TokenView(**token) for token in tokens),
            )
        )
    return views


def _token(
    seen: dict[str, Tensor], place: int, text: str, token_id: int, decode: Callable[[Sequence[int]], str]
) -> dict[str, Any]:
    facts: dict[str, Any] = {name: float(seen[name][place]) for name in (*NUMBERS, *PROBABILITIES)}
    for role in ("student", "teacher"):
        ids, probs = seen[f"{role}_ids"][place].tolist(), seen[f"{role}_probs"][place].tolist()
        facts[f"{role}_expects"] = tuple((decode([one]), share) for one, share in zip(ids, probs, strict=True))
    return {"text": text, "id": token_id, "kind": token_class(text), **facts}
