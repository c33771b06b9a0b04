"""What every family of fuzzing shares: a case's time limit, the fence around files, processes and network, and what
counts as an answer. Owns no strategy."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hypothesis.strategies import SearchStrategy

from opsd_cli.settings.errors import DataError, OpsdError

T = TypeVar("T")

CASE_SECONDS = 20.0
"""No case may take longer, whatever it holds; a child process that has to be started is part of it."""

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2, "os.truncate": 1,
    "os.chmod": 1, "os.utime": 1, "shutil.rmtree": 1, "shutil.move": 2, "shutil.copyfile": 2,
}  # fmt: skip
"""Audit events that change files, and how many of their first arguments are paths."""

NEVER = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.forkpty",
    "socket.connect",
    "socket.bind",
    "pickle.find_class",
)
OWN_CHILDREN = ("opsd_cli.data.answers", "opsd_cli.data.template_renderer")


class OutOfBounds(AssertionError):
    """A case touched something outside its scratch folder."""


class Hang(AssertionError):
    """A case took longer than its limit."""


def in_lines(call: Callable[[], T]) -> T:
    """What `call` returns. An OpsdError that it raises must be made of lines that say something; a DataError of one."""
    refusal: OpsdError
    try:
        return call()
    except OpsdError as error:
        refusal = error
    said = str(refusal).split("\n")
    assert all(line.strip() for line in said), said
    assert len(said) == 1 or not isinstance(refusal, DataError), said
    raise refusal


@dataclass(frozen=True)
class Family:
    """One kind of input: how it is made and what must hold. `check` returns without a word or raises; an OpsdError is
    an answer, any other exception is a fault."""

    strategy: SearchStrategy[Any]
    check: Callable[[Any], None]
    cases: int  # in a whole run
    sample: int  # in the test suite


@dataclass
class _Fence:
    """Where the running case may write; None: no case is running."""

    inside: Path | None = None
    seen: list[str] = field(default_factory=list)

    def watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        if event in NEVER:
            self._refuse(f"{event} {arguments!r}")
        elif event == "subprocess.Popen" and not any(child in arguments[1] for child in OWN_CHILDREN):
            self._refuse(f"{event} {arguments[1]!r}")
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
            self._look(event, arguments[0])
        elif event in CHANGES:
            for path in arguments[: CHANGES[event]]:
                self._look(event, path)

    def _look(self, event: str, path: Any) -> None:
        assert self.inside is not None
        if isinstance(path, int) or path == os.devnull:
            return
        real = os.path.realpath(os.fsdecode(path))
        if not Path(real).is_relative_to(self.inside) and "__pycache__" not in real:
            self._refuse(f"{event} {real!r}")

    def _refuse(self, what: str) -> None:
        self.seen.append(what)
        raise OutOfBounds(what)


_FENCE = _Fence()


def build_fence() -> None:
    """Put up the fence; an audit hook cannot be taken down, so it does nothing while no case runs."""
    if _FENCE.watch not in _BUILT:
        sys.addaudithook(_FENCE.watch)
        _BUILT.append(_FENCE.watch)


_BUILT: list[Callable[..., None]] = []


@contextlib.contextmanager
def one_case(scratch: Path, *, seconds: float = CASE_SECONDS) -> Iterator[None]:
    """Around one case: its time limit, its fence, and OpsdError as an answer."""
    build_fence()
    started = time.monotonic()

    def too_long(number: int, frame: Any) -> None:
        raise Hang(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _FENCE.inside, _FENCE.seen = scratch.resolve(), []
    try:
        with contextlib.suppress(OpsdError):
            yield
        assert not _FENCE.seen, _FENCE.seen
    finally:
        _FENCE.inside = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        TIMES.append(time.monotonic() - started)


TIMES: list[float] = []
"""Seconds of every case so far."""
