"""What lets long rollouts fit on a small card: layers' inputs in host memory, MLPs in pieces, bfloat16 for AdamW.
That updates through DeepSpeed have the right gradients with them, `test_gradients` and `test_half_precision` hold."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from recipe_support import problems_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from zoo import FAMILIES

from opsd_cli.engine import small_cards
from opsd_cli.engine.loaded_weights import switch_off_dropout
from opsd_cli.engine.loading import add_adapter, causal_of
from opsd_cli.engine.packed import run_rows
from opsd_cli.engine.small_cards import InHostMemory, OffloadActivations, tile_mlps, untile_mlps, why_not_cut
from opsd_cli.engine.weight_copies import share_beyond_bfloat16
from opsd_cli.settings.config import LoraSettings
from opsd_cli.settings.errors import ConfigError

LENGTHS = (61, 40, 19, 8)
LORA = LoraSettings(rank=4, alpha=8, dropout=0.0, targets=("all-linear",))
NO_LORA = LoraSettings(rank=0, alpha=8, dropout=0.0, targets=("all-linear",))


def model(family: str = "llama", dtype: torch.dtype = torch.float32, **sizes: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = FAMILIES[family].config()
    vars(config).update(sizes)
    causal = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    switch_off_dropout(causal)
    return causal


def gradients(causal: PreTrainedModel, *, offloads: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """States of rows one after another, and the gradients of a function of them, with checkpointing."""
    causal.train()
    causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    causal.zero_grad()
    ids_L = torch.randint(2, 250, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    with OffloadActivations() if offloads else torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        hidden_LD = run_rows(causal.get_decoder(), ids_L, LENGTHS, layout="padded")
    hidden_LD.float().square().sum().backward()
    return hidden_LD.detach(), {n: p.grad.clone() for n, p in causal.named_parameters() if p.grad is not None}


# Activations in host memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_to_the_last_bit_when_activations_lie_in_host_memory(monkeypatch, dtype):
    monkeypatch.setattr(small_cards, "SMALLEST", 1)
    causal = model(dtype=dtype)
    states, expected = gradients(causal)
    offloaded, found = gradients(causal, offloads=True)
    assert torch.equal(states, offloaded)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_input_of_every_layer_is_moved_and_small_tensors_stay(monkeypatch):
    causal, kept = model(), list[Tensor | InHostMemory]()
    put_away = small_cards.put_away
    monkeypatch.setattr(small_cards, "put_away", lambda x: kept.append(put_away(x)) or kept[-1])
    monkeypatch.setattr(small_cards, "SMALLEST", max(LENGTHS) * 32)
    gradients(causal, offloads=True)
    moved = [one.copy.shape for one in kept if isinstance(one, InHostMemory)]
    inputs = torch.Size([len(LENGTHS), max(LENGTHS), 32])
    assert moved.count(inputs) >= causal.config.num_hidden_layers
    assert all(one.numel() < max(LENGTHS) * 32 for one in kept if isinstance(one, Tensor))


# MLPs in pieces -------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """How many numbers the largest tensor has that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(one, Tensor) and one.dim() > 1:
                self.largest = max(self.largest, one.numel())
        return made


@contextmanager
def largest_tensor() -> Iterator[LargestTensor]:
    with LargestTensor() as mode:
        yield mode


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [NO_LORA, LORA], ids=["all", "lora"])
def test_an_mlp_in_pieces_gives_the_states_and_gradients_of_a_whole_one(lora: LoraSettings, dtype: torch.dtype):
    whole, exact = model(dtype=dtype), model(dtype=dtype).float()
    tiled = copy.deepcopy(whole)
    made = [causal_of(add_adapter(causal, lora, seed=0)) for causal in (whole, tiled, exact)]
    for causal in made:
        for name, parameter in causal.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(4))
                parameter.data.copy_(parameter.data.to(dtype))
    assert tile_mlps(made[1], 3) == 2
    (states, expected), (tiled_states, found), (_, right) = map(gradients, made)
    assert expected.keys() == found.keys()
    if dtype is torch.float32:
        torch.testing.assert_close(tiled_states, states, rtol=1e-5, atol=1e-6)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
        return
    off = {name: apart(found[name], right[name]) for name in right}
    own = {name: apart(expected[name], right[name]) for name in right}
    assert max(off[name] / max(own[name], 2**-8) for name in right) < 2.0, off


def apart(gradient: Tensor, right: Tensor) -> float:
    return float((gradient.float() - right.float()).norm() / right.float().norm())


def test_nothing_between_the_projections_is_larger_than_a_piece():
    """Forwards and backwards: an MLP eight times as wide as the states, in eight pieces, makes nothing larger than
    these."""
    wide = model(intermediate_size=256)
    with largest_tensor() as whole:
        gradients(wide)
    tiles = 8
    tile_mlps(wide, tiles)
    with largest_tensor() as tiled:
        gradients(wide)
    tokens = len(LENGTHS) * max(LENGTHS)
    assert whole.largest == tokens * 256
    assert tiled.largest < tokens * 64


def test_a_pass_without_gradient_is_in_pieces_too_and_a_single_token_is_one_piece():
    causal = model()
    token = torch.tensor([[7]])
    expected = causal(token).logits
    tile_mlps(causal, 4)
    with torch.no_grad():
        torch.testing.assert_close(causal(token).logits, expected)
    untile_mlps(causal)
    assert torch.equal(causal(token).logits, expected)
    assert not any("forward" in vars(module) for module in causal.modules())


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "cohere", "gemma2", "mixtral", "qwen3_5"])
def test_mlps_of_many_architectures_can_be_cut(family: str):
    causal = model(family)
    # In float64 nothing but a fault shows. Experts have none; theirs differ with the CPU by 2e-3 of the largest.
    close = 1e-2 if family == "mixtral" else 1e-8
    causal = causal if family == "mixtral" else causal.double()
    states, expected = gradients(causal)
    assert tile_mlps(causal, 3) == causal.config.num_hidden_layers
    tiled_states, found = gradients(causal)
    torch.testing.assert_close(tiled_states, states, rtol=close, atol=close * 1e-2)
    for name, gradient in expected.items():
        atol = close * float(gradient.abs().max() + 1e-6)
        torch.testing.assert_close(found[name], gradient, rtol=close, atol=atol)


def test_a_model_without_such_an_mlp_is_refused():
    with pytest.raises(ConfigError, match=re.escape("this architecture (mamba) has no MLP of its own in a layer")):
        tile_mlps(model("mamba"), 2)
    with pytest.raises(ConfigError, match="1 required positional argument: 'residual'"):
        tile_mlps(model("bloom"), 2)
    with pytest.raises(ConfigError, match=r"\(gpt_oss\) cannot be cut: they return more than one number"):
        tile_mlps(model("gpt_oss"), 2)


class Shifted(nn.Module):
    """What a token gives depends on the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x + x.roll(1, dims=1))


def test_a_module_that_mixes_tokens_is_found():
    assert "depends on other tokens" in why_not_cut(Shifted(), 32)
    assert why_not_cut(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)), 32) == ""


# AdamW's state in bfloat16 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", [1e-6, 1e-4, 1e-2])
def test_the_share_of_weights_that_an_update_does_not_change_is_what_bfloat16_says(update: float):
    layer = nn.Linear(64, 64).bfloat16()
    with torch.no_grad():
        layer.weight.mul_(torch.linspace(-3, 0, 64).exp()).flatten()[:7] = 0
    weights = torch.cat([p.detach().flatten() for p in layer.parameters()])
    changed = (weights.double() + weights.sign().double() * update * 1.0001).bfloat16() != weights
    changed |= weights == 0
    expected = 1 - float(changed.float().mean())
    assert share_beyond_bfloat16(layer, update) == pytest.approx(expected, abs=0.01)


# Rules ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            ("train.offload_activations=true", "train.gradient_checkpointing=false"),
            "set train.gradient_checkpointing=true",
        ),
        (("optim.state_dtype=bfloat16", "model.dtype=float32"), "needs weights in bfloat16 (got model.dtype=float32)"),
        (
            ("optim.state_dtype=bfloat16", "model.dtype=bfloat16", "zero=stage2_offload"),
            "optim.state_dtype=bfloat16 cannot be offloaded",
        ),
    ],
)
def test_settings_for_small_cards_that_do_not_go_together_are_refused(words: tuple[str, ...], reason: str):
    assert any(reason in problem for problem in problems_of("recipe=quickstart", *words))
