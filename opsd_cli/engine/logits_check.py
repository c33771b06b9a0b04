"""One check at load: the logits made here from hidden states and head are the model's own. Owns the comparison; what is
known of a model's way from one to the other is `policy.logit_transforms`. A model that scales or caps its logits in a
way its config does not tell by a known name would otherwise be trained, without a word, on another distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from opsd_cli.data.pairing import TokenBatch
from opsd_cli.engine.policy import Policy
from opsd_cli.settings.errors import DataError

POSITIONS = 8
ROUNDINGS = 8  # steps of the type's precision, at the largest logit, by which two ways of one computation may differ


def check_logits(policy: Policy, path: str) -> None:
    """Compare both on a short input. Before the weights are sharded. Raises DataError naming the model's type."""
    causal = policy.causal
    device = next(causal.parameters()).device
    ids_L = torch.arange(5, 5 + POSITIONS, device=device).remainder(causal.get_input_embeddings().num_embeddings)
    batch = TokenBatch(ids_L, torch.arange(POSITIONS, device=device), (POSITIONS,))
    attention = causal.config._attn_implementation
    if device.type == "cpu" and attention == "flash_attention_2":
        causal.set_attn_implementation("sdpa")  # the other runs on a GPU only, and the logits come after it
    policy.eval()
    with torch.no_grad():
        own_NV = causal(input_ids=ids_L[None], use_cache=False).logits[0].float()
        ours_NV = policy(batch, lambda h, head: head.logits(h))
    if causal.config._attn_implementation != attention:
        causal.set_attn_implementation(attention)
    difference, largest = float((own_NV - ours_NV).abs().max()), float(own_NV.abs().max())
    if difference <= ROUNDINGS * torch.finfo(causal.dtype).eps * max(largest, float(ours_NV.abs().max())):
        return
    raise DataError(
        f"model {path} (type {causal.config.model_type}) makes its logits in a way that opsd does not know: on a short "
        f"input they differ by up to {difference:.3g} (largest {largest:.3g}) from its output head applied to its "
        f"hidden states, {found(own_NV, ours_NV)}; training would be on another distribution, so use another model"
    )


def found(own_NV: Tensor, ours_NV: Tensor) -> str:
    """What the difference looks like, in words."""
    ratio = float((own_NV * ours_NV).sum() / ours_NV.square().sum())
    is_scaled = float((own_NV - ratio * ours_NV).norm()) <= 1e-2 * float(own_NV.norm())
    return f"as if multiplied by {ratio:.3g}" if is_scaled else "and not by a factor"
