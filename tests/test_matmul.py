"""Matrix products are the same numbers, whoever makes them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from opsd_cli.cpu import matmul

LARGE = (1000, 300)  # more than LARGE_BYTES, and no multiple of a tile
SMALL = (20, 30)


@pytest.fixture(params=["MKL", "oneDNN"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both, whatever the processor is."""
    if request.param == "oneDNN" and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(matmul, "onednn_rows", lambda: 1000 if request.param == "oneDNN" else 0)
    return request.param


def draw(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)))


def inputs(size: int) -> dict[str, Tensor]:
    """Rows as callers have them: whole, one, none, a view with gaps, a transposed one."""
    return {
        "whole": draw(7, size),
        "one": draw(1, size),
        "none": draw(0, size),
        "gaps": draw(5, 3, size)[:, 1],
        "transposed": draw(size, 4).T,
    }


@pytest.mark.parametrize("shape", [LARGE, SMALL])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_map_is_what_it_says(library: str, shape: tuple[int, int], bias: bool, monkeypatch):
    monkeypatch.setattr(matmul, "TILE_BYTES", 64 * 4 * shape[1])
    weight, offset = draw(*shape), draw(shape[0]) if bias else None
    assert matmul.by_onednn(weight, 7) == (library == "oneDNN" and shape == LARGE)
    for x in inputs(shape[1]).values():
        expected = (x.double() @ weight.double().T + (0 if offset is None else offset.double())).float()
        torch.testing.assert_close(matmul.linear(x, weight, offset), expected, rtol=1e-5, atol=1e-4)
        out = torch.full((len(x) + 2, shape[0]), 7.0)
        matmul.linear_into(out[1:-1], x, weight, offset)
        torch.testing.assert_close(out[1:-1], expected, rtol=1e-5, atol=1e-4)
        assert torch.all(out[[0, -1]] == 7.0)
        total = torch.ones(len(x), shape[0])
        matmul.add_linear(total, x, weight, offset)
        torch.testing.assert_close(total, expected + 1.0, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [LARGE, SMALL])
def test_back_through_a_weight_is_what_it_says(library: str, shape: tuple[int, int]):
    weight = draw(*shape)
    for gradient in inputs(shape[0]).values():
        expected = (gradient.double() @ weight.double()).float()
        torch.testing.assert_close(matmul.back(gradient, weight), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("change", ["half", "double", "transposed"])
def test_weights_that_are_not_plain_fp32_are_left_to_torch(library: str, change: str):
    changes = {"half": Tensor.bfloat16, "double": Tensor.double, "transposed": lambda weight: weight.T}
    weight = changes[change](draw(*LARGE))
    x = draw(4, weight.shape[1]).to(weight.dtype)
    assert not matmul.by_onednn(weight, 4)
    torch.testing.assert_close(matmul.linear(x, weight), x @ weight.T)


@pytest.mark.parametrize(
    ("facts", "few", "many"),
    [
        ("vendor_id : AuthenticAMD\nflags : fma avx2 avx512f", True, True),
        ("vendor_id : AuthenticAMD\nflags : fma avx2", True, False),
        ("vendor_id : GenuineIntel\nflags : fma avx2 avx512f", False, False),
        (None, False, False),
    ],
)
def test_the_choice_is_the_processors(
    facts: str | None, few: bool, many: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    file = tmp_path / "cpuinfo"
    if facts is not None:
        file.write_text(facts)
    monkeypatch.setattr(matmul, "CPU_FACTS", file)
    monkeypatch.setattr(matmul, "onednn_rows", matmul.onednn_rows.__wrapped__)
    weight = draw(*LARGE)
    assert [matmul.by_onednn(weight, rows) for rows in (0, 8, 400)] == [few, few, many]
