"""Tests run offline, on one thread, as an installed package or from the checkout."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "scripts")]

from support import TESTS, fork_server  # noqa: E402

from opsd_cli.launch import launchers  # noqa: E402


@pytest.fixture
def warm_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in this process have a fork server start their ranks."""
    servers = (str(fork_server(number)) for number in range(2))
    monkeypatch.setattr(launchers, "WORKER", (str(TESTS / "warm_rank.py"), *servers))
