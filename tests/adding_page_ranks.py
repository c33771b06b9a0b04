"""Run by test_docs in a process of its own, so that the registries of the tests stay as they are: registers the plug-in
of docs/adding.md, runs the page's check, composes its commands, and takes a real step with the first of them."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import opsd_cli.plugins  # noqa: F401
from opsd_cli import loss


def main(folder: Path) -> None:
    loss.__path__.append(str(folder / "opsd_cli" / "loss"))
    import opsd_cli.loss.jeffreys  # noqa: F401 - the line that the page adds to opsd_cli/plugins.py

    runpy.run_path(str(folder / "check_jeffreys.py"), run_name="__main__")
    os.chdir(folder)
    from method_steps_ranks import main as take_steps

    from opsd_cli.preflight import check
    from opsd_cli.settings.recipe_files import find_folders
    from opsd_cli.settings.typed_config import plain_tree

    small = (
        "train.problems_per_step=2",
        "eval.problems=0",
        "sampling.max_completion_tokens=24",
        "loss.mask_truncated=false",
    )
    trainings = json.loads((folder / "trainings.json").read_text())
    for words in trainings:
        check([word for word in words if not word.startswith("-")], find_folders(), multirun="-m" in words)
    _, (member,) = check([*trainings[0], *small], find_folders())
    print(json.dumps(take_steps({"step": [plain_tree(member.config)]})["step 0"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
