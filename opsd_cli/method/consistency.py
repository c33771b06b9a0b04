"""Combinations of a method's parts that make no sense, each with the reason. Owns nothing else; torch-free, so that a
command line is refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from opsd_cli.data.contexts import check_context
from opsd_cli.method.clip import clipped
from opsd_cli.method.support import supported
from opsd_cli.settings.errors import ConfigError

if TYPE_CHECKING:
    from opsd_cli.settings.config import Config

AT_THE_SAMPLED_TOKEN = ("sampled_token", "cross_entropy")
NEEDS_SIBLING, NEEDS_FEEDBACK = "{{sibling}}", "{{feedback}}"


def method_contradictions(config: Config) -> list[str]:
    """Every problem, one line each."""
    checks = (_teacher_and_divergence, _vocabulary, _target, _tokens, _off_policy, _context)
    return [problem for check in checks for problem in check(config)]


def _teacher_and_divergence(config: Config) -> Iterator[str]:
    divergence, teacher = config.divergence.plugin_name, config.teacher.plugin_name
    if config.divergence.needs_teacher and teacher == "none":
        yield f"divergence={divergence} needs a teacher; use teacher=initial"
    if teacher == "external" and config.teacher.path is None:
        yield f"teacher=external needs a model: teacher.path=PATH, one with the tokenizer of {config.model.path}"
    if not config.divergence.needs_teacher and teacher != "none":
        yield f"divergence={divergence} does not look at a teacher: teacher={teacher} would be wasted; use teacher=none"


def _vocabulary(config: Config) -> Iterator[str]:
    name = config.divergence.plugin_name
    if name in AT_THE_SAMPLED_TOKEN and config.support.side != "full":
        yield f"divergence={name} looks at the sampled token alone; use support=full"
    elif name in AT_THE_SAMPLED_TOKEN and config.clip.kind != "none":
        yield f"divergence={name} has no divergence to clip; use clip=none"
    else:
        try:
            supported(clipped(config.divergence, config.clip), config.support)
        except ConfigError as error:
            yield from error.problems


def _target(config: Config) -> Iterator[str]:
    target = config.target
    if target.kind != "teacher" and config.teacher.plugin_name == "none":
        yield f"target.kind={target.kind} transforms the teacher's distribution; it needs a teacher"
    if (target.kind == "guided") != (target.other != "none"):
        yield (
            f"target.kind={target.kind} and target.other={target.other} do not go together: guided needs free, wrong "
            "or reference_only, the other kinds need none; choose an option such as target=contrast_wrong"
        )
    if target.kind == "barycentre" and target.weight > 1:
        yield f"target.weight is the teacher's share of target.kind=barycentre: at most 1 (got {target.weight})"


def _tokens(config: Config) -> Iterator[str]:
    gate = config.tokens.gate
    if gate in ("teacher_entropy", "privilege") and config.teacher.plugin_name == "none":
        yield f"tokens.gate={gate} looks at the teacher's distribution; it needs a teacher"


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
    yield from check_context(context, other=config.target.other)
    shown = f"{context.teacher} {context.teacher_system or ''}"
    is_sampled = NEEDS_SIBLING in shown or NEEDS_FEEDBACK in shown
    if is_sampled and config.sampler.plugin_name == "static" and config.sampler.prompt == "teacher":
        yield (
            f"sampler.prompt=teacher completes the teacher's prompt, which context={context.name} makes of the "
            "completions; use sampler=static"
        )
    if NEEDS_SIBLING in shown and config.train.rollouts_per_problem < 2:
        yield (
            f"context={context.name} shows the teacher another rollout of the same problem; set "
            f"train.rollouts_per_problem to 2 or more (got {config.train.rollouts_per_problem})"
        )
