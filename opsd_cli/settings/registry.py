"""The plug-ins of a config: what the program asks of each kind, and the registry (group, name) -> frozen dataclass. A
plug-in's fields are its YAML keys; `recipes/<group>/<name>.yaml` holds the defaults. A name is the only way in: nothing
in a recipe is ever imported by path. The classes are in folders that import the settings, so the types of those folders
are `Any` here; each folder states them in full."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar, dataclass_transform, overload, runtime_checkable

from opsd_cli.settings.errors import ConfigError


class Dataset(Protocol):
    """Problems to train on and to measure: `load` returns `data.problems.Splits`, `instruction` follows a question."""

    @property
    def instruction(self) -> str: ...
    def load(self) -> Any: ...


class Divergence(Protocol):
    """What is minimised at one token; `loss.divergences` has the protocol with its tensors."""

    @property
    def needs_teacher(self) -> bool: ...
    def value_and_gradient(self, tokens: Any) -> tuple[Any, Any]: ...


class Launcher(Protocol):
    """How ranks are started: `prepare` returns a `launch.attempt.Prepared`; `launch.launchers` and `launch.over_ssh`
    explain the fields. `beside` is how many processes the ranks start on devices of their own."""

    @property
    def device(self) -> Literal["auto", "cpu", "cuda"]: ...
    @property
    def threads(self) -> int | None: ...
    @property
    def save_seconds(self) -> float: ...
    @property
    def stall_seconds(self) -> float | None: ...
    def prepare(self, environ: Mapping[str, str], *, beside: int = 0) -> Any: ...


class Grader(Protocol):
    """Which completions are right: `build` returns a `data.graders.Grades`, which lives as long as the run."""

    def build(self) -> Any: ...


class Sampler(Protocol):
    """Where completions come from; `sampling.samplers` has the protocol with its types."""

    def sample(self, completer: Any, request: Any) -> list[Any]: ...


class Teacher(Protocol):
    """Whose distribution the student is pulled towards: `build` returns a `teachers.teachers.Teacher` or None."""

    def build(self, engine: Any) -> Any: ...


class TokenRule(Protocol):
    """Which completion tokens count, and how much: a factor for each token of a `data.token_rules.Completion`."""

    def weights(self, completion: Any) -> Any: ...


class Registered(Protocol):
    """What `plugin` adds to each of these classes."""

    plugin_name: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


class RegisteredDataset(Dataset, Registered, Protocol): ...


class RegisteredDivergence(Divergence, Registered, Protocol): ...


class RegisteredGrader(Grader, Registered, Protocol): ...


class RegisteredLauncher(Launcher, Registered, Protocol): ...


class RegisteredSampler(Sampler, Registered, Protocol): ...


class RegisteredTeacher(Teacher, Registered, Protocol): ...


class RegisteredTokenRule(TokenRule, Registered, Protocol): ...


@runtime_checkable
class ShowsColumns(Protocol):
    """A dataset whose rows have further columns: `load_showing` is `load`, with these in `Problem.columns`."""

    def load_showing(self, columns: tuple[str, ...]) -> Any: ...


@runtime_checkable
class LimitsRows(Protocol):
    """A sampler that draws at most so many completions at once."""

    @property
    def max_rows(self) -> int: ...


@runtime_checkable
class CompletesPrompt(Protocol):
    """A sampler that can complete either role's prompt."""

    @property
    def prompt(self) -> Literal["student", "teacher"]: ...


@runtime_checkable
class DrawsBeside(Protocol):
    """A sampler that may draw in processes beside the ranks."""

    @property
    def placement(self) -> Literal["shared", "separate"]: ...
    @property
    def processes(self) -> int: ...


@runtime_checkable
class SetsRanks(Protocol):
    """A launcher whose number of ranks is a setting."""

    @property
    def ranks(self) -> int | None: ...


@runtime_checkable
class PlacesRanks(Protocol):
    """A launcher whose number of ranks on each machine is a setting."""

    @property
    def ranks_per_node(self) -> int: ...


@runtime_checkable
class RunsWords(Protocol):
    """A launcher with settings that name what is run, which are therefore typed and never taken from a file."""

    @property
    def typed_only(self) -> Mapping[str, object]:
        """Of those that are set: dotted key -> value."""


T = TypeVar("T")
DatasetT = TypeVar("DatasetT", bound=Dataset)
DivergenceT = TypeVar("DivergenceT", bound=Divergence)
GraderT = TypeVar("GraderT", bound=Grader)
LauncherT = TypeVar("LauncherT", bound=Launcher)
SamplerT = TypeVar("SamplerT", bound=Sampler)
TeacherT = TypeVar("TeacherT", bound=Teacher)
TokenRuleT = TypeVar("TokenRuleT", bound=TokenRule)

_REGISTRIES: dict[str, dict[str, type]] = {}


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass that pydantic validates strictly and without unknown keys."""
    cls.__pydantic_config__ = {"extra": "forbid", "strict": True, "allow_inf_nan": False}  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True)(cls)


@overload
def plugin(kind: Literal["dataset"], name: str) -> Callable[[type[DatasetT]], type[DatasetT]]: ...
@overload
def plugin(kind: Literal["divergence"], name: str) -> Callable[[type[DivergenceT]], type[DivergenceT]]: ...
@overload
def plugin(kind: Literal["grader"], name: str) -> Callable[[type[GraderT]], type[GraderT]]: ...
@overload
def plugin(kind: Literal["launcher"], name: str) -> Callable[[type[LauncherT]], type[LauncherT]]: ...
@overload
def plugin(kind: Literal["sampler"], name: str) -> Callable[[type[SamplerT]], type[SamplerT]]: ...
@overload
def plugin(kind: Literal["teacher"], name: str) -> Callable[[type[TeacherT]], type[TeacherT]]: ...
@overload
def plugin(kind: Literal["token_rule"], name: str) -> Callable[[type[TokenRuleT]], type[TokenRuleT]]: ...
@dataclass_transform(frozen_default=True, kw_only_default=True)
def plugin(kind: str, name: str) -> Callable[[type[Any]], type[Any]]:
    """Register a settings dataclass as the option `name` of the group `kind` (for example divergence, jsd). Raises
    ConfigError for a name that is taken."""

    def register(cls: type[Any]) -> type[Any]:
        options = _REGISTRIES.setdefault(kind, {})
        if name in options:
            taken = options[name]
            raise ConfigError(f"{kind}={name} is taken by {taken.__module__}.{taken.__qualname__}; choose another name")
        options[name] = settings(cls)
        cls.plugin_name = name
        return options[name]

    return register


def forget_module(module: str) -> None:
    """Take what a module has registered out of the registries."""
    for options in _REGISTRIES.values():
        for name in [name for name, cls in options.items() if cls.__module__ == module]:
            del options[name]


def plugin_names(kind: str) -> tuple[str, ...]:
    return tuple(sorted(_REGISTRIES[kind]))


def find_plugin(kind: str, name: object) -> type[Any]:
    """The dataclass behind `kind=name`. Raises ConfigError with the nearest name if there is none."""
    options = _REGISTRIES[kind]
    if not isinstance(name, str) or name not in options:
        raise ConfigError(
            f"{kind}.name is {name!r}, which is not one of {', '.join(sorted(options))}"
            + did_you_mean(str(name), options)
            + "; one of your own is registered by its file: --plugin FILE"
        )
    return options[name]


def did_you_mean(word: str, known: Iterable[str], *, prefix: str = "", cutoff: float = 0.6) -> str:
    """`" - did you mean '<prefix>x'?"` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f" - did you mean '{prefix}{near[0]}'?" if near else ""
