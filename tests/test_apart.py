"""Sampling processes beside the ranks, for real: what they draw after every update, the schedule of a lag of one step,
what a checkpoint keeps, and that none is left behind. Our own decoder draws; with vLLM `scripts/test_vllm.sh` does the
same."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from recipe_support import config_of, problems_of
from support import REPOSITORY, TESTS, run_ranks

from opsd_cli.data.problems import Problem, PromptPair
from opsd_cli.engine.loading import LoadedModel, Source, load_model, resolve
from opsd_cli.engine.process_group import alone
from opsd_cli.launch.devices import Answer, decide
from opsd_cli.launch.rank_environ import Place, rank_environ, usable_cores
from opsd_cli.sampling.apart import Apart
from opsd_cli.sampling.batch_decoder import BatchLimits
from opsd_cli.sampling.choose_decoder import Completer
from opsd_cli.sampling.samplers import SampleRequest, draws_of, sample_apart
from opsd_cli.sampling.sampling_child import MODULE, card_beside
from opsd_cli.sampling.token_sampling import Completion, Draw
from opsd_cli.sampling.weight_channel import Messages, WeightChannel, receive_weights, send_weights
from opsd_cli.settings.composition import correct_lag
from opsd_cli.settings.config import SamplingSettings
from opsd_cli.settings.errors import ConfigError, OutsideError

CPU = torch.device("cpu")
SAMPLED = SamplingSettings(max_completion_tokens=12, temperature=0.9, top_p=1.0, top_k=0)
DRAWS = [Draw(tuple(range(3, 3 + length)), seed=2**62 + length) for length in (5, 17, 9)]
ABOUT = {"draws_with": "static", "max_rows": 8, "cache_tokens": 2**16, "end_ids": [1], "pad_id": 0}
SETTINGS = {"sampling": SAMPLED, "end_ids": (1,)}


def source_at(path: str) -> Source:
    return Source(path, None, torch.float32, "sdpa", False, True)


SOURCE = source_at(resolve("bundled:tiny", None, key="model.path")[0])


def start(source: Source = SOURCE, processes: int = 1) -> Apart:
    return Apart(ABOUT, processes=processes, ranks=alone(), source=source, device=CPU)


@pytest.fixture(scope="module")
def apart() -> Iterator[Apart]:
    made = start(processes=2)
    yield made
    made.close()


@pytest.fixture
def model() -> LoadedModel:
    return load_model(SOURCE, device=CPU)


def expected(model: LoadedModel, draws: list[Draw], sampling: SamplingSettings = SAMPLED) -> list[Completion]:
    """What our decoder draws in this process."""
    completer = Completer(model, alone(), end_ids=(1,), pad_id=0)
    return completer.complete(draws, sampling=sampling, limits=BatchLimits(8, 2**16), should_stop=lambda: False)


@torch.no_grad()
def change(model: LoadedModel, seed: int) -> None:
    """A large update."""
    generator = torch.Generator().manual_seed(seed)
    for _, weight in model.merged_weights():
        weight.add_(0.1 * weight.std() * torch.randn(weight.shape, generator=generator))


def draws_of_step(step: int) -> list[Draw]:
    return [Draw(draw.prompt_ids, draw.seed + 1000 * step) for draw in DRAWS]


def ask(apart: Apart, model: LoadedModel, step: int, *, last: bool = False):
    following = None if last else draws_of_step(step + 1)
    weights = model.merged_weights
    return apart.draw(step, draws_of_step(step), following, weights=weights, **SETTINGS, should_stop=lambda: False)


@pytest.mark.slow
def test_processes_draw_what_our_decoder_draws_after_every_update(apart: Apart, model: LoadedModel):
    seen = []
    for update in range(3):
        apart.wake(model.merged_weights())
        drawn = apart.complete(DRAWS, **SETTINGS, should_stop=lambda: False)
        for got, own in zip(drawn, expected(model, DRAWS), strict=True):
            assert (got.ids, got.finish_reason) == (own.ids, own.finish_reason)
            assert got.logprobs == pytest.approx(own.logprobs, abs=1e-5), "two processes share the rows"
        seen.append(str(drawn))
        change(model, update)
    assert len(set(seen)) == 3, "the updates changed what is said"


@pytest.mark.slow
def test_with_a_lag_of_one_a_step_is_drawn_with_the_weights_before_the_update_before_it(
    apart: Apart, model: LoadedModel
):
    wanted = [expected(model, draws_of_step(0))]
    for step in range(4):
        if step < 3:
            wanted.append(expected(model, draws_of_step(step + 1)))  # with the weights before update `step`
        completions, lag = ask(apart, model, step, last=step == 3)
        assert [done.ids for done in completions] == [done.ids for done in wanted[step]]
        assert lag == (1 if step else 0)
        change(model, step)


@pytest.mark.slow
def test_what_was_drawn_ahead_is_kept_to_the_bit_and_drawn_on_with_after_a_resume(apart: Apart, model: LoadedModel):
    ask(apart, model, 0)
    change(model, 0)
    wanted, _ = ask(apart, model, 1)
    said: list[str] = []
    assert json.loads(apart.kept(1, lambda: said.append("waits")))["lag"] == 1
    assert said == [], "a step that was stopped has its completions at hand"
    text = apart.kept(2, lambda: said.append("waits"))
    assert said == ["waits"]
    assert apart.kept(7, lambda: said.append("waits")) == "", "of a step that nobody has asked for"
    ahead, _ = ask(apart, model, 2, last=True)
    change(model, 1)  # the weights that drew it are gone
    apart.restore(text)
    assert ask(apart, model, 2, last=True) == (ahead, 1)
    assert wanted != ahead
    # A rank of a resumed run may have other draws of the step than the rank of before.
    how = {"weights": model.merged_weights, **SETTINGS, "should_stop": lambda: False}
    assert apart.draw(2, draws_of_step(2)[1:], None, **how) == (ahead[1:], 1)


@pytest.mark.slow
def test_a_request_to_stop_leaves_what_is_drawn_ahead_to_be_kept(apart: Apart, model: LoadedModel):
    long = replace(SAMPLED, max_completion_tokens=700)
    asked = {"weights": model.merged_weights, "sampling": long, "end_ids": (1,), "should_stop": lambda: True}
    assert apart.draw(4, DRAWS, DRAWS, **asked) is None
    kept = json.loads(apart.kept(4, lambda: None))
    assert kept["lag"] == 0
    assert [(seed, tuple(done["ids"])) for seed, done in kept["completions"]] == [
        (draw.seed, done.ids) for draw, done in zip(DRAWS, expected(model, DRAWS, long), strict=True)
    ]


@pytest.mark.slow
def test_completions_that_are_no_step_are_drawn_anew_and_leave_what_is_drawn_ahead(apart: Apart, model: LoadedModel):
    """As a session asks for them, between two steps."""
    ask(apart, model, 6)
    ahead = [done.ids for done in expected(model, draws_of_step(7))]
    change(model, 6)
    sampler = config_of("recipe=quickstart", "sampler=separate").sampler
    completer = Completer(model, alone(), end_ids=(1,), pad_id=0)
    completer.apart = apart
    for seed in (3, 4):
        problem = Problem("p", "", "", "1")
        request = SampleRequest(
            [(0, PromptPair(problem, (5, 6, 7), (5, 6)))], 2, SAMPLED, seed, lambda text: (), lambda: False
        )
        drawn = sample_apart(sampler, completer, request)
        own = expected(model, draws_of(request, prompt="student", dataset_share=0.0))
        assert [rollout.completion_ids for rollout in drawn] == [done.ids for done in own]
        assert {rollout.lag for rollout in drawn} == {0}
    completions, lag = ask(apart, model, 7, last=True)
    assert ([done.ids for done in completions], lag) == (ahead, 1)


@pytest.mark.slow
def test_without_a_lag_a_request_to_stop_cuts_the_completions(apart: Apart, model: LoadedModel):
    apart.wake(model.merged_weights())
    long = replace(SAMPLED, max_completion_tokens=4000)
    asked = time.monotonic()
    cut = apart.complete(DRAWS, sampling=long, end_ids=(), should_stop=lambda: True)
    assert time.monotonic() - asked < 20
    assert any(len(done.ids) < 4000 for done in cut)
    whole = apart.complete(DRAWS, **SETTINGS, should_stop=lambda: False)
    assert [done.ids for done in whole] == [done.ids for done in expected(model, DRAWS)], "it can still be used"


@pytest.mark.slow
def test_a_model_that_a_process_cannot_load_is_refused_in_its_words(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nowhere: neither an existing folder nor a hub id") as caught:
        start(source_at(str(tmp_path / "nowhere")))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.slow
def test_a_process_that_was_killed_is_named_and_no_other_is_left(model: LoadedModel):
    others = children_of(os.getpid())
    apart = start(processes=2)
    children = children_of(os.getpid()) - others
    apart.wake(model.merged_weights())
    os.kill(min(children), signal.SIGKILL)
    with pytest.raises(OutsideError, match=r"sampling process \d .* was killed by SIGKILL; .* resume the run"):
        apart.complete(DRAWS, **SETTINGS, should_stop=lambda: False)
    with pytest.raises(OutsideError, match="SIGKILL"):
        apart.wake(model.merged_weights())
    apart.close()
    assert not children & children_of(os.getpid())


PARENT = """
import sys, time
sys.path.insert(0, {tests!r})
from test_apart import DRAWS, SETTINGS, SOURCE, start
from opsd_cli.engine.loading import load_model
import torch
apart = start()
apart.wake(load_model(SOURCE, device=torch.device("cpu")).merged_weights())
print("ready", flush=True)
{then}
"""
LONG = """
from opsd_cli.settings.config import SamplingSettings
long = SamplingSettings(max_completion_tokens=10**6, temperature=0.9, top_p=1.0, top_k=0)
apart.complete(DRAWS, sampling=long, end_ids=(), should_stop=lambda: False)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("then", "number"), [
    (LONG, signal.SIGKILL), ("time.sleep(2); raise SystemExit('an error')", None),
], ids=["killed while it waits", "an error"])  # fmt: skip
def test_a_process_ends_with_its_rank_whatever_ends_that(then: str, number: signal.Signals | None):
    words = [sys.executable, "-c", PARENT.format(tests=str(TESTS), then=then)]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(words, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    children = children_of(parent.pid)
    assert children
    if number:
        time.sleep(0.5)
        for child in children:  # Ctrl-C reaches a whole group; only rank 0 decides what it means
            os.kill(child, signal.SIGINT)
            os.kill(child, signal.SIGTERM)
        time.sleep(0.2)
        assert children_of(parent.pid) == children
        parent.send_signal(number)
    parent.wait(timeout=60)
    deadline = time.monotonic() + 20
    while any(map(is_sampling, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_sampling, children))


def is_sampling(process: int) -> bool:
    try:
        return MODULE.encode() in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


def children_of(parent: int) -> set[int]:
    """The sampling processes of a process."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            own = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if own == parent and is_sampling(int(folder.name)):
            found.add(int(folder.name))
    return found


def test_weights_of_every_kind_arrive_to_the_bit(tmp_path: Path):
    sent = {
        "half": torch.randn(3, 5).bfloat16(), "transposed": torch.randn(4, 6).T, "scalar": torch.tensor(2.5),
        "numbers": torch.arange(7), "float16": torch.randn(2).half(), "empty": torch.empty(0, 3),
    }  # fmt: skip
    ours, theirs = map(Messages, socket.socketpair())
    received: dict[str, torch.Tensor] = {}

    def receive() -> None:
        channel = WeightChannel(tmp_path, CPU, place=1, size=2, patience=timedelta(minutes=1))
        received.update(receive_weights(theirs, channel, CPU))

    thread = threading.Thread(target=receive)
    thread.start()
    channel = WeightChannel(tmp_path, CPU, place=0, size=2, patience=timedelta(minutes=1))
    send_weights(sent.items(), channel, [ours])
    thread.join(timeout=60)
    assert list(received) == list(sent)
    for name, tensor in sent.items():
        assert received[name].dtype == tensor.dtype
        assert torch.equal(received[name], tensor)


def test_a_message_of_any_length_arrives_whole_and_a_closed_end_is_told():
    ours, theirs = map(Messages, socket.socketpair())
    assert not theirs.has_one()
    long = list(range(300_000))
    sender = threading.Thread(target=lambda: (ours.send("draw", ids=long), ours.close()))
    sender.start()
    assert theirs.has_one(seconds=10)
    assert theirs.receive() == {"kind": "draw", "ids": long}
    sender.join()
    assert theirs.has_one(seconds=10), "so that whoever draws stops"
    with pytest.raises(EOFError):
        theirs.receive()
    with pytest.raises(EOFError):
        theirs.send("drawn", ids=long)


@pytest.mark.slow
def test_a_run_with_a_lag_that_was_stopped_or_killed_ends_as_if_nothing_had_happened(tmp_path: Path):
    path = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "scripts", TESTS)))
    (output,) = run_ranks([TESTS / "apart_ranks.py", tmp_path], 1, seconds=280, PYTHONPATH=path)
    made = {line["case"]: line for line in map(json.loads, output.splitlines()) if isinstance(line, dict)}
    assert made["whole"] == {"case": "whole", "codes": [0, 0], "lags": [0.0, 1.0, 1.0, 1.0], "corrected": True}
    assert made["stopped"]["codes"] == [143, 143, 0, 0]
    assert made["killed"]["codes"] == [-9, -9, 0, 0]
    assert made["stopped"]["differences"] == made["killed"]["differences"] == []
    assert made["left"]["processes"] == 0


# Settings -----------------------------------------------------------------------------------------------------------


def test_what_does_not_go_with_processes_beside_the_ranks_is_refused():
    def refused(*words: str) -> str:
        return "\n".join(problems_of("recipe=quickstart", *words))

    shared = refused("sampler=static", "sampler.lag=1", "sampler.processes=2")
    assert shared.count("sampler.placement=separate") == 2
    # The correction, which a lag switches on, compares at one temperature.
    wrong = refused("sampler=separate", "launcher=env", "model.quantize=4bit", "lora=r16", "sampling.temperature=0.5")
    assert "launcher=env leaves them no devices" in wrong
    assert "hands over whole ones" in wrong
    assert "loss.importance_cap compares probabilities at one temperature" in wrong


def test_a_lag_switches_the_importance_correction_on_unless_it_is_typed():
    tree = {"sampler": {"name": "static", "lag": 1}, "loss": {"importance_cap": None}}
    (note,) = correct_lag(tree, typed=())
    assert "loss.importance_cap=2.0" in note
    assert tree["loss"] == {"importance_cap": 2.0}
    assert config_of("recipe=quickstart", "sampler=separate").loss.importance_cap == 2.0
    for settings, typed in (({"lag": 0}, ()), ({}, ()), ({"lag": 1}, ("loss.importance_cap",))):
        tree = {"sampler": settings, "loss": {"importance_cap": None}}
        assert correct_lag(tree, typed=typed) == []
        assert tree["loss"] == {"importance_cap": None}
    tree["loss"]["importance_cap"] = 5.0
    assert correct_lag(tree, typed=()) == [], "what a recipe says stands"


@pytest.mark.parametrize(("ranks", "beside", "chosen"), [(None, 1, 3), (2, 1, 2), (None, 3, 1), (4, 0, 4)])
def test_gpus_are_left_to_sampling_processes(ranks: int | None, beside: int, chosen: int):
    assert decide(ranks, "auto", Answer(4), hint="", environ={}, beside=beside).ranks == chosen


@pytest.mark.parametrize(("ranks", "beside"), [(4, 1), (None, 4), (3, 2)])
def test_more_processes_than_gpus_are_refused(ranks: int | None, beside: int):
    with pytest.raises(ConfigError, match=r"needs 5 GPUs, and torch sees 4 GPUs; use sampler\.placement=shared"):
        decide(ranks, "auto", Answer(4), hint="", environ={}, beside=beside)


def test_cores_are_shared_with_sampling_processes():
    place = Place(0, 0, 1, 1, "127.0.0.1", 1)
    environ = rank_environ({}, place, device="cpu", threads=None, beside=1)
    assert environ["OMP_NUM_THREADS"] == str(max(1, usable_cores() // 2))


def test_a_process_sees_the_card_after_those_of_the_ranks():
    assert card_beside({}, 2) == "2"
    assert card_beside({"CUDA_VISIBLE_DEVICES": "4, 6,7"}, 2) == "7"
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES names 2"):
        card_beside({"CUDA_VISIBLE_DEVICES": "4,6"}, 2)
