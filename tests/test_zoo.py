"""Models of many architectures, tiny and random, each through everything that a run does with it; or refused before
anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
from make_model_table import PAGE, table_of
from one_process import one_rank
from recipe_support import config_of
from zoo import FAMILIES
from zoo_run import RANKS, WORDS, Run, run_family

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def process() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Run]:
    """A family run with all weights or with an adapter; each once."""
    root, base = tmp_path_factory.mktemp("zoo"), config_of(*WORDS)
    return cache(lambda family, how: run_family(family, root, base, rank=RANKS[how]))


@pytest.mark.parametrize("how", RANKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_trained_and_exported_as_it_is_or_refused(family: str, how: str, run_of: Callable[[str, str], Run]):
    assert bool(run_of(family, how).refusal) == (family == "recurrent_gemma")


def test_the_table_of_models_is_what_was_found(run_of: Callable[[str, str], Run]):
    runs = {family: {how: run_of(family, how) for how in RANKS} for family in FAMILIES}
    assert table_of(runs) in PAGE.read_text(encoding="utf-8"), "run scripts/make_model_table.py"
