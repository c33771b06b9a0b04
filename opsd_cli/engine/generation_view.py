"""A second module tree over the policy's weights, for generation.

It has no parameters of its own, no DeepSpeed hooks, no gradient checkpointing and is always in evaluation mode, so
generation is one code path at every ZeRO stage and never touches the state of the module that trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from opsd_cli.engine.loading import Source, add_adapter, meta_causal
from opsd_cli.engine.policy import Policy
from opsd_cli.engine.weight_copies import Gather
from opsd_cli.settings.config import LoraSettings


class GenerationView:
    """A module tree on the meta device that borrows the policy's weights for the length of a context."""

    def __init__(self, policy: Policy, source: Source, lora: LoraSettings) -> None:
        twin = meta_causal(source, policy.causal)
        with torch.device("meta"):
            self._lm = add_adapter(twin, lora, seed=0)
        self._lm.requires_grad_(False).eval()
        # Tied parameters have two names: both must be pointed.
        self._sources = dict(policy.lm.named_parameters(remove_duplicate=False))
        self._targets = {name: self._target(name) for name, _ in self._lm.named_parameters(remove_duplicate=False)}
        assert self._sources.keys() == self._targets.keys(), "the view is not the same model"

    @contextmanager
    def with_weights(self, gather: Gather) -> Iterator[nn.Module]:
        """The module, ready to run, while the weights are whole."""
        with gather(list({id(p): p for p in self._sources.values()}.values())):
            self._point({name: source.data for name, source in self._sources.items()})
            try:
                yield self._lm
            finally:
                empty = torch.empty(0, device="meta")
                self._point(dict.fromkeys(self._targets, empty))

    def _target(self, name: str) -> tuple[dict[str, nn.Parameter | None], str]:
        owner, _, leaf = name.rpartition(".")
        return self._lm.get_submodule(owner)._parameters, leaf

    def _point(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put new parameters in place: the `.data` of a meta tensor cannot be set to one on another device."""
        for name, (parameters, leaf) in self._targets.items():
            parameters[leaf] = nn.Parameter(tensors[name], requires_grad=False)
