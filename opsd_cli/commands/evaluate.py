"""`opsd eval`: measure a model, or the model of a run, on held-out problems. The first word is a run, a folder, a hub
id or a model option; a run's own settings are used for what is not typed."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsd_cli.commands.flags import Flags, quote
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.paths import typed_path
from opsd_cli.settings.recipe_files import RecipeFolders, find_folders

HELP = """\
opsd eval runs/NAME                                    the model of a run, as the run itself measured it
opsd eval runs/NAME/model dataset=gsm8k eval.problems=50
opsd eval Qwen/Qwen3-1.7B recipe=gsm8k                 a model from the hub, with a recipe's prompts and data
opsd eval tiny dataset=gsm8k dataset.path=FOLDER       a model option (`opsd recipes show model`)

The first word is a run folder, a Hugging Face folder, a hub id or a model option. Everything else is KEY=VALUE:
    eval.problems=200  eval.split=validation  eval.teacher_prompt=true  dataset=...  dataset.path=...
A run's own settings (data, prompts, limits) are used for what is not typed.

--plugin FILE   a Python file of your own that registers parts; needed again where the run was trained with one
--recipes DIR   a folder of your own recipes, searched first; ./recipes is always searched
"""

PATHS = (("dataset", "path"), ("model", "chat_template"))
"""Settings that may be a path relative to where a run was started."""


@dataclass(frozen=True)
class Target:
    """The model to measure."""

    words: tuple[str, ...]  # overrides that name it
    frozen: dict[str, Any] | None  # the config of the run it came from
    name: str


def main(arguments: list[str]) -> int:
    """Run `opsd eval ...`."""
    from opsd_cli.launch.launchers import start_run
    from opsd_cli.preflight import check
    from opsd_cli.ui.display import open_display

    flags = Flags("eval")
    flags.add_argument("--recipes", metavar="DIR")
    flags.add_argument("--accept-changed-plugin", action="store_true")
    given = flags.read(arguments)
    if not given.words or "=" in given.words[0]:
        raise ConfigError("name a model or a run first: opsd eval runs/NAME [KEY=VALUE ...] (see `opsd eval --help`)")
    folders = find_folders(given.recipes)
    first, *words = given.words
    target = find_target(first, folders, accept_changed_plugin=given.accept_changed_plugin)
    for word in words:
        if word.split("=", 1)[0] in ("model", "model.path"):
            raise ConfigError(f"'{word}': the model is the first word of opsd eval")
    own = [word for word in target.words if word.split("=", 1)[0] not in {typed.split("=", 1)[0] for typed in words}]
    _, members = check([*own, "lora=none", *words], folders, frozen=target.frozen)
    config = members[0].config
    if config.eval.problems == 0:
        raise ConfigError("eval.problems is 0, which measures nothing; give eval.problems=N")
    command = ["opsd", "eval", *arguments]
    return start_run(config, task="eval", argv=command, hint=f"eval-{target.name}", open_display=open_display)


def find_target(
    word: str, folders: RecipeFolders, *, accept_changed_plugin: bool = False, verb: str = "eval"
) -> Target:
    """What the first word of `opsd eval` (or of another `verb`) stands for. Raises ConfigError if it is no run and no
    model."""
    path = typed_path(word)
    run = next((p for p in (path, Path("runs") / word) if (p / "config.yaml").is_file()), None)
    if run is not None:
        path = run / "model"
        if not path.is_dir():
            raise ConfigError(
                f"{run} has no model yet: a run exports it at its end; finish the run with `opsd train --resume {run}`"
            )
    if path.is_dir():
        return _of_folder(path, accept_changed_plugin=accept_changed_plugin, verb=verb)
    if word in folders.files["model"] and word != "hf":
        return Target((f"model={word}",), None, word)
    if path.is_absolute() or word.startswith((".", "~")) or word.count("/") > 1 or path.exists():
        raise ConfigError(f"{word}: neither a run folder nor a model folder")
    return Target(("model=hf", f"model.path={quote(word)}"), None, word.rpartition("/")[2])


def _of_folder(folder: Path, *, accept_changed_plugin: bool, verb: str) -> Target:
    """A Hugging Face folder; the one inside a run folder is measured with the run's settings."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: no config.json in it, so it is not a Hugging Face model folder")
    path = folder.absolute()
    words: tuple[str, ...] = ("model=hf", f"model.path={quote(str(path))}")
    # What an adapter has learnt was kept by merging it into float32 weights; in half precision it would be lost here.
    words += ("model.dtype=float32",) if _is_merged_wide(folder) else ()
    is_run = path.name == "model" and (path.parent / "config.yaml").is_file()
    frozen = _frozen(path.parent, accept_changed_plugin=accept_changed_plugin, verb=verb) if is_run else None
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


def _frozen(run: Path, *, accept_changed_plugin: bool, verb: str) -> dict[str, Any]:
    """The run's frozen config; relative paths in it are looked up where the run was started."""
    from opsd_cli.run.folder import RunFolder, from_where_started, read_config, shell_path
    from opsd_cli.run.plugin_copies import require_plugins

    command = f"opsd {verb} {shell_path(run)}"
    require_plugins(RunFolder(run), command=command, accept_changed=accept_changed_plugin)
    print(f"opsd: settings of {run.name} are used for what is not typed", file=sys.stderr)
    return from_where_started(RunFolder(run), read_config(RunFolder(run)), PATHS)
