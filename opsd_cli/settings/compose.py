"""Hydra: the only file that imports hydra or omegaconf. It parses an override, composes a tree of plain dicts, and runs
sweeps, `--cfg` and `--info` under `hydra.main`, so that these are what people know from Hydra."""

from __future__ import annotations

import itertools
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from hydra.core.utils import env_override
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.recipe_files import GROUPS, RecipeFolders
from opsd_cli.settings.trees import leaves

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
class Override:
    """One parsed `KEY=VALUE`."""

    text: str
    sign: str  # "", "+", "++" or "~"
    key: str
    package: str | None
    values: tuple[Any, ...]  # one, or every item of a sweep
    texts: tuple[str, ...]  # of the values, as Hydra would type them
    swept: bool

    @property
    def is_choice(self) -> bool:
        """Chooses an option of one of our groups, rather than setting a value."""
        return self.key in GROUPS and not any(isinstance(value, Mapping) for value in self.values)

    @property
    def is_hydra(self) -> bool:
        return re.match(r"hydra\b", self.key) is not None


@dataclass(frozen=True)
class Job:
    """One member of a sweep."""

    tree: dict[str, Any]  # resolved
    number: int
    overrides: tuple[str, ...]  # as this member's, without Hydra's own
    subfolder: str | None  # the resolved `hydra.sweep.subdir` that was typed, or None
    chosen: Mapping[str, str | None]  # group -> option


@contextmanager
def session(folders: RecipeFolders) -> Iterator[None]:
    """Hydra, ready to compose from these folders."""
    with _search_path(folders):
        GlobalHydra.instance().clear()
        with _config_errors(), hydra.initialize_config_dir(str(folders.builtin), version_base=VERSION_BASE):
            yield


# `model.path=~/mine`: a shell hands it on as it is, and the grammar refuses it. A list of paths is the user's to quote.
HOME_PATH = re.compile(r"""^([\w.+/@-]+=)(~[^,"'\\]*)$""")


def parse_override(text: str) -> Override | None:
    """One argument, parsed by Hydra's own grammar, with every value of a sweep; None if the grammar refuses it. Needs a
    `session`, for `glob(...)`. Raises ConfigError for a sweep without a value or with too many."""
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    text = HOME_PATH.sub(r'\1"\2"', text)
    try:
        parsed = parser.parse_overrides([text])[0]
        texts = _texts(parsed)
        values = [parser.parse_overrides([f"key={item}"])[0].value() for item in texts]
    except (HydraException, RecursionError):
        return None
    if not parsed.key_or_group:
        return None
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


def compose(choices: Sequence[str]) -> tuple[dict[str, Any], dict[str, str | None]]:
    """The tree of these group choices (`recipe=gsm8k`) as plain dicts, interpolations still in it, and which option of
    each group made it. Needs a `session`; raises ConfigError."""
    with _config_errors():
        tree = _plain(hydra.compose("config", overrides=list(choices), return_hydra_config=True))
    chosen = tree.pop("hydra")["runtime"]["choices"]
    return tree, {str(group): option for group, option in chosen.items()}


def resolve(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
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
    return (tree, problems) if problems else (_plain(config, resolve=True), {})


def _plain(config: Any, *, resolve: bool = False) -> dict[str, Any]:
    plain = OmegaConf.to_container(config, resolve=resolve)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def run_sweep(
    arguments: Sequence[str], folders: RecipeFolders, *, subfolder: str | None, run_member: Callable[[Job], float]
) -> None:
    """Call `run_member` once for each member that Hydra's sweeper composes, in this process or where `hydra/launcher`
    says. It returns the number that an optimising sweeper minimises or maximises, and reports its own failures.
    `subfolder` is a typed `hydra.sweep.subdir`: Hydra would make that folder before its name is checked, so it is
    resolved here for each member instead. Raises ConfigError for what Hydra refuses."""

    def task(config: Any) -> float:
        own, tree = HydraConfig.get(), _plain(config, resolve=True)
        assert own.mode == RunMode.MULTIRUN
        number, typed = own.job.num, tuple(own.overrides.task)
        chosen = {group: own.runtime.choices.get(group) for group in GROUPS}
        named = None if subfolder is None else subfolder_of(subfolder, tree, number=number, overrides=typed)
        return run_member(Job(tree, number, typed, named, chosen))

    logging.disable(logging.INFO)  # of a sweeper's library, which would log to the screen in colours
    try:
        _hydra_main(["--multirun", *arguments], folders, task)
    finally:
        logging.disable(logging.NOTSET)


def subfolder_of(text: str, tree: Mapping[str, Any], *, number: int, overrides: Sequence[str]) -> str:
    """A typed `hydra.sweep.subdir` with its references replaced, for one member. Raises ConfigError."""
    job = {"num": number, "id": str(number), "override_dirname": ",".join(sorted(overrides))}
    with _config_errors():
        everything = OmegaConf.create({**tree, "hydra": {"job": job}, "subfolder": text})
        return str(OmegaConf.select(everything, "subfolder"))


def print_config(arguments: Sequence[str], folders: RecipeFolders) -> bool:
    """Let Hydra print what its flags (`--cfg`, `--info`, `--hydra-help`) ask for. False if it printed an error."""
    return _hydra_main(arguments, folders, lambda config: 0.0)


def _hydra_main(arguments: Sequence[str], folders: RecipeFolders, task: Callable[[Any], float]) -> bool:
    main = hydra.main(version_base=VERSION_BASE, config_path=str(folders.builtin), config_name="config")(task)
    GlobalHydra.instance().clear()
    before = sys.argv
    # hydra.main reads sys.argv; without HYDRA_FULL_ERROR it would print its errors itself and exit.
    with _search_path(folders), _config_errors(), env_override({"HYDRA_FULL_ERROR": "1"}):
        try:
            sys.argv = ["opsd", *arguments]
            main()
        except SystemExit as end:  # after --hydra-help, and after the message that --package names nothing
            return not end.code
        finally:
            sys.argv = before
    return True


@contextmanager
def _search_path(folders: RecipeFolders) -> Iterator[None]:
    Plugins.instance().register(OwnFoldersFirst)
    OwnFoldersFirst.before, OwnFoldersFirst.after = folders.own, folders.extra
    try:
        yield
    finally:
        OwnFoldersFirst.before, OwnFoldersFirst.after = (), ()


@contextmanager
def _config_errors() -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise into a ConfigError of one line."""
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
