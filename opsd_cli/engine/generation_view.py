"""A second module tree over the policy's weights, for generation.

It has no parameters of its own, no DeepSpeed hooks, no gradient checkpointing and is always in evaluation mode, so
generation is one code path at every ZeRO stage and never touches the state of the module that trains.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from opsd_cli.engine.layer_by_layer import PassesTogether, open_while_called
from opsd_cli.engine.loading import Source, add_adapter, causal_of, load_causal, meta_causal
from opsd_cli.engine.merging import merged_parameters
from opsd_cli.engine.policy import Policy
from opsd_cli.engine.process_group import Ranks
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
        with self._gathered(self._sources, gather):
            yield self._lm

    @contextmanager
    def by_layer(self, gather: Gather, ranks: Ranks) -> Iterator[nn.Module]:
        """The module, ready to run, which gathers the weights of a layer when it calls that layer and lets go of them
        afterwards; those outside of layers, embeddings and head, are whole all along. Collective, but each rank runs
        the module as often as it likes: when it closes the context it goes along with those that still run it."""
        around, layers = self._parts()
        passes = PassesTogether(self._lm, ranks)
        with self._gathered(around, gather), ExitStack() as hooks:
            for name, own in layers.items():
                layer = self._lm.get_submodule(name)
                hooks.enter_context(open_while_called(layer, partial(self._gathered, own, gather)))
            with passes.counted():
                yield self._lm

    def merged_by_layer(self, gather: Gather) -> Iterator[tuple[str, Tensor]]:
        """`merging.merged_parameters` of the module, of which no more than a layer is gathered at once. Collective."""
        if not self._sources:  # quantised, and never sharded
            yield from merged_parameters(self._lm)
            return
        around, layers = self._parts()
        first = {id(source): name for name, source in reversed(self._sources.items())}  # of the names of tied weights
        for own in (around, *layers.values()):
            with self._gathered(own, gather):
                yield from merged_parameters(
                    self._lm, only={name for name in own if first[id(self._sources[name])] == name}
                )

    @contextmanager
    def _gathered(self, names: Iterable[str], gather: Gather) -> Iterator[None]:
        """Some parameters, by name, pointed at the policy's while these are gathered."""
        sources = {name: self._sources[name] for name in names}
        distinct = {id(source): source for source in sources.values()}
        with gather(list(distinct.values())):
            whole = {key: source.data for key, source in distinct.items()}
            point(self._lm, {name: whole[id(source)] for name, source in sources.items()})
            try:
                yield
            finally:
                # Or the gathered weights would stay in memory after ZeRO-3 has released them.
                point(self._lm, {name: torch.empty(0, device="meta") for name in sources})

    def _parts(self) -> tuple[list[str], dict[str, list[str]]]:
        """The names of the parameters outside of layers, and those of each layer by its name."""
        layers: dict[str, list[str]] = {}
        for name, module in self._lm.named_modules():
            if isinstance(module, GradientCheckpointingLayer) and not name.startswith(tuple(f"{o}." for o in layers)):
                layers[name] = []
        around: list[str] = []
        for name in self._sources:
            owner = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
            (around if owner is None else layers[owner]).append(name)
        # A weight that a layer shares with the embedding must stay when the layer lets go of its own.
        always = {id(self._sources[name]) for name in around}
        for own in layers.values():
            around += [name for name in own if id(self._sources[name]) in always]
            own[:] = [name for name in own if id(self._sources[name]) not in always]
        return around, layers

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
