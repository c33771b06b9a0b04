"""The MLP of the last layer is run only on the tokens whose hidden state is read: those that predict a completion.
What it would add to a prompt's tokens is never read, since no attention comes after it. Owns where that MLP is
and the test whether a model can be run that way; for a shallow model it is a tenth of a pass, for a deep one little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opsd_cli.engine.agreement import ONE_LAYER, deviation, overall, probe_rows
from opsd_cli.engine.packed import Layout
from opsd_cli.training.out_of_memory import is_out_of_memory


def last_mlp(causal: PreTrainedModel, layout: Layout) -> nn.Module | None:
    """The last layer's MLP where hidden states stay the same without what it does for other tokens; None otherwise.

    It is found by the names that transformers' decoders use, and tried on a few tokens. None as well where rows are
    padded: there tokens are in a rectangle, and the model may not be able to run where it is now.
    """
    if layout == "padded":
        return None
    decoder = causal.get_decoder()
    layers = dict(decoder.named_children()).get("layers")
    if not isinstance(layers, nn.ModuleList):
        return None
    mlp = dict(layers[-1].named_children()).get("mlp")
    if mlp is None:
        return None
    ids_1L = torch.cat(probe_rows(causal))[None]
    read_N = torch.arange(1, ids_1L.shape[1], 3, device=ids_1L.device)
    with torch.no_grad():
        expected_ND = decoder(input_ids=ids_1L, use_cache=False).last_hidden_state[0, read_N]
        try:
            with only_where(mlp, read_N):
                found_ND = decoder(input_ids=ids_1L, use_cache=False).last_hidden_state[0, read_N]
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            return None  # it takes or gives something else than one tensor of tokens
        head = causal.get_output_embeddings()
        apart = overall(deviation(head(found_ND), head(expected_ND)))
    return mlp if apart <= ONE_LAYER[causal.dtype] else None


@contextmanager
def only_where(mlp: nn.Module, place_N: Tensor) -> Iterator[None]:
    """Run `mlp` on the tokens at these places alone; its output [1, L, D] is zero elsewhere."""
    whole = mlp.forward

    def forward(x_1LD: Tensor) -> Tensor:
        return torch.zeros_like(x_1LD).index_copy(1, place_N, whole(x_1LD.index_select(1, place_N)))

    with forward_replaced(mlp, forward):
        yield


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Call `forward` in place of the module's own, with all its hooks in force."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
