"""Proves a card: every path of opsd that runs on CUDA, each judged by itself against float64, a CPU or the model's own
forward, then seconds and memory of a step at a real shape. Needs the installed package and nothing else; no network.

    python scripts/gpu_check.py                          # everything; about five minutes on one card and 16 cores
    python scripts/gpu_check.py --json found.json        # ... and all figures with the versions they belong to
    python scripts/gpu_check.py --only loss decoding     # groups, or names that begin so: --only "loss/triton bf16"
    python scripts/gpu_check.py --list                   # the names
    python scripts/gpu_check.py --device cpu             # small sizes; what needs a card is skipped by name

One line for each check: verdict, name, seconds, figures with their limits. Exit code 1 if any check failed. Each group
is a process of its own, so that one that crashes or hangs is a failed line and the others go on. Owns the processes
and the report; what is checked is in `gpu_checks/`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_checks import GROUPS, Group
from gpu_checks.check import Row
from gpu_checks.lane import CORES, Lane, has_card

from opsd_cli.launch.rank_environ import usable_cores

POLL_SECONDS = 0.1


def arguments(words: Sequence[str]) -> argparse.Namespace:
    description = __doc__ or ""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where a card is visible")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="groups, or beginnings of names")
    parser.add_argument("--list", action="store_true", help="print the names of all checks and stop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    options = parser.parse_args(words)
    options.device = options.device or ("cuda" if has_card(os.environ) else "cpu")
    for name in options.only:
        if name.partition("/")[0] not in {group.name for group in GROUPS}:
            parser.error(f"--only {name}: no such group; there are {', '.join(group.name for group in GROUPS)}")
    return options


def lanes_of(groups: Sequence[Group], device: str) -> list[list[Group]]:
    """Groups that share a process, one lane beside another. On a card each has its own: an error of CUDA ends all that
    a process can do. On a CPU one process saves importing everything eleven times; whole runs wait beside it."""
    if device == "cuda":
        return [[group] for group in groups]
    whole_runs = [group for group in groups if group.name in ("runs", "quickstart")]
    return [lane for lane in (whole_runs, [group for group in groups if group not in whole_runs]) if lane]


def rows_of(lanes: Sequence[Sequence[Group]], options: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Run the lanes, several at once, and give each row when it is known."""
    waiting = [Lane(lane, options.device, options.only, scratch) for lane in lanes]
    running: list[Lane] = []
    on_cpu = options.device == "cpu"
    at_once = 2 if on_cpu else max(1, usable_cores() // CORES)
    try:
        while waiting or running:
            while waiting and len(running) < at_once and (on_cpu or may_start(waiting[0], running)):
                running.append(waiting.pop(0))
                running[-1].start()
            for lane in list(running):
                rows = list(lane.poll())
                options.machine |= lane.machine  # before the rows: they are printed under it
                yield from rows
                if lane.is_over:
                    running.remove(lane)
            time.sleep(POLL_SECONDS)
    finally:
        for lane in running:
            lane.kill()


def may_start(lane: Lane, running: Sequence[Lane]) -> bool:
    """What times the card waits until nothing else runs on it, and others wait for it."""
    return not running or not any(other.is_alone for other in (lane, *running))


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM ends the children as Ctrl-C does."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def report(rows: Sequence[Row], options: argparse.Namespace, seconds: float) -> None:
    """The closing line, and the file."""
    counts = Counter(row.verdict for row in rows)
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("pass", "fail", "skip", "info"))
    print(f"{said}; {seconds:.0f} s on {options.machine.get('device', options.device)}", flush=True)
    for row in rows:
        if row.verdict == "fail":
            print(f"failed: {row.full_name}", flush=True)
    if options.json is not None:
        whole: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": options.machine,
            "seconds": round(seconds, 1),
            "counts": dict(counts),
            "checks": [row.plain() for row in rows],
        }
        options.json.write_text(json.dumps(whole, indent=1) + "\n")


def main(words: Sequence[str]) -> int:
    options = arguments(words)
    options.machine = {}
    wanted = {name.partition("/")[0] for name in options.only} or {group.name for group in GROUPS}
    groups = [group for group in GROUPS if group.name in wanted]
    start, rows = time.monotonic(), list[Row]()
    with tempfile.TemporaryDirectory(prefix="opsd-gpu-check-") as folder, terminated_like_interrupted():
        lanes = lanes_of(groups, options.device)
        if options.list:
            lane = Lane(groups, options.device, options.only, Path(folder))
            print("\n".join(lane.names()), flush=True)
            return 0
        try:
            for row in rows_of(lanes, options, Path(folder)):
                if not rows:
                    print("# " + ", ".join(f"{name} {value}" for name, value in options.machine.items()), flush=True)
                print(row, flush=True)
                rows.append(row)
        except KeyboardInterrupt:
            print("stopped", flush=True)
            return 130
    report(rows, options, time.monotonic() - start)
    return 1 if any(row.verdict == "fail" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
