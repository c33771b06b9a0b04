"""Several ranks that hold one vLLM engine (`sampler.tensor_parallel`): what they ask it for, what each gets, when they
stop, and which numbers of ranks are refused. With vLLM itself: test_vllm.py."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from recipe_support import config_of, only_problem_of, opsd, problems_of
from shared_engine_ranks import DRAWS, STEPS
from support import TESTS, run_ranks

from opsd_cli.checks import check_ranks
from opsd_cli.engine.process_group import alone
from opsd_cli.sampling.shared_engine import AGREED_EVERY, complete_together
from opsd_cli.sampling.token_sampling import Completion, Draw
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.resume_rules import later

VLLM = ("recipe=quickstart", "sampler=vllm")
GROUPS = {0: (0, 1), 1: (0, 1), 2: (2, 3), 3: (2, 3)}
SEEDS = {rank: [10 * rank + number for number in range(count)] for rank, count in DRAWS.items()}


@pytest.fixture(autouse=True)
def vllm_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or every config with it would be refused."""
    monkeypatch.setattr("opsd_cli.checks.why_not_vllm", lambda: "")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    root = tmp_path_factory.mktemp("engine")
    run_ranks([TESTS / "shared_engine_ranks.py", "aabb", "2", root], 4)
    return {rank: json.loads((root / f"{rank}.json").read_text()) for rank in range(4)}


@pytest.mark.slow
def test_neighbours_are_ranks_in_a_row(found: dict[int, dict[str, Any]]):
    for rank, one in found.items():
        assert one["group"] == [rank % 2, 2, [*GROUPS[rank]]]
        assert one["alone"] == 1
        assert one["all"] == [0, 1, 2, 3]


@pytest.mark.slow
def test_every_rank_of_a_group_asks_for_the_same_in_one_order_and_gets_its_own(found: dict[int, dict[str, Any]]):
    for rank, one in found.items():
        assert one["drawn"]["asked"] == [seed for other in GROUPS[rank] for seed in SEEDS[other]]
        steps = STEPS[rank // 2]  # groups do not wait for each other
        assert one["drawn"]["ids"] == [[seed, steps] for seed in SEEDS[rank]]


@pytest.mark.slow
def test_a_rank_that_is_asked_to_stop_ends_its_group_and_no_other(found: dict[int, dict[str, Any]]):
    assert [found[rank]["stopped"]["steps"] for rank in range(4)] == [STEPS[0], STEPS[0], AGREED_EVERY, AGREED_EVERY]


@pytest.mark.slow
def test_ranks_that_drew_different_completions_say_so(found: dict[int, dict[str, Any]]):
    for rank in (0, 1):
        assert "the 2 ranks that hold one vLLM engine (sampler.tensor_parallel)" in found[rank]["different"]["error"]
    assert "error" not in found[2]["different"]


def test_a_rank_with_an_engine_of_its_own_stops_in_the_same_step():
    steps, draws = [], [Draw((1,), seed=3)]

    def complete(asked: list[Draw], stops) -> list[Completion]:
        while not stops():
            steps.append(asked)
        return [Completion((7,), "length", (0.0,))]

    assert complete_together(alone(), draws, complete, lambda: len(steps) == 3)[0].ids == (7,)
    assert steps == [draws] * 3


@pytest.mark.parametrize(
    ("words", "ranks", "refused"),
    [
        (("sampler.tensor_parallel=2",), 4, ""),
        (("sampler.tensor_parallel=2",), 3, "it divides the number of ranks, which is 3"),
        (("sampler.tensor_parallel=4",), 2, "it divides the number of ranks, which is 2"),
    ],
)
def test_ranks_that_cannot_be_divided_into_groups_are_refused(words: tuple[str, ...], ranks: int, refused: str):
    with pytest.raises(ConfigError, match=refused) if refused else nullcontext():
        check_ranks(config_of(*VLLM, *words), ranks)


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (("launcher.ranks=3",), "it divides the number of ranks, which is 3"),
        (
            ("launcher=slurm", "launcher.nodes=2", "launcher.ranks_per_node=3"),
            "ranks_per_node=3 leaves some without neighbours; set",
        ),
        (("launcher=slurm", "launcher.nodes=2", "launcher.ranks_per_node=4"), ""),
    ],
)
def test_numbers_that_are_known_are_refused_before_a_rank_starts(words: tuple[str, ...], refused: str):
    problems = problems_of(*VLLM, "sampler.tensor_parallel=2", *words)
    assert refused in problems[0] if refused else problems == ()


def test_processes_beside_the_ranks_do_not_hold_an_engine_together():
    problem = only_problem_of("recipe=quickstart", "sampler=vllm_separate", "sampler.tensor_parallel=2")
    assert "use sampler.placement=shared (sampler=vllm), or sampler.tensor_parallel=1" in problem


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machines", "refused"),
    [
        ("aabb", ""),
        ("aaab", "makes ranks 2 to 3 hold one vLLM engine, and they are not all on one machine (this one has 3 ranks)"),
        ("abab", "makes ranks 0 to 1 hold one vLLM engine, and they are not all on one machine (this one has 2 ranks)"),
    ],
)
def test_ranks_of_several_machines_do_not_hold_an_engine_together(machines: str, refused: str):
    said = run_ranks([TESTS / "shared_engine_ranks.py", machines, "2"], 4)
    assert len({line.split(" (on rank")[0] for line in said}) == 1, "all ranks say the same"
    assert refused in said[0]
    assert bool(said[0].strip()) == bool(refused)


def test_a_run_of_an_earlier_version_had_an_engine_for_each_rank():
    assert later({"sampler.name": "vllm"})["sampler.tensor_parallel"] == 1
    assert "sampler.tensor_parallel" not in later({"sampler.name": "static"})


def test_the_plan_says_who_holds_the_weights_and_whether_they_fit(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    model = ("model.path=Qwen/Qwen3-32B", "--device", "a100_40", "--ranks", "8")

    def notes(*words: str) -> str:
        _, out, _ = opsd(capsys, "plan", "recipe=gsm8k_full", "sampler=vllm", *model, *words, "--json")
        return " ".join(json.loads(out)["notes"])

    alone_on_a_card = notes()
    assert "ranks together" not in alone_on_a_card
    assert "gives vLLM 16.0 GiB of a card, and its weights there are 61.0 GiB: raise" in alone_on_a_card
    held_by_eight = notes("sampler.tensor_parallel=8")
    assert "of which 8 ranks together hold one engine, 7.6 GiB of weights each" in held_by_eight
    assert "raise sampler" not in held_by_eight
