"""Plain lines for pipes, log files and terminals that cannot redraw: one event is one line of `key=value`, without
carriage returns or escape sequences."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

from opsd_cli.run.events import Event, number
from opsd_cli.safety.terminal import escape_controls
from opsd_cli.ui.theme import duration
from opsd_cli.ui.view import RunView

_STEP_KEYS = {
    "loss/objective": "loss",
    "kl/forward": "kl_forward",
    "kl/reverse": "kl_reverse",
    "agree/top1": "top1",
    "rollout/accuracy": "right",
    "rollout/length_mean": "length",
    "rollout/truncated": "cut",
    "optim/grad_norm": "grad_norm",
    "optim/lr": "lr",
    "tokens/per_second": "tokens_s",
    "time/step": "seconds",
}

_HIDDEN = {"kind", "time", "plan", "versions", "dataset_fingerprint"}


def lines_of(event: Event, view: RunView) -> Iterator[str]:
    """The lines of one event; `view` is the run's state after it."""
    seconds, kind = number(event.get("time")), event["kind"]
    stamp = iso_time(seconds if 0 <= seconds < 4e9 else 0.0)
    if kind == "step":
        facts: dict[str, Any] = {"step": f"{event['step']}/{view.steps}"}
        facts |= {key: view.metrics[name] for name, key in _STEP_KEYS.items() if name in view.metrics}
        if left := view.seconds_left():
            facts["left"] = duration(left)
        yield pairs(stamp, kind, facts)
        return
    if kind == "progress":
        at = {"at": f"{event['done']}/{event['total']}"} if event["total"] else {}
        yield pairs(stamp, kind, {"phase": event["phase"], **at})
        return
    yield pairs(stamp, kind, {key: value for key, value in event.items() if key not in _HIDDEN and value != ""})
    if kind == "run_started" and event["task"] != "check":  # a check's plan is its result
        yield from (pairs(stamp, "plan", {"line": line}) for line in event["plan"])


def pairs(stamp: str, kind: str, facts: dict[str, Any]) -> str:
    """`stamp kind key=value ...`, values with spaces quoted, numbers short."""
    return " ".join([stamp, kind, *(f"{key}={_value(value)}" for key, value in facts.items())])


def iso_time(seconds: float) -> str:
    """A unix time as ISO 8601 with its offset."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = escape_controls(value).replace("\n", "\\n").replace("\t", " ")
    return text if re.fullmatch(r"[^\s\"=]+", text) else '"' + text.replace('"', '\\"') + '"'
