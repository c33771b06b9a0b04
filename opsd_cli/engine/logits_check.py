"""The check at load that the policy's logits are the model's own. A model that scales or caps its logits in a way its
config does not tell by a known name (`policy.logit_transforms`) would otherwise be trained, without a word, on another
distribution.

A soft cap of 30 changes logits below 10 by 3 %, which rounding in bfloat16 can hide. So the way from the head's product
to the logits is not judged by a model's numbers at all: the model runs with its head replaced by one that answers a
ramp in fp32, far beyond usual logits, and what the model makes of that ramp must be what `Head` makes of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opsd_cli.data.pairing import TokenBatch
from opsd_cli.engine.agreement import allowed, deviation, in_words, overall, percent, probe_rows
from opsd_cli.engine.policy import Policy
from opsd_cli.settings.errors import DataError

RAMP = 50.0  # the largest logit of the ramp
RAMP_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Of the ramp's spread, by the type the model's logits come in. Measured in fp32 and bf16 models, eight architectures:
0 to 1e-7 where nothing is wrong, for a soft cap of 30 it is 0.48, for a factor of 1.02 it is 0.02."""


def check_logits(policy: Policy, path: str) -> None:
    """Compare the policy with its model on a few short rows. Before the weights are sharded. Raises DataError, which
    names the model's type, where one of three things differs: what becomes of the head's product, what the head is
    given, and the logits as a whole."""
    causal = policy.causal
    attention = causal.config._attn_implementation
    on_cpu = next(causal.parameters()).device.type == "cpu"
    if on_cpu and attention == "flash_attention_2":
        causal.set_attn_implementation("sdpa")  # the other runs on a GPU only, and the logits come after it
    policy.eval()
    with torch.no_grad():
        problem = of_the_head(policy) or of_the_whole(policy)
    if causal.config._attn_implementation != attention:
        causal.set_attn_implementation(attention)
    if problem:
        raise DataError(
            f"model {path} (type {causal.config.model_type}) makes its logits in a way that opsd does not know: "
            f"{problem}; training would be on another distribution, so use another model"
        )


def of_the_head(policy: Policy) -> str:
    """What is wrong before and after the head's product, in words; empty where nothing is."""
    causal, head = policy.causal, policy.head
    decoder_states: list[Tensor] = []
    row_S = probe_rows(causal)[0]
    ramp_SV = ramp(len(row_S), head)
    hook = causal.get_decoder().register_forward_hook(
        lambda module, given, made: decoder_states.append(made.last_hidden_state)
    )
    stand_in = RampHead(head, ramp_SV)
    name = next(name for name, module in causal.named_modules() if module is head)
    causal.set_submodule(name, stand_in)
    try:
        own_SV = causal(input_ids=row_S[None], use_cache=False).logits[0]
    finally:
        causal.set_submodule(name, head)
        hook.remove()
    if len(stand_in.inputs) != 1 or len(decoder_states) != 1:
        return "its forward pass does not call its decoder and its output head once each"
    ours_SV = head.numbers().transformed(ramp_SV)
    limit, apart = RAMP_TOLERANCE[own_SV.dtype], overall(deviation(ours_SV, own_SV))
    if not apart <= limit:
        return (
            f"of a head's product from {-RAMP:g} to {RAMP:g} it makes logits that are {percent(float(apart))} of their "
            f"spread away from what its config says, {likeness(own_SV, ours_SV)}"
        )
    state_SD, input_SD = decoder_states[0][0], stand_in.inputs[0][0]
    if not overall(deviation(input_SD, state_SD)) <= RAMP_TOLERANCE[state_SD.dtype]:
        return f"its head is given something else than the hidden states of its decoder, {likeness(input_SD, state_SD)}"
    return ""


class RampHead(nn.Module):
    """Stands for the output head for one call: keeps what it is given and answers the ramp. It has the head's weight,
    which some models read."""

    def __init__(self, head: nn.Linear, ramp_SV: Tensor) -> None:
        super().__init__()
        self.weight, self._ramp_SV = head.weight, ramp_SV
        self.inputs: list[Tensor] = []

    def forward(self, hidden_1SD: Tensor) -> Tensor:
        self.inputs.append(hidden_1SD)
        return self._ramp_SV.unsqueeze(0)


def ramp(positions: int, head: nn.Linear) -> Tensor:
    """Logits [positions, V] in fp32 from -RAMP to RAMP, begun at another place of the vocabulary at each position."""
    size = len(head.weight)
    values_V = torch.linspace(-RAMP, RAMP, size, device=head.weight.device)
    return torch.stack([values_V.roll(position * size // positions) for position in range(positions)])


def of_the_whole(policy: Policy) -> str:
    """How far the policy's logits are from the model's, in words; empty where not further than rounding goes. Judged by
    the median over positions: in a mixture of experts rounding may send a token to another expert."""
    causal = policy.causal
    rows = probe_rows(causal)
    ids_L, lengths = torch.cat(rows), tuple(len(row) for row in rows)
    batch = TokenBatch(ids_L, torch.arange(len(ids_L), device=ids_L.device), lengths)
    own_LV = torch.cat([causal(input_ids=row[None], use_cache=False).logits[0].float() for row in rows])
    padded_BSV = causal(input_ids=nn.utils.rnn.pad_sequence(rows, batch_first=True), use_cache=False).logits.float()
    padded_LV = torch.cat([padded_SV[:length] for padded_SV, length in zip(padded_BSV, lengths, strict=True)])
    (ours_LV,) = policy(batch, lambda hidden_ND, head: (head.logits(hidden_ND),))
    middle = deviation(ours_LV, own_LV).median()
    limit = allowed(deviation(padded_LV, own_LV).median(), causal.dtype)
    return "" if middle <= limit else f"on a few short rows they deviate {in_words(middle, limit)}"


def likeness(own: Tensor, ours: Tensor) -> str:
    """What a difference looks like, in words."""
    own, ours = own.float(), ours.float()
    ratio = float((own * ours).sum() / ours.square().sum())
    is_scaled = float((own - ratio * ours).norm()) <= 1e-2 * float(own.norm())
    return f"as if multiplied by {ratio:.3g}" if is_scaled else "and not by a factor"
