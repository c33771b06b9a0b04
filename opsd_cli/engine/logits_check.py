"""The check at load that the policy's logits are the model's own. A model that scales or caps its logits in a way its
config does not say by a known name (`policy.Policy`) would otherwise be trained, silently, on another distribution.

A soft cap of 30 changes logits below 10 by 3 %, which rounding in bfloat16 can hide. So the way from the head's product
to the logits is not judged by a model's own numbers at all: the model runs while its head answers a ramp in fp32, far
beyond usual logits, and what the model makes of that ramp must be what `Head` makes of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from opsd_cli.data.pairing import TokenBatch
from opsd_cli.engine import agreement
from opsd_cli.engine.policy import Policy
from opsd_cli.settings.errors import DataError

RAMP = 50.0  # the largest logit of the ramp
RAMP_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Of the ramp's spread, by the type of the model's logits. Measured in fp32 and bf16 models of eight architectures: 0
to 1e-7 where nothing is wrong, 0.48 for a soft cap of 30, 0.02 for a factor of 1.02."""


def check_logits(policy: Policy, path: str, *, dropout: bool = False) -> None:
    """Compare the policy with its model on a few short rows. Before the weights are sharded. Raises DataError, which
    names the model's type, where one of three things differs: what becomes of the head's product, what the head is
    given, and the logits as a whole."""
    causal = policy.causal
    attention = causal.config._attn_implementation
    on_cpu = next(causal.parameters()).device.type == "cpu"
    if on_cpu and attention == "flash_attention_2":
        causal.set_attn_implementation("sdpa")  # flash runs on GPUs only, and the logits come after the attention
    policy.eval()
    with torch.no_grad():
        problem = _check_head(policy) or _check_model(policy, dropout=dropout)
    if causal.config._attn_implementation != attention:
        causal.set_attn_implementation(attention)
    if problem:
        raise DataError(
            f"model {path} (type {causal.config.model_type}) makes its logits in a way that opsd does not know: "
            f"{problem}; training would be on another distribution, so use another model"
        )


def _check_head(policy: Policy) -> str:
    """What differs before and after the head's product, in words; empty where nothing does."""
    causal, head = policy.causal, policy.head
    row_S = agreement.probe_rows(causal)[0]
    values_V = torch.linspace(-RAMP, RAMP, len(head.weight), device=head.weight.device)
    # Each position starts at another place of the vocabulary, or no position would differ from the mean of all.
    ramp_SV = torch.stack([values_V.roll(i * len(values_V) // len(row_S)) for i in range(len(row_S))])
    states, inputs = list[Tensor](), list[Tensor]()

    def keep_states(module: nn.Module, args: Any, output: Any) -> None:
        states.append(output.last_hidden_state)

    def answer_ramp(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs.append(args[0])
        return ramp_SV.unsqueeze(0)

    with (
        causal.get_decoder().register_forward_hook(keep_states),
        head.register_forward_hook(answer_ramp),
    ):
        model_SV = causal(input_ids=row_S[None], use_cache=False).logits[0]
    if len(inputs) != 1 or len(states) != 1:
        return "its forward pass does not call its decoder and its output head once each"
    policy_SV = head.numbers().transformed(ramp_SV)
    difference = agreement.overall(agreement.deviation(policy_SV, model_SV))
    if not difference <= RAMP_TOLERANCE[model_SV.dtype]:
        return (
            f"from a head's product of {-RAMP:g} to {RAMP:g} it makes logits that are "
            f"{agreement.percent(float(difference))} of their spread away from what its config says, "
            f"{describe_factor(model_SV, policy_SV)}"
        )
    state_SD, input_SD = states[0][0], inputs[0][0]
    if not agreement.overall(agreement.deviation(input_SD, state_SD)) <= RAMP_TOLERANCE[state_SD.dtype]:
        return (
            "its head is given something other than the hidden states of its decoder, "
            f"{describe_factor(input_SD, state_SD)}"
        )
    return ""


def _check_model(policy: Policy, *, dropout: bool) -> str:
    """How far the policy's logits are from the model's, in words; empty where no further than rounding goes."""
    causal = policy.causal
    rows = agreement.probe_rows(causal)
    ids_L = torch.cat(rows)
    batch = TokenBatch(ids_L, torch.arange(len(ids_L), device=ids_L.device), tuple(map(len, rows)))
    # As it is trained: what changes then, unless a model's dropout was asked for, would tell student from teacher.
    policy.train(not dropout)
    (policy_LV,) = policy(batch, lambda hidden_ND, head: (head.logits(hidden_ND),))
    policy.eval()
    model_LV = agreement.model_logits(causal, rows)
    noise_L = agreement.deviation(agreement.model_logits(causal, rows, padded=True), model_LV)
    # The median over positions: in a mixture of experts rounding may send a single token to another expert.
    median = agreement.deviation(policy_LV, model_LV).median()
    limit = agreement.model_limit(noise_L.median(), causal.dtype)
    return "" if median <= limit else f"on a few short rows they deviate {agreement.describe(median, limit)}"


def describe_factor(own: Tensor, expected: Tensor) -> str:
    """Whether a difference looks like a factor, in words."""
    own, expected = own.float(), expected.float()
    ratio = float((own * expected).sum() / expected.square().sum())
    is_scaled = float((own - ratio * expected).norm()) <= 1e-2 * float(own.norm())
    return f"as if multiplied by {ratio:.3g}" if is_scaled else "and not by a factor"
