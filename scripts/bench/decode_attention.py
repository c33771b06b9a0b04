"""Benchmark: microseconds of the attention of one token in one layer, by how the kernel is spread over the card, beside
the time that reading its keys and values takes at the speed at which this card copies. What the defaults of
`attention_kernels.Tuning` are chosen by. A card only, under a minute.

    python scripts/bench/decode_attention.py --gpu
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from measure import arguments, report, start

from opsd_cli.sampling import attention_kernels
from opsd_cli.sampling.attention_kernels import TUNED, Tuning
from opsd_cli.sampling.paged_attention import PAGE, PagedCache

SHAPES = {  # rows, query heads, key heads, head size, keys of each row
    "Qwen3-1.7B, 64 rows, 500 keys": (64, 16, 8, 128, 500),
    "Qwen3-1.7B, 8 rows, 2,000 keys": (8, 16, 8, 128, 2000),
    "SmolLM2-135M, 32 rows, 500 keys": (32, 9, 3, 64, 500),
}
TUNINGS: list[Tuning] = [
    TUNED,
    *(replace(TUNED, stages=stages) for stages in (1, 2, 4)),
    *(replace(TUNED, stages=stages, warps=2) for stages in (2, 3)),
    *(replace(TUNED, stages=stages, programs=programs) for programs in (528, 1056) for stages in (2, 3)),
    replace(TUNED, stages=2, programs=1056, warps=2),
]
LAYERS, REPEATS = 8, 20  # layers of a cache, so that none is found in the card's own cache


def microseconds(work: Callable[[], object], pieces: int) -> float:
    """Of one of so many pieces of work, captured together."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(REPEATS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return 1000 * begin.elapsed_time(end) / REPEATS / pieces


def copy_speed() -> float:
    """Bytes read and written in a microsecond by a large copy."""
    source, target = (torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * 2**30 / microseconds(lambda: target.copy_(source), 1)


@torch.inference_mode()
def measured(name: str, speed: float) -> list[list[object]]:
    rows, query_heads, kv_heads, head_size, keys = SHAPES[name]
    device, pages = torch.device("cuda", 0), -(-keys // PAGE)
    cache = PagedCache(
        layers=LAYERS, kv_heads=kv_heads, head_size=head_size, rows=rows, pages=pages * rows, pages_per_row=pages,
        dtype=torch.bfloat16, device=device,
    )  # fmt: skip
    for layer in cache.layers:
        layer.normal_()
    cache.deal(rows, pages)
    heads_BHE = torch.randn(rows, query_heads + 2 * kv_heads, head_size, dtype=torch.bfloat16, device=device)
    row_B = torch.arange(rows, device=device)
    position_B = torch.full_like(row_B, keys - 1)
    floor = rows * keys * 2 * kv_heads * head_size * 2 / speed
    lines: list[list[object]] = []

    def attend(tuning: Tuning) -> None:
        for layer in cache.layers:
            attention_kernels.attend(heads_BHE, layer, cache.table_RP, row_B, position_B, head_size**-0.5, tuning)

    for tuning in TUNINGS:
        found = microseconds(partial(attend, tuning), LAYERS)
        lines.append([name, tuning.programs, tuning.stages, tuning.warps, found, floor, found / floor])
        print(f"# {name}, {tuning}: {found:.1f}", flush=True)
    return lines


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    if not options.gpu:
        raise SystemExit("decode_attention.py measures a card: give --gpu")
    start(options)
    speed = copy_speed()
    print(f"# copies {speed / 1e6:.2f} TB/s")
    head = ["shape", "programs", "stages", "warps", "microseconds", "floor", "times the floor"]
    report(options, head, [line for name in SHAPES for line in measured(name, speed)])


if __name__ == "__main__":
    main()
