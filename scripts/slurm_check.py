"""Runs under a real SLURM: a cluster of two nodes on this machine, what srun and launcher=slurm do in it, and what is
done to them. Started by scripts/slurm.sh; needs root, SLURM's and munge's programs, and no network.

    scripts/slurm.sh                      everything: fifteen to thirty minutes on two cores
    scripts/slurm.sh --only srun_two_nodes preemption
    scripts/slurm.sh -- COMMAND ...       a command of your own on the head of the cluster

Prints a table; the exit code is 1 if anything is not as expected.
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

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[0], os.environ.get("PYTHONPATH")]))

from slurm.cluster import Cluster, cluster, inside_namespaces, missing_tools  # noqa: E402
from slurm.faults import CHECKS, World  # noqa: E402

SKIPPED = 77  # the exit code where this machine cannot have a cluster


def main() -> int:
    options, command = _options()
    if options.list:
        print("\n".join(f"{name:20} {check.what}" for name, check in CHECKS.items()))
        return 0
    if lacking := missing_tools():
        print(f"slurm_check: this machine lacks {', '.join(lacking)}; on Debian: scripts/slurm.sh --install")
        return SKIPPED
    if (code := inside_namespaces(sys.argv)) is not None:
        return code
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.alarm(60 * options.minutes)
    started = time.monotonic()
    with cluster() as made:
        print(f"cluster: {len(made.names)} nodes after {time.monotonic() - started:.1f} s", flush=True)
        if command:
            return subprocess.run(command, check=False).returncode
        return _check(made, options.only or list(CHECKS), keep=options.keep)


def _check(made: Cluster, names: list[str], *, keep: str | None) -> int:
    failed = 0
    with tempfile.TemporaryDirectory(prefix="opsd-slurm-runs-") as scratch:
        runs = Path(keep or scratch).absolute()
        runs.mkdir(parents=True, exist_ok=True)
        world = World(made, runs)
        for name in names:
            started = time.monotonic()
            try:
                seen = CHECKS[name].run(world)
                expected = CHECKS[name].expects(world)
            except RuntimeError as error:
                seen, expected = f"{error}\n{_last_lines(runs)}", "an end"
            failed += seen != expected
            mark = "ok  " if seen == expected else "FAIL"
            print(f"{mark} {CHECKS[name].what:38} {time.monotonic() - started:5.0f} s  {seen}", flush=True)
            if seen != expected:
                print(f"     expected: {expected}\n{made.logs()}", flush=True)
    print(f"{len(names) - failed} of {len(names)} as expected")
    return 1 if failed else 0


def _last_lines(runs: Path) -> str:
    newest = max(runs.glob("*.out"), key=lambda file: file.stat().st_mtime, default=None)
    return "" if newest is None else "\n".join(newest.read_text(errors="replace").splitlines()[-15:])


def _options() -> tuple[argparse.Namespace, list[str]]:
    words = sys.argv[1:]
    place = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), metavar="NAME")
    parser.add_argument("--list", action="store_true", help="the names")
    parser.add_argument("--minutes", type=int, default=30, help="after which everything is ended")
    parser.add_argument("--keep", metavar="FOLDER", help="for the runs, which are removed otherwise")
    return parser.parse_args(words[:place]), words[place + 1 :]


def _out_of_time(number: int, frame: object) -> None:
    print("slurm_check: out of time (--minutes)", flush=True)
    os._exit(1)  # the first process of its namespaces: everything in them ends with it


if __name__ == "__main__":
    sys.exit(main())
