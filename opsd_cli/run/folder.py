"""The run folder: its layout and name, its frozen config, the command that was typed, and the errors its ranks leave.

config.yaml   the frozen config          command.json  what was typed, where, by which version
events.jsonl  what the run reported      samples.jsonl some rollouts
logs/         one per rank               checkpoints/  step_000020/ ... and latest
model/        the result                 summary.json  the result in numbers
crash.txt     tracebacks of a bug        run.lock      which process works in the folder (`run.lock`)
evaluations/  every completion of them   nonfinite/    rollouts of updates that were refused
plugins/      copies of --plugin FILE    slurm/        batch script and output of its jobs
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from opsd_cli import __version__
from opsd_cli.run.events import read_events
from opsd_cli.safety.secrets import redact
from opsd_cli.settings.errors import ConfigError, DataError, OutsideError, display_path
from opsd_cli.settings.paths import typed_path
from opsd_cli.settings.registry import did_you_mean
from opsd_cli.settings.resume_rules import later
from opsd_cli.settings.trees import leaves, plain_yaml

_OF_FAR_RANKS = ("deepspeed.log", "nodes.json", "orders", "hub.*")
"""In `logs`, of a run on several machines (`launch.far_ranks`)."""


class RunFolder:
    """A run folder's paths. Creating the object creates nothing on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.config = path / "config.yaml"
        self.command = path / "command.json"
        self.events = path / "events.jsonl"
        self.samples = path / "samples.jsonl"
        self.logs = path / "logs"
        self.evaluations = path / "evaluations"  # see `run.evaluations`
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.summary = path / "summary.json"
        self.crash = path / "crash.txt"
        self.lock = path / "run.lock"
        self.nonfinite = path / "nonfinite"
        self.plugins = path / "plugins"
        self.slurm = path / "slurm"  # see `launch.submit`

    def log_of(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}.log"

    def error_of(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}.error"


def new_run_folder(root: str | Path, *, name: str | None, hint: str) -> RunFolder:
    """Create an empty run folder `root/name`, or `root/<hint>-001` with the next free number. Raises ConfigError if the
    name is taken, OutsideError if the folder cannot be created."""
    root = typed_path(root).absolute()
    with writing(root):
        if root.exists() and not root.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        root.mkdir(parents=True, exist_ok=True)
    if name is not None:
        path = root / name
        if not _create(path):
            raise name_taken(path)
        return RunFolder(path)
    stem = safe_stem(hint)
    taken = (re.fullmatch(rf"{re.escape(stem)}-([0-9]+)", entry.name) for entry in root.iterdir())
    number = 1 + max((int(match[1]) for match in taken if match), default=0)
    while not _create(path := root / f"{stem}-{number:03d}"):
        number += 1
    return RunFolder(path)


def name_taken(path: Path) -> ConfigError:
    """What is said of a name that is taken."""
    return ConfigError(
        f"run folder {path} exists and is never overwritten; "
        f"continue it with `opsd train --resume {shell_path(path)}`, or give another run.name"
    )


def open_run_folder(run: str | Path, *, root: str | Path = "runs") -> RunFolder:
    """The existing run folder `run`: a path, or a name under `root`. Raises ConfigError with the nearest name."""
    candidates = [typed_path(run), typed_path(root) / run]
    for path in candidates:
        if (path / "config.yaml").is_file():
            return RunFolder(path.absolute())
    parent = candidates[0].parent if len(candidates[0].parts) > 1 else Path(root)
    known = [entry.parent.name for entry in parent.glob("*/config.yaml")] if parent.is_dir() else []
    raise ConfigError(
        f"no run folder {str(run)!r}: no config.yaml in {' or '.join(str(path) for path in candidates)}"
        + did_you_mean(candidates[0].name, known)
    )


def safe_stem(hint: str) -> str:
    """`hint` as the first part of a run name: letters, digits, dot, dash and underscore, at most 70 characters."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", hint).strip("-._")[:70] or "run"


def shell_path(path: Path) -> str:
    """A path to type or to copy: relative if it lies below the working directory, quoted for a shell."""
    return shlex.quote(display_path(path))


def has_begun(folder: RunFolder) -> bool:
    """True once everything was loaded and the run recorded its start."""
    return any(event["kind"] == "run_started" for event in read_events(folder.events))


def discard_unstarted(folder: RunFolder) -> bool:
    """Remove the folder of a run that never began, unless it holds a foreign file. True if it is gone."""
    if has_begun(folder):
        return False
    patterns = ("rank_*", "track_*", *_OF_FAR_RANKS)
    logs = [path for pattern in patterns for path in folder.logs.glob(pattern)]
    own = [
        folder.config,
        folder.command,
        folder.events,
        folder.samples,
        folder.lock,
        *logs,
        *folder.plugins.glob("*.py"),
    ]
    with contextlib.suppress(OSError):
        for path in own:
            path.unlink(missing_ok=True)
        folder.logs.rmdir()
        if folder.plugins.is_dir():
            folder.plugins.rmdir()
        folder.path.rmdir()
    return not folder.path.exists()


def write_config(folder: RunFolder, tree: Mapping[str, Any]) -> None:
    """Freeze a plain tree (of `settings.config.plain_tree`) as config.yaml, replacing it in one move."""
    header = (
        f"# The frozen config of run {folder.name}, written by opsd {__version__}. Do not edit it.\n"
        f"# Continue the run:  opsd train --resume {shell_path(folder.path)}\n"
    )
    tree = json.loads(json.dumps(tree))  # tuples as lists: YAML has one kind of sequence
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110)
    replace_file(folder.config, header + text)


def read_config(folder: RunFolder) -> dict[str, Any]:
    """The plain tree that `write_config` froze; `settings.config.typed_config` makes it a Config. Raises DataError."""
    try:
        tree = plain_yaml(folder.config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{folder.config} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise DataError(f"{folder.config} holds no settings; it is not the config of a run")
    for key, value in later(dict(leaves(tree))).items():  # an earlier version's config lacks them
        section, _, name = key.partition(".")
        if "divergence" in tree:  # whole, but for sections that are younger
            tree.setdefault(section, {})
        if isinstance(tree.get(section), dict):
            tree[section].setdefault(name, value)
    return tree


def from_where_started(folder: RunFolder, tree: dict[str, Any], places: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The tree of `read_config` with relative paths (section, key) that are not here looked up where the run was
    started."""
    started_in = Path(read_command(folder).get("cwd", "."))
    for section, key in places:
        value = tree.get(section, {}).get(key)
        if isinstance(value, str) and not Path(value).exists() and (started_in / value).exists():
            tree[section][key] = str(started_in / value)
    return tree


def refuse_links(folder: Path) -> None:
    """Raise ConfigError if anything that a resumed run would write to is a symbolic link."""
    names = ("logs", "checkpoints", "model", "evaluations", "nonfinite", "plugins", "slurm")
    below = [folder / name for name in names]
    entered = [folder, *(path for path in below if path.is_dir() and not path.is_symlink())]
    for path in (*below, *(entry for parent in entered for entry in parent.iterdir())):
        if path.is_symlink():
            raise ConfigError(
                f"{display_path(path)} is a symbolic link, and a run writes only inside its own folder; replace it "
                "with the file itself"
            )


def write_command(folder: RunFolder, *, argv: Sequence[str], **facts: Any) -> None:
    """Record what was typed. Earlier records of a resumed run are kept under `earlier`, newest last."""
    before = read_command(folder)
    earlier = [*before.pop("earlier", []), before] if before else []
    record = {
        "argv": list(map(redact, argv)),
        "cwd": os.getcwd(),
        "opsd": __version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "pid": os.getpid(),
        **facts,
        "earlier": earlier,
    }
    replace_file(folder.command, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def read_command(folder: RunFolder) -> dict[str, Any]:
    """What `write_command` recorded last; empty if there is nothing to read."""
    shapes = {
        "cwd": str,
        "argv": list,
        "earlier": list,
        "plugins": list,
    }  # a folder from someone else may hold anything
    with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):  # AttributeError: of a list
        record = json.loads(folder.command.read_text(encoding="utf-8"))
        return {key: value for key, value in record.items() if isinstance(value, shapes.get(key, object))}
    return {}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into an OutsideError that names the path."""
    try:
        yield
    except OSError as error:
        raise OutsideError(
            f"cannot write {path}: {error.strerror} (errno {error.errno}); choose another place with run.root=FOLDER"
        ) from None


def _create(path: Path) -> bool:
    """Create a run folder; False if the name is taken."""
    with writing(path):
        try:
            path.mkdir()
        except FileExistsError:
            return False
        (path / "logs").mkdir()
    return True


def replace_file(path: Path, text: str) -> None:
    """Write a file anew, in one move. Raises OutsideError."""
    beside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with writing(path):
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(beside, path)
