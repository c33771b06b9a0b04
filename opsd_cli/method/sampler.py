"""Samplers: where completions come from. Owns which prompts are completed, from which random stream, and off-policy
completions; knows nothing of losses or teachers. Importing it does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

from pydantic import Field

from opsd_cli.data.problems import PromptPair, Rollout
from opsd_cli.randomness import derive_seed
from opsd_cli.settings.config import SamplingSettings
from opsd_cli.settings.registry import plugin

if TYPE_CHECKING:
    from opsd_cli.engine.decoding import BatchLimits
    from opsd_cli.engine.drawing import Completion, Draw

Positive = Annotated[int, Field(gt=0)]


class Engine(Protocol):
    """What a sampler may ask of the engine."""

    def complete(
        self,
        draws: Sequence[Draw],
        *,
        sampling: SamplingSettings,
        limits: BatchLimits,
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
    """The current weights complete a prompt of each problem. Finished rows leave the batch, waiting prompts enter, and
    the rollouts of one problem share its prefill (`engine.decoding`).

    On-policy with the student's prompt. With the teacher's prompt the completions show what the student would not
    have said; with a share from the dataset it is the mixture of GKD (2306.13649).
    """

    max_rows: Positive  # completions generated at once
    cache_tokens: Positive  # rows x positions of the key-value cache; with fewer, fewer rows run at once
    prompt: Literal["student", "teacher"]  # whose prompt is completed
    dataset_share: Annotated[float, Field(ge=0, le=1)]  # of the problems, whose reference solution is the completion

    def sample(self, engine: Engine, request: SampleRequest) -> list[Rollout]:
        from opsd_cli.engine.decoding import BatchLimits
        from opsd_cli.engine.drawing import Draw

        drawn: list[tuple[PromptPair, int]] = []
        for place, pair in request.prompts:
            if not self._is_from_dataset(request, place):
                seeds = [derive_seed(request.seed, "rollout", place, g) for g in range(request.rollouts_per_problem)]
                drawn += [(pair, seed) for seed in seeds]
        completions = engine.complete(
            [Draw(pair.student_ids if self.prompt == "student" else pair.teacher_ids, seed) for pair, seed in drawn],
            sampling=request.sampling,
            limits=BatchLimits(self.max_rows, self.cache_tokens),
            should_stop=request.should_stop,
        )
        made = iter(zip(drawn, completions, strict=True))
        rollouts: list[Rollout] = []
        for place, pair in request.prompts:
            if self._is_from_dataset(request, place):
                rollouts += [written(pair, request)] * request.rollouts_per_problem
                continue
            for _ in range(request.rollouts_per_problem):
                (_, _), done = next(made)
                rollouts.append(Rollout(pair, done.ids, done.finish_reason, done.logprobs, request.policy_step))
        return rollouts

    def _is_from_dataset(self, request: SampleRequest, place: int) -> bool:
        """Decided by (seed, place) alone, so that neither ranks nor a resume change it."""
        return derive_seed(request.seed, "from dataset", place) / 2**63 < self.dataset_share


def written(pair: PromptPair, request: SampleRequest) -> Rollout:
    """The reference solution as a completion; over the length limit it is cut there and marked truncated."""
    limit = request.sampling.max_completion_tokens
    ids = request.encode_completion(pair.problem.solution)
    return Rollout(pair, tuple(ids[:limit]), "stop" if len(ids) <= limit else "length", (), request.policy_step)


@plugin("sampler", "dataset")
class DatasetSampler:
    """Off-policy: the completion is the reference solution. Makes SFT with cross_entropy, off-policy distillation
    with a divergence. A solution over sampling.max_completion_tokens is cut there and marked truncated."""

    def sample(self, engine: Engine, request: SampleRequest) -> list[Rollout]:
        return [written(pair, request) for _, pair in request.prompts for _ in range(request.rollouts_per_problem)]
