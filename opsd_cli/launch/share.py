"""A share of this machine for each of several runs at once: threads, cards, and ports that are never the same. The
members of a sweep that run beside each other take their places here, whatever started their processes."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from opsd_cli.launch.devices import DeviceChoice, ask, gpu_hint
from opsd_cli.settings.errors import ConfigError

SHARE = "OPSD_SHARE"
"""`PLACE/RUNS` in the environment of a run: it is one of so many at once on this machine."""

_POLL_SECONDS = 0.2
# What a pool of processes sets for its own good, and what would otherwise reach the ranks.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS",
            "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "NUMBA_NUM_THREADS", "TBB_NUM_THREADS")  # fmt: skip


def share_of(environ: Mapping[str, str]) -> tuple[int, int]:
    """The place of a run, from 0, and how many run at once. Raises ConfigError for a value that is no share."""
    text = environ.get(SHARE, "0/1")
    place, _, runs = text.partition("/")
    if not (place.isdigit() and runs.isdigit() and int(place) < int(runs)):
        raise ConfigError(f"{SHARE} is {text!r}; it is PLACE/RUNS, such as 0/2 and 1/2 for two runs at once")
    return int(place), int(runs)


def visible_gpus(device: DeviceChoice, environ: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs that torch can use here, as CUDA_VISIBLE_DEVICES names them; none on the CPU."""
    if device == "cpu" or gpu_hint(environ) is None:
        return ()
    count = ask(environ).devices
    named = [item.strip() for item in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if item.strip()]
    return tuple((named or list(map(str, range(count))))[:count])


@dataclass(frozen=True)
class Places:
    """So many places, each held by one process at a time; the kernel frees that of one that dies. Pickled to the
    processes of a pool."""

    folder: Path  # of the lock files
    runs: int
    gpus: tuple[str, ...] = ()
    threads: Mapping[str, str] = field(
        default_factory=lambda: {name: os.environ[name] for name in _THREADS if name in os.environ}
    )

    @property
    def gpus_each(self) -> int:
        return len(self.gpus) // self.runs

    @contextlib.contextmanager
    def take(self) -> Iterator[int]:
        """Wait for a free place and hold it; this process's environment becomes that of the place."""
        self.folder.mkdir(parents=True, exist_ok=True)
        place, lock = self._wait()
        try:
            self._holder(place).write_text(str(os.getpid()))
            os.environ.update(self.environ(place))
            for name in set(_THREADS) - self.threads.keys():
                os.environ.pop(name, None)
            yield place
        finally:
            self._holder(place).unlink(missing_ok=True)
            lock.release()

    def environ(self, place: int) -> dict[str, str]:
        """What tells a run in this place its share."""
        each = self.gpus_each
        own = self.gpus[place * each : (place + 1) * each]
        cards = {"CUDA_VISIBLE_DEVICES": ",".join(own)} if own else {}
        return {**self.threads, **cards, SHARE: f"{place}/{self.runs}"}

    def pass_on(self, number: int) -> None:
        """Send a signal to every process that holds a place, and let nobody begin any more."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stop.touch()
        for place in range(self.runs):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(self._holder(place).read_text()), number)

    @property
    def is_stopped(self) -> bool:
        return self._stop.exists()

    @contextlib.contextmanager
    def passing_signals_on(self, say: Callable[[str], None]) -> Iterator[None]:
        """While members run in processes of their own: a request to stop is theirs, and this process waits for them."""

        def receive(number: int, frame: FrameType | None) -> None:
            self.pass_on(number)
            say(f"{signal.Signals(number).name}: the members stop at their next safe point and save")

        before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _wait(self) -> tuple[int, FileLock]:
        while True:
            for place in range(self.runs):
                lock = FileLock(self.folder / f"{place}.lock", mode=0o644, fallback_to_soft=False)
                with contextlib.suppress(Timeout):
                    lock.acquire(timeout=0)
                    return place, lock
            time.sleep(_POLL_SECONDS)

    def _holder(self, place: int) -> Path:
        return self.folder / f"{place}.pid"

    @property
    def _stop(self) -> Path:
        return self.folder / "stop"


def at_once(asked: int, gpus: tuple[str, ...], *, ranks: int | None) -> int:
    """How many runs of so many ranks (None: as many as there are cards) this machine's cards allow at once."""
    return max(1, min(asked, len(gpus) // (ranks or 1))) if gpus else asked
