"""Every decoder against the model's own forward without a cache. What is drawn comes with its log-probability at every
length a row goes through, so one decode compares all of them: keys of length 1 modulo 32, prompts of odd length, rows
that enter while others run, rows taken out, a cache that grows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial

import torch
from transformers import PreTrainedModel

from gpu_checks import build
from gpu_checks.check import Bench, Check, Figure, Found
from opsd_cli.engine.loading import LoadedModel
from opsd_cli.engine.process_group import alone
from opsd_cli.sampling.batch_decoder import BatchLimits, HostLoop, Request, TokenLoop, run_loop
from opsd_cli.sampling.choose_decoder import Completer
from opsd_cli.sampling.device_loop import DeviceLoop
from opsd_cli.sampling.hf_decoder import HFDecoder
from opsd_cli.sampling.llama_decoder import LlamaDecoder
from opsd_cli.sampling.paged_decoder import PagedDecoder
from opsd_cli.sampling.static_decoder import StaticDecoder
from opsd_cli.sampling.token_sampling import Completion, Draw
from opsd_cli.settings.config import SamplingSettings

HEAD_SIZES = (32, 64, 80, 96, 128)
ON_A_CPU = {"captured": (32, 80), "lean": (32, 80), "static": (32,), "module": (32,)}
VOCABULARY = 97
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.05}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
LOOPS: dict[str, Callable[[PreTrainedModel], TokenLoop]] = {
    "captured": lambda lm: DeviceLoop(PagedDecoder(lm)),
    "lean": lambda lm: HostLoop(LlamaDecoder(lm)),
    "static": lambda lm: HostLoop(StaticDecoder(lm, pad_id=build.PAD_ID, graphs=True)),
    "module": lambda lm: HostLoop(HFDecoder(lm, pad_id=build.PAD_ID)),
}


def checks(bench: Bench) -> list[Check]:
    made = []
    for decoder in LOOPS:
        for dtype, name in NAMES.items():
            for size in HEAD_SIZES:
                why = "" if size in ON_A_CPU[decoder] else f"on a card only: a CPU checks {ON_A_CPU[decoder]}"
                run = partial(compare, bench, decoder, size, dtype)
                made.append(Check(f"{decoder} {name}, head size {size}", run, why))
    return [*made, Check("the decoder that a run chooses", partial(chosen, bench))]


def compare(bench: Bench, name: str, head_size: int, dtype: torch.dtype) -> Found:
    """The worst mean error of a log-probability over the lengths, of rows that never end and of rows that come and
    go."""
    lm = model(head_size, dtype, bench.device)
    loop = LOOPS[name](lm)
    steps = 100 if bench.is_small else 300  # beyond 256 columns a cache grows
    errors: dict[int, list[float]] = defaultdict(list)
    lengths = [1, 2, 5, 31, 32, 33] if bench.is_small else [1, 2, 3, 5, 7, 17, 31, 32, 33, 47]
    runs = [(draws(lengths), [], steps, 64), (draws([(7 * i) % 41 + 1 for i in range(24)]), range(3), 60, 5)]
    for rows, end_ids, limit, at_once in runs:
        sampling = SamplingSettings(max_completion_tokens=limit, temperature=1.0, top_p=1.0, top_k=0)
        request = Request(rows, sampling, frozenset(end_ids), BatchLimits(at_once, 10**6))
        made = run_loop(loop, request, should_stop=lambda: False)
        for draw, done in zip(rows, made, strict=True):
            add_errors(errors, lm, draw, done)
    means = {length: sum(found) / len(found) for length, found in errors.items()}
    worst = max(means, key=lambda length: means[length])
    missing = set(range(2, 101)) - means.keys()
    assert not missing, f"lengths {sorted(missing)} were not reached"
    note = f"worst at length {worst}, of {min(means)} to {max(means)}"
    return Found((Figure("log-probability", means[worst], LIMITS[dtype]),), note)


def add_errors(errors: dict[int, list[float]], lm: PreTrainedModel, draw: Draw, done: Completion) -> None:
    """How far each log-probability is from that of the same weights in fp32 on the CPU, by the keys it had."""
    prompt = list(draw.prompt_ids)
    with torch.no_grad():
        logits = in_fp32(lm)(input_ids=torch.tensor([[*prompt, *done.ids]]), use_cache=False).logits[0]
    expected = logits[len(prompt) - 1 : -1].log_softmax(-1)
    for place, (token, logprob) in enumerate(zip(done.ids, done.logprobs, strict=True)):
        errors[len(prompt) + place].append(abs(logprob - float(expected[place, token])))


def draws(lengths: list[int]) -> list[Draw]:
    return [Draw(build.ids(length, VOCABULARY, place), 10 * place) for place, length in enumerate(lengths)]


@cache
def model(head_size: int, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    shape = build.qwen3(hidden=64, layers=2, heads=4, kv_heads=2, head_size=head_size, vocabulary=VOCABULARY)
    return build.random_model(shape, dtype=dtype, device=device, spread=0.6)


@cache
def in_fp32(lm: PreTrainedModel) -> PreTrainedModel:
    return build.converted(lm, dtype=torch.float32, device=torch.device("cpu"))


def chosen(bench: Bench) -> Found:
    """Which decoder runs the bundled model's kind here, and so completions at all."""
    kinds = [
        type(
            Completer(LoadedModel(lm, None), alone(), end_ids=(build.END_ID,), pad_id=build.PAD_ID).loop(lm).decoder
        ).__name__
        for lm in (model(32, dtype, bench.device) for dtype in NAMES)
    ]
    said = ", ".join(f"{name} {kind}" for name, kind in zip(NAMES.values(), kinds, strict=True))
    fast = (LlamaDecoder if bench.device.type == "cpu" else PagedDecoder).__name__
    fallbacks = sum(kind != fast for kind in kinds)
    return Found((Figure("fallbacks", fallbacks, 0),), said)
