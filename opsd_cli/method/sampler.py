"""Samplers: where completions come from. Owns which prompts are completed, from which random stream, and off-policy
completions; knows nothing of losses or teachers. Importing it does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Protocol

from pydantic import Field

from opsd_cli.data.problems import PromptPair, Rollout
from opsd_cli.randomness import derive_seed
from opsd_cli.settings.config import SamplingSettings
from opsd_cli.settings.registry import plugin

if TYPE_CHECKING:
    from opsd_cli.engine.decoding import Completion, Draw

Positive = Annotated[int, Field(gt=0)]


class Engine(Protocol):
    """What a sampler may ask of the engine."""

    def complete(
        self,
        draws: Sequence[Draw],
        *,
        sampling: SamplingSettings,
        max_rows: int,
        should_stop: Callable[[], bool],
    ) -> list[Completion]: ...


@dataclass(frozen=True)
class SampleRequest:
    """What to sample for one step: prompts with their place in the step's stream, and how."""

    prompts: Sequence[tuple[int, PromptPair]]  # place in the stream of all problems, prompts
    rollouts_per_problem: int
    sampling: SamplingSettings
    seed: int
    policy_step: int
    encode_completion: Callable[[str], Sequence[int]]  # text -> ids with the end-of-sequence id
    should_stop: Callable[[], bool]


class Sampler(Protocol):
    """A plug-in of the group `sampler`."""

    def sample(self, engine: Engine, request: SampleRequest) -> list[Rollout]:
        """`rollouts_per_problem` rollouts for each prompt, grouped by prompt, in order."""


@plugin("sampler", "static")
class StaticSampler:
    """On-policy: the student completes its own prompt, in left-padded batches sorted by length."""

    max_rows: Positive  # rows of one batch: bounds the memory of the key-value cache

    def sample(self, engine: Engine, request: SampleRequest) -> list[Rollout]:
        from opsd_cli.engine.decoding import Draw

        wanted = [
            (pair, derive_seed(request.seed, "rollout", request.policy_step, place, g))
            for place, pair in request.prompts
            for g in range(request.rollouts_per_problem)
        ]
        completions = engine.complete(
            [Draw(pair.student_ids, seed) for pair, seed in wanted],
            sampling=request.sampling,
            max_rows=self.max_rows,
            should_stop=request.should_stop,
        )
        return [
            Rollout(pair, completion.ids, completion.finish_reason, completion.logprobs, request.policy_step)
            for (pair, _), completion in zip(wanted, completions, strict=True)
        ]


@plugin("sampler", "dataset")
class DatasetSampler:
    """Off-policy: the completion is the reference solution. Makes SFT with cross_entropy, off-policy distillation
    with a divergence. A solution over sampling.max_completion_tokens is cut there and marked truncated."""

    def sample(self, engine: Engine, request: SampleRequest) -> list[Rollout]:
        limit = request.sampling.max_completion_tokens
        rollouts = []
        for _, pair in request.prompts:
            ids = request.encode_completion(pair.problem.solution)
            whole = len(ids) <= limit
            rollout = Rollout(pair, tuple(ids[:limit]), "stop" if whole else "length", (), request.policy_step)
            rollouts += [rollout] * request.rollouts_per_problem
        return rollouts
