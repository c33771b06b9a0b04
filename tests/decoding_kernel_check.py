"""Run by test_decoding_kernels in a process of its own, with TRITON_INTERPRET=1: the kernels of decoding against plain
PyTorch. Prints the largest differences."""

from __future__ import annotations

import json
import sys

import torch

from opsd_cli.sampling import drawing_kernels, token_sampling
from opsd_cli.sampling.paged_attention import PAGE, PagedAttention, PagedCache, gated
from opsd_cli.sampling.token_sampling import draw_token
from opsd_cli.settings.config import SamplingSettings

FULL, HALF, NARROW = torch.float32, torch.float16, torch.bfloat16  # triton's interpreter has no dot of bfloat16
LENGTHS = (1, PAGE, PAGE + 1, 5 * PAGE - 2)
SHAPES = [  # query heads, key heads, head size, with gains, type
    (4, 2, 32, False, FULL), (9, 3, 64, False, FULL), (4, 2, 128, True, HALF), (3, 1, 80, True, FULL),
    (20, 1, 64, False, FULL),
]  # fmt: skip
VOCABULARIES = (5, 97, 5003)


def relative(plain: torch.Tensor, fused: torch.Tensor) -> float:
    return float((plain - fused).float().abs().max() / plain.float().abs().max())


def attention(query_heads: int, kv_heads: int, head_size: int, has_gains: bool, dtype: torch.dtype) -> dict[str, float]:
    """Rows of LENGTHS in a cache, some of whose tokens the kernel wrote; then attention from the last of each."""
    generator = torch.Generator().manual_seed(head_size)
    heads = query_heads + 2 * kv_heads
    raw_NX = torch.randn(sum(LENGTHS), heads * head_size, generator=generator).to(dtype)
    gains = tuple(1 + torch.rand(head_size, generator=generator).to(dtype) for _ in range(2)) if has_gains else None
    angles_SE = torch.rand(max(LENGTHS), head_size, generator=generator) * 6
    rotation_S2E = torch.stack([angles_SE.cos(), angles_SE.sin()], dim=1).to(dtype)
    row_N = torch.cat([torch.full((length,), row) for row, length in enumerate(LENGTHS)])
    position_N = torch.cat([torch.arange(length) for length in LENGTHS])
    end_B = torch.tensor(LENGTHS).cumsum(0) - 1
    pages = -(-max(LENGTHS) // PAGE)
    cache = PagedCache(
        layers=1, kv_heads=kv_heads, head_size=head_size, rows=len(LENGTHS), pages=pages * len(LENGTHS),
        pages_per_row=pages, dtype=dtype, device=torch.device("cpu"),
    )  # fmt: skip
    cache.deal(len(LENGTHS), pages)
    plain, fused = (
        PagedAttention(cache, rotation_S2E, scale=head_size**-0.5, eps=1e-6, kernels=kernels)
        for kernels in (False, True)
    )
    heads_NHE = plain.rotate_and_store(0, raw_NX, gains, row_N, position_N)
    written = cache.layers[0].clone()
    found = {}
    # The kernel writes the last tokens again, in another order than the rows have in the cache.
    end_B, order_B = end_B.flip(0), torch.arange(len(LENGTHS)).flip(0)
    expected_BHE = plain.attend(0, heads_NHE[end_B], order_B, position_N[end_B])
    for place, row in zip(end_B.tolist(), order_B.tolist(), strict=True):
        page = cache.table_RP[row, position_N[place] // PAGE]
        cache.layers[0][:, page, :, position_N[place] % PAGE :] = torch.nan  # not written, or not yet
    made_BHE = fused.rotate_and_store(0, raw_NX[end_B], gains, order_B, position_N[end_B])
    found["heads"] = relative(heads_NHE[end_B], made_BHE)
    found["out"] = relative(expected_BHE, fused.attend(0, made_BHE, order_B, position_N[end_B]))
    found["cache"] = relative(written, cache.layers[0].nan_to_num())
    return found


def gate() -> float:
    generator = torch.Generator().manual_seed(1)
    gate_up_NM = torch.randn(3, 2 * 1100, generator=generator)
    return relative(gated(gate_up_NM, kernels=False), gated(gate_up_NM, kernels=True))


def drawing(vocabulary: int, temperature: float, dtype: torch.dtype) -> dict[str, float]:
    """The share of draws that differ, and the largest difference of a log-probability among the others."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits_BV = (4 * torch.randn(8, vocabulary, generator=generator)).to(dtype)
    logits_BV[:, vocabulary // 2 :: 3] = -torch.inf
    if vocabulary > 2048:
        logits_BV[0, :2048] = -torch.inf  # a whole block that cannot be drawn
        logits_BV[1, 2048:] = -torch.inf
    uniform_B = torch.rand(8, generator=generator) if temperature else None
    if uniform_B is not None:
        uniform_B[:4] = torch.tensor([0.0, 1.0 - 2.0**-24, 0.0, 1.0 - 2.0**-24])
    sampling = SamplingSettings(max_completion_tokens=1, temperature=temperature, top_p=1.0, top_k=0)
    (token_B, logprob_B), (found_B, its_logprob_B) = (
        draw_token(logits_BV, sampling, uniform_B), drawing_kernels.draw(logits_BV, temperature, uniform_B)
    )  # fmt: skip
    same_B = token_B == found_B
    same_B[:4] = True  # at both ends of the range rounding decides, and only that it can be drawn matters
    assert bool(its_logprob_B.isfinite().all()), "a token that cannot be drawn"
    apart_B = (logprob_B - its_logprob_B)[4:][same_B[4:]].abs()
    return {"tokens": float((~same_B).float().mean()), "log": float(apart_B.max())}


def likeliest(vocabulary: int, k: int, dtype: torch.dtype) -> float:
    """How many rows' ids differ, of logits many of which are equal."""
    generator = torch.Generator().manual_seed(k)
    logits_BV = (4 * torch.randn(6, vocabulary, generator=generator)).round().to(dtype)
    logits_BV[0] = -torch.inf
    logits_BV[1, ::2] = -0.0
    logits_Bk, id_Bk = drawing_kernels.likeliest(logits_BV, 0.7, k)
    expected_Bk = token_sampling.likeliest(logits_BV.float() / 0.7, k)
    assert torch.equal(logits_Bk, (logits_BV.float() / 0.7).gather(1, id_Bk))
    return float((id_Bk != expected_Bk).any(dim=1).sum())


def broken(value: float) -> float:
    """Whether logits that are not finite numbers stay so in the log-probability, and the token is one (0 if so)."""
    logits_BV = torch.randn(2, 97)
    logits_BV[0, 31] = value
    token_B, logprob_B = drawing_kernels.draw(logits_BV, 1.0, torch.tensor([0.3, 0.3]))
    fine = bool(logprob_B[1].isfinite()) and 0 <= int(token_B.min()) <= int(token_B.max()) < 97
    return float(not fine or bool(logprob_B[0].isfinite()))


def main() -> None:
    found = {"gate": gate()}
    for shape in SHAPES:
        found |= {f"{name} {shape}": value for name, value in attention(*shape).items()}
    for vocabulary in VOCABULARIES:
        for temperature in (0.0, 1.0, 0.7):
            for dtype in (FULL, NARROW):
                drawn = drawing(vocabulary, temperature, dtype)
                found |= {f"{name} {vocabulary} {temperature} {dtype}": value for name, value in drawn.items()}
    for vocabulary, k in ((97, 20), (5003, 1), (5003, 20)):
        found |= {f"likeliest {vocabulary} {k} {dtype}": likeliest(vocabulary, k, dtype) for dtype in (FULL, NARROW)}
    found |= {f"broken {value}": broken(value) for value in (float("nan"), float("inf"))}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
