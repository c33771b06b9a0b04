"""`opsd eval`: measure a model, or the model of a run, on held-out problems. The first word is a run, a folder, a hub
id or a model option; a run's own settings are used for what is not typed."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsd_cli.commands.flags import Flags, quote, step_word
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.paths import typed_path
from opsd_cli.settings.recipe_files import RecipeFolders, find_folders

if TYPE_CHECKING:
    from opsd_cli.run.folder import RunFolder

HELP = """\
opsd eval runs/NAME                                    the model of a run, as the run itself measured it
opsd eval runs/NAME/model dataset=gsm8k eval.problems=50
opsd eval Qwen/Qwen3-1.7B recipe=gsm8k                 a model from the hub, with a recipe's prompts and data
opsd eval tiny dataset=gsm8k dataset.path=FOLDER       a model option (`opsd recipes show model`)
opsd eval runs/NAME --step last                        a checkpoint of a run that was stopped, failed or is going on
opsd eval runs/NAME eval.samples=8 eval.temperature=0.8          avg@8, pass@k and maj@k, with intervals
opsd eval runs/NAME eval.second_grader=math_verify     what another grader says, and where the two disagree
opsd eval runs/A --against runs/B                      measured as B was, then compared problem by problem
opsd eval --resume runs/eval-NAME-001                  go on with a measurement that was stopped
opsd eval runs/NAME --tasks hellaswag,arc_easy         lm-evaluation-harness (opsd-cli[harness]), before and after
                                                       training; --limit N, --include DIR, --chat-template, --json

The first word is a run folder, a Hugging Face folder, a hub id or a model option. Everything else is KEY=VALUE:
    eval.problems=200  eval.split=validation  eval.teacher_prompt=true  dataset=...  dataset.path=...
A run's own settings (data, prompts, limits) are used for what is not typed.

--plugin FILE   a Python file of your own that registers parts; needed again where the run was trained with one
--recipes DIR   a folder of your own recipes, searched first; ./recipes is always searched
"""

PATHS = (("dataset", "path"), ("model", "path"), ("model", "chat_template"))
"""Settings that may be a path relative to where a run was started."""


@dataclass(frozen=True)
class Target:
    """The model to measure."""

    words: tuple[str, ...]  # overrides that name it
    frozen: dict[str, Any] | None  # the config of the run it came from
    name: str


def main(arguments: list[str]) -> int:
    """Run `opsd eval ...`."""
    flags = Flags("eval")
    flags.add_argument("--recipes", metavar="DIR")
    flags.add_argument("--accept-changed-plugin", action="store_true")
    flags.add_argument("--step", metavar="N")
    flags.add_argument("--against", metavar="RUN")
    flags.add_argument("--resume", metavar="RUN")
    flags.add_argument("--tasks", metavar="TASK,TASK")
    flags.add_argument("--limit", type=int, metavar="N")
    flags.add_argument("--include", metavar="DIR")
    flags.add_argument("--chat-template", action="store_true")
    flags.add_argument("--json", action="store_true")
    given = flags.read(arguments)
    if given.resume is not None:
        return _resume(given, ["opsd", "eval", *arguments])
    if not given.words or "=" in given.words[0]:
        raise ConfigError("name a model or a run first: opsd eval runs/NAME [KEY=VALUE ...] (see `opsd eval --help`)")
    folders = find_folders(given.recipes)
    first, *words = given.words
    target = find_target(first, folders, accept_changed_plugin=given.accept_changed_plugin, step=given.step)
    if given.tasks is not None:
        from opsd_cli.commands.harness import measure_tasks

        if words or given.against:
            raise ConfigError("--tasks takes no settings and no --against: the tasks bring their own data and prompts")
        return measure_tasks(target.words, target.frozen, target.name, given)
    if odd := [flag for flag in ("limit", "include", "chat_template", "json") if vars(given)[flag]]:
        raise ConfigError(f"--{odd[0].replace('_', '-')} is for --tasks")
    return _measure(target, words, folders, given, command=["opsd", "eval", *arguments])


def _measure(target: Target, words: list[str], folders: RecipeFolders, given: Any, *, command: list[str]) -> int:
    """Start the measurement, and compare it with another run where that was asked for."""
    from opsd_cli.launch.start import start_run
    from opsd_cli.preflight import check
    from opsd_cli.ui.display import open_display

    other = None if given.against is None else _measured_run(given.against)
    if other is not None and (target.frozen is None or other.is_eval):
        # The same problems under the same prompts and limits: there is nothing to compare otherwise.
        frozen = frozen_of(other.path, accept_changed_plugin=given.accept_changed_plugin, verb="eval")
        kept = {section: target.frozen[section] for section in ("model", "lora")} if target.frozen else {}
        target = replace(target, frozen=frozen | kept)
    for word in words:
        if word.split("=", 1)[0] in ("model", "model.path"):
            raise ConfigError(f"'{word}': the model is the first word of opsd eval")
    own = [word for word in target.words if word.split("=", 1)[0] not in {typed.split("=", 1)[0] for typed in words}]
    _, members = check([*own, *words], folders, frozen=target.frozen)
    config = members[0].config
    if config.eval.problems == 0:
        raise ConfigError("eval.problems is 0, which measures nothing; give eval.problems=N")
    return start_run(
        config, task="eval", argv=command, hint=f"eval-{target.name}", open_display=open_display,
        after=None if other is None else partial(_compare, other),
    )  # fmt: skip


@dataclass(frozen=True)
class MeasuredRun:
    """A run whose answers are compared with."""

    path: Path
    is_eval: bool


def _measured_run(word: str) -> MeasuredRun:
    """Raises ConfigError for a run that has kept no completions."""
    from opsd_cli.run.folder import open_run_folder, read_command, shell_path

    folder = open_run_folder(word)
    if not any(folder.evaluations.glob("step_*.jsonl")):
        raise ConfigError(
            f"--against {word}: {shell_path(folder.path)} has measured nothing; run `opsd eval` on it first"
        )
    return MeasuredRun(folder.path, read_command(folder).get("task") == "eval")


def _compare(other: MeasuredRun, folder: RunFolder) -> None:
    """Print what a finished measurement won and lost against another run, problem by problem."""
    from opsd_cli.insight.history import read_history
    from opsd_cli.insight.versus import compared
    from opsd_cli.ui.theme import changes

    comparison = compared(read_history(other.path), read_history(folder.path))
    if comparison is None:
        print(f"opsd: no problem is in both {folder.name} and {other.path.name}: nothing to compare", file=sys.stderr)
        return
    print(f"{folder.name} against {other.path.name}, the same {comparison['problems']} problems: {changes(comparison)}")


def _resume(given: Any, command: list[str]) -> int:
    """Go on with a measurement that was stopped."""
    from opsd_cli.launch.start import resume_run
    from opsd_cli.preflight import config_of
    from opsd_cli.ui.display import open_display

    if given.words or given.step or given.against or given.recipes:
        raise ConfigError("opsd eval --resume RUN takes nothing else: it goes on with the settings it began with")
    return resume_run(
        given.resume, argv=command, changes={}, check=config_of, open_display=open_display, task="eval",
        accept_changed_plugin=given.accept_changed_plugin,
    )  # fmt: skip


def find_target(
    word: str,
    folders: RecipeFolders,
    *,
    accept_changed_plugin: bool = False,
    verb: str = "eval",
    step: str | None = None,
) -> Target:
    """What the first word of `opsd eval` (or of another `verb`) stands for; `step` names a checkpoint of a run. Raises
    ConfigError if it is no run and no model."""
    path = typed_path(word)
    run = next((p for p in (path, Path("runs") / word) if (p / "config.yaml").is_file()), None)
    if step is not None:
        if run is None:
            raise ConfigError(f"--step is of a run, and {word} is none")
        return _of_checkpoint(run, step, accept_changed_plugin=accept_changed_plugin, verb=verb)
    if run is not None:
        path = run / "model"
        if not path.is_dir():
            raise ConfigError(
                f"{run} has no model yet: a run exports it at its end; finish the run with `opsd train --resume "
                f"{run}`, or take its newest checkpoint: `opsd {verb} {run} --step last`"
            )
    if path.is_dir():
        return _of_folder(path, accept_changed_plugin=accept_changed_plugin, verb=verb)
    if word in folders.files["model"] and word != "hf":
        return Target((f"model={word}", "lora=none"), None, word)
    if path.is_absolute() or word.startswith((".", "~")) or word.count("/") > 1 or path.exists():
        raise ConfigError(f"{word}: neither a run folder nor a model folder")
    return Target(("model=hf", f"model.path={quote(word)}", "lora=none"), None, word.rpartition("/")[2])


def _of_checkpoint(run: Path, step: str, *, accept_changed_plugin: bool, verb: str) -> Target:
    """A run's checkpoint, put into the model that the run started from, its adapter and all."""
    from opsd_cli.api.exporting import checkpoint_of

    checkpoint = checkpoint_of(run, step_word(step))
    frozen = frozen_of(run, accept_changed_plugin=accept_changed_plugin, verb=verb)
    words = (f"model.checkpoint={quote(str(checkpoint))}",)
    return Target(words, frozen, f"{run.name}-{checkpoint.name}")


def _of_folder(folder: Path, *, accept_changed_plugin: bool, verb: str) -> Target:
    """A Hugging Face folder; the one inside a run folder is measured with the run's settings."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: no config.json in it, so it is not a Hugging Face model folder")
    path = folder.absolute()
    words: tuple[str, ...] = ("model=hf", f"model.path={quote(str(path))}", "lora=none")
    # What an adapter has learnt was kept by merging it into float32 weights; in half precision it would be lost here.
    words += ("model.dtype=float32",) if _is_merged_wide(folder) else ()
    is_run = path.name == "model" and (path.parent / "config.yaml").is_file()
    frozen = frozen_of(path.parent, accept_changed_plugin=accept_changed_plugin, verb=verb) if is_run else None
    return Target(words, frozen, path.parent.name if is_run else path.name)


def _is_merged_wide(folder: Path) -> bool:
    """Whether the folder is an export whose adapter was merged into float32 weights."""
    if not (folder / "adapter").is_dir():
        return False
    try:
        held = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # told when the model is loaded
    return isinstance(held, dict) and held.get("dtype") == "float32"


def frozen_of(run: Path, *, accept_changed_plugin: bool, verb: str) -> dict[str, Any]:
    """The run's frozen config; relative paths in it are looked up where the run was started."""
    from opsd_cli.run.folder import RunFolder, from_where_started, read_config, shell_path
    from opsd_cli.run.plugin_copies import require_plugins

    command = f"opsd {verb} {shell_path(run)}"
    require_plugins(RunFolder(run), command=command, accept_changed=accept_changed_plugin)
    print(f"opsd: settings of {run.name} are used for what is not typed", file=sys.stderr)
    return from_where_started(RunFolder(run), read_config(RunFolder(run)), PATHS)
