"""Run by a launcher in place of `python -m opsd_cli.rank` where a test is not about how a process starts: a fork
server starts the rank; this process hands it the signals that it gets, and ends as the rank does."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from support import WarmProcess

from opsd_cli.run.heartbeat import STACKS_SIGNAL

LONGEST_SECONDS = 240


def main(*arguments: str) -> int:
    servers, task = arguments[:2], arguments[2:]
    server = Path(servers[int(os.environ["RANK"]) % 2])
    log = Path(os.readlink("/proc/self/fd/1"))
    process = WarmProcess(server, ["-m", "opsd_cli.rank", *task], dict(os.environ), log)
    for number in (signal.SIGINT, signal.SIGTERM, STACKS_SIGNAL):
        signal.signal(number, lambda number, frame: process.send_signal(number))
    code = process.wait(LONGEST_SECONDS)
    if code < 0:
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
