"""How long a start takes: from the command to the first evaluation of the quickstart, and a whole dry run of any other
words; seconds of wall clock and of CPU, of all processes together, several times in turn for several commands.

    python scripts/bench/start_up.py                                        # the quickstart
    python scripts/bench/start_up.py --opsd .venv/bin/opsd ../main/.venv/bin/opsd --times 3
    python scripts/bench/start_up.py -- recipe=gsm8k model=hf model.path=FOLDER dataset.path=FOLDER --dry-run
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
FIRST = '"phase": "evaluating before training'


def cpu_seconds(root: int) -> float:
    """Of a process and everything that it has started, while they live."""
    parents, ticks = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        pid = int(stat.parent.name)
        parents[pid], ticks[pid] = int(fields[1]), sum(map(int, fields[11:15]))
    family = {root}
    while grown := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= grown
    return sum(ticks.get(pid, 0) for pid in family) / TICKS


def measure(opsd: str, words: list[str]) -> tuple[float, float]:
    """Seconds of wall clock and CPU until the first evaluation begins, or until the command ends."""
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, "OPSD_CACHE": str(Path(folder) / "cache")}
        began = time.perf_counter()
        command = [opsd, "train", *words]
        process = subprocess.Popen(
            command, cwd=folder, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        cpu = 0.0
        while process.poll() is None:
            events = next(Path(folder).glob("runs/*/events.jsonl"), None)
            has_begun = events is not None and FIRST in events.read_text()
            cpu = max(cpu, cpu_seconds(process.pid))
            if has_begun:
                break
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait()
    return seconds, cpu


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--opsd", nargs="+", default=[str(Path(sys.executable).with_name("opsd"))])
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("words", nargs="*", default=["recipe=quickstart"])
    given = parser.parse_args()
    for _ in range(given.times):
        for opsd in given.opsd:
            seconds, cpu = measure(opsd, given.words)
            print(f"{seconds:6.1f} s of wall clock, {cpu:6.1f} s of CPU: {opsd}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
