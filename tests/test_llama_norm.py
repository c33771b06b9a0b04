"""The norms of the fast forward pass are the model's, whichever way they are made."""

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from opsd_cli.sampling.llama_weights import LengthNorm, Projection, TorchNorm, absorb_gain, make_norm

EPS = 1e-6


def draw(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)))


def model_norm(weight: Tensor) -> Qwen3RMSNorm:
    norm = Qwen3RMSNorm(len(weight), eps=EPS)
    norm.weight.data = weight
    return norm


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-4, 0.0, 1e4])  # the mean square beside eps: over it, at it, under it
@pytest.mark.parametrize("kind", [LengthNorm, TorchNorm])
def test_a_norm_is_the_models(kind: type, scale: float):
    x, weight = scale * draw(7, 48), 1.0 + draw(48)
    norm = make_norm(weight, EPS) if kind is LengthNorm else TorchNorm(weight, EPS)
    assert isinstance(norm, kind)
    torch.testing.assert_close(norm(x), model_norm(weight)(x).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [LengthNorm, TorchNorm])
def test_heads_may_have_weights_of_their_own(kind: type):
    x, weight = draw(7, 3, 32), 1.0 + draw(3, 32)
    norm = make_norm(weight, EPS) if kind is LengthNorm else TorchNorm(weight, EPS)
    expected = torch.stack([model_norm(weight[head])(x[:, head]).detach() for head in range(3)], dim=1)
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-6)


def test_the_gain_may_be_left_to_the_projection():
    x, weight = draw(5, 16), 1.0 + draw(16)
    whole, projection = make_norm(weight, EPS), Projection((draw(8, 16), draw(4, 16)), (draw(8), None), (None, None))
    kept = projection.weights[0].clone()
    bare, scaled = absorb_gain(whole, projection.fuse())
    assert isinstance(bare, LengthNorm)
    assert bare.gain is None
    torch.testing.assert_close(scaled(bare(x)), projection(whole(x)), rtol=1e-5, atol=1e-5)
    assert torch.equal(projection.weights[0], kept)


def test_half_precision_is_left_to_torch():
    assert isinstance(make_norm(torch.ones(8, dtype=torch.bfloat16), EPS), TorchNorm)
    norm = TorchNorm(torch.ones(8, dtype=torch.bfloat16), EPS)
    assert absorb_gain(norm, Projection((draw(2, 8),), (None,), (None,)))[0] is norm
