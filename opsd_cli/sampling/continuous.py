"""`sampler=continuous`: completions through the continuous batching of transformers. Owns how a request becomes its
settings and its results rollouts. Importing it imports neither torch nor transformers.

Its random numbers come from one generator for the whole batch, not from a stream per completion: the same request with
the same weights gives the same completions again, but another number of ranks, rows or rollouts gives others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from opsd_cli.data.problems import Rollout
from opsd_cli.data.seeds import derive_seed
from opsd_cli.sampling.samplers import Engine, Positive, SampleRequest, on_policy
from opsd_cli.settings.errors import OutsideError
from opsd_cli.settings.registry import plugin

if TYPE_CHECKING:
    from opsd_cli.sampling.token_sampling import Completion, Draw

PAGE = 32  # positions of one block of the cache; what prompts share is shared in whole blocks
PASS_TOKENS = 2048  # of one forward pass: prompts that enter and one token of each running row
POLL_SECONDS = 0.05


@plugin("sampler", "continuous")
class ContinuousSampler:
    """The current weights complete a prompt of each problem through transformers' own continuous batching: a paged
    cache, and attention over rows of any length in one pass."""

    max_rows: Positive  # completions generated at once
    cache_tokens: Positive  # positions of the paged cache, over all rows
    prompt: Literal["student", "teacher"]  # whose prompt is completed
    dataset_share: Annotated[float, Field(ge=0, le=1)]  # of the problems, whose reference solution is the completion

    def sample(self, engine: Engine, request: SampleRequest) -> list[Rollout]:
        """Raises OutsideError when transformers gives up on a request."""

        def complete(draws: list[Draw]) -> list[Completion]:
            with engine.generating() as lm:  # every rank enters, also one without draws
                return self._complete(lm, draws, engine, request) if draws else []

        return on_policy(request, complete, prompt=self.prompt, dataset_share=self.dataset_share)

    def _complete(self, lm: Any, draws: Sequence[Draw], engine: Engine, request: SampleRequest) -> list[Completion]:
        import torch
        from transformers import ContinuousBatchingConfig, GenerationConfig

        from opsd_cli.sampling.llama_weights import causal_of

        sampling = request.sampling
        longest = max(len(draw.prompt_ids) for draw in draws) + sampling.max_completion_tokens
        positions = min(self.cache_tokens, len(draws) * (longest + PAGE))
        causal = causal_of(lm)
        own_gpu = [causal.device] if causal.device.type == "cuda" else []  # the others are other ranks'
        with torch.no_grad(), torch.random.fork_rng(own_gpu):  # it seeds the global generators
            manager = causal.init_continuous_batching(
                GenerationConfig(
                    do_sample=sampling.temperature > 0,
                    temperature=sampling.temperature or None,
                    top_k=sampling.top_k,
                    top_p=sampling.top_p,
                    max_new_tokens=sampling.max_completion_tokens,
                    eos_token_id=list(engine.end_ids),
                    pad_token_id=engine.pad_id,
                ),
                ContinuousBatchingConfig(
                    page_size=PAGE,
                    num_blocks=max(math.ceil(longest / PAGE) + 1, math.ceil(positions / PAGE)),
                    max_batch_tokens=max(PASS_TOKENS, self.max_rows),
                    max_requests_per_batch=self.max_rows,
                    return_logprobs=True,
                    seed=derive_seed(request.seed, "continuous", request.prompts[0][0]) % 2**31,
                    use_cuda_graph=False,  # graphs would remember where the weights lay in the step before
                ),
            )
            return collected(manager, draws, request, end_ids=engine.end_ids)


def collected(
    manager: Any, draws: Sequence[Draw], request: SampleRequest, *, end_ids: Sequence[int]
) -> list[Completion]:
    """Run the manager until every draw is finished. When asked to stop, what is unfinished is empty."""
    from opsd_cli.sampling.token_sampling import Completion

    results: dict[str, Any] = {}
    stopped = False
    manager.start()
    try:
        names = manager.add_requests([list(draw.prompt_ids) for draw in draws])
        while len(results) < len(names) and not stopped:
            result = manager.get_result(timeout=POLL_SECONDS)
            if result is None and not manager.is_running():
                raise OutsideError("sampler=continuous: transformers ended its generation early; use sampler=static")
            if result is not None and result.error:
                raise OutsideError(f"sampler=continuous: transformers refused a request: {result.error}")
            if result is not None and result.is_finished():
                results[result.request_id] = result
            stopped = request.should_stop()
    finally:
        manager.stop(block=True, hard_stop=len(results) < len(draws))
        manager.destroy()
    completions = []
    for name in names:
        ids = tuple(results[name].generated_tokens) if name in results else ()
        logprobs = tuple(results[name].logprobs) if name in results else ()
        completions.append(Completion(ids, "stop" if ids and ids[-1] in end_ids else "length", logprobs))
    return completions
