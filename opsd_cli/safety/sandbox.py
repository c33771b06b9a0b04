"""A child process for work on untrusted text (answers a model wrote, chat templates from the hub), with limits on wall
time, CPU time and memory: `BoundedChild` in the parent, `serve` in the child. A request and its reply are one line of
JSON each; no signals and no threads, so it can be used anywhere."""

from __future__ import annotations

import json
import os
import resource
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

START_SECONDS = 120.0
"""For the interpreter and its imports, on a cold disk."""

MAX_REPLY_BYTES = 64 * 2**20

# Nothing else of the environment is passed on: no tokens, no rank variables.
KEPT_VARIABLES = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "TMPDIR", "VIRTUAL_ENV", "HF_HOME")


class ChildError(Exception):
    """The work failed in the child, which is still usable."""


class ChildKilled(ChildError):
    """The work passed a limit, or crashed the child; the next request gets a new child."""


class ChildStartError(ChildError):
    """The child's own module does not start: a library is missing or broken."""


class BoundedChild:
    """A process running `python -m module`, which must call `serve`. Started at the first request, stopped by `close`
    or when this object is collected. `seconds` limits the wall and the CPU time of each request, `memory_mib` the
    memory it may add."""

    def __init__(self, module: str, *, seconds: float, memory_mib: int = 1024) -> None:
        self.module = module
        self.seconds = seconds
        self.memory_mib = memory_mib
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._finalizer: weakref.finalize[[subprocess.Popen[bytes]], BoundedChild] | None = None

    def ask(self, request: object) -> Any:
        """The child's reply. Raises ChildError with the message of an error inside the child, ChildKilled if it was
        killed or died, ChildStartError if it cannot be started."""
        with self._lock:
            process = self._process or self._start()
            answered = False
            try:
                assert process.stdin is not None
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
                reply = json.loads(_read_line(process, time.monotonic() + self.seconds))
                answered = True
            except (OSError, EOFError, ValueError) as error:
                raise ChildKilled(str(error)) from None
            finally:
                # Also if a signal handler raised: a late reply would be read as the reply to the next request.
                if not answered:
                    self._stop()
        if "error" in reply:
            raise ChildError(reply["error"])
        return reply["value"]

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        package_root = str(Path(__file__).parents[2])
        # An empty entry would mean the working directory.
        paths = [package_root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        environment["OMP_NUM_THREADS"] = "1"
        # -P: a file in the working directory must not stand in for a library. A session of its own, so that a Ctrl-C
        # meant for the run does not reach it.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", self.module, str(self.seconds), str(self.memory_mib)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        self._finalizer = weakref.finalize(self, _kill, process)
        try:
            _read_line(process, time.monotonic() + START_SECONDS)
        except (OSError, EOFError) as error:
            self._stop()
            raise ChildStartError(f"`python -m {self.module}` does not start: {error}") from None
        self._process = process
        return process

    def _stop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):  # an unsent request to a dead child
                pipe.close()


def _read_line(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    """One line of the child's output. Raises TimeoutError at the deadline, EOFError if the child ended."""
    assert process.stdout is not None
    parts: list[bytes] = []
    size = 0
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not parts or not parts[-1].endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError("it passed the time limit")
            part = os.read(process.stdout.fileno(), 2**16)
            if not part:
                raise EOFError("it ended (out of memory, CPU time or stack)")
            parts.append(part)
            size += len(part)
            if size > MAX_REPLY_BYTES:
                raise OSError("its reply was too large")
    return b"".join(parts)


class _Caught:
    """Holds whatever error ended its block: at the edge of the process every error becomes a message."""

    error: BaseException | None = None

    def __enter__(self) -> _Caught:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error
        return True


def serve(work: Callable[[Any], Any]) -> None:
    """The child's main loop: reply `work(request)` to each request, until the parent closes the pipe. The limits come
    from the command line: seconds of CPU for each request, MiB of memory beyond what is in use now."""
    seconds, memory_mib = float(sys.argv[1]), int(sys.argv[2])
    # What a library prints must not end up among the replies.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    used_pages = int(Path("/proc/self/statm").read_text().split()[0])
    room = used_pages * resource.getpagesize() + memory_mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    replies.write(b"{}\n")
    replies.flush()
    for line in sys.stdin.buffer:
        # The kernel ends this process after so many more seconds of CPU time, even if the parent is gone.
        usage = resource.getrusage(resource.RUSAGE_SELF)
        soft = int(usage.ru_utime + usage.ru_stime + seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))
        with _Caught() as caught:
            value = work(json.loads(line))
        error = caught.error
        reply = {"value": value} if error is None else {"error": _one_line(error)}
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


def _one_line(error: BaseException) -> str:
    """The error's name and text without line breaks or control codes: the text may be untrusted."""
    text = f"{type(error).__name__}: {error}"[:500]
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
