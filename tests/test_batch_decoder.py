"""Drawing completions: what is drawn depends on prompt and seed alone, and equals what transformers draws."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from drawing_check import distribution

from opsd_cli.engine.loading import Source, load_causal, load_tokenizer, resolve
from opsd_cli.sampling.batch_decoder import BatchLimits, Decoder, decode
from opsd_cli.sampling.hf_decoder import HFDecoder
from opsd_cli.sampling.llama_decoder import LlamaDecoder
from opsd_cli.sampling.token_sampling import Completion, Draw
from opsd_cli.settings.config import SamplingSettings
from opsd_cli.settings.errors import GuardError

pytestmark = pytest.mark.slow

GREEDY = SamplingSettings(max_completion_tokens=40, temperature=0.0, top_p=1.0, top_k=0)
WARM = SamplingSettings(max_completion_tokens=40, temperature=1.2, top_p=0.9, top_k=50)
QUESTIONS = (
    "Tom has 4 coins. He finds 3 coins. How many coins does he have?",
    "Ann has 12 shells. She sells 5 shells.",
    "What?",
    "Ben has 9 books. Now he has 3 times as many. He gives away 7 books. How many books does Ben have now?",
    "Eva picks 2 apples.",
)


@pytest.fixture(scope="module")
def tiny():
    source = Source(resolve("bundled:tiny", None, key="model.path")[0], None, torch.float32, "sdpa", False, True)
    return load_causal(source), load_tokenizer(source)


@pytest.fixture(scope="module")
def prompts(tiny) -> list[list[int]]:
    _, tokenizer = tiny
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]


KINDS = ("lean", "module")


def decoder_of(tiny, kind: str) -> Decoder:
    causal, tokenizer = tiny
    return LlamaDecoder(causal) if kind == "lean" else HFDecoder(causal, pad_id=tokenizer.pad_token_id)


def run(
    tiny, draws: Sequence[Draw], sampling: SamplingSettings, *, kind: str = "lean", rows: int = 64, tokens: int = 10**6,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Completion]:  # fmt: skip
    return decode(
        decoder_of(tiny, kind), draws,
        sampling=sampling, end_ids=[tiny[1].eos_token_id], limits=BatchLimits(rows, tokens), should_stop=should_stop,
    )  # fmt: skip


def draws_of(prompts: Sequence[Sequence[int]], repeats: int = 3) -> list[Draw]:
    return [Draw(prompt, 100 * i + g) for i, prompt in enumerate(prompts) for g in range(repeats)]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_completions_equal_transformers_own(tiny, prompts, kind: str):
    causal, tokenizer = tiny
    for prompt, done in zip(prompts, run(tiny, draws_of(prompts, 1), GREEDY, kind=kind, rows=3), strict=True):
        expected = causal.generate(
            torch.tensor([prompt]), max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )[0, len(prompt) :]
        assert list(done.ids) == expected.tolist()


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_what_is_drawn_does_not_depend_on_the_batch(tiny, prompts, sampling, kind: str, rows: int):
    draws = draws_of(prompts)
    together = run(tiny, draws, sampling, kind="module")
    apart = run(tiny, draws, sampling, kind=kind, rows=rows)
    assert [done.ids for done in together] == [done.ids for done in apart]
    assert [done.finish_reason for done in together] == [done.finish_reason for done in apart]
    for a, b in zip(together, apart, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_seeds_decide_what_is_drawn(tiny, prompts):
    drawn = run(tiny, [Draw(prompts[2], seed) for seed in (1, 1, 2, 3, 4, 5)], WARM)
    assert drawn[0] == drawn[1]
    assert len({done.ids for done in drawn}) > 2


def test_a_completion_ends_in_the_end_token_exactly_when_it_stopped(tiny, prompts):
    _, tokenizer = tiny
    short = SamplingSettings(max_completion_tokens=12, temperature=1.0, top_p=1.0, top_k=0)
    for limit in (short, WARM):
        for done in run(tiny, draws_of(prompts), limit):
            ends = [token == tokenizer.eos_token_id for token in done.ids]
            assert not any(ends[:-1])
            assert ends[-1] == (done.finish_reason == "stop")
            assert len(done.ids) == len(done.logprobs) <= limit.max_completion_tokens
            assert done.finish_reason == "stop" or len(done.ids) == limit.max_completion_tokens


def test_log_probabilities_are_those_of_the_distribution_drawn_from(tiny, prompts):
    causal, _ = tiny
    for draw, done in zip(draws_of(prompts), run(tiny, draws_of(prompts), WARM), strict=True):
        whole = torch.tensor([[*draw.prompt_ids, *done.ids]])
        with torch.no_grad():
            logits = causal(whole).logits[0, len(draw.prompt_ids) - 1 : -1]
        expected = distribution(logits / WARM.temperature, top_k=WARM.top_k, top_p=WARM.top_p).log_softmax(-1)
        picked = expected.gather(1, torch.tensor(done.ids).unsqueeze(1)).squeeze(1)
        assert done.logprobs == pytest.approx(picked.tolist(), abs=1e-3)


def test_a_request_to_stop_ends_the_batch_at_the_next_token(tiny, prompts):
    asked = iter([False, False, True])
    made = run(tiny, [Draw(prompts[0], 1), Draw(prompts[1], 1)], WARM, rows=1, should_stop=lambda: next(asked))
    assert sorted(len(done.ids) for done in made) == [0, 3]
    assert {done.finish_reason for done in made} == {"length"}


def test_logits_that_are_not_numbers_end_the_batch_with_a_reason(tiny, prompts):
    causal, tokenizer = tiny
    broken = copy.deepcopy(causal)
    broken.lm_head.weight.data[7] = torch.nan
    for sampling in (GREEDY, WARM, replace(WARM, top_k=0, top_p=1.0)):
        with pytest.raises(GuardError, match="logits are NaN or infinite"):
            run((broken, tokenizer), draws_of(prompts), sampling)
