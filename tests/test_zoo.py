"""Models of many architectures, tiny and random, each through everything that a run does with it; or refused before
anything is trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from one_process import one_rank
from recipe_support import config_of
from zoo import FAMILIES
from zoo_run import run_family

from opsd_cli.settings.config import Config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def process() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@pytest.fixture(scope="module")
def base() -> Config:
    return config_of(*WORDS)


WORDS = (
    "recipe=quickstart", "teacher=initial", "divergence=reverse_kl", "train.steps=4", "train.problems_per_step=3",
    "train.rollouts_per_problem=2", "sampling.max_completion_tokens=8", "eval.max_completion_tokens=8",
    "loss.mask_truncated=false", "prompts.max_tokens=40", "train.gradient_checkpointing=true",
)  # fmt: skip


@pytest.mark.parametrize("rank", [0, 4], ids=["all weights", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_trained_and_exported_as_it_is_or_refused(family: str, rank: int, root: Path, base: Config):
    run = run_family(family, root, base, rank=rank)
    assert bool(run.refusal) == (family in REFUSED.get(rank, ()))


REFUSED = {0: ("recurrent_gemma",), 4: ("recurrent_gemma",)}
