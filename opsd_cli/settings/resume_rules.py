"""Which settings make a run that run, and which may change when it is continued. Pure; owns the list."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

MAY_CHANGE = (
    "train.steps",
    "train.micro_batch_tokens",
    "train.gradient_checkpointing",
    "train.halve_on_oom",
    "loss.chunk_mib",
    "zero.bucket_mib",
    "eval.every",
    "eval.max_rows",
    "eval.cache_tokens",
    "checkpoint.every",
    "checkpoint.keep_last",
    "samples.every",
    "samples.count",
    "guard.nonfinite_patience",
    "launcher.*",
)
"""Keys a resumed run accepts: how far, how often, how much at once, on what. Everything else is the run
itself.
"""

NOT_COMPARED = ("run.root", "run.name", "launcher.name")
"""Keys that a resume cannot change either, though they change no number: where the folder stands, how ranks start."""


LATER = {"loss.logits_dtype": "auto"}
"""Settings that earlier versions did not have, with the value that is what they did: for the runs they made."""


def with_later(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity, with what the version that stored it did where it had no setting."""
    return {**LATER, **identity}


def may_change(key: str) -> bool:
    """Whether a dotted key may change between a run and its continuation."""
    section, _, field = key.partition(".")
    return key in MAY_CHANGE or (f"{section}.*" in MAY_CHANGE and field != "name")


def identity_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of a plain tree that a continuation must share, by dotted key, as JSON reads it back."""
    kept = {key: value for key, value in _leaves(tree) if not may_change(key) and key not in NOT_COMPARED}
    plain: dict[str, Any] = json.loads(json.dumps(kept, sort_keys=True))
    return plain


def identity_hash(identity: Mapping[str, Any]) -> str:
    """The sha256 of an identity."""
    return hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()


def changed_keys(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys in which two identities differ, each as "key (old -> new)"."""
    keys = sorted(key for key in {*was, *now} if was.get(key) != now.get(key))
    return [f"{key} ({was.get(key)!r} -> {now.get(key)!r})" for key in keys]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
