"""Rows that lie one after another against rows run alone, and the attention that keeps them apart against float64: at
lengths that fill no tile, head sizes that kernels treat differently, and shared key heads."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from gpu_checks import build
from gpu_checks.check import Bench, Check, Figure, Found
from opsd_cli.data.pairing import whole_rows
from opsd_cli.engine.packed import packed_attention, row_bounds, row_groups, run_rows, usable_layout
from opsd_cli.engine.process_group import alone

HEAD_SIZES = (64, 80, 96, 128)
ON_A_CPU = (64, 80)
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
HIDDEN = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative, of the worst position
ATTENTION = {torch.float32: 5e-5, torch.bfloat16: 2e-2}  # relative to the largest
GROUPS, SHARED = (40, 70, 65, 33, 130), (0, 31, 31, 0, 32)  # lengths, and what a row has of the one before it
LENGTHS = (1, 7, 31, 32, 33, 65, 127, 130)


def checks(bench: Bench) -> list[Check]:
    made = []
    for size in HEAD_SIZES:
        why = "" if size in ON_A_CPU else f"on a card only: a CPU checks {' and '.join(map(str, ON_A_CPU))}"
        for dtype, name in NAMES.items():
            made.append(Check(f"packed rows {name}, head size {size}", partial(rows, bench, size, dtype), why))
            for kv_heads in (2, 8):
                run = partial(attention, bench, size, kv_heads, dtype)
                made.append(Check(f"attention {name}, head size {size}, 8 heads on {kv_heads}", run, why))
    made += [Check(f"shared prompts {name}", partial(shared_prompts, bench, dtype)) for dtype, name in NAMES.items()]
    return made


def shared_prompts(bench: Bench, dtype: torch.dtype) -> Found:
    """Rows of which several share a prompt that is run once, against each row alone, in fp32 on the CPU."""
    shape = build.qwen3(hidden=128, layers=2, heads=8, kv_heads=2, head_size=64, vocabulary=512)
    causal = build.random_model(shape, dtype=dtype, device=bench.device)
    exact = build.converted(causal, dtype=torch.float32, device=torch.device("cpu"))
    ids_L = torch.tensor(build.ids(sum(GROUPS) - sum(SHARED), 512, 5))
    places_W, back_L = whole_rows(GROUPS, SHARED)
    with torch.no_grad():
        decoder = exact.get_decoder()
        rows = ids_L[places_W].split(GROUPS)
        expected_WD = torch.cat([decoder(input_ids=row_S.unsqueeze(0)).last_hidden_state[0] for row_S in rows])
        choice = usable_layout(causal, alone())
        run = partial(run_rows, causal.get_decoder(), ids_L.to(bench.device), GROUPS, shared=SHARED)
        found = {layout: run(layout=layout) for layout in dict.fromkeys(("packed", choice.layout))}
    apart = {layout: relative(hidden_LD, expected_WD[back_L]) for layout, hidden_LD in found.items()}
    return Found(tuple(Figure(layout, error, HIDDEN[dtype]) for layout, error in apart.items()), choice.reason)


def rows(bench: Bench, head_size: int, dtype: torch.dtype) -> Found:
    """Every layout, and the one a run chooses, against each row alone, in fp32 on the CPU."""
    shape = build.qwen3(hidden=128, layers=2, heads=8, kv_heads=2, head_size=head_size, vocabulary=512)
    causal = build.random_model(shape, dtype=dtype, device=bench.device)
    exact = build.converted(causal, dtype=torch.float32, device=torch.device("cpu"))
    ids_L = torch.tensor(build.ids(sum(LENGTHS), 512, 5))
    with torch.no_grad():
        decoder = exact.get_decoder()
        each = [decoder(input_ids=row_S.unsqueeze(0)).last_hidden_state[0] for row_S in ids_L.split(LENGTHS)]
        run = partial(run_rows, causal.get_decoder(), ids_L.to(bench.device), LENGTHS)
        found = {"padded": run(layout="padded")}
        choice = usable_layout(causal, alone())
        found |= {layout: run(layout=layout) for layout in dict.fromkeys(("packed", choice.layout))}
    expected_LD = torch.cat(each)
    figures = [Figure(name, relative(found_LD, expected_LD), HIDDEN[dtype]) for name, found_LD in found.items()]
    expected = "packed" if bench.is_small or dtype is torch.float32 else "varlen"
    return Found((*figures, Figure("fallbacks", float(choice.layout != expected), 0)), choice.reason)


def relative(found_LD: Tensor, expected_LD: Tensor) -> float:
    """The error of the worst position, over the length of its hidden state."""
    apart_L = (found_LD.cpu().double() - expected_LD.double()).norm(dim=1) / expected_LD.double().norm(dim=1)
    return float(apart_L.max())


def attention(bench: Bench, size: int, kv_heads: int, dtype: torch.dtype) -> Found:
    """Output and gradients of the packed attention, against softmax written out in float64."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(1, heads, sum(LENGTHS), size) for heads in (8, kv_heads, kv_heads)]
    parts = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    weight_LHE = torch.randn(sum(LENGTHS), 8, size, generator=generator).to(dtype)
    expected = with_gradients([part.double() for part in parts], written_out, weight_LHE.double())
    kernels = {"": row_groups} if bench.is_small or dtype is torch.float32 else {"": row_groups, "varlen ": row_bounds}
    figures = []
    for kernel, lay_out in kernels.items():
        here = [part.to(bench.device) for part in parts]
        found = with_gradients(here, partial(packed, lay_out), weight_LHE.to(bench.device))
        for name, got, right in zip(("output", "d query", "d key", "d value"), found, expected, strict=True):
            error = float((got.cpu().double() - right).abs().max() / right.abs().max())
            figures.append(Figure(kernel + name, error, ATTENTION[dtype]))
    return Found(tuple(figures))


def with_gradients(parts: list[Tensor], run, weight_LHE: Tensor) -> list[Tensor]:
    leaves = [part.detach().clone().requires_grad_() for part in parts]
    out_LHE = run(*leaves)
    (out_LHE * weight_LHE).sum().backward()
    return [out_LHE.detach(), *(leaf.grad for leaf in leaves)]


def packed(lay_out, query_1HLE: Tensor, key_1hLE: Tensor, value_1hLE: Tensor) -> Tensor:
    rows = lay_out(LENGTHS, query_1HLE.device)
    out, _ = packed_attention(torch.nn.Identity(), query_1HLE, key_1hLE, value_1hLE, None, rows=rows)
    return out[0]


def written_out(query_1HLE: Tensor, key_1hLE: Tensor, value_1hLE: Tensor) -> Tensor:
    repeats = query_1HLE.shape[1] // key_1hLE.shape[1]
    key_HLE, value_HLE = (part[0].repeat_interleave(repeats, dim=0) for part in (key_1hLE, value_1hLE))
    outs = []
    for query, key, value in zip(
        query_1HLE[0].split(LENGTHS, dim=1), key_HLE.split(LENGTHS, dim=1), value_HLE.split(LENGTHS, dim=1), strict=True
    ):
        scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
        future = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        outs.append((scores.masked_fill(future, -torch.inf).softmax(-1) @ value).transpose(0, 1))
    return torch.cat(outs)
