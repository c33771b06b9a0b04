"""Tests run offline, on one thread, as an installed package or from the checkout. Long files come first, so that no
worker is left with one at the end. Whether a test without the mark `slow` is quick is checked here."""

import gc
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "scripts")]

import compositions  # noqa: E402
import support  # noqa: E402
from support import TESTS, fork_server  # noqa: E402

from opsd_cli.launch import launchers  # noqa: E402

os.environ["OPSD_CACHE"] = str(support.scratch_folder())  # no test finds prompts that another version rendered

compositions.remember()

MOST_CPU_SECONDS = 5.0  # of a test that is not slow, on the slowest machine; nearly all of them take less than one
WHOLE_FILE_IS_SLOW = "\npytestmark = pytest.mark.slow\n"
LONGEST_FILES = (
    "test_runs.py", "test_apart.py", "test_nodes.py", "test_zoo.py", "test_placement.py", "test_resume.py",
    "test_gradients.py", "test_rank_failures.py", "test_docs.py", "test_sweeps.py", "test_reshard.py",
    "test_crash_matrix.py", "test_methods.py", "test_gpu.py", "test_eval_command.py", "test_half_precision.py",
    "test_hub.py", "test_inspect.py", "test_plan_memory.py", "test_several_updates.py",
)  # fmt: skip


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files of slow tests alone need not even be imported where those are left out."""
    if config.option.markexpr == "not slow" and collection_path.suffix == ".py":
        return WHOLE_FILE_IS_SLOW in collection_path.read_text(encoding="utf-8") or None
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest, then the others that start ranks, then the rest."""
    places = {name: place for place, name in enumerate(LONGEST_FILES)}
    with_slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: places.get(item.path.name, len(places) + (item.path not in with_slow)))


def pytest_collection_finish() -> None:
    """What is imported stays: to look through it takes each garbage collection half a second."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    """At the end it is ordinary garbage again, or libraries report it as leaked."""
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    support.may_start_ranks = item.get_closest_marker("slow") is not None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Keeps `scripts/test.sh --quick` quick: warns of what takes long and is not marked, in CPU time of the test and
    of the processes that it waited for. It is not a failure, since machines differ."""
    before = cpu_seconds()
    yield
    used = cpu_seconds() - before
    if item.get_closest_marker("slow") is None and used > MOST_CPU_SECONDS:
        item.warn(pytest.PytestWarning(f"took {used:.1f} s of CPU time: make it shorter, or mark it as slow"))


def cpu_seconds() -> float:
    uses = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


@pytest.fixture
def warm_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in this process have a fork server start their ranks."""
    servers = (str(fork_server(number)) for number in range(2))
    monkeypatch.setattr(launchers, "WORKER", (str(TESTS / "warm_rank.py"), *servers))
