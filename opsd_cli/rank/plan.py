"""The plan that a run shows before its first step: where a fast path does not fit every model, which path is taken, and
why not the fast one."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

from opsd_cli.engine.packed import SHARING, LayoutChoice
from opsd_cli.engine.wide_adapters import adapters_in_words
from opsd_cli.engine.zero import ZeroEngine
from opsd_cli.insight.model_lookup import find_model
from opsd_cli.insight.plan import make_plan, one_line
from opsd_cli.insight.plan_setup import Device, Lengths, this_cpu
from opsd_cli.loss.chunk_rows import numbers_of
from opsd_cli.loss.chunked_head import Objective
from opsd_cli.rank.run_data import RunData
from opsd_cli.sampling.choose_decoder import Completer
from opsd_cli.sampling.samplers import DatasetSampler, StaticSampler
from opsd_cli.sampling.vllm import VllmSampler
from opsd_cli.settings.config import Config
from opsd_cli.settings.errors import DataError, OutsideError
from opsd_cli.settings.known_devices import recognise


def training_plan(
    config: Config, engine: ZeroEngine, completer: Completer, rows: LayoutChoice, *, evaluates: bool
) -> list[str]:
    """For a run that is about to start. Decides how completions are drawn, and starts vLLM where it draws them.
    Collective."""
    return [
        *sharding_lines(engine.sharded_from, engine.device),
        *attention_lines(config, engine.policy.causal.config._attn_implementation),
        *(adapters_in_words(engine.policy.lm) if engine.has_adapter else []),
        rows_line("rows", rows),
        *(rows_line("the teacher's rows", other) for other in engine.rows_of_others),
        *prompt_lines(config, rows),
        completions_line(drawn_elsewhere(config, completer), completer.choose_decoder, evaluates=evaluates),
        loss_line(config, engine.device),
    ]


def predicted_line(config: Config, run_data: RunData, *, ranks: int, device: torch.device) -> list[str]:
    """What opsd plan says of this run's memory and time, with the lengths that its prompts have; nothing for a model
    whose size it cannot tell from a config.json."""
    pairs = run_data.train_prompts.rendered
    if not pairs:
        return []
    prompt, teacher = (
        -(-sum(map(len, ids)) // len(pairs))
        for ids in ([pair.student_ids for pair in pairs], [pair.teacher_ids for pair in pairs])
    )
    lengths, source = Lengths(prompt, max(1, teacher)), run_data.source
    try:
        model = find_model(source.path, source.revision)
        found = make_plan(
            config, device_of(device), ranks=ranks, lengths=lengths, threads=torch.get_num_threads(), model=model
        )
    except (DataError, OutsideError):
        return []
    return [one_line(found)]


def device_of(device: torch.device) -> Device:
    """A rank's device as a plan takes it."""
    if device.type != "cuda":
        return this_cpu()
    facts = torch.cuda.get_device_properties(device)
    return Device(facts.name, facts.total_memory / 2**30, recognise(facts.name))


def sharding_lines(whole_on: torch.device | None, device: torch.device) -> list[str]:
    """How weights became shards, at stage 3: where all of them were before."""
    if whole_on is None:
        return []
    before = "" if whole_on == device else "; the card has no room for all of them, so they were checked on the CPU"
    return [f"shards: each rank took its part of one parameter after another{before}"]


def attention_lines(config: Config, attention: str) -> list[str]:
    """Which attention runs, where it is not the one that was asked for."""
    if config.model.attention == "sdpa" and attention == "eager":
        return ["attention: eager: this architecture has no sdpa"]
    return []


def rows_line(name: str, rows: LayoutChoice) -> str:
    """How rows are scored."""
    in_groups = f"; attention runs on groups of similar length: {rows.reason}" if rows.reason else ""
    ways = {
        "varlen": "packed one after another, without padding, by torch's kernel for rows of any lengths",
        "packed": f"packed one after another, without padding{in_groups}",
        "flash": "packed one after another, without padding, by FlashAttention",
        "padded": f"padded to the longest of a micro-batch: {rows.reason}",
    }
    return f"{name}: {ways[rows.layout]}"


def prompt_lines(config: Config, rows: LayoutChoice) -> list[str]:
    """Whether a prompt that the rollouts of a problem share is run once; nothing where each has its own problem."""
    if config.train.rollouts_per_problem == 1 or not config.train.share_prompts:
        return []
    reason = rows.unshared or ("" if rows.layout in SHARING else "rows have to be packed for that by our own attention")
    if reason:
        return [f"prompts: run once for each rollout: {reason}"]
    return ["prompts: run once for the rollouts of a problem that are scored together"]


def drawn_elsewhere(config: Config, completer: Completer) -> str | None:
    """Where the completions of training come from, if not from the engine that trains. Collective."""
    if isinstance(config.sampler, DatasetSampler):
        return "the dataset's reference solutions"
    if not isinstance(config.sampler, StaticSampler | VllmSampler):
        return None
    if isinstance(config.sampler, StaticSampler) and config.sampler.placement == "shared":
        return None
    drawn = config.sampler.prepare(completer)
    if config.lora.rank == 0 or completer.weights.source.dtype is torch.float32:
        return drawn
    return f"{drawn}, from merged weights: in half precision these hold only a part of a small update"


def completions_line(elsewhere: str | None, choose_decoder: Callable[[], str], *, evaluates: bool) -> str:
    """How completions are drawn, in training and, where that differs, in evaluation. `elsewhere` as above."""
    if elsewhere is not None and not evaluates:
        return f"completions: {elsewhere}"
    drawn = choose_decoder()
    return f"completions: {drawn}" if elsewhere is None else f"completions: {elsewhere}; in evaluation {drawn}"


def loss_line(config: Config, device: torch.device) -> str:
    """How the rows of the loss are computed. Known before weights are loaded."""
    reason = why_no_kernel(config, device)
    return f"loss: in plain PyTorch: {reason}" if reason else "loss: in one Triton kernel"


def why_no_kernel(config: Config, device: torch.device) -> str:
    """Why the Triton kernel cannot be used, empty where it is: the conditions of `triton_takes`, in words."""
    if device.type != "cuda":
        return "the Triton kernel runs on GPUs only"
    if find_spec("triton") is None:
        return "triton is not installed"
    if config.teacher.plugin_name == "blend" or config.target.kind != "teacher":
        return "the Triton kernel takes one teacher pass, and this target is made of several"
    if config.target.temperature != 1.0:
        own = f"target.temperature={config.target.temperature}"
        return f"the Triton kernel has no temperature of the teacher's own ({own})"
    factors = {
        f"tokens.gate={config.tokens.gate}": config.tokens.gate != "none",
        f"tokens.prefix_nats={config.tokens.prefix_nats:g}": config.tokens.prefix_nats > 0,
        f"loss.importance_cap={config.loss.importance_cap}": config.loss.importance_cap is not None,
    }
    if settings := [setting for setting, is_on in factors.items() if is_on]:
        return f"the Triton kernel has no factors for single tokens ({settings[0]})"
    if numbers_of(Objective.of(config).divergence) is None:
        name = config.divergence.plugin_name
        return f"the Triton kernel does not support divergence={name} with this clip and support"
    return ""
