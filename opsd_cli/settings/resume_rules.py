"""Which settings define a run, and which may change when it is resumed."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.registry import did_you_mean
from opsd_cli.settings.trees import leaves

MAY_CHANGE = (
    "train.steps",
    "train.seconds",
    "train.micro_batch_tokens",
    "train.share_prompts",
    "train.gradient_checkpointing",
    "train.offload_activations",
    "train.mlp_tiles",
    "train.halve_on_oom",
    "loss.chunk_mib",
    "zero.*",
    "eval.every",
    "eval.max_rows",
    "eval.cache_tokens",
    "model.export_dtype",
    "checkpoint.every",
    "checkpoint.keep_last",
    "samples.every",
    "samples.count",
    "guard.nonfinite_patience",
    "launcher.*",
    "track.*",
    "expected.*",
)
"""Keys that a resume may change: how far, how often, how much at once, on what, sharded how. The others define the
run."""

NOT_COMPARED = ("run.root", "run.name", "launcher.name")
"""Keys that a resume cannot change either, though they change no number: where the folder is, how ranks start."""

LATER: dict[str, Any] = {
    **{"train.offload_activations": False, "train.mlp_tiles": 1, "optim.state_dtype": "float32"},
    **{"zero.hpz_ranks": 1, "zero.overlap": False, "zero.persist_below": 0, "zero.gather": "auto"},
    **{"train.share_prompts": False},
    **{"loss.logits_dtype": "auto", "eval.top_p": 1.0, "eval.top_k": 0},
    **{"model.dropout": True, "model.export_dtype": "weights", "model.quantize": "none"},
    **{"prompts.control_tokens": "refuse", "prompts.date": None},
    **{"track.to": "none", "track.project": "opsd"},
    **{"loss.reduction": "token", "target.temperature": 1.0, "target.view": None, "guard.entropy_gap": 1.0},
    **{"tokens.first": 0, "tokens.prefix_nats": 0.0, "tokens.prefix_of": "all", "tokens.pass_powers": [0.0, 0.0]},
    **{"tokens.gate_width": 0.0, "tokens.gate_low": 0.0, "tokens.gate_high": 1.0},
    **{"prompts.student_variables": [], "prompts.teacher_variables": []},
    **{"context.for_both": [], "context.sibling": "correct", "context.verdicts": "reference"},
    **{"train.seconds": None, "context.write": None, "context.write_tokens": 256},
    **{"eval.samples": 1, "eval.second_grader": None, "model.checkpoint": None},
    **{"grader.name": "reference", "token_rule.name": "none"},
    **{"expected.figures": [], "expected.problems": None, "expected.version": None, "expected.model": None},
    **{"expected.dataset": None, "expected.source": None},
}
"""Settings that an identity or a config stored by an earlier version lacks, with the value that does what it did."""
DRAWN = ("static", "vllm")
LATER_OF: dict[str, tuple[tuple[str, ...], Any]] = {
    "dataset.max_bad_share": (("hub", "jsonl"), 0.0),
    "launcher.lost_seconds": (("deepspeed",), 30.0),
    **{"sampler.placement": (DRAWN, "shared"), "sampler.processes": (DRAWN, 1), "sampler.lag": (DRAWN, 0)},
    "sampler.tensor_parallel": (("vllm",), 1),
}
"""The same for a key that only some plug-ins of a section have."""


def later(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What settings by dotted key, stored by an earlier version, may lack."""
    chosen = {
        key: value for key, (names, value) in LATER_OF.items() if settings.get(f"{key.partition('.')[0]}.name") in names
    }
    return LATER | chosen


def may_change(key: str) -> bool:
    """Whether a dotted key may change on a resume."""
    section, _, field = key.partition(".")
    return key in MAY_CHANGE or (f"{section}.*" in MAY_CHANGE and field != "name")


def identity_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of a plain tree that a resume must share, by dotted key, as JSON reads it back."""
    kept = {key: value for key, value in leaves(tree) if not may_change(key) and key not in NOT_COMPARED}
    return dict(json.loads(json.dumps(kept, sort_keys=True)))


def identity_hash(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()


def changed_keys(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys in which two identities differ, each as "key (old -> new)"; none of those that a resume may change."""
    keys = sorted(key for key in {*was, *now} if was.get(key) != now.get(key) and not may_change(key))
    return [f"{key} ({was.get(key)!r} -> {now.get(key)!r})" for key in keys]


def apply_changes(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a frozen tree with dotted keys replaced. Raises ConfigError with every key that may not change."""
    changed = copy.deepcopy(dict(tree))
    problems: list[str] = []
    for key, value in changes.items():
        section, _, field = key.partition(".")
        if not isinstance(changed.get(section), dict) or field not in changed[section]:
            keys = [f"{name}.{inner}" for name, node in tree.items() if isinstance(node, dict) for inner in node]
            problems.append(f"unknown key {key!r}{did_you_mean(key, keys)}")
        elif (before := changed[section][field]) != value:
            changed[section][field] = value
            if not may_change(key):
                problems.append(
                    f"{key} was {before!r} when the run began and cannot become {value!r} on a resume: that would "
                    f"change the run's identity; start a new run, or change only {', '.join(MAY_CHANGE)}"
                )
            elif key in ("train.steps", "train.seconds") and (schedule := tree["optim"]["schedule"]) != "constant":
                problems.append(
                    f"{key} cannot change from {before} to {value} on a resume: with optim.schedule={schedule} "
                    "the learning rate depends on it; start a new run"
                )
    if problems:
        raise ConfigError(*problems)
    return changed
