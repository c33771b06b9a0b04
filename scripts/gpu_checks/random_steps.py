"""Whole steps of the real loop on random weights and random prompts: no tokenizer, no dataset, any shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from gpu_checks import build, twin
from gpu_checks.check import Bench
from opsd_cli.data.problems import PromptPair, Rollout
from opsd_cli.data.stream import stream_of
from opsd_cli.loss.chunked_head import Objective
from opsd_cli.loss.divergences import ForwardKL
from opsd_cli.sampling.choose_decoder import Completer
from opsd_cli.sampling.samplers import Sampler, SampleRequest
from opsd_cli.settings.config import LoraSettings
from opsd_cli.teachers.teachers import Initial
from opsd_cli.training.clock import PhaseClock
from opsd_cli.training.interruptions import TokenBudget
from opsd_cli.training.loop import Parts
from opsd_cli.training.step_report import Inspection


@dataclass(frozen=True)
class Given:
    """A sampler whose rollouts are known before."""

    rollouts: Sequence[Rollout]

    def sample(self, completer: object, request: SampleRequest) -> list[Rollout]:
        asked = [(place, number) for place, _ in request.prompts for number in range(request.rollouts_per_problem)]
        given = zip(asked, self.rollouts, strict=True)
        return [replace(rollout, place=place, number=number) for (place, number), rollout in given]


def parts_of(
    causal: PreTrainedModel,
    bench: Bench,
    pairs: Sequence[PromptPair],
    *,
    words: Sequence[str],
    stage: int,
    lora: LoraSettings = build.NO_LORA,
    checkpointing: bool = False,
    rollouts: Sequence[Rollout] | None = None,
) -> tuple[Parts, build.WatchedEngine]:
    """What a step needs. Without `rollouts` it draws them itself."""
    config = twin.config_of((*words, f"train.problems_per_step={len(pairs)}"))
    engine = build.engine_of(causal, bench, stage=stage, lora=lora, checkpointing=checkpointing)
    sampler: Sampler = config.sampler if rollouts is None else Given(rollouts)
    parts = Parts(
        config=config,
        engine=engine,
        teacher=Initial().build(engine),
        sampler=sampler,
        completer=Completer(engine, engine.ranks, end_ids=(build.END_ID,), pad_id=build.PAD_ID),
        objective=Objective.of(replace(config, divergence=ForwardKL())),
        train_prompts=stream_of(pairs, seed=config.run.seed),
        special_ids=frozenset(),
        encode_completion=lambda text: (),
        inspect=lambda drawn: Inspection([""] * len(drawn), [False] * len(drawn), [False] * len(drawn), {}),
        with_feedback=lambda drawn, correct: (list(drawn), {}),
        should_stop=lambda: False,
        clock=PhaseClock(engine.device, lambda phase: None),
        budget=TokenBudget(config.train.micro_batch_tokens),
    )
    return parts, engine


def reset_peak(bench: Bench) -> None:
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
