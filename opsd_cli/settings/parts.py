"""What the program asks of the plug-ins in a config: dataset, divergence, launcher, sampler and teacher. Their classes
are in folders that import the settings, so the types of those folders are `Any` here; each folder states them in
full."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable


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
    """How ranks are started: `prepare` returns a `launch.attempt.Prepared`; `launch.launchers` explains the
    settings."""

    @property
    def device(self) -> Literal["auto", "cpu", "cuda"]: ...
    @property
    def threads(self) -> int | None: ...
    @property
    def save_seconds(self) -> float: ...
    @property
    def stall_seconds(self) -> float | None: ...
    def prepare(self, environ: Mapping[str, str]) -> Any: ...


class Sampler(Protocol):
    """Where completions come from; `sampling.samplers` has the protocol with its types."""

    def sample(self, engine: Any, request: Any) -> list[Any]: ...


class Teacher(Protocol):
    """Whose distribution the student is pulled towards: `build` returns a `teachers.teachers.Teacher` or None."""

    def build(self, engine: Any) -> Any: ...


class Registered(Protocol):
    """What `registry.plugin` adds to each of these classes."""

    plugin_name: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


class RegisteredDataset(Dataset, Registered, Protocol): ...


class RegisteredDivergence(Divergence, Registered, Protocol): ...


class RegisteredLauncher(Launcher, Registered, Protocol): ...


class RegisteredSampler(Sampler, Registered, Protocol): ...


class RegisteredTeacher(Teacher, Registered, Protocol): ...


@runtime_checkable
class CompletesPrompt(Protocol):
    """A sampler that can complete either role's prompt."""

    @property
    def prompt(self) -> Literal["student", "teacher"]: ...


@runtime_checkable
class SetsRanks(Protocol):
    """A launcher whose number of ranks is a setting."""

    @property
    def ranks(self) -> int | None: ...
