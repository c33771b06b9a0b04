"""Samplers: where completions come from, and from which random stream. Importing it does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field

from opsd_cli.data.problems import FinishReason, PromptPair, Rollout
from opsd_cli.data.seeds import derive_seed
from opsd_cli.settings.config import EvalSettings, SamplingSettings
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.registry import plugin

if TYPE_CHECKING:
    from torch import Tensor

    from opsd_cli.engine.loading import Source
    from opsd_cli.engine.process_group import Ranks
    from opsd_cli.sampling.apart import Apart
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

    @property
    def gathers_layers(self) -> str:
        """Why the model of `generating` gathers its layers one at a time as it is called, so that weights are only read
        in its own forward pass; empty where they are whole."""

    def generating(self) -> AbstractContextManager[Any]:
        """The current weights as a transformers (or peft) model. Collective: every rank enters."""

    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The same, one parameter at a time, an adapter merged: for an engine with a model of its own. Collective."""


class Completes(Protocol):
    """What a sampler draws completions with, from the current weights."""

    weights: Weights
    ranks: Ranks
    end_ids: tuple[int, ...]
    pad_id: int
    apart: Apart | None  # sampling processes beside the ranks, once they have been started

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
    step: int | None = None  # of the run, from 0; None where the completions are for something else
    following: Callable[[], SampleRequest] | None = None  # what the next step will ask for; None in the last


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
    completions = iter(complete(draws_of(request, prompt=prompt, dataset_share=dataset_share)))
    rollouts: list[Rollout] = []
    for place, pair in request.prompts:
        if is_from_dataset(request, place, dataset_share):
            rollouts += reference_rollouts(place, pair, request)
            continue
        for g in range(request.rollouts_per_problem):
            done = next(completions)
            rollouts.append(Rollout(pair, done.ids, done.finish_reason, done.logprobs, place, g))
    return rollouts


def draws_of(request: SampleRequest, *, prompt: Literal["student", "teacher"], dataset_share: float) -> list[Draw]:
    """The completions of a request that are drawn, in order."""
    from opsd_cli.sampling.token_sampling import Draw

    ids_of = attrgetter(f"{prompt}_ids")
    return [
        Draw(ids_of(pair), derive_seed(request.seed, "rollout", place, g))
        for place, pair in request.prompts
        if not is_from_dataset(request, place, dataset_share)
        for g in range(request.rollouts_per_problem)
    ]


def is_from_dataset(request: SampleRequest, place: int, share: float) -> bool:
    """Whether a problem's completions are the dataset's."""
    # By (seed, place) alone, so that neither ranks nor a resume change it.
    return derive_seed(request.seed, "from dataset", place) / 2**63 < share


class DrawsApart(Protocol):
    """A sampler that can draw in processes on devices of their own."""

    @property
    def placement(self) -> Literal["shared", "separate"]: ...
    @property
    def processes(self) -> int: ...
    @property
    def lag(self) -> int: ...
    @property
    def prompt(self) -> Literal["student", "teacher"]: ...
    @property
    def dataset_share(self) -> float: ...
    def about(self, completer: Completes) -> Mapping[str, Any]:
        """What `rank.sampling_process` builds, as JSON."""


def processes_of(sampler: DrawsApart, completer: Completes) -> Apart:
    """The sampling processes, started at the first call. Collective. Raises ConfigError, on every rank, where they
    cannot draw."""
    from opsd_cli.engine.loading import causal_of
    from opsd_cli.sampling.apart import Apart

    if completer.apart is None:
        with completer.weights.generating() as lm:
            device = causal_of(lm).device
        completer.apart = Apart(
            {**sampler.about(completer), "end_ids": completer.end_ids, "pad_id": completer.pad_id},
            processes=sampler.processes, ranks=completer.ranks, source=completer.weights.source, device=device,
        )  # fmt: skip
    return completer.apart


def prepare_apart(sampler: DrawsApart, completer: Completes) -> str:
    """Start the sampling processes, hand them the weights and compare what they say with the model; how they draw, in
    words. Collective. Raises ConfigError, on every rank, where they cannot be used."""
    from opsd_cli.sampling.sampler_trial import find_fault

    fault = find_fault(lambda: processes_of(sampler, completer), completer.weights, name="the sampling process")
    if reason := completer.ranks.refusal(fault):
        raise ConfigError(f"sampler.placement=separate: {reason}; use sampler.placement=shared")
    count, lag = sampler.processes, ""
    if sampler.lag:
        lag = ", a step ahead: while the step before is learnt, with the weights before its update"
    processes = "a process" if count == 1 else f"{count} processes"
    return f"{processes_of(sampler, completer).how}, in {processes} beside the ranks{lag}"


def sample_apart(sampler: DrawsApart, completer: Completes, request: SampleRequest) -> list[Rollout]:
    """`on_policy` in processes of its own, with lag 0 or 1. No rollouts after a request to stop."""
    apart, choice = processes_of(sampler, completer), {"prompt": sampler.prompt, "dataset_share": sampler.dataset_share}
    asked = {"sampling": request.sampling, "end_ids": completer.end_ids, "should_stop": request.should_stop}
    draws, weights = draws_of(request, **choice), completer.weights.merged_weights
    if sampler.lag == 0 or request.step is None:
        apart.settle()
        apart.wake(weights())
        completions, lag = apart.complete(draws, **asked), 0
    else:
        following = None if request.following is None else draws_of(request.following(), **choice)
        drawn = apart.draw(request.step, draws, following, weights=weights, **asked)
        if drawn is None:
            return []
        completions, lag = drawn
    rollouts = on_policy(request, lambda draws: completions, **choice)
    return [replace(rollout, lag=lag if rollout.logprobs else None) for rollout in rollouts]


@plugin("sampler", "static")
class StaticSampler:
    """The current weights complete a prompt of each problem. Finished rows leave the batch, waiting prompts enter, and
    the rollouts of one problem share its prefill. What is drawn depends on prompt and seed alone."""

    max_rows: Positive  # completions generated at once
    cache_tokens: Positive  # rows x positions of the key-value cache; with fewer, fewer rows run at once
    prompt: Literal["student", "teacher"]  # whose prompt is completed
    dataset_share: Annotated[float, Field(ge=0, le=1)]  # of the problems, whose reference solution is the completion
    placement: Literal["shared", "separate"]  # on the devices of the ranks, or in processes with devices of their own
    processes: Positive  # of placement=separate
    lag: Literal[0, 1]  # steps by which the weights that draw are older; 1: they draw while the ranks learn

    def about(self, completer: Completes) -> Mapping[str, Any]:
        return {"draws_with": "static", "max_rows": self.max_rows, "cache_tokens": self.cache_tokens}

    def prepare(self, completer: Completes) -> str:
        """As `prepare_apart`."""
        return prepare_apart(self, completer)

    def sample(self, completer: Completes, request: SampleRequest) -> list[Rollout]:
        if self.placement == "separate":
            return sample_apart(self, completer, request)
        from opsd_cli.sampling.batch_decoder import BatchLimits

        limits = BatchLimits(self.max_rows, self.cache_tokens)
        complete = partial(
            completer.complete, sampling=request.sampling, limits=limits, should_stop=request.should_stop
        )
        return on_policy(request, complete, prompt=self.prompt, dataset_share=self.dataset_share)


def own_decoder(limits: EvalSettings, *, prompt: Literal["student", "teacher"], dataset_share: float) -> StaticSampler:
    """Our own decoder in this process, with the limits of an evaluation."""
    return StaticSampler(
        max_rows=limits.max_rows, cache_tokens=limits.cache_tokens, prompt=prompt, dataset_share=dataset_share,
        placement="shared", processes=1, lag=0,
    )  # fmt: skip


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
