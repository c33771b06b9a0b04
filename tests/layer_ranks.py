"""Run by test_layer_by_layer on two ranks: at stage 3, completions drawn with whole weights or with weights that are
gathered a layer at a time, then an update. Leaves what was drawn, what each rank held and the weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gradient_ranks import OPTIM, WEIGH, make_rollouts
from support import plain_objective
from torch import nn

from opsd_cli.data.pairing import pair
from opsd_cli.engine.generation_view import GenerationView
from opsd_cli.engine.loading import Source, add_adapter, load_causal
from opsd_cli.engine.packed import usable_layout
from opsd_cli.engine.policy import Policy
from opsd_cli.engine.process_group import Ranks, connect, disconnect
from opsd_cli.engine.zero import ZeroEngine
from opsd_cli.loss.divergences import ForwardKL
from opsd_cli.sampling.batch_decoder import BatchLimits
from opsd_cli.sampling.choose_decoder import Completer
from opsd_cli.sampling.token_sampling import Draw
from opsd_cli.settings.config import LoraSettings, SamplingSettings, ZeroSettings

CPU = torch.device("cpu")
GREEDY = SamplingSettings(max_completion_tokens=9, temperature=0.0, top_p=1.0, top_k=0)
ADAPTERS = {
    "all weights": LoraSettings(rank=0, alpha=8, dropout=0.0, targets=("q_proj",)),
    "lora": LoraSettings(rank=4, alpha=8, dropout=0.0, targets=("q_proj", "down_proj")),
}
CASES = {
    # name: model of `zoo`, adapter, where parameters are between uses
    "all weights": ("qwen3", "all weights", "none"),
    "lora": ("qwen3", "lora", "none"),
    "two windows": ("gemma2", "all weights", "none"),
    "experts": ("mixtral", "all weights", "none"),
    "recurrent": ("mamba", "all weights", "none"),
    "in host memory": ("qwen3", "all weights", "cpu"),
}


def draws_of(rank: int) -> list[Draw]:
    """Three on the first rank, whose last ones enter later; none on the second."""
    prompts = [[3, 14, 15, 9, 26], [5, 35], [8, 9, 79]]
    return [] if rank else [Draw(prompt, seed=number) for number, prompt in enumerate(prompts)]


class Held:
    """The most numbers of parameters that `gather` made whole at once, and of all at the end."""

    def __init__(self, engine: ZeroEngine) -> None:
        self.now = self.most = 0
        gather = engine._gather

        @contextmanager
        def counted(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
            with gather(parameters):
                size = sum(parameter.numel() for parameter in parameters)
                self.now += size
                self.most = max(self.most, self.now)
                yield
                self.now -= size

        engine._gather = counted


def run(root: Path, case: str, way: str, ranks: Ranks) -> None:
    kind, adapter, host = CASES[case]
    source = Source(str(root / kind), None, torch.float32, "sdpa", False, True)
    causal = load_causal(source)
    layout = usable_layout(causal, ranks).layout
    policy = Policy(add_adapter(causal, ADAPTERS[adapter], seed=0), layout=layout)
    if adapter == "lora":
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(torch.linspace(-0.2, 0.3, parameter.numel()).view_as(parameter))
    view = GenerationView(policy, source, ADAPTERS[adapter])
    zero = ZeroSettings(
        stage=3, offload_optimizer="none", offload_parameters=host, bucket_mib=1, hpz_ranks=1, overlap=False,
        persist_below=0, gather=way,
    )  # fmt: skip
    engine = ZeroEngine(policy, view, ranks, zero=zero, optim=OPTIM, steps=2, device=CPU, source=source)
    held = Held(engine)
    completer = Completer(engine, ranks, end_ids=[1], pad_id=0)
    found: dict[str, Any] = {"how": completer.choose_decoder()}
    found["drawn"] = draw(completer, ranks)
    found["most"], held.most = held.most, 0
    merged = {name: tensor.clone() for name, tensor in engine.merged_weights()}
    found["most merged"] = held.most
    mine = make_rollouts(0)[ranks.rank :: ranks.world_size]
    (batch,) = pair([[(rollout, WEIGH(rollout)) for rollout in mine]])
    objective = plain_objective(ForwardKL(), temperature=1.0, chunk_bytes=2**20)
    loss = engine.student_loss(batch, engine.score(batch.teacher, own_head=True), objective)
    engine.backward(loss.weighted_sum, denominator=10.0, last=True)
    assert not engine.step(0).refused
    found["drawn after an update"] = draw(completer, ranks)
    weights = dict(engine.whole_parameters())
    if ranks.rank == 0:
        torch.save({"weights": weights, "merged": merged}, root / f"{case} {way}.pt")
    (root / f"{case} {way} {ranks.rank}.json").write_text(json.dumps(found))


def draw(completer: Completer, ranks: Ranks) -> list[Any]:
    completions = completer.complete(
        draws_of(ranks.rank), sampling=GREEDY, limits=BatchLimits(2, 200), should_stop=lambda: False
    )
    return [(done.ids, done.logprobs) for done in completions]


if __name__ == "__main__":
    connected = connect(CPU)
    for this_case in sys.argv[3].split(","):
        run(Path(sys.argv[1]), this_case, sys.argv[2], connected)
    disconnect()
