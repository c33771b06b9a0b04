"""`opsd eval MODEL --tasks`: standard tasks by lm-evaluation-harness, of a run's model beside the model it came from,
and beside what the run has gained."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from opsd_cli.settings.errors import ConfigError, ExitCode, display_path

ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = "bundled:"


def measure_tasks(words: Sequence[str], frozen: Mapping[str, Any] | None, name: str, given: Any) -> int:
    """Measure the model that the `words` name on the tasks, and where it is a run's (`frozen` is its config) also the
    model before training; print both."""
    if find_spec("lm_eval") is None:
        raise ConfigError("--tasks needs lm-evaluation-harness: pip install 'opsd-cli[harness]'")
    import torch

    from opsd_cli.insight.harness import against, run_tasks
    from opsd_cli.run.folder import new_run_folder

    model = _path(words)
    if model is None:
        raise ConfigError(
            "--tasks needs a whole model: name a run with its model, a folder or a hub id (of a checkpoint or an "
            "adapter: `opsd export RUN OUT --merge`)"
        )
    folder = new_run_folder("runs", name=None, hint=f"harness-{name}").path
    tasks = [task for task in given.tasks.split(",") if task]
    options = ["--batch_size", "8"]
    for flag, value in (("--limit", given.limit), ("--include_path", given.include)):
        options += [flag, str(value)] if value is not None else []
    options += ["--apply_chat_template"] if given.chat_template else []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = None if frozen is None else _whole_path(str(frozen["model"]["path"]))
    scores = []
    for part, path in (("before", base), ("after" if base else "model", model)):
        if path is not None:
            shown = display_path(Path(path)) if Path(path).exists() else path
            print(f"opsd: {', '.join(tasks)} on {shown}", file=sys.stderr)
            scores.append(run_tasks(path, tasks, folder / part, device=device, options=options))
    if base is None:
        rows = [{"task": f"{s.task} ({s.metric}, {s.filter})", "score": _value(s.value, s.error)} for s in scores[0]]
    else:
        rows = []
        for first, last, comparison in against(*scores):
            rows.append({
                "task": f"{last.task} ({last.metric}, {last.filter})",
                "before": _value(first.value, first.error),
                "after": _value(last.value, last.error),
                "change": _change(comparison) if comparison else f"{last.value - first.value:+.3f}",
            })  # fmt: skip
        rows += _own_gain(Path(model).parent)
    _show(rows, as_json=given.json)
    print(f"opsd: all of it is in {display_path(folder)}", file=sys.stderr)
    return ExitCode.DONE


def _path(words: Sequence[str]) -> str | None:
    """The model of a target's words."""
    for word in words:
        key, _, value = word.partition("=")
        if key == "model.path":
            return value.strip("'").replace("\\'", "'").replace("\\\\", "\\")
    return None


def _whole_path(path: str) -> str:
    return str(ASSETS / path.removeprefix(BUNDLED)) if path.startswith(BUNDLED) else path


def _value(value: float, error: float | None) -> str:
    return f"{value:.3f}" if error is None else f"{value:.3f} +- {error:.3f}"


def _change(comparison: Any) -> str:
    noise = "" if comparison.p_value < 0.05 else ", may be noise"
    return (
        f"{comparison.gain:+.3f} [{comparison.low:+.3f}, {comparison.high:+.3f}], {len(comparison.won)} won, "
        f"{len(comparison.lost)} lost{noise}"
    )


def _own_gain(run: Path) -> list[dict[str, str]]:
    """What the run itself has measured: its gain, to stand beside what other tasks lost."""
    from opsd_cli.insight.history import read_history

    summary = read_history(run).summary
    rows = []
    for label, first, last, change in (
        ("trained for", summary["before"], summary["after"], summary["change"]),
        ("retention", summary["retention_before"], summary["retention_after"], summary["retention_change"]),
    ):
        if first and last and change:
            noise = "" if change["p_value"] < 0.05 else ", may be noise"
            gained = f"{change['gain']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"
            rows.append({
                "task": f"{label}: {last['split']} of the run",
                "before": f"{first['accuracy']:.3f}",
                "after": f"{last['accuracy']:.3f}",
                "change": f"{gained}, {change['won']} won, {change['lost']} lost{noise}",
            })  # fmt: skip
    return rows


def _show(rows: list[dict[str, str]], *, as_json: bool) -> None:
    from opsd_cli.ui.columns import aligned, terminal_width

    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    for line in aligned(rows, least=(), width=terminal_width()):
        print(line)
