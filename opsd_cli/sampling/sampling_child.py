"""One sampling process, as rank 0 holds it: started, spoken to, found dead, ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from opsd_cli.sampling.weight_channel import Messages
from opsd_cli.settings.errors import ConfigError, OutsideError

MODULE = "opsd_cli.rank.sampling_process"
GONE_SECONDS = 5.0  # from the last a process was heard of to its end
END_SECONDS = 10.0  # for a process that was asked to end


class SamplingChild:
    """Number `number` of the processes, with `environ`. Raises OutsideError where it cannot be started."""

    def __init__(self, number: int, environ: Mapping[str, str]) -> None:
        self.number, self.how = number, ""
        ours, theirs = socket.socketpair()
        reading, self._lifeline = os.pipe()
        command = [sys.executable, "-P", "-m", MODULE, str(theirs.fileno()), str(reading)]
        try:
            # In this rank's process group, which the supervisor ends as a whole.
            self._child = subprocess.Popen(
                command, env=dict(environ), stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(), reading)
            )
        except OSError as error:
            raise OutsideError(f"cannot start sampling process {number}: {error}") from None
        finally:
            theirs.close()
            os.close(reading)
        self.messages = Messages(ours)

    def send(self, kind: str, **content: Any) -> None:
        """Raises OutsideError where it is gone."""
        try:
            self.messages.send(kind, **content)
        except EOFError:
            raise OutsideError(self.obituary()) from None

    def has_ended(self) -> bool:
        """Whether it is gone, or goes within seconds: its sockets close before it does."""
        try:
            self._child.wait(timeout=GONE_SECONDS)
        except subprocess.TimeoutExpired:
            return False
        return True

    def obituary(self) -> str:
        """How it ended, in one line."""
        self.has_ended()
        code = self._child.poll()
        how = "does not answer" if code is None else f"ended with exit code {code}"
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        return (
            f"sampling process {self.number} (sampler.placement=separate) {how}; what it said is in the log of rank 0; "
            "resume the run"
        )

    def end(self) -> None:
        """Ask it to end, and see to it."""
        self.messages.close()
        os.close(self._lifeline)
        try:
            self._child.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


def card_beside(environ: Mapping[str, str], number: int) -> str:
    """What CUDA_VISIBLE_DEVICES is for a process on the GPU of that number among those that this rank sees."""
    seen = [item.strip() for item in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if item.strip()]
    if seen and number >= len(seen):
        raise ConfigError(
            f"sampler.placement=separate needs a GPU beside those of the ranks, and CUDA_VISIBLE_DEVICES names "
            f"{len(seen)}, of which number {number} is wanted"
        )
    return seen[number] if seen else str(number)
