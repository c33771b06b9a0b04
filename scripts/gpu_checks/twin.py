"""The same step in plain PyTorch, fp32 and on the CPU: what a step of the real engine is compared with. An engine
without DeepSpeed, sharding or updates, for the loop's own functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from peft import PeftModel

from gpu_checks import build
from opsd_cli.data.pairing import PairedBatch, TokenBatch, pair
from opsd_cli.data.problems import Rollout
from opsd_cli.data.seeds import derive_seed
from opsd_cli.engine.base import load_frozen
from opsd_cli.engine.device import card_of
from opsd_cli.engine.loading import load_causal
from opsd_cli.engine.policy import FrozenModel, Policy, score_tokens
from opsd_cli.engine.process_group import alone
from opsd_cli.engine.weight_copies import WeightCopy, trainable
from opsd_cli.engine.zero import ZeroEngine
from opsd_cli.loss.chunked_head import Objective
from opsd_cli.loss.types import TokenLoss, TokenMixture, TokenScores
from opsd_cli.preflight import check
from opsd_cli.rank.build import build_completer, build_parts, build_policy
from opsd_cli.rank.build_zero import build_engine
from opsd_cli.rank.run_data import RunData, load_run_data
from opsd_cli.settings.config import Config
from opsd_cli.settings.recipe_files import find_folders
from opsd_cli.training.loop import Parts, score, train_step, weigh
from opsd_cli.training.step_report import StepReport

CPU = torch.device("cpu")
ALL_SAMPLES = ("samples.every=1", "samples.count=100000")  # a report then holds every rollout of its step
SMALL = (
    "recipe=quickstart", "train.steps=3", "train.problems_per_step=4", "sampling.max_completion_tokens=16",
    "eval.problems=0", "dataset.train_problems=24", "dataset.test_problems=8", "dataset.retention_problems=4",
    "optim.warmup_steps=0", "loss.mask_truncated=false", *ALL_SAMPLES,
)  # fmt: skip


class TwinEngine:
    """What loop and teachers ask of an engine, by one module on the CPU."""

    def __init__(self, policy: Policy, engine: ZeroEngine) -> None:
        self.policy, self.ranks, self.device = policy, engine.ranks, CPU
        self.source = replace(engine.source, dtype=torch.float32)
        self.pads, self.shares = engine.pads, engine.shares
        self.has_adapter, self.adapter_off = policy.has_adapter, policy.adapter_off

    def student_loss(
        self, batch: PairedBatch, target: TokenScores | TokenMixture | None, objective: Objective
    ) -> TokenLoss:
        return TokenLoss(*self.policy(batch.student, partial(objective, batch=batch, target=target)))

    def score(self, batch: TokenBatch, *, own_head: bool = False) -> TokenScores:
        return score_tokens(self.policy, self.policy, batch, keeps_head=False, copies=False)

    def copy_weights(self, *, moves: bool) -> WeightCopy:
        return WeightCopy(trainable(self.policy.lm), moves=moves)

    def average_weights(self) -> WeightCopy:
        """Before the first update an average is the weights themselves."""
        kept = {} if isinstance(self.policy.lm, PeftModel) else trainable(self.policy.lm)
        return WeightCopy(kept, moves=True)

    def load_other(self, path: str, revision: str | None, *, placement: str) -> FrozenModel:
        other, _ = load_frozen(self.source.beside(path, revision), self.source, alone(), device=CPU)
        return FrozenModel(other, other, sharded=False, rows=len(other.head.weight))


@dataclass(frozen=True)
class Stage:
    """A run's live parts in this process."""

    config: Config
    run_data: RunData
    parts: Parts


RUN_DATA: dict[str, RunData] = {}
"""By the settings they were made from: prompts are rendered once, not once for each of forty variants."""


def config_of(words: Sequence[str]) -> Config:
    """The config of a small quickstart with these words, checked as a command line is."""
    _, (member,) = check([*SMALL, *words], find_folders())
    return member.config


def build_run(words: Sequence[str], device: torch.device) -> Stage:
    """Everything of `opsd train` up to its first step, but a run folder."""
    config = config_of(words)
    read = (config.dataset, config.prompts, config.context, config.model, config.target, config.eval, config.run)
    if (key := repr(read)) not in RUN_DATA:
        RUN_DATA[key] = load_run_data(config, [card_of(device)], lambda phase: None, train=True)
    run_data = RUN_DATA[key]
    ranks = build.ranks_of(device)
    policy, view, _ = build_policy(config, run_data.source, device, ranks)
    engine = build_engine(config, policy, view, ranks, run_data.source, device)
    completer = build_completer(engine, ranks, run_data, policy.causal, lambda _: None)
    parts = build_parts(config, engine, completer, run_data, lambda: False, enter=lambda phase: None)
    return Stage(config, run_data, parts)


def take_step(stage: Stage, step: int) -> StepReport:
    return train_step(step, stage.parts, updates=step)


def objective_and_norm(stage: Stage, rollouts: Sequence[Rollout]) -> tuple[float, float]:
    """What the first step must have found for these rollouts: the mean objective and the norm of its gradient."""
    config, source = stage.config, stage.run_data.source
    rounded = load_causal(source)
    causal = build.converted(rounded, dtype=torch.float32, device=CPU)
    policy = build.policy_of(causal, config.lora, seed=derive_seed(config.run.seed, "adapter"), second_factor=0.0)
    twin = TwinEngine(policy, stage.parts.engine)
    parts = replace(stage.parts, engine=twin, teacher=config.teacher.build(twin))
    weighed = weigh(parts, rollouts, stage.run_data.inspect(rollouts))
    kept = [(rollout, weights) for rollout, weights in weighed if any(weights)]
    (batch,) = pair([kept])
    loss = score(parts, batch)
    tokens = float(batch.weights_N.sum())
    (loss.weighted_sum / tokens).backward()
    squares = [float(p.grad.double().square().sum()) for p in policy.parameters() if p.grad is not None]
    return float(loss.weighted_sum) / tokens, sum(squares) ** 0.5
