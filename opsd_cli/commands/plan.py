"""`opsd plan`: memory and time of a recipe before anything is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from opsd_cli.commands.flags import Flags
from opsd_cli.settings.errors import ConfigError, ExitCode
from opsd_cli.settings.recipe_files import find_folders
from opsd_cli.settings.registry import SetsRanks

if TYPE_CHECKING:
    from opsd_cli.insight.plan import Growth, Plan
    from opsd_cli.insight.plan_setup import Device
    from opsd_cli.settings.config import Config

HELP = """\
opsd plan recipe=gsm8k                       memory and time on this machine, before anything is loaded
opsd plan recipe=gsm8k --device h100         ... on a card of that name; exit code 2 where it does not fit
opsd plan recipe=gsm8k --device dgx_h100 --ranks 16      ... on two machines of a cluster
opsd plan recipe=gsm8k --device l4 lora=none             which keys to change where it does not fit
opsd plan recipe=gsm8k --device h100 --scale             1 to 1,024 ranks at ZeRO stages 1 to 3
opsd plan --devices                          the cards and clusters it knows, and where their figures are from

KEY=VALUE                  as for opsd train
--device NAME              a card or a cluster; without it this machine's GPU, or its CPU (--device cpu)
--ranks N                  how many (default: launcher.ranks, else the GPUs that are here, else 1)
--prompt-tokens N          of the student's prompt (default: as long as the recipe allows, prompts.max_tokens)
--teacher-prompt-tokens N  of the teacher's (default: twice the student's)
--completion-tokens N      of a completion (default: sampling.max_completion_tokens)
--json                     everything, for programs
--recipes DIR, --plugin FILE    as for opsd train

exit codes: 0 it fits, 2 it does not
"""


def main(arguments: list[str]) -> int:
    """Run `opsd plan ...`. Raises ConfigError, DataError, OutsideError."""
    flags = Flags("plan")
    for name in ("--device", "--recipes", "--config-dir"):
        flags.add_argument(name)
    for name in ("--ranks", "--prompt-tokens", "--teacher-prompt-tokens", "--completion-tokens"):
        flags.add_argument(name, type=int)
    for name in ("--devices", "--json", "--scale"):
        flags.add_argument(name, action="store_true")
    given = flags.read(arguments)
    if given.devices:
        if len(arguments) > 1:
            raise ConfigError("--devices lists what is known and takes nothing else")
        print("\n".join(_device_lines()))
        return ExitCode.DONE
    for name in ("ranks", "prompt_tokens", "teacher_prompt_tokens", "completion_tokens"):
        if vars(given)[name] is not None and vars(given)[name] < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {vars(given)[name]}, and must be at least 1")

    from opsd_cli.insight.plan import make_plan
    from opsd_cli.insight.plan_setup import Lengths
    from opsd_cli.preflight import check

    _, (member,) = check(given.words, find_folders(given.recipes, given.config_dir))
    config = member.config
    device, count = _device(given.device, config)
    launcher = config.launcher
    ranks = given.ranks or (launcher.ranks if isinstance(launcher, SetsRanks) else None) or count
    lengths = Lengths(given.prompt_tokens, given.teacher_prompt_tokens, given.completion_tokens)
    plan = make_plan(config, device, ranks=ranks, lengths=lengths, threads=_threads(config, ranks))
    print(json.dumps(_as_json(plan), indent=1) if given.json else "\n".join(_lines(plan, scale=given.scale)))
    return ExitCode.DONE if plan.fits else ExitCode.CHANGE_SOMETHING


def _device(name: str | None, config: Config) -> tuple[Device, int]:
    """The device that is named, or the one that is here, and how many of it. Raises ConfigError for an unknown name."""
    from opsd_cli.insight.plan_setup import Device, this_cpu
    from opsd_cli.launch.devices import present_cards
    from opsd_cli.settings.known_devices import named, recognise

    if name is not None and name != "cpu":
        card, cluster = named(name)
        return Device(card.title, card.memory_gib, card, cluster), 1
    wants_cpu = name == "cpu" or config.launcher.device == "cpu"
    if not wants_cpu and (cards := present_cards(os.environ)):
        title, memory = cards[0]
        return Device(title, memory, recognise(title)), len(cards)
    return this_cpu(), 1


def _threads(config: Config, ranks: int) -> int:
    from opsd_cli.launch.rank_environ import usable_cores

    return config.launcher.threads or max(1, usable_cores() // ranks)


# What is printed -----------------------------------------------------------------------------------------------------

NAMES = {
    "weights": "weights", "optimizer": "optimizer", "gradients": "gradients", "teacher": "teacher's weights",
    "activations": "activations", "loss": "loss, both roles' logits of a chunk", "cache": "key-value cache",
    "decoder": "decoder's copies of weights", "bucket": "DeepSpeed's buffers", "gathered": "weights gathered by ZeRO-3",
    "process": "the process",
}  # fmt: skip


def _lines(plan: Plan, *, scale: bool) -> list[str]:
    from opsd_cli.insight.plan import growth_of

    lines = [*_head(plan), "", *_memory_lines(plan), "", *_verdict(plan), "", *_beside(plan)]
    if scale:
        lines += ["", *_scale_lines(plan, growth_of(plan))]
    return [*lines, *(f"note: {note}" for note in plan.notes)]


def _head(plan: Plan) -> list[str]:
    shape, setup = plan.model.shape, plan.setup
    trained = f"{setup.trained:,} in adapters are trained" if setup.trained else "all are trained"
    prompt, teacher, completion = plan.lengths
    ranks = f"{setup.ranks} rank{'s' * (setup.ranks > 1)}"
    stage = "" if setup.sharding == setup.stage else f" (run as stage {setup.sharding})"
    return [
        f"model: {plan.model.source}: {shape.parameters:,} weights, {trained}",
        f"device: {plan.device.name}, {plan.device.memory_gib:.1f} GiB; {ranks} at ZeRO stage {setup.stage}{stage}, "
        f"{plan.precision}",
        f"rows: {plan.work.rows} a rank and step, student {prompt:,} + {completion:,} tokens, teacher {teacher:,} + "
        f"{completion:,}; {plan.work.micro_batches} micro-batch{'es' * (plan.work.micro_batches > 1)}",
    ]


def _memory_lines(plan: Plan) -> list[str]:
    """A line for each kind of thing, a column for each phase, GiB."""
    from opsd_cli.ui.columns import aligned

    phases = plan.memory.phases
    held = [name for name in NAMES if any(phase.parts.get(name, 0) > 0 for phase in phases)]
    rows = [{"GiB of a rank": NAMES[name], **{p.name: _gib(p.parts.get(name, 0)) for p in phases}} for name in held]
    rows.append({"GiB of a rank": "together", **{p.name: _gib(p.total) for p in phases}})
    lines = aligned(rows)
    if plan.memory.host:
        parts = ", ".join(f"{NAMES[name]} {_gib(size)}" for name, size in plan.memory.host.items())
        lines.append(f"in host memory, for each rank: {parts} GiB")
    if plan.time is not None:
        lines += ["", *_time_lines(plan)]
    return lines


def _time_lines(plan: Plan) -> list[str]:
    from opsd_cli.insight.plan import seconds_in_words as words

    time = plan.time
    assert time is not None, "asked for where a time is known"
    links = "" if plan.setup.ranks == 1 else f", links {'not known' if time.links is None else words(time.links)}"
    return [
        f"a step: about {words(time.total)} (drawing {words(time.drawing)}, teacher {words(time.teacher)}, student "
        f"{words(time.student)}, update {words(time.update)}{links})",
        f"{plan.steps:,} steps without evaluations: about {words(time.total * plan.steps)}",
    ]


def _verdict(plan: Plan) -> list[str]:
    from opsd_cli.insight.plan import largest_micro_batch, what_to_change

    peak, largest = plan.memory.peak.total, largest_micro_batch(plan)
    room = f"{_gib(peak)} GiB at the peak of {_gib(plan.room)} that can be used"
    if plan.fits:
        assert largest is not None, "what fits has rows"
        whole = " (all rows of a step at once)" if largest >= plan.work.rows * plan.row else ""
        return [f"fits: {room}; the largest micro-batch that does: train.micro_batch_tokens={largest}{whole}"]
    lines = [f"does not fit: {room}"]
    if largest is not None:
        lines.append(f"  train.micro_batch_tokens={largest}: fits")
    for words, size in what_to_change(plan):
        lines.append(f"  {words}: {_gib(size)} GiB, {'fits' if size <= plan.room else 'not enough alone'}")
    return lines


def _beside(plan: Plan) -> list[str]:
    """The same recipe with a second model as teacher."""
    from opsd_cli.insight.plan import beside_second_model

    found = beside_second_model(plan)
    if not found:
        return ["no teacher: nothing to compare with distillation from a second model"]
    parts = [f"{times}x: {_gib(peak)} GiB, of which this recipe saves {saved:.0%}" for times, peak, saved in found]
    return [
        "OPD, the same with a second model as teacher, by its weights as a multiple:",
        *(f"  {part}" for part in parts),
    ]


def _scale_lines(plan: Plan, found: list[Growth]) -> list[str]:
    from opsd_cli.insight.plan import seconds_in_words
    from opsd_cli.ui.columns import aligned

    cells: dict[int, dict[str, str]] = {}
    for one in found:
        row = cells.setdefault(one.ranks, {"ranks": f"{one.ranks:,}"})
        row[f"ZeRO {one.stage}, GiB"] = _gib(one.peak) + ("" if one.fits else " no")
        row[f"step {one.stage}"] = "?" if one.seconds is None else seconds_in_words(one.seconds)
    names = list(next(iter(cells.values())))
    head = "the same rows on each of more ranks (so train.problems_per_step grows with them):"
    lines = [head, *aligned([{name: row[name] for name in names} for row in cells.values()])]
    if plan.setup.bytes == 2:
        lines.append("in half precision stage 1 is run as stage 2")
    if any(one.seconds is None for one in found):
        lines.append("?: the rate between machines is not known; name a cluster (opsd plan --devices)")
    return lines


def _device_lines() -> list[str]:
    from opsd_cli.settings.known_devices import CARDS, CLUSTERS
    from opsd_cli.ui.columns import aligned, terminal_width

    cards = [
        {
            "card": card.name, "": card.title, "GiB": f"{card.memory_gib:.1f}", "TFLOP/s half": f"{card.half_tflops:g}",
            "fp32": f"{card.float32_tflops:g}", "GB/s": f"{card.memory_gb_s:,.0f}", "link GB/s": f"{card.link_gb_s:g}",
            "from": card.source,
        }
        for card in CARDS.values()
    ]  # fmt: skip
    clusters = [
        {
            "cluster": one.name, "machine": f"{one.cards} x {one.card}", "network GB/s a card": f"{one.network_gb_s:g}",
            "from": one.source,
        }
        for one in CLUSTERS.values()
    ]  # fmt: skip
    width = terminal_width()
    least = ("from", "link GB/s", "fp32")
    return [*aligned(cards, least=least, width=width), "", *aligned(clusters, least=("from",), width=width)]


def _gib(size: float) -> str:
    gib = size / 2**30
    return "-" if gib == 0 else f"{gib:.2f}" if gib >= 0.1 else f"{gib:.3f}"


def _as_json(plan: Plan) -> Mapping[str, Any]:
    from dataclasses import asdict

    from opsd_cli.insight.plan import beside_second_model, growth_of, largest_micro_batch, what_to_change

    setup, shape = plan.setup, plan.model.shape
    return {
        "model": {"source": plan.model.source, "parameters": shape.parameters, "trained": setup.learns},
        "device": {"name": plan.device.name, "memory_gib": plan.device.memory_gib, "usable_bytes": plan.room},
        "ranks": setup.ranks,
        "stage": setup.sharding,
        "dtype": plan.precision,
        "rows": asdict(setup.rows) | {"micro_batches": plan.work.micro_batches, "a_step": plan.work.rows},
        "phases": {phase.name: dict(phase.parts) for phase in plan.memory.phases},
        "host": dict(plan.memory.host),
        "peak_bytes": plan.memory.peak.total,
        "peak_phase": plan.memory.peak.name,
        "fits": plan.fits,
        "largest_micro_batch_tokens": largest_micro_batch(plan),
        "changes": [{"words": words, "peak_bytes": size} for words, size in what_to_change(plan)],
        "second_model": [
            {"times": times, "peak_bytes": peak, "saved": saved} for times, peak, saved in beside_second_model(plan)
        ],
        "seconds": None if plan.time is None else asdict(plan.time) | {"total": plan.time.total},
        "scale": [asdict(one) for one in growth_of(plan)],
        "notes": list(plan.notes),
    }
