"""Hostile input by the thousand: command lines, whole commands, recipe files, dataset files, completions, event files,
chat templates and run folders. For every case: an answer or an OpsdError, never a traceback, never a hang, no file
outside the scratch folder, no process but opsd's own helpers, no network.

    python scripts/fuzz.py                            # all of it, at least 10,000 cases
    python scripts/fuzz.py recipes --cases 500 --seed 7

Prints a line per family; the first case that breaks a promise is shrunk, printed with its traceback, and ends the
program with exit code 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

sys.path.insert(0, str(Path(__file__).parent))

from fuzzing import lines, recipes, rows, texts, world
from fuzzing.world import Family
from hypothesis import strategies as st

FAMILIES = {
    "lines": Family(lines.lines, lines.check_line, cases=1000, sample=15),
    "commands": Family(lines.commands, lines.check_command, cases=500, sample=10),
    "recipes": Family(recipes.recipes, recipes.check_recipe, cases=700, sample=12),
    "rows": Family(rows.cases, rows.check_rows, cases=4000, sample=80),
    "answers": Family(st.tuples(texts.written, texts.golds), texts.check_answer, cases=3000, sample=60),
    "screens": Family(texts.screens, texts.check_screen, cases=2500, sample=80),
    "templates": Family(texts.templates, texts.check_template, cases=60, sample=0),
    "folders": Family(texts.folders, texts.check_folder, cases=400, sample=20),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", choices=[*FAMILIES, []], help="which families; none means all")
    parser.add_argument("--cases", type=int, help="of each family, instead of its own number")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    chosen = arguments.families or list(FAMILIES)
    total, started = 0, time.monotonic()
    print(f"{'family':<10}  cases  seconds  slowest")
    for name in chosen:
        try:
            seconds = fuzz(FAMILIES[name], cases=arguments.cases or FAMILIES[name].cases, seed=arguments.seed)
        except Exception as error:
            traceback.print_exception(error)
            print(f"{name}: a promise is broken (seed {arguments.seed}); the shrunk case stands above")
            return 1
        total += len(seconds)
        print(f"{name:<10}  {len(seconds):5}  {sum(seconds):7.1f}  {max(seconds):7.2f}", flush=True)
    print(f"{total} cases in {time.monotonic() - started:.0f} s; every one answered")
    return 0


def fuzz(family: Family, *, cases: int, seed: int) -> list[float]:
    """Run so many cases of a family in a scratch folder; returns the seconds of each. Raises what the shrunk case
    raises."""
    world.TIMES.clear()
    here = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="opsd-fuzz-") as scratch:
        tempfile.tempdir, before = scratch, tempfile.tempdir
        os.chdir(scratch)
        try:
            hypothesis.seed(seed)(_test(family, cases, Path(scratch)))()
        finally:
            os.chdir(here)
            tempfile.tempdir = before
    return list(world.TIMES)


def _test(family: Family, cases: int, scratch: Path):
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(family.strategy)
    def holds(case) -> None:
        with world.one_case(scratch):
            family.check(case)

    return holds


if __name__ == "__main__":
    raise SystemExit(main())
