"""A second module tree over the policy's weights, for generation.

It has no parameters of its own, no DeepSpeed hooks, no gradient checkpointing and is always in evaluation mode, so
generation is one code path at every ZeRO stage and never touches the state of the module that trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from opsd_cli.engine.loading import Source, add_adapter, causal_of, meta_causal
from opsd_cli.engine.policy import Policy
from opsd_cli.engine.quantized import sharing_copy
from opsd_cli.engine.weight_copies import Gather
from opsd_cli.settings.config import LoraSettings


class GenerationView:
    """A module tree on the meta device that borrows the policy's weights for the length of a context."""

    def __init__(self, policy: Policy, source: Source, lora: LoraSettings) -> None:
        if source.quantize == "4bit":
            # Packed weights cannot be lent without their scales; they are never sharded, so they are shared for good.
            self._lm, self._sources, self._targets = sharing_copy(policy.lm).eval(), {}, {}
            causal_of(self._lm).set_attn_implementation(source.attention)
            return
        twin = meta_causal(source, policy.causal)
        with torch.device("meta"):
            self._lm = add_adapter(twin, lora, seed=0)
        self._lm.requires_grad_(False).eval()
        # Tied parameters have two names, and both must be pointed.
        self._sources = dict(policy.lm.named_parameters(remove_duplicate=False))
        # Of each name the table that holds the parameter in its module, and the key in it.
        self._targets = {
            name: (self._lm.get_submodule(name.rpartition(".")[0])._parameters, name.rpartition(".")[2])
            for name, _ in self._lm.named_parameters(remove_duplicate=False)
        }
        assert self._sources.keys() == self._targets.keys(), "the view is not the same model"

    @contextmanager
    def with_weights(self, gather: Gather) -> Iterator[nn.Module]:
        """The module, ready to run, while the weights are gathered."""
        with gather(list({id(p): p for p in self._sources.values()}.values())):
            self._point({name: source.data for name, source in self._sources.items()})
            try:
                yield self._lm
            finally:
                # Or the gathered weights would stay in memory after ZeRO-3 has released them.
                self._point(dict.fromkeys(self._targets, torch.empty(0, device="meta")))

    def _point(self, tensors: dict[str, torch.Tensor]) -> None:
        # New parameters, because the `.data` of a meta tensor cannot be set to a tensor on another device.
        for name, (parameters, key) in self._targets.items():
            parameters[key] = nn.Parameter(tensors[name], requires_grad=False)
