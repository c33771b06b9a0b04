"""Run by test_docs in a process of its own, so that the registries of the tests stay as they are: types the commands of
docs/adding.md in their order (the trainings are checked, not run), runs the page's check, and takes a real step with
each of its divergences."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

from method_steps_ranks import main as take_steps

from opsd_cli.cli import main as opsd
from opsd_cli.commands.train import _flags
from opsd_cli.preflight import check
from opsd_cli.settings.plugin_files import use_plugins
from opsd_cli.settings.recipe_files import find_folders
from opsd_cli.settings.typed_config import plain_tree

SMALL = ("recipe=quickstart", "train.problems_per_step=2", "eval.problems=0", "sampling.max_completion_tokens=24",
         "loss.mask_truncated=false", "dataset.train_problems=40", "dataset.validation_problems=0",
         "dataset.test_problems=0", "dataset.retention_problems=0")  # fmt: skip


def main(folder: Path) -> None:
    os.chdir(folder)
    for words in json.loads(Path("commands.json").read_text()):
        if words[0] != "train":
            assert opsd(words) == 0, words
            continue
        given = _flags().read(words[1:])
        check(given.words, find_folders(), multirun=given.multirun)
    runpy.run_path("check_jeffreys.py", run_name="__main__")
    use_plugins(["jeffreys.py", "halfway.py"])
    trees = [
        plain_tree(check([*SMALL, f"divergence={name}"], find_folders())[1][0].config)
        for name in ("jeffreys", "halfway")
    ]
    print(json.dumps(take_steps({"step": trees})))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
