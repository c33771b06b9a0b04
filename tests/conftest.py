"""Tests run offline, on one thread, as an installed package or from the checkout."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

from support import TESTS, fork_server

from opsd_cli.launch import launchers


@pytest.fixture
def warm_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in this process have a fork server start their ranks."""
    servers = (str(fork_server(number)) for number in range(2))
    monkeypatch.setattr(launchers, "WORKER", (str(TESTS / "warm_rank.py"), *servers))
