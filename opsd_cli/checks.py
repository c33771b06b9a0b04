"""Every rule between settings: combinations of valid settings that make no sense together, each refused with the reason
and what to change. In one file, and checked for every config, whatever parts it is made of: a rule that belonged to a
part would be lost with the next part that somebody adds. What one setting may be, `settings.config` says."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from opsd_cli.data.contexts import check_context
from opsd_cli.data.datasets import Hub, Jsonl
from opsd_cli.loss.clip import apply_clip
from opsd_cli.loss.divergences import AtSampledToken
from opsd_cli.loss.routed import Routed
from opsd_cli.loss.support import restrict_support
from opsd_cli.sampling.samplers import DatasetSampler, StaticSampler
from opsd_cli.sampling.vllm import VllmSampler, why_not_vllm
from opsd_cli.settings.config import Config
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.paths import typed_path
from opsd_cli.settings.registry import CompletesPrompt, PlacesRanks, SetsRanks, did_you_mean, plugin_names
from opsd_cli.teachers.teachers import Blend, Ema, External

NEEDS_SIBLING, MADE_OF_ROLLOUTS = "{{sibling}}", ("{{sibling}}", "{{feedback}}", "{{written}}")


def check_config(config: Config) -> Config:
    """The config itself. Raises ConfigError with everything that does not go together."""
    rules = (
        _sharding,
        _small_cards,
        _rollouts,
        _evaluation,
        _remote_code,
        _teacher,
        _tokens,
        _vocabulary,
        _target,
        _off_policy,
        _context,
        _solutions,
        _vllm,
        _separate,
        _quantize,
    )
    problems = [problem for rule in rules for problem in rule(config)]
    if isinstance(config.launcher, SetsRanks) and config.launcher.ranks is not None:  # otherwise each rank checks it
        problems += _ranks(config, config.launcher.ranks)
    if problems:
        raise ConfigError(*problems)
    return config


def check_ranks(config: Config, world_size: int) -> None:
    """Raises ConfigError if the run cannot work on that many ranks."""
    if problems := list(_ranks(config, world_size)):
        raise ConfigError(*problems)


def _evaluation(config: Config) -> Iterator[str]:
    settings = config.eval
    if settings.samples > 1 and settings.temperature == 0:
        yield (
            f"eval.samples is {settings.samples} and eval.temperature is 0, at which every completion of a problem is "
            "the same; set eval.temperature above 0, or eval.samples=1"
        )
    if settings.second_grader is not None and settings.second_grader not in (known := plugin_names("grader")):
        near = did_you_mean(settings.second_grader, known)
        yield f"eval.second_grader is {settings.second_grader!r}, which is no grader{near} (known: {', '.join(known)})"
    elif settings.second_grader == config.grader.plugin_name:
        yield f"eval.second_grader is {settings.second_grader}, which is the grader already; choose another, or null"


def _sharding(config: Config) -> Iterator[str]:
    zero = config.zero
    if zero.offload_parameters == "cpu" and zero.stage != 3:
        yield f"zero.offload_parameters=cpu needs zero.stage=3 (got {zero.stage}); use zero=stage3_offload"
    if zero.overlap and zero.stage == 0:
        yield "zero.overlap=true needs gradients that are sharded, zero.stage=1 to 3 (got 0); use zero.overlap=false"
    name = config.teacher.plugin_name
    under_adapter = config.lora.rank > 0 and name in ("initial", "blend")
    if zero.persist_below and (zero.stage != 3 or zero.hpz_ranks > 1):
        yield (
            f"zero.persist_below={zero.persist_below} keeps small parameters whole, which needs zero.stage=3 and "
            f"zero.hpz_ranks=1 (got {zero.stage} and {zero.hpz_ranks}); use zero.persist_below=0"
        )
    elif zero.persist_below and name not in ("live", "external", "none") and not under_adapter:
        yield (
            f"zero.persist_below={zero.persist_below} keeps small parameters whole, and teacher={name} is a copy of "
            "the shards, which would leave them out; use zero.persist_below=0"
        )
    if zero.gather != "auto" and zero.stage != 3:
        yield (
            f"zero.gather={zero.gather} says how sharded weights are gathered, which needs zero.stage=3 (got "
            f"{zero.stage}); use zero.gather=auto"
        )
    if zero.hpz_ranks > 1 and (zero.stage != 3 or zero.offload_parameters == "cpu"):
        yield (
            f"zero.hpz_ranks={zero.hpz_ranks} keeps a second set of parameters on the cards of a node, which needs "
            f"zero.stage=3 and zero.offload_parameters=none (got {zero.stage} and {zero.offload_parameters}); use "
            "zero=stage3_hpz, or zero.hpz_ranks=1"
        )
    if zero.hpz_ranks > 1 and isinstance(config.teacher, External) and config.teacher.placement != "replicated":
        yield (
            f"zero.hpz_ranks={zero.hpz_ranks} and teacher.placement={config.teacher.placement} both shard a model, "
            "each over other ranks, which DeepSpeed cannot; use teacher.placement=replicated, or zero=stage3"
        )
    if zero.offload_optimizer == "cpu" and zero.stage == 0:
        yield "zero.offload_optimizer=cpu needs zero.stage 1 or higher (got 0)"


def _small_cards(config: Config) -> Iterator[str]:
    train, dtype = config.train, config.model.dtype
    if train.offload_activations and not train.gradient_checkpointing:
        yield (
            "train.offload_activations=true moves what checkpointing keeps, and without it everything that a layer "
            "computes: set train.gradient_checkpointing=true"
        )
    if config.optim.state_dtype == "float32":
        return
    if dtype not in ("auto", "bfloat16"):
        yield f"optim.state_dtype=bfloat16 needs weights in bfloat16 (got model.dtype={dtype})"
    if config.zero.offload_optimizer == "cpu":
        yield (
            "optim.state_dtype=bfloat16 cannot be offloaded: DeepSpeed's optimizer for that would have to be compiled; "
            "use zero=stage2, or optim.state_dtype=float32"
        )


def _rollouts(config: Config) -> Iterator[str]:
    rollouts = config.train.rollouts_per_problem
    if config.sampling.temperature == 0 and rollouts > 1:
        yield (
            "sampling.temperature=0 is greedy, so the rollouts of a problem would be the same; "
            f"set train.rollouts_per_problem=1 (got {rollouts}) or a temperature above 0"
        )


def _remote_code(config: Config) -> Iterator[str]:
    model = config.model
    if model.trust_remote_code and model.revision is None and not typed_path(model.path).is_dir():
        yield (
            f"model.trust_remote_code=true runs code that comes with {model.path}; "
            "pin the version you trust: model.revision=COMMIT"
        )


def _teacher(config: Config) -> Iterator[str]:
    divergence, teacher = config.divergence.plugin_name, config.teacher.plugin_name
    if config.divergence.needs_teacher and teacher == "none":
        yield f"divergence={divergence} needs a teacher; use teacher=initial"
    if isinstance(config.teacher, External) and config.teacher.path is None:
        yield f"teacher={teacher} needs a model: teacher.path=PATH, one with the tokenizer of {config.model.path}"
    if isinstance(config.teacher, Blend) and config.teacher.live == 1.0:
        yield f"teacher={teacher} with live=1 is the student's own weights and two passes; use teacher=live"
    if not config.divergence.needs_teacher and teacher != "none":
        yield f"divergence={divergence} uses no teacher: teacher={teacher} would be wasted; use teacher=none"
    gate, divergence_of = config.tokens.gate, config.divergence
    if gate in ("teacher_entropy", "entropy_gap", "privilege") and teacher == "none":
        yield f"tokens.gate={gate} uses the teacher's distribution; it needs a teacher"
    if config.tokens.prefix_nats > 0 and teacher == "none":
        yield "tokens.prefix_nats uses the teacher's distribution; it needs a teacher"
    if isinstance(divergence_of, Routed) and divergence_of.above == divergence_of.below:
        yield f"divergence={divergence} is {divergence_of.above} above and below its bound; use that divergence itself"


def _tokens(config: Config) -> Iterator[str]:
    rules, rollouts = config.tokens, config.train.rollouts_per_problem
    graded = (rules.gate_width, rules.gate_low, rules.gate_high) != (0.0, 0.0, 1.0)
    if rules.gate == "none" and graded:
        yield "tokens.gate_width, gate_low and gate_high belong to a gate, and tokens.gate=none; choose a gate"
    if rules.gate != "none" and rules.gate_low == rules.gate_high:
        yield (
            f"tokens.gate_low and tokens.gate_high are both {rules.gate_low}, so tokens.gate={rules.gate} would change "
            "nothing; set them apart, or tokens.gate=none"
        )
    if 0 < rules.first <= rules.skip_first:
        yield f"tokens.skip_first={rules.skip_first} leaves nothing of tokens.first={rules.first}; raise tokens.first"
    if rules.prefix_of == "wrong" and not rules.first and not rules.prefix_nats:
        yield "tokens.prefix_of=wrong needs a prefix: set tokens.first or tokens.prefix_nats"
    if any(rules.pass_powers) and rollouts < 2:
        yield (
            "tokens.pass_powers weighs a problem by the share of its right rollouts; set train.rollouts_per_problem to "
            f"2 or more (got {rollouts})"
        )


def _vocabulary(config: Config) -> Iterator[str]:
    name, at_sampled_token = config.divergence.plugin_name, isinstance(config.divergence, AtSampledToken)
    if at_sampled_token and config.support.side != "full":
        yield f"divergence={name} uses the sampled token only; use support=full"
    elif at_sampled_token and config.clip.kind != "none":
        yield f"divergence={name} has no divergence to clip; use clip=none"
    else:
        try:
            restrict_support(apply_clip(config.divergence, config.clip), config.support)
        except ConfigError as error:
            yield from error.problems


def _target(config: Config) -> Iterator[str]:
    target = config.target
    if target.kind != "teacher" and config.teacher.plugin_name == "none":
        yield f"target.kind={target.kind} transforms the teacher's distribution; it needs a teacher"
    if (target.kind in ("guided", "average")) != (target.other != "none"):
        yield (
            f"target.kind={target.kind} and target.other={target.other} do not go together: guided and average need "
            "free, wrong, reference_only or view, the other kinds need none; choose an option such as "
            "target=contrast_wrong"
        )
    if (target.other == "view") != (target.view is not None):
        yield (
            f"target.view is the message of target.other=view, and target.other={target.other}; give both or neither, "
            "as target=two_views does"
        )
    if target.kind == "average" and not 0 < target.weight < 1:
        yield f"target.weight is the second pass's share of target.kind=average: between 0 and 1 (got {target.weight})"
    if target.kind == "average" and (target.temperature != 1.0 or isinstance(config.teacher, Blend)):
        yield (
            "target.kind=average takes each pass as it is: it goes with neither target.temperature nor teacher=blend; "
            "use target.kind=guided with a weight between -1 and 0"
        )
    if target.kind == "barycentre" and not 0 <= target.weight <= 1:
        yield f"target.weight is the teacher's share of target.kind=barycentre: from 0 to 1 (got {target.weight})"
    if target.temperature != 1.0 and config.teacher.plugin_name == "none":
        yield "target.temperature is the teacher's; it needs a teacher"


def _off_policy(config: Config) -> Iterator[str]:
    updates, cap = config.train.updates_per_step, config.loss.importance_cap
    if updates > 1 and cap is None:
        yield (
            f"train.updates_per_step is {updates}, so the later updates are off-policy; set loss.importance_cap "
            "(2.0 is usual)"
        )
    if cap is not None and config.sampling.temperature != config.loss.temperature:
        yield (
            f"loss.importance_cap compares probabilities at one temperature; set loss.temperature (now "
            f"{config.loss.temperature}) to sampling.temperature (now {config.sampling.temperature})"
        )


def _context(config: Config) -> Iterator[str]:
    context = config.context
    yield from check_context(context, other=config.target.other, view=config.target.view)
    shown = f"{context.teacher} {context.teacher_system or ''} {context.write or ''}"
    is_sampled = any(placeholder in shown for placeholder in MADE_OF_ROLLOUTS)
    if is_sampled and isinstance(config.sampler, CompletesPrompt) and config.sampler.prompt == "teacher":
        yield (
            f"sampler.prompt=teacher completes the teacher's prompt, which context={context.name} makes of the "
            "completions; use sampler.prompt=student"
        )
    if NEEDS_SIBLING in shown and config.train.rollouts_per_problem < 2:
        yield (
            f"context={context.name} shows the teacher another rollout of the same problem; set "
            f"train.rollouts_per_problem to 2 or more (got {config.train.rollouts_per_problem})"
        )
    if context.verdicts == "majority" and config.train.rollouts_per_problem < 3:
        yield (
            "context.verdicts=majority takes what most rollouts of a problem answer; set "
            f"train.rollouts_per_problem to 3 or more (got {config.train.rollouts_per_problem})"
        )
    if context.verdicts == "none":
        for name in _rules_by_verdict(config):
            yield (
                f"{name} needs to know which rollouts are right, and context.verdicts=none judges nothing; use "
                "context.verdicts=reference or majority"
            )


def _rules_by_verdict(config: Config) -> Iterator[str]:
    """The settings that ask which rollouts are right."""
    rules, divergence = config.tokens, config.divergence
    if rules.keep != "all":
        yield f"tokens.keep={rules.keep}"
    if rules.prefix_of == "wrong":
        yield "tokens.prefix_of=wrong"
    if any(rules.pass_powers):
        yield "tokens.pass_powers"
    if rules.gate == "right_answer":
        yield "tokens.gate=right_answer"
    if isinstance(divergence, Routed) and divergence.by == "right_answer":
        yield "divergence.by=right_answer"


def _solutions(config: Config) -> Iterator[str]:
    dataset, context, sampler = config.dataset, config.context, config.sampler
    if not isinstance(dataset, Jsonl | Hub) or dataset.solution_field is not None:
        return
    wanting = {
        f"context={context.name} shows the teacher {{{{solution}}}}": "{{solution}}"
        in f"{context.teacher} {context.teacher_system or ''}",
        "context.write asks the policy with {{solution}}": "{{solution}}" in (context.write or ""),
        "target.view shows the teacher {{solution}}": "{{solution}}" in (config.target.view or ""),
        f"sampler={sampler.plugin_name} takes the reference solution as completion": isinstance(sampler, DatasetSampler)
        or (isinstance(sampler, StaticSampler | VllmSampler) and sampler.dataset_share > 0),
    }
    for reason in (reason for reason, is_wanting in wanting.items() if is_wanting):
        yield (
            f"{reason}, and dataset.solution_field=null gives none; name their column, or use context=answer_only or "
            "context=none with sampler=static"
        )


def _vllm(config: Config) -> Iterator[str]:
    sampler = config.sampler
    if not isinstance(sampler, VllmSampler):
        return
    if reason := why_not_vllm():
        yield f"sampler={config.sampler.plugin_name} {reason}"
    needed = config.prompts.max_tokens + config.sampling.max_completion_tokens
    if needed > sampler.max_positions:
        yield (
            f"sampler.max_positions is {sampler.max_positions}, but prompts.max_tokens and "
            f"sampling.max_completion_tokens make {needed}; raise it to {needed}"
        )


def _separate(config: Config) -> Iterator[str]:
    sampler = config.sampler
    if not isinstance(sampler, StaticSampler | VllmSampler):
        return
    if sampler.placement == "shared":
        if sampler.lag:
            yield "sampler.lag=1 draws while ranks learn, which needs devices of its own: sampler.placement=separate"
        if sampler.processes > 1:
            yield (
                f"sampler.processes={sampler.processes} are processes beside the ranks: set "
                "sampler.placement=separate, or sampler.processes=1"
            )
        return
    if config.launcher.plugin_name != "local":
        yield (
            f"sampler.placement=separate starts processes beside the ranks, and launcher={config.launcher.plugin_name} "
            "leaves them no devices; use launcher=local, or sampler.placement=shared"
        )
    if isinstance(sampler, VllmSampler) and sampler.tensor_parallel > 1:
        yield (
            f"sampler.tensor_parallel={sampler.tensor_parallel} makes ranks hold an engine together, and "
            "sampler.placement=separate draws in processes that are each alone on a GPU; use sampler.placement=shared "
            "(sampler=vllm), or sampler.tensor_parallel=1"
        )
    if config.model.quantize != "none" and isinstance(sampler, StaticSampler):
        yield (
            f"model.quantize={config.model.quantize} packs weights, and sampler.placement=separate hands over whole "
            "ones; use sampler.placement=shared"
        )


def _quantize(config: Config) -> Iterator[str]:
    if config.model.quantize == "none":
        return
    if find_spec("bitsandbytes") is None:
        yield (
            "model.quantize=4bit needs bitsandbytes, which is not installed: pip install 'opsd-cli[quantize]', or use "
            "model.quantize=none"
        )
    if config.lora.rank == 0:
        yield "model.quantize=4bit freezes the weights, so an adapter must be trained: use lora=r16 (got lora.rank=0)"
    if config.zero.stage == 3:
        yield "model.quantize=4bit packs weights, which cannot be sharded: use zero=stage2 (got zero.stage=3)"
    if isinstance(config.teacher, Ema):
        name = config.teacher.plugin_name
        yield f"teacher={name} averages whole weights, which model.quantize=4bit has not; use teacher=initial or live"
    if isinstance(config.sampler, VllmSampler):
        name = config.sampler.plugin_name
        yield f"sampler={name} is given whole weights, which model.quantize=4bit has not; use sampler=static"


def _ranks(config: Config, ranks: int) -> Iterator[str]:
    yield from _recovery(config, ranks)
    yield from _held_together(config, ranks)
    per_node = config.zero.hpz_ranks
    if ranks % per_node:
        yield (
            f"zero.hpz_ranks is the number of ranks of one node, so it divides that of all ranks; it is {per_node} and "
            f"there are {ranks}; set it to the GPUs of one node, or use zero=stage3"
        )


def _held_together(config: Config, ranks: int) -> Iterator[str]:
    if not isinstance(config.sampler, VllmSampler) or config.sampler.placement == "separate":
        return
    count, launcher = config.sampler.tensor_parallel, config.launcher
    if ranks % count:
        yield (
            f"sampler.tensor_parallel={count} makes {count} ranks hold one vLLM engine, so it divides the number of "
            f"ranks, which is {ranks}; set it to a divisor of {ranks}, or use a multiple of {count} ranks"
        )
    elif isinstance(launcher, PlacesRanks) and launcher.ranks_per_node % count:
        yield (
            f"sampler.tensor_parallel={count} makes {count} ranks of one machine hold one vLLM engine, and "
            f"launcher.ranks_per_node={launcher.ranks_per_node} leaves some without neighbours; set that to a "
            f"multiple of {count}"
        )


def _recovery(config: Config, ranks: int) -> Iterator[str]:
    if not config.train.halve_on_oom or ranks == 1:
        return
    teacher = config.teacher
    sharded = ["zero.stage=3"] if config.zero.stage == 3 else []
    if isinstance(teacher, External) and teacher.placement != "replicated":
        sharded.append(f"teacher.placement={teacher.placement}")
    if sharded:
        yield (
            f"train.halve_on_oom=true cannot work with {' and '.join(sharded)} on {ranks} ranks: a rank that runs "
            "out of memory leaves the others waiting for its part of the weights; use zero=stage2, or "
            "train.halve_on_oom=false and a smaller train.micro_batch_tokens"
        )
