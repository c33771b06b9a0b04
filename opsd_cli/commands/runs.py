"""`opsd runs`: what is in `runs/`, one line for each run; and what differs between two of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsd_cli.commands.flags import Flags
from opsd_cli.settings.errors import ConfigError, ExitCode
from opsd_cli.settings.paths import typed_path
from opsd_cli.settings.registry import did_you_mean

if TYPE_CHECKING:
    from opsd_cli.insight.history import History

HELP = """\
opsd runs                       every run under ./runs, the newest last, those of sweeps too
opsd runs FOLDER                ... under another folder, or of one sweep
opsd runs --recipe quickstart --state completed     those that match; --method and --task too
opsd runs --sort accuracy       the best last; also: age, name, steps
opsd runs diff A B              settings and results that differ between two runs
opsd runs --json                everything, for programs

States: running, completed, stopped (asked to), failed, lost (its process is gone), empty (never began).
"""

STATES = ("running", "completed", "stopped", "failed", "lost", "empty")
LEAST = ("retention", "task", "recipe", "steps", "age", "method")  # left out of a narrow terminal, in this order


def main(arguments: list[str]) -> int:
    """Run `opsd runs ...`. Raises ConfigError for a folder without runs."""
    flags = Flags("runs")
    for name in ("--recipe", "--method", "--task"):
        flags.add_argument(name)
    flags.add_argument("--state", choices=STATES)
    flags.add_argument("--sort", choices=SORTS, default="age")
    flags.add_argument("--json", action="store_true")
    given = flags.read(arguments)
    match given.words:
        case ["diff", first, second]:
            if filters := [f"--{name}" for name in ("recipe", "method", "task", "state") if vars(given)[name]]:
                raise ConfigError(f"opsd runs diff takes no {' or '.join(filters)}: it compares the two runs you name")
            return _diff(first, second, as_json=given.json)
        case ["diff", *_]:
            raise ConfigError("name two runs: opsd runs diff runs/A runs/B")
        case [] | [_]:
            wanted = {name: vars(given)[name] for name in ("recipe", "method", "task", "state")}
            root = typed_path(given.words[0] if given.words else "runs")
            return _list(root, {name: value for name, value in wanted.items() if value}, given.sort, given.json)
        case [word, *_]:
            raise ConfigError(f"opsd runs {word} ...: one folder at most{did_you_mean(word, ['diff'])}")
    return ExitCode.DONE


def _by_age(run: History) -> Any:
    return -_age(run)


def _by_accuracy(run: History) -> Any:
    after = run.summary["after"] or run.summary["before"]
    return after["accuracy"] if after else -1.0


SORTS: dict[str, Callable[[History], Any]] = {
    "age": _by_age,
    "accuracy": _by_accuracy,
    "name": lambda run: run.name,
    "steps": lambda run: run.summary["steps"],
}


def _list(root: Path, wanted: dict[str, str], sort: str, as_json: bool) -> int:
    from opsd_cli.insight.history import find_runs, try_read
    from opsd_cli.ui.columns import aligned, terminal_width

    if not root.is_dir():
        raise ConfigError(f"{root}: no such folder; runs are written to ./runs (run.root), or name another folder")
    found = [(name, path, try_read(path, name=name, points=1)) for name, path in find_runs(root)]
    runs = sorted((run for _, _, run in found if run is not None), key=SORTS[sort])
    runs = [run for run in runs if all(_facts(run)[name] == value for name, value in wanted.items())]
    if as_json:
        print(json.dumps([_as_json(run) for run in runs], indent=1, ensure_ascii=False))
        return ExitCode.DONE
    for line in aligned([_row(run) for run in runs], least=LEAST, width=terminal_width()):
        print(line)
    if not runs:
        every = ", ".join(f"{name}={value}" for name, value in wanted.items())
        print(f"no run in {root}" + (f" with {every}" if every else "; start one: opsd train recipe=quickstart"))
    for name, path, run in found:
        if run is None:
            print(f"{name}: {path / 'config.yaml'} cannot be read")
    return ExitCode.DONE


def _facts(run: History) -> dict[str, str]:
    """What the filters compare."""
    chosen = run.chosen
    return {
        "recipe": chosen.get("recipe") or chosen.get("dataset", ""),
        "method": chosen.get("method", ""),
        "task": run.task,
        "state": run.state,
    }


def _row(run: History) -> dict[str, str]:
    from opsd_cli.ui.theme import duration, percent

    facts, summary = _facts(run), run.summary
    steps = int(run.settings.get("train.steps", 0))
    shares = [summary["before"], summary["after"]]
    retained = [summary["retention_before"], summary["retention_after"]]
    return {
        "run": run.name,
        "state": run.state,
        "task": facts["task"] or "-",
        "recipe": facts["recipe"] or "-",
        "method": facts["method"] or "-",
        "steps": f"{summary['steps']}/{steps}" if facts["task"] == "train" else "-",
        "accuracy": " -> ".join(percent(e["accuracy"]) for e in shares if e) or "-",
        "change": _verdict(summary["change"]),
        "retention": " -> ".join(percent(e["accuracy"]) for e in retained if e) or "-",
        "age": duration(_age(run)),
    }


def _verdict(comparison: dict[str, Any] | None) -> str:
    from opsd_cli.ui.theme import is_noise

    if comparison is None:
        return "-"
    return f"+{comparison['won']} -{comparison['lost']}{' (may be noise)' if is_noise(comparison) else ''}"


def _age(run: History) -> float:
    """Seconds since the run last wrote."""
    from opsd_cli.run.events import number

    events = [*run.events[-1:], *run.steps[-1:]]
    last = max((number(event["time"]) for event in events), default=run.folder.config.stat().st_mtime)
    return max(0.0, time.time() - last)


def _as_json(run: History) -> dict[str, Any]:
    return {
        "run": run.name,
        "path": str(run.folder.path),
        **_facts(run),
        "seconds_ago": round(_age(run)),
        "command": run.typed,
        "summary": dict(run.summary),
    }


def _diff(first: str, second: str, *, as_json: bool) -> int:
    from opsd_cli.insight.history import read_all, told_apart
    from opsd_cli.insight.versus import compared, differing, results
    from opsd_cli.ui.columns import aligned
    from opsd_cli.ui.theme import changes

    runs = [*read_all([first], root=Path("runs")), *read_all([second], root=Path("runs"))]
    if len(runs) != 2:
        raise ConfigError(f"{first} and {second} name {len(runs)} runs, not two; `opsd report` compares several")
    if runs[0].folder.path == runs[1].folder.path:
        raise ConfigError(f"{first} and {second} are the same run")
    settings, found = differing(runs), results(runs)
    paired = compared(*runs)
    names = list(told_apart({run.folder.path: run.name for run in runs}).values())
    if as_json:
        sides = [
            {"settings": {key: values[i] for key, values in settings.items()}, "results": found[i]} for i in (0, 1)
        ]
        print(json.dumps({"runs": dict(zip(names, sides, strict=True)), "paired": paired}, indent=1))
        return ExitCode.DONE
    rows = [_side_by_side(key, names, values) for key, values in settings.items()]
    print("\n".join(aligned(rows)) if rows else "no setting differs")
    print()
    shown = {key: [side[key] for side in found] for key in found[0] if any(side[key] for side in found)}
    print("\n".join(aligned([_side_by_side(key, names, values) for key, values in shown.items()])))
    if paired is not None:
        print(f"\n{names[1]} against {names[0]}, the same {paired['problems']} problems: {changes(paired)}")
    return ExitCode.DONE


def _side_by_side(key: str, names: Sequence[str], values: Sequence[Any]) -> dict[str, str]:
    return {"": key, **{name: _short(value) for name, value in zip(names, values, strict=True)}}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
