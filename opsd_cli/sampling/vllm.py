"""`sampler=vllm`: completions from a vLLM engine in the rank's own process, which gets the current weights before every
step. Importing it imports neither torch nor vLLM, which is an extra: pip install 'opsd-cli[vllm]'.

Each completion has a seed of its own, but vLLM's kernels may round differently in another batch, so a completion can
differ between runs with another number of ranks or rows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from opsd_cli.data.problems import FinishReason, Rollout
from opsd_cli.sampling.samplers import Completes, Positive, SampleRequest, on_policy
from opsd_cli.settings.registry import plugin

if TYPE_CHECKING:
    from opsd_cli.engine.loading import Source
    from opsd_cli.sampling.token_sampling import Completion, Draw

INSTALL = "pip install 'opsd-cli[vllm]'"


@plugin("sampler", "vllm")
class VllmSampler:
    """The current weights, copied into a vLLM engine on this rank's GPU, complete a prompt of each problem. Between
    steps the engine frees its memory for training."""

    max_rows: Positive  # completions generated at once
    max_positions: Positive  # of prompt and completion together that the engine allows
    memory_share: Annotated[float, Field(gt=0, lt=1)]  # of the GPU's memory, for the engine's weights and cache
    prompt: Literal["student", "teacher"]  # whose prompt is completed
    dataset_share: Annotated[float, Field(ge=0, le=1)]  # of the problems, whose reference solution is the completion

    def sample(self, completer: Completes, request: SampleRequest) -> list[Rollout]:
        def complete(draws: list[Draw]) -> list[Completion]:
            llm = get_engine(self, completer.weights.source)
            llm.wake_up(tags=["weights"])
            llm.apply_model(lambda model: model.load_weights(completer.weights.merged_weights()))
            llm.reset_prefix_cache()
            llm.wake_up(tags=["kv_cache"])
            try:
                return run_to_end(llm, draws, request, end_ids=completer.end_ids)
            finally:
                llm.sleep(level=2)  # discards the weights too: the next step loads its own

        return on_policy(request, complete, prompt=self.prompt, dataset_share=self.dataset_share)


@cache
def get_engine(sampler: VllmSampler, source: Source) -> Any:
    """This rank's engine, asleep: one GPU each."""
    # In this process, so that weights are loaded from memory without a copy in between.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    llm = LLM(
        model=source.path,
        revision=source.revision,
        dtype=str(source.dtype).removeprefix("torch."),
        trust_remote_code=source.trust_remote_code,
        skip_tokenizer_init=True,
        tensor_parallel_size=1,
        distributed_executor_backend="external_launcher",  # joins the process group of our ranks
        max_model_len=sampler.max_positions,
        max_num_seqs=sampler.max_rows,
        gpu_memory_utilization=sampler.memory_share,
        enable_sleep_mode=True,
        logprobs_mode="processed_logprobs",  # of the distribution drawn from, after temperature and truncation
    )
    llm.sleep(level=2)
    return llm


def run_to_end(llm: Any, draws: Sequence[Draw], request: SampleRequest, *, end_ids: Sequence[int]) -> list[Completion]:
    """Step the engine until every draw is finished; after a request to stop, unfinished completions are empty."""
    from vllm import SamplingParams

    from opsd_cli.sampling.token_sampling import Completion

    sampling, engine = request.sampling, llm.llm_engine
    for i, draw in enumerate(draws):
        params = SamplingParams(
            temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k or -1,
            max_tokens=sampling.max_completion_tokens, seed=draw.seed % 2**31, logprobs=0,
            stop_token_ids=list(end_ids), ignore_eos=True, detokenize=False,
        )  # fmt: skip
        engine.add_request(str(i), {"prompt_token_ids": list(draw.prompt_ids)}, params)
    completions = [Completion((), "length", ()) for _ in draws]
    while engine.has_unfinished_requests():
        for output in engine.step():
            if not output.finished:
                continue
            done = output.outputs[0]
            ids = tuple(done.token_ids)
            # A table per token, which holds at least the token that was drawn.
            logprobs = tuple(float(table[token].logprob) for token, table in zip(ids, done.logprobs, strict=True))
            reason: FinishReason = "stop" if done.finish_reason == "stop" else "length"
            completions[int(output.request_id)] = Completion(ids, reason, logprobs)
        if request.should_stop():
            engine.abort_request([str(i) for i in range(len(draws))])
            break
    return completions
