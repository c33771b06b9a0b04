"""Hydra, and all of it: THE ONLY file that imports hydra or omegaconf. Owns the search path (a user's folders
first), parsing an override, composing a tree of plain dicts, and running a command under `hydra.main`, so
that overrides, sweeps, `--cfg` and `--config-dir` are what people know. What a setting means is `config`'s
business.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, OverrideType, RangeSweep
from hydra.core.override_parser.types import Override as HydraOverride
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.folders import RecipeFolders
from opsd_cli.settings.overrides import Override, leaves, slip

VERSION_BASE = "1.3"
MOST_MEMBERS = 1000  # runs of one sweep; each is composed and checked before the first one starts
SIGNS = {OverrideType.CHANGE: "", OverrideType.ADD: "+", OverrideType.FORCE_ADD: "++", OverrideType.DEL: "~"}


class OwnFoldersFirst(SearchPathPlugin):
    """Puts the user's recipe folders before the built-in one; Hydra itself would search them after it."""

    before: tuple[Path, ...] = ()
    after: tuple[Path, ...] = ()

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in self.before:
            search_path.prepend(provider="opsd", path=f"file://{folder}", anchor="main")
        for folder in self.after:
            search_path.append(provider="opsd", path=f"file://{folder}", anchor=SearchPathQuery(provider="main"))


@dataclass(frozen=True)
class Composed:
    """A composed tree of plain dicts, interpolations still in it, and which option of each group made it."""

    tree: dict[str, Any]
    choices: dict[str, str | None]


@dataclass(frozen=True)
class Job:
    """What `hydra.main` hands to one run: the resolved tree and the choices that made it."""

    tree: dict[str, Any]
    choices: dict[str, str | None]
    number: int | None  # of a sweep's member; None outside sweeps
    overrides: tuple[str, ...]  # as this member's, without Hydra's own
    subfolder: str | None  # the resolved `hydra.sweep.subdir` that was typed, or None


@contextmanager
def session(folders: RecipeFolders) -> Iterator[None]:
    """Hydra, ready to compose from these folders."""
    with _search_path(folders):
        GlobalHydra.instance().clear()
        with _plain_words(), hydra.initialize_config_dir(str(folders.builtin), version_base=VERSION_BASE):
            yield


def parse_override(text: str, *, options: Sequence[str] = ()) -> Override:
    """One argument, parsed by Hydra's own grammar; sweeps are spelt out. Needs a `session`, for `glob(...)`.

    Raises ConfigError in plain words for a text that is no override.
    """
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    try:
        parsed = parser.parse_overrides([text])[0]
        texts = _texts(parsed)
        values = [parser.parse_overrides([f"key={item}"])[0].value() for item in texts]
    except (HydraException, RecursionError):
        raise ConfigError(slip(text, options)) from None
    if not parsed.key_or_group:
        raise ConfigError(slip(text, options))
    return Override(
        text=text,
        sign=SIGNS[parsed.type],
        key=parsed.key_or_group,
        package=parsed.package,
        values=tuple(values),
        texts=tuple(texts),
        swept=parsed.is_sweep_override(),
    )


def _texts(parsed: HydraOverride) -> list[str]:
    value = parsed.value()
    if isinstance(value, IntervalSweep):
        return [str(value.start)]  # stands for the whole interval when it is checked
    if not parsed.is_sweep_override():
        return [parsed.get_value_element_as_str()]
    if isinstance(value, RangeSweep):
        value.shuffle = False  # it would first make the whole list, however long
        if value.step == 0:
            raise ConfigError(f"'{parsed.input_line}': the step of a range cannot be 0")
    texts = list(itertools.islice(parsed.sweep_string_iterator(), MOST_MEMBERS + 1))
    if not 0 < len(texts) <= MOST_MEMBERS:
        count = f"more than {MOST_MEMBERS} values" if texts else "no value"
        raise ConfigError(f"'{parsed.input_line}' lists {count}; a sweep has 1 to {MOST_MEMBERS} runs")
    return texts


def composed(choices: Sequence[str]) -> Composed:
    """The tree of these group choices (`recipe=gsm8k`). Needs a `session`; raises ConfigError."""
    with _plain_words():
        config = hydra.compose("config", overrides=list(choices), return_hydra_config=True)
        tree = _plain(config)
    hydra_node = tree.pop("hydra")
    return Composed(tree, {str(key): value for key, value in hydra_node["runtime"]["choices"].items()})


def resolved(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The tree with every `${a.b}` replaced, and what is wrong with those that point nowhere, by dotted key."""
    config = OmegaConf.create(tree)
    problems = {}
    for key, value in leaves(tree):
        if not isinstance(value, str | list) or "${" not in str(value):
            continue
        try:
            OmegaConf.to_container(OmegaConf.create({"value": OmegaConf.select(config, key)}), resolve=True)
        except OmegaConfBaseException as error:
            problems[key] = f"{value} points to nothing ({str(error).splitlines()[0]})"
    if problems:
        return tree, problems
    return _plain(config, resolve=True), {}


def _plain(config: Any, *, resolve: bool = False) -> dict[str, Any]:
    plain = OmegaConf.to_container(config, resolve=resolve)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def run(
    arguments: Sequence[str], folders: RecipeFolders, *, subfolder: str | None, job: Callable[[Job], float]
) -> bool:
    """Run `job` under `hydra.main` with Hydra's own command line: once, or once per member of a sweep.

    `subfolder` is a typed `hydra.sweep.subdir`: it is resolved here for each member instead of by Hydra,
    which would make the folder before anyone has looked at its name. `job` returns the number that an
    optimising sweeper minimises or maximises and reports its own failures. True unless Hydra has said what it could not
    do. Raises ConfigError for what Hydra refuses.
    """

    def task(config: Any) -> float:
        return job(_job(config, subfolder))

    main = hydra.main(version_base=VERSION_BASE, config_path=str(folders.builtin), config_name="config")(task)
    GlobalHydra.instance().clear()
    with _search_path(folders), _plain_words(), _command_line(arguments):
        try:
            main()
        except SystemExit as end:  # after --hydra-help, and when --package names nothing, which it has said then
            return not end.code
    return True


def _job(config: Any, subfolder: str | None) -> Job:
    own = HydraConfig.get()
    tree = _plain(config, resolve=True)
    is_member = own.mode == RunMode.MULTIRUN
    typed = None
    if is_member and subfolder is not None:
        whole = OmegaConf.create({**tree, "hydra": own, "subfolder": subfolder})
        typed = str(OmegaConf.select(whole, "subfolder"))
    return Job(
        tree=tree,
        choices=dict(own.runtime.choices),
        number=own.job.num if is_member else None,
        overrides=tuple(own.overrides.task),
        subfolder=typed,
    )


@contextmanager
def _search_path(folders: RecipeFolders) -> Iterator[None]:
    Plugins.instance().register(OwnFoldersFirst)
    OwnFoldersFirst.before, OwnFoldersFirst.after = folders.own, folders.extra
    try:
        yield
    finally:
        OwnFoldersFirst.before, OwnFoldersFirst.after = (), ()


@contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    """`hydra.main` reads sys.argv; without HYDRA_FULL_ERROR it would print its errors itself and exit."""
    before = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = ["opsd", *arguments], "1"
    try:
        yield
    finally:
        sys.argv = before[0]
        if before[1] is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before[1]


@contextmanager
def _plain_words() -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise into a ConfigError of one line each."""
    try:
        yield
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: of a number with 5000 digits
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
        text = str(error) or str(cause)
        raise ConfigError(" ".join(text.split())) from error
    except RecursionError:
        raise ConfigError("the recipe is nested too deeply, or it builds on itself") from None
