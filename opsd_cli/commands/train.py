"""`opsd train`: a command line becomes a run, a sweep of runs, or the continuation of one."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from typing import Any

from opsd_cli.commands.flags import Flags
from opsd_cli.settings.errors import ConfigError, ExitCode
from opsd_cli.settings.recipe_files import RecipeFolders, find_folders

HELP = """\
opsd train recipe=quickstart                          a minute, on a CPU, offline
opsd train recipe=gsm8k                               Qwen3-1.7B on GSM8K, one GPU
opsd train recipe=gsm8k model=qwen3_4b optim.lr=1e-5  another model, another number
opsd train recipe=gsm8k method=sft                    the same data with another method
opsd train recipe=jsonl dataset.path=mine.jsonl       your own problems
opsd train recipe=gsm8k --dry-run                     everything but the steps
opsd train -m recipe=quickstart divergence=forward_kl,jsd optim.lr=1e-4,3e-4    a sweep, one run after another
opsd train --resume runs/NAME                         continue from the last checkpoint
opsd train --resume runs/NAME train.steps=200         ... and further (see the message for what may change)
opsd train --resume runs/NAME launcher.ranks=2 zero=stage3     ... on other ranks, sharded otherwise

KEY=VALUE       GROUP=OPTION chooses an option (`opsd recipes` lists them), SECTION.KEY=VALUE sets one setting
--dry-run       compose, check, load tokenizer and data, render one problem both ways, print the plan
--resume RUN    a run folder
--recipes DIR   a folder of your own recipes, searched first; ./recipes is always searched
--plugin FILE   run a Python file of your own that registers parts (`opsd new` writes one); may be given again
--accept-changed-plugin   resume although the file is not the one the run was started with
-m, --multirun  run every combination of the values given with commas, range(...) or choice(...); a sweep that is typed
                again takes its finished members as they are and goes on with the others
--parallel N    with -m: so many members at once, each with its share of the cores or of the GPUs
--anew          with -m: run every member again
--cfg job       print the composed config and stop; also --resolve, --package KEY, --info, --config-dir DIR (Hydra's)

exit codes: 0 done, 2 change something, 3 environment (try again), 4 a guard stopped the run, 130/143 stopped and saved
"""


def main(arguments: list[str]) -> int:
    """Run `opsd train ...`."""
    given = _flags().read(arguments)
    command = ["opsd", "train", *arguments]
    if given.resume is not None:
        return _resume(given, command)
    folders = find_folders(given.recipes, given.config_dir)
    if given.cfg or given.info or given.hydra_help:
        return _print_config(given, folders)
    return _train(given, folders, command)


def _flags() -> Flags:
    flags = Flags("train")
    flags.add_argument("--dry-run", action="store_true")
    flags.add_argument("--resume", metavar="RUN")
    flags.add_argument("--accept-changed-plugin", action="store_true")
    flags.add_argument("--recipes", metavar="DIR")
    flags.add_argument("--multirun", "-m", action="store_true")
    flags.add_argument("--parallel", type=int, metavar="N")
    flags.add_argument("--anew", action="store_true")
    flags.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    flags.add_argument("--resolve", action="store_true")
    flags.add_argument("--package", "-p")
    flags.add_argument("--info", "-i", nargs="?", const="all", choices=("all", "config", "defaults", "defaults-tree"))
    flags.add_argument("--config-dir", "-cd", metavar="DIR")
    flags.add_argument("--hydra-help", action="store_true")
    return flags


def _train(given: argparse.Namespace, folders: RecipeFolders, command: list[str]) -> int:
    from opsd_cli.commands.sweep import run_sweep
    from opsd_cli.launch.slurm import SlurmLauncher
    from opsd_cli.launch.start import start_run
    from opsd_cli.launch.submit import preview
    from opsd_cli.preflight import check
    from opsd_cli.ui.display import open_display

    if given.resolve or given.package:
        raise ConfigError("--resolve and --package say how --cfg prints; add --cfg job")
    line, members = check(given.words, folders, multirun=given.multirun)
    task = "check" if given.dry_run else "train"
    if line.is_sweep:
        return run_sweep(line, members, folders, task=task, command=command, parallel=given.parallel, anew=given.anew)
    if given.parallel is not None or given.anew:
        raise ConfigError("--parallel and --anew are about the members of a sweep; add -m")
    (member,) = members
    for note in member.notes:
        print(f"opsd: {note}", file=sys.stderr)
    hint, launcher = name_hint(member.choices), member.config.launcher
    script = preview(member.config, launcher, hint=hint) if isinstance(launcher, SlurmLauncher) else ""
    code = start_run(
        member.config, task=task, argv=command, hint=hint, open_display=open_display, chosen=member.choices
    )
    if given.dry_run and script and code == ExitCode.DONE:
        print(script)
    return code


def name_hint(choices: Mapping[str, str | None]) -> str:
    """What a run is called if it has no name: its recipe (or dataset), method and model."""
    parts = (choices.get("recipe") or choices.get("dataset"), choices.get("method"), choices.get("model"))
    return "-".join(filter(None, parts))


def _print_config(given: argparse.Namespace, folders: RecipeFolders) -> int:
    """Hydra's own `--cfg` and `--info`, after our check of names."""
    from opsd_cli.preflight import check
    from opsd_cli.settings.compose import print_config

    if given.hydra_help:
        words = ["--hydra-help"]
    else:
        line, _ = check(given.words, folders, multirun=given.multirun, values=False)
        words = [*(["--cfg", given.cfg] if given.cfg else ["--info", given.info]), *line.for_hydra]
        words += ["--resolve"] if given.resolve else []
        if given.package and not re.fullmatch(r"[\w.]+", given.package):
            raise ConfigError(f"--package {given.package!r} is not the name of a section")
        words += ["--package", given.package] if given.package else []
    return ExitCode.DONE if print_config(words, folders) else ExitCode.CHANGE_SOMETHING


def _resume(given: argparse.Namespace, command: list[str]) -> int:
    from opsd_cli.launch.start import resume_run
    from opsd_cli.preflight import config_of
    from opsd_cli.settings.command_line import parse_line
    from opsd_cli.settings.compose import compose, session
    from opsd_cli.ui.display import open_display

    for flag in ("multirun", "parallel", "anew", "dry_run", "recipes", "config_dir", "cfg"):
        if vars(given)[flag]:
            typed = f"--{flag.replace('_', '-')}"
            raise ConfigError(f"{typed} cannot be used with --resume: a resumed run keeps its frozen config")
    folders = find_folders()
    changes: dict[str, Any] = {}
    with session(folders):
        line, problems = parse_line(given.words, folders)
        for override in line.overrides:
            # Groups that no plug-in stands behind: their options are nothing but numbers and words that may change.
            if override.is_choice and override.key in ("zero", "track"):
                tree, _ = compose(["recipe=quickstart", override.text])
                changes |= {f"{override.key}.{key}": value for key, value in tree[override.key].items()}
            elif override.is_choice or override.is_hydra:
                problems.append(f"'{override.text}': a resumed run keeps its options; only single settings can change")
            else:
                changes[override.key] = override.values[0]
    if problems:
        raise ConfigError(*problems)
    return resume_run(
        given.resume, argv=command, changes=changes, check=config_of, open_display=open_display,
        accept_changed_plugin=given.accept_changed_plugin,
    )  # fmt: skip
