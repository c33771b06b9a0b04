"""`opsd doctor`: the machine, and a recipe on its real model and data, looked at before a run is started."""

from __future__ import annotations

import json
import os
import sys

from opsd_cli.commands.flags import Flags, device_of
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.recipe_files import find_folders

HELP = """\
opsd doctor                              the machine: versions, devices, compilers, memory, disk, hub, clocks
opsd doctor recipe=gsm8k                 ... and the recipe on its real model and data, up to one small step
opsd doctor recipe=jsonl dataset.path=mine.jsonl model=hf model.path=FOLDER
opsd doctor recipe=quickstart --json     for programs

Settings are those of `opsd train`. Nothing is kept: the untrained model is written to run.root, read back and removed.
--all           show everything that was looked at; without it, on a terminal, only a line for each area that is well
--recipes DIR   a folder of your own recipes, searched first; ./recipes is always searched
--plugin FILE   a Python file of your own that registers parts

exit codes: 0 no error (there may be warnings), 2 change something, 3 only the environment is wrong (try again)
"""


def main(arguments: list[str]) -> int:
    """Run `opsd doctor ...`. Raises ConfigError for a command line that stands for no single run."""
    flags = Flags("doctor")
    flags.add_argument("--recipes", metavar="DIR")
    flags.add_argument("--json", action="store_true")
    flags.add_argument("--all", action="store_true")
    given = flags.read(arguments)
    from opsd_cli.launch.devices import ask, gpu_hint, why_no_gpu
    from opsd_cli.preflight import check

    config = None
    if given.words:
        _, (member, *others) = check(given.words, find_folders(given.recipes))
        if others:
            raise ConfigError("these words stand for several runs; opsd doctor looks at one")
        config = member.config
    elif given.recipes or given.plugin:
        raise ConfigError("--recipes and --plugin go with a recipe: opsd doctor recipe=NAME")
    problem = ""
    if (config is None or vars(config.launcher).get("device") != "cpu") and gpu_hint(os.environ) is not None:
        answer = ask(os.environ)
        problem = "" if answer.devices else why_no_gpu(answer, os.environ)

    import torch

    from opsd_cli.insight.findings import Findings
    from opsd_cli.insight.machine import look_at_machine

    here = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device("cpu" if problem else here if config is None else device_of(config))
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, which peft imports, warns of it
    findings = Findings()
    look_at_machine(findings, config, problem=problem, device=device)
    if config is not None:
        from opsd_cli.api.checkup import look_at_recipe

        look_at_recipe(findings, config, device=device, tell=_tell)
    if given.json:
        print(json.dumps(findings.as_dict(), indent=1, ensure_ascii=False))
    else:
        from opsd_cli.ui.foresight_text import print_findings

        print_findings(findings, everything=given.all or not sys.stdout.isatty())
    return findings.exit_code


def _tell(phase: str) -> None:
    if sys.stderr.isatty():
        print(f"opsd: {phase}", file=sys.stderr)
