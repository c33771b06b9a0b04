"""What decoding gives to PyTorch's attention kernels: aligned, finite, and never a token that is hidden."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from decoder_check import HEAD_SIZES, check_decoding
from torch._subclasses.fake_tensor import FakeTensorMode

from opsd_cli.engine import fused_attention
from opsd_cli.engine.fused_attention import aligned_mask, causal_attention

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_attention_gets_aligned_tensors_and_every_step_answers_what_the_model_answers(head_size, dtype):
    check_decoding(head_size, dtype, torch.device("cpu"))


@pytest.mark.parametrize("view", [
    lambda table: table[:, None, None, 3:11],
    lambda table: table[:, None, None, :12],
    lambda table: table[:, :20].contiguous()[:, None, None, :16],
    lambda table: table.t()[:, None, None, :],
], ids=["its start", "its width", "its rows", "its columns"])  # fmt: skip
def test_a_mask_that_is_not_aligned_is_refused(view):
    table = torch.zeros(8, 24, dtype=torch.bfloat16)
    assert aligned_mask(table[:5, None, None, 8:24]).shape == (5, 1, 1, 16)
    with pytest.raises(AssertionError, match="a mask"):
        aligned_mask(view(table))


@pytest.mark.parametrize(("dtype", "head_size", "heads"), [
    (torch.float32, 64, 4), (torch.bfloat16, 64, 2), (torch.float16, 256, 2), (torch.bfloat16, 512, 4),
])  # fmt: skip
def test_on_a_gpu_key_heads_are_repeated_only_where_no_fused_kernel_takes_groups(dtype, head_size, heads, monkeypatch):
    given: list[tuple[int, bool]] = []
    real = F.scaled_dot_product_attention

    def look_and_attend(query, key, value, **how):
        given.append((key.shape[1], how["enable_gqa"]))
        return real(query, key, value, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", look_and_attend)
    with FakeTensorMode():  # shapes on a GPU that need not exist
        query = torch.empty(2, 4, 9, head_size, dtype=dtype, device="cuda")
        key = torch.empty(2, 2, 9, head_size, dtype=dtype, device="cuda")
        assert causal_attention(query, key, key, scale=None).shape == query.shape
    assert given == [(heads, heads == 2)]


def test_repeated_key_heads_answer_what_groups_answer(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 9, 16), torch.randn(2, 3, 9, 16), torch.randn(2, 3, 9, 16)
    grouped = causal_attention(query, key, value, scale=0.3)
    monkeypatch.setattr(fused_attention, "takes_groups", lambda query: False)
    torch.testing.assert_close(causal_attention(query, key, value, scale=0.3), grouped)
