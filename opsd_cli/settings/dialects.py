"""What the parts of a method are called in other frameworks. Owns one table, read from their sources in November 2026
(the versions stand in FRAMEWORKS); `opsd recipes show METHOD` and docs/methods.md print it. Changes no setting.

A cell is the words to type there, "" where nothing need be typed (its default, or none of its business), or None where
the framework has no such setting.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Tree = Mapping[str, Mapping[str, Any]]

FRAMEWORKS = (
    "TRL 1.16",
    "authors' code",
    "verl (distillation.*)",
    "ms-swift 4.6",
    "Liger 0.8",
)
"""In the order of a row's cells. The authors' code is siyan-zhao/OPSD; verl as of 2026-08-22."""

SAMPLED_TOKEN = ("sampled_token", "cross_entropy")
"""Divergences that look at the sampled token alone: no framework asks for their part of the vocabulary."""

WIDTH = 120


@dataclass(frozen=True)
class Row:
    """One part of a method. It applies where all of `where` holds in the section and not all of `unless` does, and is
    not asked for by the divergences of `not_with`."""

    section: str
    where: Mapping[str, Any]
    cells: tuple[str | None, str | None, str | None, str | None, str | None]
    unless: Mapping[str, Any] = field(default_factory=dict)
    not_with: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """What opsd calls it: `divergence=jsd`, `support.side=teacher support.rest=tail`, `tokens.ramp`."""
        if self.unless:
            return " ".join(f"{self.section}.{key}" for key in self.unless)
        if "name" in self.where and len(self.where) == 1:
            return f"{self.section}={self.where['name']}"
        pairs = (f"{key}={value}".replace("True", "true") for key, value in self.where.items() if key != "name")
        return " ".join(f"{self.section}.{pair}" for pair in pairs)

    def applies(self, tree: Tree) -> bool:
        values = tree[self.section]
        is_met = all(values.get(key) == wanted for key, wanted in self.where.items())
        is_plain = bool(self.unless) and all(values.get(key) == value for key, value in self.unless.items())
        return is_met and not is_plain and tree["divergence"]["name"] not in self.not_with


ROWS = (
    Row(
        "divergence",
        {"name": "forward_kl"},
        (
            "distillation_alpha=0.0",
            "--beta 0",
            "distillation_loss.loss_mode=forward_kl_topk",
            "--rlhf_type gkd --beta 0",
            "LigerFusedLinearJSD(jsd_beta=0.0)",
        ),
    ),
    Row(
        "divergence",
        {"name": "reverse_kl"},
        ("distillation_alpha=1.0", "--beta 1", None, "--rlhf_type gkd --beta 1", "LigerFusedLinearJSD(jsd_beta=1.0)"),
    ),
    Row(
        "divergence",
        {"name": "jsd"},
        (
            "distillation_alpha={beta}",
            "--beta {beta}",
            None,
            "--rlhf_type gkd --beta {beta}",
            "LigerFusedLinearJSD(jsd_beta={beta})",
        ),
    ),
    Row("divergence", {"name": "jsd", "normalize": True}, (None,) * 5),
    Row("divergence", {"name": "skew_forward_kl"}, (None,) * 5),
    Row("divergence", {"name": "skew_reverse_kl"}, (None,) * 5),
    Row("divergence", {"name": "total_variation"}, (None, None, None, None, "LigerTVDLoss()")),
    Row(
        "divergence",
        {"name": "sampled_token"},
        (
            "distillation_mode=sampled_token distillation_alpha=1.0",
            "--use_tinker_loss",
            "distillation_loss.loss_mode=k1 distillation_loss.use_policy_gradient=true",
            "--rlhf_type grpo",
            None,
        ),
    ),
    Row(
        "divergence",
        {"name": "cross_entropy"},
        (
            "SFTTrainer instead",
            "sft_train.py instead",
            "its SFT trainer instead",
            "swift sft instead",
            "LigerFusedLinearCrossEntropyLoss",
        ),
    ),
    Row(
        "teacher",
        {"name": "initial"},
        (
            "teacher_model_kind=base",
            "--fixed_teacher --use_peft",
            "teacher_models.teacher_model.model_path=(the student's)",
            "--teacher_model (the student's) --tuner_type lora",
            "",
        ),
    ),
    Row(
        "teacher",
        {"name": "live"},
        ("teacher_model_kind=live", "(no --fixed_teacher)", None, "(no --teacher_model)", ""),
    ),
    Row(
        "teacher",
        {"name": "ema"},
        (
            "teacher_model_kind=ema teacher_update_rate={rate}",
            "--use_ema_teacher --ema_decay {decay}",
            None,
            None,
            "",
        ),
    ),
    Row(
        "teacher",
        {"name": "sync"},
        ("teacher_model_kind=ema teacher_update_rate=1.0 teacher_sync_steps={every}", None, None, None, ""),
    ),
    Row("teacher", {"name": "blend"}, (None, None, None, None, "")),
    Row(
        "teacher",
        {"name": "external"},
        (
            "teacher_model_name_or_path=PATH (GKDConfig: beta for distillation_alpha, no distillation_mode)",
            None,
            "teacher_models.teacher_model.model_path=PATH",
            "--teacher_model PATH",
            "",
        ),
    ),
    Row(
        "sampler",
        {"name": "static", "prompt": "student", "dataset_share": 0.0},
        ("", "--lmbda 1", "", "--lmbda 1", ""),
    ),
    Row(
        "sampler",
        {"name": "static", "prompt": "student"},
        ("lmbda={on_policy}", "--lmbda {on_policy}", None, "--lmbda {on_policy}", ""),
        unless={"dataset_share": 0.0},
    ),
    Row(
        "sampler",
        {"name": "static", "prompt": "teacher"},
        ("generate_from_teacher=true", None, None, None, ""),
    ),
    Row(
        "sampler",
        {"name": "dataset"},
        ("lmbda=0.0 (GKDConfig)", "--lmbda 0", None, "--lmbda 0", ""),
        not_with=("cross_entropy",),
    ),
    Row(
        "support",
        {"side": "full"},
        ("distillation_mode=full_logits", "", None, "", ""),
        not_with=SAMPLED_TOKEN,
    ),
    Row(
        "support",
        {"side": "student", "rest": "renormalise"},
        ("distillation_mode=topk_logits distillation_topk={k}", None, None, None, None),
    ),
    Row(
        "support",
        {"side": "student", "rest": "tail"},
        (
            "distillation_mode=topk_logits distillation_topk={k} distillation_add_tail=true",
            None,
            None,
            None,
            None,
        ),
    ),
    Row("support", {"side": "student", "rest": "drop"}, (None,) * 5),
    Row(
        "support",
        {"side": "teacher", "rest": "renormalise"},
        (None, "--top_k_loss {k}", None, "--gkd_logits_topk {k}", None),
    ),
    Row("support", {"side": "teacher", "rest": "tail"}, (None,) * 5),
    Row("support", {"side": "teacher", "rest": "drop"}, (None, None, "distillation_loss.topk={k}", None, None)),
    Row("support", {"side": "union"}, (None,) * 5),
    Row("clip", {"kind": "entry"}, (None, "--jsd_token_clip {limit}", None, None, None)),
    Row("clip", {"kind": "neutral"}, (None,) * 5),
    Row("clip", {"kind": "token"}, (None,) * 5),
    Row("target", {"kind": "barycentre"}, (None,) * 5),
    Row("target", {"kind": "guided"}, (None,) * 5),
    Row(
        "tokens",
        {},
        ("num_loss_tokens_to_skip={skip_first}", None, None, None, ""),
        unless={"skip_first": 0},
    ),
    Row("tokens", {}, (None,) * 5, unless={"ramp": 0.0}),
    Row("tokens", {"skip_special": True}, (None,) * 5),
    Row("tokens", {}, (None,) * 5, unless={"keep": "all"}),
    Row("tokens", {}, (None,) * 5, unless={"gate": "none"}),
)
"""Everything a method may be made of, but its context: that is a text, and no framework's is another's."""


PLACEHOLDERS = ("beta", "rate", "decay", "every", "on_policy", "k", "limit", "skip_first")


def dialect_lines(tree: Tree) -> list[str]:
    """The parts of a composed method in the words of every framework, as comment lines of at most WIDTH."""
    rows = [row for row in ROWS if row.applies(tree)]
    numbers = _numbers(tree)
    wide = max(map(len, FRAMEWORKS))
    lines = ["# The same in other frameworks (docs/methods.md); the teacher's prompt is written differently in each:"]
    for place, framework in enumerate(FRAMEWORKS):
        said = [cell.format_map(numbers) for row in rows if (cell := row.cells[place])]
        missing = [row.title for row in rows if row.cells[place] is None]
        said += [f"[has no {', '.join(missing)}]"] if missing else []
        lines += textwrap.wrap(
            "; ".join(said) or "-",
            WIDTH,
            initial_indent=f"#   {framework:<{wide}}  ",
            subsequent_indent="#   " + " " * (wide + 2),
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def _numbers(tree: Tree) -> dict[str, Any]:
    """What the placeholders of the cells stand for in a composed method."""
    found: dict[str, Any] = {}
    for section in ("divergence", "teacher", "sampler", "support", "clip", "tokens"):
        found |= tree[section]
    found["decay"] = f"{1 - found.get('rate', 0):g}"
    found["on_policy"] = f"{1 - found.get('dataset_share', 0):g}"
    return found


def table() -> Iterator[tuple[str, ...]]:
    """The whole table, head first, for docs/methods.md: `-` for nothing to type, `no` for no such setting."""
    names = {name: name.upper() for name in PLACEHOLDERS}
    yield ("opsd", *FRAMEWORKS)
    for row in ROWS:
        yield (row.title, *("no" if cell is None else cell.format_map(names) or "-" for cell in row.cells))
