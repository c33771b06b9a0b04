"""`opsd compare`: a recipe under several contexts and methods, over seeds, and what may be claimed of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opsd_cli.commands.flags import Flags, quote, whole_number
from opsd_cli.settings.errors import ConfigError, ExitCode, display_path
from opsd_cli.settings.paths import typed_path
from opsd_cli.settings.recipe_files import RecipeFolders, find_folders
from opsd_cli.settings.registry import did_you_mean

if TYPE_CHECKING:
    from opsd_cli.insight.history import History

HELP = """\
opsd compare recipe=quickstart arms=solution,shuffled,none,wrong,sft seeds=3
opsd compare recipe=quickstart arms=opsd,op2sd,off_policy seeds=0,1 --basis tokens
opsd compare recipe=gsm8k arms=solution,shuffled lora=r16 train.steps=50 --json

arms=A,B,...    contexts (solution, shuffled, none, wrong, ...) and methods (sft, off_policy, opd, ...); the others are
                held against the first
seeds=N         so many seeds, 0 to N-1 (3), or seeds=4,7 by number
--basis WHAT    updates: all at their end; tokens, seconds: each at its last evaluation within what the cheapest run has
                spent (eval.every is an eighth of the steps, unless it is typed)
--recipes DIR   a folder of your own recipes; --plugin FILE registers parts

Each arm is a sweep over the seeds, in a folder that belongs to these words: typed again, what has finished is not run
again. KEY=VALUE are settings of every run. The exit code is that of the worst run.
"""

BASES = ("updates", "tokens", "seconds")
MOST_SEEDS = 100
OWN_WORDS = ("arms", "seeds")
EVALUATIONS = 8  # of a run, where a point of it is compared


def main(arguments: list[str]) -> int:
    """Run `opsd compare ...`. Raises ConfigError with every problem, before anything is run."""
    flags = Flags("compare")
    flags.add_argument("--basis", default="updates")
    flags.add_argument("--recipes", metavar="DIR")
    flags.add_argument("--json", action="store_true")
    given = flags.read(arguments)
    if given.basis not in BASES:
        raise ConfigError(f"--basis {given.basis}: one of {', '.join(BASES)}{did_you_mean(given.basis, BASES)}")
    own = {word.partition("=")[0]: word.partition("=")[2] for word in given.words if word.split("=")[0] in OWN_WORDS}
    words = [word for word in given.words if word.split("=")[0] not in OWN_WORDS]
    if "arms" not in own or not words:
        raise ConfigError(
            "name a recipe and its arms: opsd compare recipe=quickstart arms=solution,shuffled,sft seeds=3 "
            "(see `opsd compare --help`)"
        )
    folders = find_folders(given.recipes)
    arms = _arms(own["arms"], folders)
    seeds = _seeds(own.get("seeds", "3"))
    for word in words:
        if word.split("=")[0] in ("run.seed", "run.name", "hydra.sweep.dir"):
            raise ConfigError(f"'{word}': opsd compare sets it; give seeds=..., and run.root=FOLDER for another place")
    code, root, split = _run(words, arms, seeds, folders, basis=given.basis, command=["opsd", "compare", *arguments])
    from opsd_cli.insight.arms import compare_arms

    found = compare_arms({arm: _runs_of(root / arm, seeds) for arm in arms}, basis=given.basis, split=split)
    if given.json:
        print(json.dumps({"folder": str(root), **found.as_dict()}, indent=1, ensure_ascii=False))
    else:
        from opsd_cli.ui.foresight_text import arm_lines

        print("\n".join(arm_lines(found, display_path(root))))
    return code


def _arms(text: str, folders: RecipeFolders) -> dict[str, str]:
    """Name of each arm -> the word that chooses it. Raises ConfigError."""
    names = [name.strip() for name in text.strip("[]").split(",") if name.strip()]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"arms={text}: {repeated} is there twice")
    if len(names) < 2:
        raise ConfigError(f"arms={text}: name at least two, the first of which is held against the others")
    contexts, methods = folders.files["context"], folders.files["method"]
    problems = [
        f"arms={text}: {name} is neither a context nor a method{did_you_mean(name, [*contexts, *methods])} "
        "(`opsd recipes show context`, `opsd recipes show method`)"
        for name in names
        if name not in contexts and name not in methods
    ]
    if problems:
        raise ConfigError(*problems)
    return {name: f"context={name}" if name in contexts else f"method={name}" for name in names}


def _seeds(text: str) -> list[int]:
    numbers = [whole_number(part.strip()) for part in text.strip("[]").split(",")]
    seeds = [number for number in numbers if number is not None]
    if len(seeds) < len(numbers):
        raise ConfigError(f"seeds={text}: a number of seeds, or seeds by number (seeds=3, seeds=4,7)")
    found = list(range(min(seeds[0], MOST_SEEDS + 1))) if len(seeds) == 1 else seeds
    if not 1 <= len(found) <= MOST_SEEDS or len(set(found)) < len(found):
        raise ConfigError(f"seeds={text}: 1 to {MOST_SEEDS} different seeds")
    return found


def _run(
    words: Sequence[str],
    arms: dict[str, str],
    seeds: Sequence[int],
    folders: RecipeFolders,
    *,
    basis: str,
    command: Sequence[str],
) -> tuple[int, Path, str]:
    """Run what has not finished; the worst exit code, the folder of the arms, and the split that is measured."""
    from opsd_cli.commands.sweep import run_sweep, worst_code
    from opsd_cli.preflight import check

    words = list(words)
    _, members = check([*words, next(iter(arms.values()))], folders)
    config = members[0].config
    if len(members) > 1:
        raise ConfigError("one recipe is compared at a time; leave out values with commas, or make them arms")
    if config.eval.problems == 0:
        raise ConfigError("eval.problems is 0, so nothing is measured; give eval.problems=N")
    if not config.eval.before:
        raise ConfigError("eval.before is false, so no arm has a start to gain over; set eval.before=true")
    if basis != "updates" and not any(word.split("=")[0] == "eval.every" for word in words):
        words.append(f"eval.every={max(1, config.train.steps // EVALUATIONS)}")
    recipe = next((word.partition("=")[2] for word in words if word.startswith("recipe=")), "runs")
    print_of_words = hashlib.sha256("\n".join(sorted(words)).encode()).hexdigest()[:8]
    root = (typed_path(config.run.root) / f"compare_{recipe}_{print_of_words}").absolute()
    lines = {
        arm: check(
            [*words, word, "run.seed=" + ",".join(map(str, seeds)), f"hydra.sweep.dir={quote(str(root / arm))}"],
            folders,
            multirun=True,
        )
        for arm, word in arms.items()
    }
    print(f"opsd: {len(arms)} arms with {len(seeds)} seeds each, in {root}", file=sys.stderr)
    codes = []
    for arm, (line, runs) in lines.items():
        if all(run is not None and run.state == "completed" for run in _runs_of(root / arm, seeds).values()):
            print(f"opsd: arm {arm} has finished before", file=sys.stderr)
            continue
        print(f"opsd: arm {arm}", file=sys.stderr)
        with contextlib.redirect_stdout(sys.stderr):  # the table of all arms is what is printed
            codes.append(run_sweep(line, runs, folders, task="train", command=command))
        if codes[-1] in (ExitCode.INTERRUPTED, ExitCode.TERMINATED):
            break
    return worst_code(codes), root, config.eval.split


def _runs_of(folder: Path, seeds: Sequence[int]) -> dict[int, History | None]:
    """The newest run of each seed below an arm's folder."""
    from opsd_cli.insight.history import find_runs, try_read

    found: dict[int, History | None] = dict.fromkeys(seeds)
    for name, path in find_runs(folder):
        run = try_read(path, name=name)
        if run is None or (seed := run.settings.get("run.seed")) not in found:
            continue
        if (held := found[seed]) is None or held.state != "completed":
            found[seed] = run
    return found
