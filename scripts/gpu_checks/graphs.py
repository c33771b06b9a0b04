"""The decoder for GPUs, token by token in captured graphs: the tokens of the model's own forward, at the edges of every
bucket of rows, with rows that come and go, after updates, under an adapter; what capturing changes (nothing); its
kernels against float64; and how often a token makes the host wait."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from itertools import pairwise
from statistics import mean

import torch
from torch import Tensor, nn

from gpu_checks import build
from gpu_checks.check import Bench, Check, Figure, Found
from opsd_cli.engine.loading import add_adapter
from opsd_cli.loss.divergences import CrossEntropy
from opsd_cli.sampling.batch_decoder import BatchLimits, HostLoop, Request, TokenLoop, run_loop
from opsd_cli.sampling.device_loop import DeviceLoop, Tricks
from opsd_cli.sampling.graphs import SMALL_BUCKETS
from opsd_cli.sampling.hf_decoder import HFDecoder
from opsd_cli.sampling.paged_attention import PAGE, PagedAttention, PagedCache, has_kernels
from opsd_cli.sampling.paged_decoder import PagedDecoder
from opsd_cli.sampling.static_decoder import StaticDecoder
from opsd_cli.sampling.token_sampling import Completion, Draw, draw_token
from opsd_cli.settings.config import SamplingSettings
from opsd_cli.teachers.teachers import Live

VOCABULARY = 97
GREEDY = SamplingSettings(max_completion_tokens=24, temperature=0.0, top_p=1.0, top_k=0)
WARM = replace(GREEDY, temperature=1.0)
CUT = replace(GREEDY, temperature=0.8, top_k=12, top_p=0.9)
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ATTENTION = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # relative to the largest
COMPILED = (
    (64, torch.float32), (32, torch.bfloat16), (80, torch.bfloat16), (128, torch.bfloat16), (256, torch.bfloat16),
    (128, torch.float16),
)  # fmt: skip
TIES = 5e-3  # share of completions with a token whose number falls between two ways of rounding
CARD_ONLY = "needs a card: a CPU captures nothing"


def checks(bench: Bench) -> list[Check]:
    kernel = "" if has_kernels(bench.device) else "needs a card: a CPU has no kernels"
    return [
        Check("rows at the edges of buckets", partial(edges, bench)),
        Check("rows that come and go", partial(refilled, bench)),
        Check("after updates", partial(updated, bench, build.NO_LORA)),
        Check("after updates of an adapter", partial(updated, bench, build.LORA)),
        *(Check(f"after updates of ZeRO-{stage}", partial(trained, bench, stage)) for stage in (0, 2, 3)),
        Check("a layer at a time at ZeRO-3", partial(by_layer, bench)),
        Check("captured and not", partial(captured, bench), CARD_ONLY),
        Check("waits and launches of a token", partial(waits, bench), CARD_ONLY),
        *(
            Check(f"attention {NAMES[dtype]}, head size {size}", partial(attention, bench, size, dtype), kernel)
            for size, dtype in COMPILED  # each takes seconds to compile
        ),
        *(Check(f"drawn by kernels, V={size:,}", partial(drawing, bench, size), kernel) for size in (4999, 151_936)),
    ]


def model(bench: Bench) -> nn.Module:
    """In fp32, where greedy tokens can be compared one by one."""
    shape = build.qwen3(hidden=64, layers=2, heads=4, kv_heads=2, head_size=32, vocabulary=VOCABULARY)
    return build.random_model(shape, dtype=torch.float32, device=bench.device, spread=0.6)


def draws(count: int) -> list[Draw]:
    return [Draw(build.ids(1 + (5 * i) % 37, VOCABULARY, i // 2), i) for i in range(count)]


def drawn(
    loop: TokenLoop, rows: list[Draw], at_once: int, sampling: SamplingSettings, end_ids=range(3)
) -> list[Completion]:
    request = Request(rows, sampling, frozenset(end_ids), BatchLimits(at_once, 10**6))
    return run_loop(loop, request, should_stop=lambda: False)


def different(found: list[Completion], expected: list[Completion]) -> int:
    return sum(a.ids != b.ids or a.finish_reason != b.finish_reason for a, b in zip(found, expected, strict=True))


def of_the_model(lm: nn.Module, rows: int) -> dict[SamplingSettings, list[Completion]]:
    """The model's own completions of the first draws: greedy, drawn, and drawn with top-k and top-p."""
    own = HostLoop(HFDecoder(lm, pad_id=build.PAD_ID))
    return {sampling: drawn(own, draws(rows), rows, sampling) for sampling in (GREEDY, WARM, CUT)}


def against_the_model(loop: TokenLoop, expected: dict[SamplingSettings, list[Completion]], rows: int, at_once: int):
    """Share of completions of the first draws that differ."""
    wrong = sum(different(drawn(loop, draws(rows), at_once, way), right[:rows]) for way, right in expected.items())
    return wrong / (3 * rows)


def edges(bench: Bench) -> Found:
    """As many rows as a bucket has, one less and one more, in one loop from call to call."""
    lm = model(bench)
    loop = DeviceLoop(PagedDecoder(lm))
    sizes = sorted({rows + off for rows in SMALL_BUCKETS for off in (-1, 0, 1)} - {0}, reverse=True)
    sizes = [size for size in sizes if size <= 5] if bench.is_small else sizes
    expected = of_the_model(lm, sizes[0])
    wrong = mean(against_the_model(loop, expected, size, size) for size in sizes)
    return Found((Figure("share that differs", wrong, TIES), Figure("graphs", len(loop.graphs))))


def refilled(bench: Bench) -> Found:
    lm = model(bench)
    loop, rows = DeviceLoop(PagedDecoder(lm)), 20 if bench.is_small else 70
    expected = of_the_model(lm, rows)
    wrong = mean(against_the_model(loop, expected, rows, at_once) for at_once in (17, 8, 3))
    together = drawn(loop, draws(rows), 64, WARM)
    apart = different(drawn(loop, draws(rows), 5, WARM), together)
    return Found((Figure("share that differs", wrong, TIES), Figure("that depend on the batch", apart, 0)))


@torch.no_grad()
def updated(bench: Bench, lora) -> Found:
    """Parameters change in place between calls; what was captured before reads the new ones."""
    lm = add_adapter(model(bench), lora, seed=0).to(bench.device).eval()
    loop, wrong, before, moved = DeviceLoop(PagedDecoder(lm)), list[float](), None, 0
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        assert loop.decoder.weights.refresh(lm), "the weights have moved"
        wrong.append(against_the_model(loop, of_the_model(lm, 9), 9, 9))
        made = drawn(loop, draws(9), 9, GREEDY)
        moved += before is not None and different(made, before) > 0
        before = made
        for name, parameter in lm.named_parameters():
            if lora.rank == 0 or "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
                parameter.add_(0.1 * noise.to(parameter))
    return Found(
        (Figure("share that differs", mean(wrong), TIES), Figure("updates that show", moved, 1, at_least=True))
    )


def trained(bench: Bench, stage: int) -> Found:
    """The engine's own updates between calls, with its weights where it keeps them, or copied where it gathers them."""
    shape = build.qwen3(hidden=64, layers=2, heads=4, kv_heads=2, head_size=32, vocabulary=VOCABULARY)
    causal = build.random_model(shape, dtype=torch.float32, device=bench.device, spread=0.6)
    engine = build.engine_of(causal, bench, stage=stage)
    engine.optim = replace(engine.optim, lr=3e-2)  # so that one update shows
    pairs = build.prompt_pairs(4, VOCABULARY, student=9, teacher=14)
    loop, wrong, made = None, list[float](), list[list[Completion]]()
    for step in range(3):
        with engine.generating() as lm:
            if loop is None:
                loop = DeviceLoop(PagedDecoder(lm, lent=engine.keeps_addresses))
            assert loop.decoder.weights.refresh(lm), f"the weights have moved at stage {stage}"
            wrong.append(against_the_model(loop, of_the_model(lm, 9), 9, 9))
            made.append(drawn(loop, draws(9), 9, GREEDY))
        batches = build.in_pieces(build.random_rollouts(pairs, VOCABULARY, length=6), 1, bench.device)
        loss = build.loss_of(engine, Live().build(engine), batches[0], divergence=CrossEntropy())
        engine.backward(loss.weighted_sum, denominator=1.0, last=True)
        engine.step(step)
    moved = sum(different(a, b) > 0 for a, b in pairwise(made))
    return Found(
        (Figure("share that differs", mean(wrong), TIES), Figure("updates that show", moved, 1, at_least=True))
    )


def by_layer(bench: Bench) -> Found:
    """The model's own forward over shards, of which a layer is whole at a time."""
    causal = model(bench)
    expected = of_the_model(causal, 9)
    engine = build.engine_of(causal, bench, stage=3, gather="layer")
    with engine.generating() as lm:
        loop = HostLoop(StaticDecoder(lm, pad_id=build.PAD_ID, graphs=False))
        wrong = against_the_model(loop, expected, 9, 4)
    return Found((Figure("share that differs", wrong, TIES),))


def captured(bench: Bench) -> Found:
    """Log-probabilities of the same tokens with and without a graph: the same kernels, so the same numbers. Under LoRA,
    whose first products are branches of the graph."""
    shape = build.qwen3(hidden=256, layers=4, heads=8, kv_heads=4, head_size=64, vocabulary=4096)
    lm = build.policy_of(build.random_model(shape, dtype=torch.bfloat16, device=bench.device), build.LORA).lm
    lm = lm.to(bench.device).eval()
    rows = [Draw(build.ids(20 + i % 5, 4096, i), i) for i in range(40)]
    with_graphs, without = (
        drawn(DeviceLoop(PagedDecoder(lm), Tricks(graphs=graphs)), rows, 32, replace(WARM, max_completion_tokens=64))
        for graphs in (True, False)
    )
    pairs = zip(with_graphs, without, strict=True)
    apart = max(abs(x - y) for a, b in pairs for x, y in zip(a.logprobs, b.logprobs, strict=False))
    return Found(
        (
            Figure("completions that differ", different(with_graphs, without), 0),
            Figure("log-probability", apart, 0),
        )
    )


def waits(bench: Bench) -> Found:
    """Counted by torch while 20 tokens are drawn: what makes the host wait, and what it launches."""
    loop = DeviceLoop(PagedDecoder(model(bench)))
    request = Request(draws(9), replace(WARM, max_completion_tokens=64), frozenset([-1]), BatchLimits(9, 10**6))
    with torch.inference_mode():
        loop.open(request)
        loop.advance({i: i for i in range(9)})
        for _ in range(5):
            loop.advance({})
            loop.ended()
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
                    for _ in range(20):
                        loop.advance({})
                        loop.ended()
            finally:
                torch.cuda.set_sync_debug_mode(before)
    # Not torch's word of warning about this way of counting, which it gives once.
    count = sum("called a synchronizing" in str(warning.message) for warning in caught)
    operations = sum(event.count for event in found.key_averages() if event.key.startswith("aten::"))
    return Found((Figure("waits", count, 0), Figure("operations a token", operations / 20, 10)))


def attention(bench: Bench, head_size: int, dtype: torch.dtype) -> Found:
    """Written and read through the kernels in a cache of rows of many lengths, against float64 on the CPU."""
    lengths = [*range(1, 9), *(n + off for n in (32, PAGE, 5 * PAGE) for off in (-1, 0, 1))]
    worst = {"heads": 0.0, "output": 0.0}
    for query_heads, kv_heads in ((9, 3), (16, 1)):
        for rows in ([*lengths, 33 * PAGE + 1], lengths * 5):  # few are split over their keys, many are not
            found = one_cache(rows, query_heads, kv_heads, head_size, dtype, bench.device)
            expected = one_cache(rows, query_heads, kv_heads, head_size, dtype, torch.device("cpu"))
            for name, (here, there) in zip(worst, zip(found, expected, strict=True), strict=True):
                apart = float((here.cpu().double() - there).abs().max() / there.abs().max())
                worst[name] = max(worst[name], apart)
    return Found(tuple(Figure(name, value, ATTENTION[dtype]) for name, value in worst.items()))


def one_cache(
    lengths: list[int], query_heads: int, kv_heads: int, head_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Heads and attention of the last token of each row; on the CPU by plain PyTorch in float64, from these values."""
    generator = torch.Generator().manual_seed(7)
    exact = device.type == "cpu"
    kind = torch.float64 if exact else dtype
    pages = -(-max(lengths) // PAGE)
    cache = PagedCache(
        layers=1, kv_heads=kv_heads, head_size=head_size, rows=len(lengths), pages=pages * len(lengths),
        pages_per_row=pages, dtype=kind, device=device,
    )  # fmt: skip
    cache.deal(len(lengths), pages)
    # The same page of values for every row, shifted: enough to tell keys apart, and quickly made.
    values = torch.randn(cache.layers[0].shape[2:], generator=generator)
    shifts = [values.roll(number, 1) for number in range(16)]
    filled = torch.stack([shifts[number % 16] for number in range(cache.layers[0].shape[1])])
    for part, factor in zip(cache.layers[0], (1.0, -0.5), strict=True):
        part.copy_((factor * filled).to(dtype).to(kind))
    heads = query_heads + 2 * kv_heads
    raw_BX = torch.randn(len(lengths), heads * head_size, generator=generator).to(dtype).to(kind).to(device)
    gains = tuple((1 + torch.rand(head_size, generator=generator)).to(dtype).to(kind).to(device) for _ in range(2))
    rotation_S2E = torch.rand(max(lengths), 2, head_size, generator=generator).to(dtype).to(kind).to(device)
    row_B = torch.arange(len(lengths)).flip(0).to(device)
    position_B = torch.tensor(lengths).flip(0).to(device) - 1
    paged = PagedAttention(cache, rotation_S2E, scale=head_size**-0.5, eps=1e-6, kernels=not exact)
    heads_BHE = paged.rotate_and_store(0, raw_BX, gains, row_B, position_B)
    return heads_BHE, paged.attend(0, heads_BHE, row_B, position_B)


def drawing(bench: Bench, vocabulary: int) -> Found:
    """The share of draws that differ from `draw_token`'s, and how far log-probabilities of the others are apart."""
    from opsd_cli.sampling import drawing_kernels

    generator = torch.Generator(device=bench.device).manual_seed(3)
    differ, apart, total = 0, 0.0, 0
    for dtype in (torch.float32, torch.bfloat16):
        logits_BV = (3 * torch.randn(256, vocabulary, generator=generator, device=bench.device)).to(dtype)
        logits_BV[:, ::7] = -torch.inf
        for sampling in (GREEDY, WARM, replace(WARM, temperature=0.7), replace(CUT, top_k=20), replace(WARM, top_k=1)):
            uniform_B = torch.rand(256, generator=generator, device=bench.device) if sampling.temperature else None
            expected_B, its_logs_B = draw_token(logits_BV, sampling, uniform_B)
            found_B, logs_B = drawing_kernels.draw_token(logits_BV, sampling, uniform_B)
            same_B = found_B == expected_B
            assert bool(logs_B.isfinite().all()), "a token that cannot be drawn"
            differ, total = differ + int((~same_B).sum()), total + len(same_B)
            apart = max(apart, float((logs_B - its_logs_B)[same_B].abs().max()))
    return Found((Figure("share that differs", differ / total, 2e-2), Figure("log-probability", apart, 1e-4)))
