"""A vLLM engine in this process, given weights that change: it completes what our own decoder completes. Skipped
where vLLM is not installed; `scripts/test_vllm.sh` makes an environment with it and runs these."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import TESTS, run_ranks

from opsd_cli.engine.loading import Source, add_adapter, load_causal, resolve
from opsd_cli.engine.merging import merged_parameters
from opsd_cli.engine.process_group import alone
from opsd_cli.sampling.batch_decoder import BatchLimits
from opsd_cli.sampling.choose_decoder import Completer
from opsd_cli.sampling.token_sampling import Draw
from opsd_cli.settings.config import LoraSettings, SamplingSettings

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (scripts/test_vllm.sh)"),
    pytest.mark.slow,
]
SAMPLED = SamplingSettings(max_completion_tokens=24, temperature=0.9, top_p=0.95, top_k=40)
GREEDY = SamplingSettings(max_completion_tokens=24, temperature=0.0, top_p=1.0, top_k=0)
PROMPTS = [tuple(range(3, 3 + length)) for length in (5, 17, 9, 30)]
DRAWS = [Draw(prompt, seed=2**62 + i) for i, prompt in enumerate(PROMPTS)]


class Lent:
    """A model as `Weights`."""

    keeps_addresses = True
    gathers_layers = ""

    def __init__(self, lm: torch.nn.Module, source: Source) -> None:
        self.lm, self.source = lm, source

    def generating(self):
        from contextlib import nullcontext

        return nullcontext(self.lm)

    def merged_weights(self):
        return merged_parameters(self.lm)


@pytest.fixture(scope="module")
def source() -> Source:
    return Source(resolve("bundled:tiny", None, key="model.path")[0], None, torch.float32, "sdpa", False, True)


@pytest.fixture(scope="module")
def engine(source: Source) -> Iterator:
    from opsd_cli.launch.rank_environ import free_port
    from opsd_cli.sampling.vllm_engine import Room, VllmEngine

    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(place | {"MASTER_PORT": str(free_port(os.environ))})
    dist.init_process_group("gloo")
    built = VllmEngine(source, torch.device("cpu"), Room(8, 128, 0.4, 2**27), group=alone(), graphs=True, sleeps=True)
    yield built
    built.close()


def completer_of(lm: torch.nn.Module, source: Source) -> Completer:
    return Completer(Lent(lm.eval(), source), alone(), end_ids=(1,), pad_id=0)


def both(engine, completer: Completer, draws: list[Draw], sampling: SamplingSettings) -> tuple[list, list]:
    """Ours and vLLM's completions."""
    limits = BatchLimits(8, 2**16)
    ours = completer.complete(draws, sampling=sampling, limits=limits, should_stop=lambda: False)
    engine.wake(completer.weights.merged_weights())
    return ours, ask(engine, draws, sampling, end_ids=completer.end_ids)


def ask(engine, draws: list[Draw], sampling: SamplingSettings, *, end_ids=(1,)) -> list:
    return engine.complete(draws, sampling=sampling, end_ids=end_ids, should_stop=lambda: False)


@torch.no_grad()
def change(lm: torch.nn.Module, seed: int) -> None:
    """A large update of what is trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in (p for p in lm.parameters() if p.requires_grad):
        spread = parameter.std() if parameter.any() else 0.5  # of an adapter's second factor, which begins at zero
        parameter.add_(0.1 * spread * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("rank", [0, 4], ids=["all weights", "LoRA"])
def test_vllm_completes_as_our_decoder_does_after_every_update(engine, source: Source, rank: int):
    lora = LoraSettings(rank=rank, alpha=8, dropout=0.0, targets=("q_proj", "v_proj", "down_proj"))
    lm = add_adapter(load_causal(source), lora, seed=0)
    completer, seen = completer_of(lm, source), []
    for update in range(3):
        # The head of this model is tied to its embedding, and is not among the parameters that vLLM is given.
        assert not any("lm_head" in name for name, _ in completer.weights.merged_weights())
        ours, theirs = both(engine, completer, DRAWS, GREEDY)
        assert [(own.ids, own.finish_reason) for own in ours] == [(own.ids, own.finish_reason) for own in theirs]
        for own, other in zip(ours, theirs, strict=True):
            assert own.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        seen.append([own.ids for own in ours])
        change(lm, seed=update)
    assert len({str(ids) for ids in seen}) == 3, "the updates changed what is said"


def test_a_completion_ends_at_each_end_id_and_at_the_limit_and_keeps_the_id(engine, source: Source):
    completer = completer_of(load_causal(source), source)
    (ours, *_), (theirs, *_) = both(engine, completer, DRAWS, GREEDY)
    middle = theirs.ids[5]
    place = theirs.ids.index(middle)
    (cut, *_) = ask(engine, DRAWS, GREEDY, end_ids=(1000, middle))
    assert cut.ids == theirs.ids[: place + 1]
    assert cut.finish_reason == "stop"
    assert len(cut.logprobs) == len(cut.ids)
    (short, *_) = ask(engine, DRAWS, replace(GREEDY, max_completion_tokens=3), end_ids=())
    assert (short.ids, short.finish_reason) == (ours.ids[:3], "length")


def test_a_completion_depends_on_its_seed_and_not_on_who_shares_the_batch(engine, source: Source):
    engine.wake(completer_of(load_causal(source), source).weights.merged_weights())
    together = ask(engine, DRAWS, SAMPLED)
    assert [ask(engine, [draw], SAMPLED)[0].ids for draw in DRAWS] == [done.ids for done in together]
    assert [done.ids for done in ask(engine, DRAWS[::-1], SAMPLED)[::-1]] == [done.ids for done in together]
    others = [replace(draw, seed=draw.seed + 100) for draw in DRAWS]
    assert [done.ids for done in ask(engine, others, SAMPLED)] != [done.ids for done in together]


@torch.no_grad()
def test_log_probabilities_are_those_of_the_distribution_drawn_from(engine, source: Source):
    from opsd_cli.sampling.token_sampling import truncate_logits

    lm = load_causal(source).eval()
    engine.wake(merged_parameters(lm))
    for draw, done in zip(DRAWS, ask(engine, DRAWS, SAMPLED), strict=True):
        logits_LV = lm(torch.tensor([[*draw.prompt_ids, *done.ids]])).logits[0, len(draw.prompt_ids) - 1 : -1]
        kept_LK, ids_LK = truncate_logits(logits_LV / SAMPLED.temperature, top_k=SAMPLED.top_k, top_p=SAMPLED.top_p)
        drawn_L = (ids_LK == torch.tensor(done.ids)[:, None]).int().argmax(dim=1, keepdim=True)
        assert done.logprobs == pytest.approx(kept_LK.log_softmax(dim=1).gather(1, drawn_L)[:, 0].tolist(), abs=1e-4)


def test_a_request_to_stop_ends_the_completions_and_leaves_the_engine_usable(engine, source: Source):
    engine.wake(completer_of(load_causal(source), source).weights.merged_weights())
    cut = engine.complete(DRAWS, sampling=GREEDY, end_ids=(), should_stop=lambda: True)
    assert all(done.ids == () for done in cut)
    assert all(len(done.ids) == 24 for done in ask(engine, DRAWS, GREEDY, end_ids=()))


def test_what_training_draws_does_not_depend_on_the_engine(engine, source: Source):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    engine.wake(completer_of(load_causal(source), source).weights.merged_weights())
    ask(engine, DRAWS, SAMPLED)
    assert torch.equal(torch.rand(3), expected)


def test_the_trial_finds_an_engine_with_other_weights(engine, source: Source, monkeypatch: pytest.MonkeyPatch):
    from opsd_cli.sampling.sampler_trial import find_fault

    lm = load_causal(source)
    completer = completer_of(lm, source)
    assert find_fault(lambda: engine, completer.weights) == ""
    first = {name: weight.clone() for name, weight in completer.weights.merged_weights()}
    change(lm, seed=3)
    monkeypatch.setattr(completer.weights, "merged_weights", lambda: iter(first.items()))
    assert "nats a token" in find_fault(lambda: engine, completer.weights)


def test_two_ranks_hold_one_engine_and_complete_as_our_decoder_does_after_every_update(tmp_path: Path):
    run_ranks([TESTS / "vllm_ranks.py", tmp_path], 2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for one in (first, second):
        assert one["in shared memory"] == [], "nothing that a killed run leaves to the next"
        assert one["fault"] == "", "the trial before the first step"
        assert 2 * one["numbers"] == one["whole"] > 0, "each holds a half"
        for update in one["updates"]:
            assert update["ours"] == update["vllm"]
            assert update["gap"] < 1e-4
        assert len({str(update["vllm"]) for update in one["updates"]}) == 3, "the updates changed what is said"
        assert one["stopped"] == [0, 0, 0, 0]
        assert all(one["afterwards"]), "a stop leaves the engine usable"
    assert first["sampled alone"] == []
    assert second["sampled alone"] == first["sampled"] + second["sampled"], "whoever asks"
