"""Samplers: where completions come from, and from which random stream. Importing it does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field

from opsd_cli.data.problems import FinishReason, PromptPair, Rollout
from opsd_cli.data.seeds import derive_seed
from opsd_cli.settings.config import SamplingSettings
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.registry import plugin

if TYPE_CHECKING:
    from torch import Tensor

    from opsd_cli.engine.loading import Source
    from opsd_cli.engine.process_group import Ranks
    from opsd_cli.sampling.batch_decoder import BatchLimits
    from opsd_cli.sampling.token_sampling import Completion, Draw

Positive = Annotated[int, Field(gt=0)]


class Weights(Protocol):
    """What completions are drawn from: the engine that trains, or a model that is not trained."""

    @property
    def source(self) -> Source: ...

    @property
    def keeps_addresses(self) -> bool:
        """Whether `generating` gives parameters at the same addresses each time, updated in place."""

    def generating(self) -> AbstractContextManager[Any]:
        """The current weights, whole, as a transformers (or peft) model. Collective: every rank enters."""

    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The same, one parameter at a time, an adapter merged: for an engine with a model of its own. Collective."""


class Completes(Protocol):
    """What a sampler draws completions with, from the current weights."""

    weights: Weights
    ranks: Ranks
    end_ids: tuple[int, ...]

    def complete(
        self,
        draws: Sequence[Draw],
        *,
        sampling: SamplingSettings,
        limits: BatchLimits,
        should_stop: Callable[[], bool],
        report_done: Callable[[int], None] = ...,
    ) -> list[Completion]:
        """One completion per draw, in order. Collective."""

    def free(self) -> None:
        """Give back what is kept from call to call, because training needs the memory."""


@dataclass(frozen=True)
class SampleRequest:
    """What to sample for one step: prompts with their place in the step's stream, and how."""

    prompts: Sequence[tuple[int, PromptPair]]  # place in the stream of all problems, prompts
    rollouts_per_problem: int
    sampling: SamplingSettings
    seed: int
    encode_completion: Callable[[str], Sequence[int]]  # text -> ids with the end-of-sequence id
    should_stop: Callable[[], bool]


class Sampler(Protocol):
    """A plug-in of the group `sampler`."""

    def sample(self, completer: Completes, request: SampleRequest) -> list[Rollout]:
        """`rollouts_per_problem` rollouts for each prompt, grouped by prompt, in order, each with its place and
        number."""


def checked_rollouts(rollouts: Sequence[Rollout], request: SampleRequest, *, name: str) -> list[Rollout]:
    """What a sampler has returned. Raises ConfigError unless it is what `Sampler.sample` promises: the rest of the
    program counts on it."""
    asked = [(place, number) for place, _ in request.prompts for number in range(request.rollouts_per_problem)]
    if (keys := [rollout.key for rollout in rollouts]) != asked:
        wrong = next((pair for pair in zip(keys, asked, strict=False) if pair[0] != pair[1]), None)
        where = "" if wrong is None else f"; the first that differs has place and number {wrong[0]}, not {wrong[1]}"
        raise ConfigError(
            f"sampler={name}: {len(keys)} rollouts for {len(request.prompts)} prompts; return "
            f"{request.rollouts_per_problem} for each, grouped by prompt and numbered from 0{where}"
        )
    for rollout in rollouts:
        ids, logprobs = len(rollout.completion_ids), len(rollout.logprobs)
        if not ids or logprobs not in (0, ids):
            raise ConfigError(
                f"sampler={name}: rollout {rollout.key} has {ids} completion_ids and {logprobs} logprobs; a completion "
                "has at least one token, and a log-probability for each or none"
            )
    return list(rollouts)


def on_policy(
    request: SampleRequest,
    complete: Callable[[list[Draw]], list[Completion]],
    *,
    prompt: Literal["student", "teacher"],
    dataset_share: float,
) -> list[Rollout]:
    """Rollouts of a request: `complete` is called once, with every draw, and the rest comes from the dataset.

    With the student's prompt this is on-policy; with the teacher's the completions show what the student would not
    have said; with a share from the dataset it is the mixture of GKD (2306.13649).
    """
    from opsd_cli.sampling.token_sampling import Draw

    # By (seed, place) alone, so that neither ranks nor a resume change which problems are taken from the dataset.
    from_dataset = {
        place
        for place, _ in request.prompts
        if derive_seed(request.seed, "from dataset", place) / 2**63 < dataset_share
    }
    numbers, ids_of = range(request.rollouts_per_problem), attrgetter(f"{prompt}_ids")
    draws = [
        Draw(ids_of(pair), derive_seed(request.seed, "rollout", place, g))
        for place, pair in request.prompts
        if place not in from_dataset
        for g in numbers
    ]
    completions = iter(complete(draws))
    rollouts: list[Rollout] = []
    for place, pair in request.prompts:
        if place in from_dataset:
            rollouts += reference_rollouts(place, pair, request)
            continue
        for g in numbers:
            done = next(completions)
            rollouts.append(Rollout(pair, done.ids, done.finish_reason, done.logprobs, place, g))
    return rollouts


@plugin("sampler", "static")
class StaticSampler:
    """The current weights complete a prompt of each problem. Finished rows leave the batch, waiting prompts enter, and
    the rollouts of one problem share its prefill. What is drawn depends on prompt and seed alone."""

    max_rows: Positive  # completions generated at once
    cache_tokens: Positive  # rows x positions of the key-value cache; with fewer, fewer rows run at once
    prompt: Literal["student", "teacher"]  # whose prompt is completed
    dataset_share: Annotated[float, Field(ge=0, le=1)]  # of the problems, whose reference solution is the completion

    def sample(self, completer: Completes, request: SampleRequest) -> list[Rollout]:
        from opsd_cli.sampling.batch_decoder import BatchLimits

        limits = BatchLimits(self.max_rows, self.cache_tokens)
        complete = partial(
            completer.complete, sampling=request.sampling, limits=limits, should_stop=request.should_stop
        )
        return on_policy(request, complete, prompt=self.prompt, dataset_share=self.dataset_share)


def reference_rollouts(place: int, pair: PromptPair, request: SampleRequest) -> list[Rollout]:
    """The reference solution as every completion of a problem; cut at the length limit and marked truncated."""
    limit = request.sampling.max_completion_tokens
    ids = request.encode_completion(pair.problem.solution)
    reason: FinishReason = "stop" if len(ids) <= limit else "length"
    return [Rollout(pair, tuple(ids[:limit]), reason, (), place, g) for g in range(request.rollouts_per_problem)]


@plugin("sampler", "dataset")
class DatasetSampler:
    """Off-policy: the completion is the reference solution. SFT with cross_entropy, off-policy distillation with a
    divergence. A solution longer than sampling.max_completion_tokens is cut there and marked truncated."""

    def sample(self, completer: Completes, request: SampleRequest) -> list[Rollout]:
        return [rollout for place, pair in request.prompts for rollout in reference_rollouts(place, pair, request)]
