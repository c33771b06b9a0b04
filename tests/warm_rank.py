"""Run by a launcher in place of `python -m opsd_cli.rank.entry` where a test is not about how a process starts: a fork
server starts the rank, and this process ends as the rank does."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from support import WarmProcess

LONGEST_SECONDS = 240


def main(*arguments: str) -> int:
    servers, task = arguments[:2], arguments[2:]
    server = Path(servers[int(os.environ["RANK"]) % 2])
    log = Path(os.readlink("/proc/self/fd/1"))
    process = WarmProcess(server, ["-m", "opsd_cli.rank.entry", *task], dict(os.environ), log)
    code = process.wait(LONGEST_SECONDS)
    if code < 0:
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
