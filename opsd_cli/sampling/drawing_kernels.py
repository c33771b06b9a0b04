"""The draw of one token in Triton kernels that read the logits once: each block of the vocabulary is summed up by a
program of its own; one program per row finds the block that its uniform number falls into, and the token there. With
top-k, likewise, the likeliest of every block, and of those the likeliest. Imported only where triton is installed. What
is drawn is what `token_sampling.draw_token` draws, up to the order of summation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opsd_cli.sampling import token_sampling
from opsd_cli.settings.config import SamplingSettings

BLOCK = 2048  # vocabulary entries of one program
MOST_LIKELIEST = 64  # up to which the likeliest tokens are found one after another


def draw_token(logits_BV: Tensor, sampling: SamplingSettings, uniform_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `token_sampling.draw_token` draws, by kernels where they can."""
    truncates = 0 < sampling.top_k < logits_BV.shape[1]
    if uniform_B is None or (not truncates and sampling.top_p == 1.0):
        return draw(logits_BV, sampling.temperature, uniform_B)
    if not truncates or sampling.top_k > MOST_LIKELIEST:
        return token_sampling.draw_token(logits_BV, sampling, uniform_B)
    logits_Bk, id_Bk = likeliest(logits_BV, sampling.temperature, sampling.top_k)
    return token_sampling.draw_among(token_sampling.truncate_mass(logits_Bk, sampling.top_p), id_Bk, uniform_B)


def draw(logits_BV: Tensor, temperature: float, uniform_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token per row and its log-probability at this temperature; the likeliest, at temperature 1, if there are no
    uniform numbers."""
    rows, vocabulary = logits_BV.shape
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    blocks = triton.cdiv(vocabulary, block)
    largest_Bn, sum_Bn = logits_BV.new_empty(2, rows, blocks, dtype=torch.float32)
    token_B = logits_BV.new_empty(rows, dtype=torch.long)
    logprob_B = logits_BV.new_empty(rows, dtype=torch.float32)
    greedy = uniform_B is None
    divisor = 1.0 if greedy else temperature
    _sum_blocks[(rows, blocks)](logits_BV, largest_Bn, sum_Bn, vocabulary, divisor, BLOCK=block, num_warps=4)
    _find[(rows,)](
        logits_BV, largest_Bn, sum_Bn, largest_Bn if uniform_B is None else uniform_B, token_B, logprob_B,
        vocabulary, blocks, divisor, token_sampling.BELOW_ONE,
        BLOCK=block, BLOCKS=triton.next_power_of_2(blocks), GREEDY=greedy, num_warps=4,
    )  # fmt: skip
    return token_B, logprob_B


def likeliest(logits_BV: Tensor, temperature: float, k: int) -> tuple[Tensor, Tensor]:
    """The logits over the temperature, fp32, of exactly k tokens per row and their ids, ascending by id [B, k]; of
    equally likely ones those with the lowest ids, as `token_sampling.likeliest` has it."""
    rows, vocabulary = logits_BV.shape
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    blocks = triton.cdiv(vocabulary, block)
    key_Bnk = logits_BV.new_empty(rows, blocks, k, dtype=torch.long)
    _likeliest_of_blocks[(rows, blocks)](logits_BV, key_Bnk, vocabulary, temperature, K=k, BLOCK=block, num_warps=4)
    key_Bk = key_Bnk.new_empty(rows, k)
    found = blocks * k
    _likeliest_keys[(rows,)](key_Bnk, key_Bk, found, K=k, BLOCK=triton.next_power_of_2(found), num_warps=4)
    # A key is an integer that ascends with the logit, times the vocabulary, minus the id.
    id_Bk = torch.remainder(-key_Bk, vocabulary).sort(dim=1).values
    return logits_BV.gather(1, id_Bk).float() / temperature, id_Bk


@triton.jit
def _likeliest_of_blocks(logits_ptr, key_ptr, vocabulary, divisor, K: tl.constexpr, BLOCK: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    logits = _logits(logits_ptr + row * vocabulary, vocabulary, block, divisor, BLOCK) + 0.0  # one zero of the two
    # The bits of positive numbers ascend with them as integers do; those of negative ones descend.
    bits = logits.to(tl.int32, bitcast=True)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    entries = block * BLOCK + tl.arange(0, BLOCK)
    # Past the end of the vocabulary: below the key of any logit.
    keys = tl.where(entries < vocabulary, order * vocabulary - entries, -(2**62))
    _take_largest(keys, key_ptr + (row * tl.num_programs(1) + block) * K, K)


@triton.jit
def _likeliest_keys(from_ptr, to_ptr, count, K: tl.constexpr, BLOCK: tl.constexpr):
    row, n = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    keys = tl.load(from_ptr + row * count + n, mask=n < count, other=-(2**62))
    _take_largest(keys, to_ptr + row * K, K)


@triton.jit
def _take_largest(keys, to_ptr, K: tl.constexpr):
    """The K largest keys, of which no two are equal but the smallest possible."""
    for number in range(K):
        largest = tl.max(keys, 0)
        tl.store(to_ptr + number, largest)
        keys = tl.where(keys == largest, -(2**62), keys)


@triton.jit
def _logits(pointer, vocabulary, block, divisor, BLOCK: tl.constexpr):
    """A block of a row, minus infinity past the end of the vocabulary."""
    entries = block * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(pointer + entries, mask=entries < vocabulary, other=float("-inf")).to(tl.float32)
    return logits / divisor


@triton.jit
def _sum_blocks(logits_ptr, largest_ptr, sum_ptr, vocabulary, divisor, BLOCK: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    logits = _logits(logits_ptr + row * vocabulary, vocabulary, block, divisor, BLOCK)
    largest = tl.max(logits, 0)
    # A block of which every entry is minus infinity has the sum 0.
    shifted = tl.where(logits > float("-inf"), logits - largest, float("-inf"))
    shifted = tl.where(logits != logits, logits, shifted)  # NaN stays, to be seen in the log-probability
    place = row * tl.num_programs(1) + block
    tl.store(largest_ptr + place, largest)
    tl.store(sum_ptr + place, tl.sum(tl.exp(shifted), 0))


@triton.jit
def _find(
    logits_ptr, largest_ptr, sum_ptr, uniform_ptr, token_ptr, logprob_ptr, vocabulary, blocks, divisor, below_one,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, GREEDY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n, entries = tl.arange(0, BLOCKS), tl.arange(0, BLOCK)
    largest_n = tl.load(largest_ptr + row * blocks + n, mask=n < blocks, other=float("-inf"))
    sum_n = tl.load(sum_ptr + row * blocks + n, mask=n < blocks, other=0.0)
    largest = tl.max(largest_n, 0)
    mass_n = tl.where(largest_n > float("-inf"), sum_n * tl.exp(largest_n - largest), sum_n)
    cumulative_n = tl.cumsum(mass_n, 0)
    total = tl.sum(mass_n, 0)
    if GREEDY:
        block = tl.min(tl.where(largest_n == largest, n, BLOCKS - 1), 0)
        logits = _logits(logits_ptr + row * vocabulary, vocabulary, block, divisor, BLOCK)
        place = tl.min(tl.where(logits == largest, entries, BLOCK - 1), 0)
    else:
        # The threshold must stay below the sum, to which rounding could lift it.
        threshold = tl.minimum(tl.load(uniform_ptr + row), below_one) * total
        # The first block that reaches beyond it; where rounding leaves none, the last that can be drawn. Only blocks
        # and entries with a probability above 0 are looked at: none other is ever drawn.
        last = tl.max(tl.where(mass_n > 0, n, 0), 0)
        block = tl.min(tl.where((cumulative_n > threshold) & (mass_n > 0), n, last), 0)
        before = tl.sum(tl.where(n < block, mass_n, 0.0), 0)
        logits = _logits(logits_ptr + row * vocabulary, vocabulary, block, divisor, BLOCK)
        p = tl.exp(logits - largest)
        last_place = tl.max(tl.where(p > 0, entries, 0), 0)
        reaches = (before + tl.cumsum(p, 0) > threshold) & (p > 0)
        place = tl.min(tl.where(reaches, entries, last_place), 0)
    token = tl.minimum(block * BLOCK + place, vocabulary - 1)
    chosen = tl.load(logits_ptr + row * vocabulary + token).to(tl.float32) / divisor
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logprob_ptr + row, chosen - largest - tl.log(total))
