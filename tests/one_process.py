"""The engine of a run in one process and without DeepSpeed, which wants a real accelerator: `ZeroEngine` at stage 0
around a policy on any device, and what else a step needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opsd_cli.data.problems import Problem, PromptPair
from opsd_cli.data.stream import stream_of
from opsd_cli.engine.loading import Source
from opsd_cli.engine.policy import Policy
from opsd_cli.engine.process_group import alone
from opsd_cli.engine.weight_copies import trainable
from opsd_cli.engine.zero import ZeroEngine
from opsd_cli.loss.chunked_head import Objective
from opsd_cli.rank.build import build_policy
from opsd_cli.sampling.choose_decoder import Completer
from opsd_cli.settings.config import Config
from opsd_cli.training.clock import PhaseClock
from opsd_cli.training.interruptions import TokenBudget
from opsd_cli.training.loop import Parts
from opsd_cli.training.step_report import Inspection


class Unsharded(nn.Module):
    """What `ZeroEngine` asks of DeepSpeed at stage 0."""

    def __init__(self, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.policy, self.optimizer = policy, optimizer

    def forward(self, *args):
        return self.policy(*args)

    def set_gradient_accumulation_boundary(self, last: bool) -> None:
        """Nothing is reduced at one."""

    def backward(self, loss: Tensor, *, scale_wrt_gas: bool) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class OneProcessEngine(ZeroEngine):
    """All of `ZeroEngine` but how it is made."""

    def __init__(self, config: Config, source: Source, device: torch.device) -> None:
        self.ranks, self.device, self.source = alone(), device, source
        self.policy, self._view, _ = build_policy(config, source, device, self.ranks)
        self.optim, self.steps = config.optim, config.train.steps
        self.stage, self._offloaded, self._overlaps, self.rows_of_others = 0, False, False, []
        self.as_loaded = {name: p.detach().clone() for name, p in trainable(self.policy).items()}
        self.begin()

    def begin(self) -> None:
        """Before the first step of a run."""
        parameters = trainable(self.policy)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.as_loaded[name])
        self._optimizer = torch.optim.AdamW(parameters.values(), lr=self.optim.lr, foreach=False)
        self._ds = Unsharded(self.policy, self._optimizer)

    def save(self, folder: Path) -> None:
        torch.save((trainable(self.policy), self._optimizer.state_dict()), folder / "engine.pt")

    def load(self, folder: Path) -> None:
        weights, optimizer = torch.load(folder / "engine.pt")
        with torch.no_grad():
            for name, parameter in trainable(self.policy).items():
                parameter.copy_(weights[name])
        self._optimizer.load_state_dict(optimizer)


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def prompts(number: int, vocabulary: int) -> list[PromptPair]:
    """Prompts of unequal lengths, with a third one each."""
    generator = torch.Generator().manual_seed(3)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, vocabulary, (count,), generator=generator).tolist())

    problem = Problem(id="p", question="q", solution="s", answer="1")
    return [PromptPair(problem, ids(4 + 3 * i), ids(11 + 2 * i), ids(7 + i)) for i in range(number)]


def parts_of(engine: OneProcessEngine, config: Config) -> Parts:
    """Everything that the first step of a run needs."""
    engine.begin()
    return Parts(
        config=config,
        engine=engine,
        teacher=config.teacher.build(engine),
        sampler=config.sampler,
        completer=Completer(engine, engine.ranks, end_ids=(1,), pad_id=0),
        objective=Objective.of(config),
        train_prompts=stream_of(prompts(5, engine.policy.causal.config.vocab_size), seed=config.run.seed),
        special_ids=frozenset(),
        encode_completion=lambda text: [5, 6, 7, 1],
        inspect=lambda rollouts: Inspection(
            [""] * len(rollouts), [rollout.place % 2 == 0 for rollout in rollouts], [True] * len(rollouts), {}
        ),
        with_feedback=lambda rollouts, correct: (list(rollouts), {}),
        should_stop=lambda: False,
        clock=PhaseClock(engine.device, lambda phase: None),
        budget=TokenBudget(config.train.micro_batch_tokens),
    )
