"""The last layer's MLP is run on the tokens that are read, and hidden states and gradients stay what they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from opsd_cli.data.pairing import TokenBatch
from opsd_cli.engine.last_mlp import last_mlp, only_where
from opsd_cli.engine.packed import usable_layout
from opsd_cli.engine.policy import Policy, Source, load_causal, resolve
from opsd_cli.engine.process_group import alone

TINY = Source(resolve("bundled:tiny", None, key="model.path")[0], None, torch.float32, "sdpa", False, True)
LENGTHS = (13, 5, 9)


def batch() -> TokenBatch:
    ids_L = torch.randint(2, 1000, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    return TokenBatch(ids_L, torch.arange(3, len(ids_L), 4), LENGTHS)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_states_and_gradients_are_those_of_the_whole_layer(checkpointing: bool):
    found = {}
    for trimmed in (False, True):
        causal = load_causal(TINY)
        layout = usable_layout(causal, alone()).layout
        mlp = last_mlp(causal, layout) if trimmed else None
        seen: list[int] = []
        gate = causal.model.layers[-1].mlp.gate_proj
        gate.register_forward_hook(lambda _, given, __, seen=seen: seen.append(given[0].shape[1]))
        policy = Policy(causal, causal=causal, layout=layout, last_mlp=mlp).train()
        if checkpointing:
            causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        seen.clear()
        hidden_ND = policy(batch(), lambda hidden_ND, head: hidden_ND)
        hidden_ND.square().sum().backward()
        read = len(batch().predict_N) if trimmed and not checkpointing else sum(LENGTHS)
        assert set(seen) == {read}
        found[trimmed] = [hidden_ND.detach(), *(p.grad for p in causal.get_decoder().parameters())]
    for got, wanted in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


class Mixing(nn.Module):
    """No MLP: what it gives for a token depends on the others."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.cumsum(dim=1)


def test_a_model_that_it_does_not_fit_is_run_whole():
    causal = load_causal(TINY)
    assert last_mlp(causal, "packed") is causal.model.layers[-1].mlp
    assert last_mlp(causal, "padded") is None, "its tokens are in a rectangle"
    causal.model.layers[-1].mlp = Mixing()
    assert last_mlp(causal, "packed") is None
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()
    assert last_mlp(gpt2, "packed") is None, "its layers have other names"


def test_the_modules_own_forward_is_back_afterwards():
    mlp = nn.Linear(3, 3)
    with only_where(mlp, torch.tensor([0])):
        assert float(mlp(torch.ones(1, 2, 3))[0, 1].detach().abs().sum()) == 0
    assert float(mlp(torch.ones(1, 2, 3))[0, 1].detach().abs().sum()) > 0
