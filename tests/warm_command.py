"""Run by support: the command, with ranks that fork servers start (the first two arguments are their sockets)."""

from __future__ import annotations

import sys
from pathlib import Path

from opsd_cli.cli import main
from opsd_cli.launch import launchers

if __name__ == "__main__":
    launchers.WORKER = (str(Path(__file__).with_name("warm_rank.py")), *sys.argv[1:3])
    raise SystemExit(main(sys.argv[3:]))
