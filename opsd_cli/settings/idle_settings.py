"""Settings that another one switches off: typed beside it they would be accepted and ignored, so they are refused. A
recipe may leave them where they are."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from opsd_cli.settings.config import Config


@dataclass(frozen=True)
class Switch:
    """While the setting `key` is `off`, the settings `idle` do nothing."""

    key: str
    off: Any
    idle: tuple[str, ...]
    instead: str  # what to choose


SWITCHES = (
    Switch("clip.kind", "none", ("clip.limit",), "choose clip=entry, neutral or token"),
    Switch("support.side", "full", ("support.k", "support.rest"), "choose support.side=teacher, student or union"),
    Switch("target.kind", "teacher", ("target.weight",), "choose target.kind=barycentre, guided or average"),
    Switch("tokens.gate", "none", ("tokens.gate_min",), "choose a gate, such as tokens.gate=student_entropy"),
    Switch("lora.rank", 0, ("lora.alpha", "lora.dropout", "lora.targets"), "set lora.rank, or choose lora=r16"),
    Switch("sampling.temperature", 0, ("sampling.top_p", "sampling.top_k"), "greedy takes the likeliest token"),
    Switch("eval.temperature", 0, ("eval.top_p", "eval.top_k"), "greedy takes the likeliest token; set it above 0"),
    Switch("samples.every", 0, ("samples.count",), "set samples.every"),
    Switch("context.write", None, ("context.write_tokens",), "choose one that writes, such as context=reflection"),
    Switch(
        "guard.action",
        "off",
        ("guard.window", "guard.entropy_ratio", "guard.entropy_gap", "guard.length_ratio", "guard.truncated_share",
         "guard.repeated_share", "guard.leak_share", "guard.accuracy_drop", "guard.spike_ratio"),
        "choose guard=warn or guard=stop",
    ),
)  # fmt: skip


def idle_settings(config: Config, typed: Collection[str]) -> Iterator[str]:
    """What is wrong with the settings that were typed, by dotted key, and that do nothing in this config."""
    for switch in SWITCHES:
        section, _, name = switch.key.partition(".")
        value = vars(vars(config)[section])[name]
        if value != switch.off:
            continue
        said = "null" if value is None else value
        for key in switch.idle:
            if key in typed:
                yield f"{key} does nothing with {switch.key}={said}: {switch.instead}, or leave it out"
