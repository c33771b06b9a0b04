"""From a config to live objects, in the order in which a rank builds them. Nothing here runs a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from opsd_cli.data.problems import Rollout
from opsd_cli.data.seeds import derive_seed
from opsd_cli.data.token_rules import NoRule
from opsd_cli.engine.generation_view import GenerationView
from opsd_cli.engine.loading import LoadedModel, Source, add_adapter, asked_once, load_causal, load_model
from opsd_cli.engine.logits_check import check_logits
from opsd_cli.engine.merging import rehearse_merge
from opsd_cli.engine.model_limits import longest_of
from opsd_cli.engine.neighbours import choose_layout
from opsd_cli.engine.packed import LayoutChoice
from opsd_cli.engine.placement import home_of, move_buffers
from opsd_cli.engine.policy import Policy
from opsd_cli.engine.process_group import Ranks
from opsd_cli.engine.saved_weights import load_saved
from opsd_cli.engine.small_cards import tile_mlps
from opsd_cli.loss.chunked_head import Objective
from opsd_cli.rank.run_data import RunData
from opsd_cli.sampling.batch_decoder import BatchLimits
from opsd_cli.sampling.choose_decoder import Completer
from opsd_cli.sampling.samplers import Weights
from opsd_cli.sampling.token_sampling import Draw
from opsd_cli.settings.config import Config
from opsd_cli.settings.errors import ConfigError
from opsd_cli.training.clock import PhaseClock
from opsd_cli.training.engine_protocol import Engine
from opsd_cli.training.interruptions import TokenBudget, stop_together
from opsd_cli.training.loop import Parts
from opsd_cli.training.time_budget import TimeBudget

Tell = Callable[[str], None]


def build_policy(
    config: Config, source: Source, device: torch.device, ranks: Ranks, *, shards: bool = False
) -> tuple[Policy, GenerationView, LayoutChoice]:
    """Weights, adapter and the view of them for generation; and how rows are run. With `shards`, which says that the
    engine will shard the weights, these stay on the CPU where a device cannot hold all of them. Collective."""
    causal = asked_once(source, ranks, partial(load_causal, device=device)).requires_grad_(False)
    if source.quantize == "none":
        nn.Module.to(causal, home_of(causal, device, ranks) if shards else device)
    rows = choose_layout(causal, ranks, longest=longest_of(config))
    lm = add_adapter(causal, config.lora, seed=derive_seed(config.run.seed, "adapter"))
    policy = Policy(
        lm, layout=rows.layout, shares=not rows.unshared,
        offloads=config.train.offload_activations, longest_row=longest_of(config),
    )  # fmt: skip
    if config.train.mlp_tiles > 1:
        tile_mlps(causal, config.train.mlp_tiles)
    if config.train.gradient_checkpointing:
        if not causal.supports_gradient_checkpointing:
            raise ConfigError(
                f"train.gradient_checkpointing is true, but this architecture ({causal.config.model_type}) cannot "
                "compute its states again; use train.gradient_checkpointing=false"
            )
        switch_on_checkpointing(causal)
    check_logits(policy, source.path, dropout=source.dropout)
    if source.quantize == "none":  # else an adapter is merged into the original weights
        rehearse_merge(lm)
    move_buffers(policy, device)  # in place before the view shares them
    return policy, GenerationView(policy, source, config.lora), rows


def switch_on_checkpointing(causal: PreTrainedModel) -> None:
    """Recompute activations in the backward pass."""
    options = {"use_reentrant": False}
    if hasattr(PreTrainedModel, "activation_checkpointing_enable"):  # transformers 5.23; the older name warns
        causal.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def load_trained(config: Config, source: Source, device: torch.device) -> LoadedModel:
    """The model of the config to draw completions from; with the weights of a checkpoint, if it names one."""
    if config.model.checkpoint is None:
        return load_model(source, device=device)
    return load_saved(source, config.lora, Path(config.model.checkpoint), device=device)


def build_completer(
    weights: Weights, ranks: Ranks, run_data: RunData, causal: PreTrainedModel, warn: Tell
) -> Completer:
    """What draws completions from `weights`, whose architecture is that of `causal`."""
    end_ids = run_data.renderer.end_ids(causal.generation_config)
    return Completer(weights, ranks, end_ids=end_ids, pad_id=run_data.tokenizer.pad_token_id, warn=warn)


def build_parts(
    config: Config,
    engine: Engine,
    completer: Completer,
    run_data: RunData,
    should_stop: Callable[[], bool],
    *,
    enter: Callable[[str], None],
) -> Parts:
    """Everything `training.loop` needs. The teacher is built last: a frozen copy is taken of the weights as loaded."""
    rule, clock = config.token_rule, PhaseClock(engine.device, enter)
    write = (
        None if config.context.write is None else partial(write_notes, config, engine, completer, clock, should_stop)
    )
    return Parts(
        config=config,
        engine=engine,
        teacher=config.teacher.build(engine),
        sampler=config.sampler,
        completer=completer,
        objective=Objective.of(config, engine.device),
        train_prompts=run_data.train_prompts,
        special_ids=frozenset(run_data.tokenizer.all_special_ids) - set(completer.end_ids),
        encode_completion=run_data.renderer.encode_completion,
        inspect=run_data.inspect,
        with_feedback=run_data.with_feedback if write is None else partial(run_data.with_feedback, write=write),
        should_stop=should_stop,
        clock=clock,
        budget=TokenBudget(config.train.micro_batch_tokens),
        time=TimeBudget(config.train.seconds),
        token_factors=None if isinstance(rule, NoRule) else partial(run_data.token_factors, rule),
    )


def write_notes(
    config: Config,
    engine: Engine,
    completer: Completer,
    clock: PhaseClock,
    should_stop: Callable[[], bool],
    rollouts: Sequence[Rollout],
    prompts: Sequence[Sequence[int]],
) -> list[tuple[int, ...]]:
    """What the current policy writes about each rollout of this rank, as ids; nothing where there is no prompt. What is
    drawn depends on the seed and the rollout's key alone. Collective."""
    asked = [(rollout, ids) for rollout, ids in zip(rollouts, prompts, strict=True) if ids]
    draws = [Draw(ids, derive_seed(config.run.seed, "written", *rollout.key)) for rollout, ids in asked]
    with clock.phase("time/write"):
        completions = completer.complete(
            draws,
            sampling=replace(config.sampling, max_completion_tokens=config.context.write_tokens),
            limits=BatchLimits(config.eval.max_rows, config.eval.cache_tokens),
            should_stop=should_stop,
        )
    for draw, done in zip(draws, completions, strict=True):
        engine.meter.add_draws(len(draw.prompt_ids), [len(done.ids)])
    stop_together(completer.ranks, should_stop)  # what was cut short is no note
    drawn = iter(completions)
    return [next(drawn).ids if ids else () for ids in prompts]
