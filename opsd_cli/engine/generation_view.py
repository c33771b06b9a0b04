"""A second module tree over the policy's weights, for generation.

It has no parameters of its own, no DeepSpeed hooks, no gradient checkpointing and is always in evaluation mode, so
generation is one code path at every ZeRO stage and never touches the state of the module that trains.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from opsd_cli.engine.loading import Source, add_adapter, causal_of, load_causal, meta_causal
from opsd_cli.engine.policy import Policy
from opsd_cli.engine.quantized import sharing_copy
from opsd_cli.engine.small_cards import untile_mlps
from opsd_cli.engine.weight_copies import Gather
from opsd_cli.settings.config import LoraSettings


class GenerationView:
    """A module tree on the meta device that borrows the policy's weights for the length of a context."""

    def __init__(self, policy: Policy, source: Source, lora: LoraSettings) -> None:
        self._source, self._lora = source, lora
        if source.quantize == "4bit":
            # Packed weights cannot be lent without their scales; they are never sharded, so they are shared for good.
            self._lm, self._sources = sharing_copy(policy.lm).eval(), {}
            causal_of(self._lm).set_attn_implementation(source.attention)
            untile_mlps(self._lm)
            return
        twin = meta_causal(source, policy.causal)
        with torch.device("meta"):
            self._lm = add_adapter(twin, lora, seed=0)
        self._lm.requires_grad_(False).eval()
        # Tied parameters have two names, and both must be pointed.
        self._sources = dict(policy.lm.named_parameters(remove_duplicate=False))
        names = {name for name, _ in self._lm.named_parameters(remove_duplicate=False)}
        assert self._sources.keys() == names, "the view is not the same model"

    @contextmanager
    def with_weights(self, gather: Gather) -> Iterator[nn.Module]:
        """The module, ready to run, while the weights are gathered."""
        sources = {id(source): source for source in self._sources.values()}
        with gather(list(sources.values())):
            whole = {key: source.data for key, source in sources.items()}
            point(self._lm, {name: whole[id(source)] for name, source in self._sources.items()})
            try:
                yield self._lm
            finally:
                # Or the gathered weights would stay in memory after ZeRO-3 has released them.
                point(self._lm, {name: torch.empty(0, device="meta") for name in self._sources})

    def module_of(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """A module tree of its own over `weights`: one tensor for each parameter of the policy, by its first name. In
        the place of frozen weights that are quantised the original ones are loaded again."""
        if self._source.quantize == "4bit":
            lm = add_adapter(load_causal(replace(self._source, quantize="none")), self._lora, seed=0)
            for name, parameter in lm.named_parameters():
                parameter.data = weights[name] if ".lora_" in name else parameter.data
            return lm.requires_grad_(False).eval()
        lm = copy.deepcopy(self._lm)
        by_parameter = {id(source): weights[name] for name, source in self._sources.items() if name in weights}
        point(lm, {name: by_parameter[id(source)] for name, source in self._sources.items()})
        return lm


def point(lm: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make each parameter of `lm`, by name, a view of a tensor."""
    # New parameters, because the `.data` of a meta tensor cannot be set to a tensor on another device. Tied parameters
    # have two names, and both are pointed at one, or whoever lists parameters would meet the weight twice.
    made = {id(tensor): nn.Parameter(tensor, requires_grad=False) for tensor in tensors.values()}
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        lm.get_submodule(owner)._parameters[key] = made[id(tensor)]
