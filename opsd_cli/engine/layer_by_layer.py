"""Weights that are gathered for the call of one layer at a time, so that a card never holds a whole model; and ranks
that call it differently often, though gathering needs all of them each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from opsd_cli.engine import agreement
from opsd_cli.engine.loading import causal_of
from opsd_cli.engine.process_group import Ranks


@contextmanager
def open_while_called(layer: nn.Module, opens: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """From here on a call of `layer` opens a context first and closes it afterwards, also where it fails."""
    held = ExitStack()

    def begin(*given: Any) -> None:
        with outside_inference():
            held.enter_context(opens())

    def end(*given: Any) -> None:
        with outside_inference():
            held.close()

    with ExitStack() as hooks:
        hooks.callback(layer.register_forward_pre_hook(begin).remove)
        hooks.callback(layer.register_forward_hook(end, always_call=True).remove)
        yield


@contextmanager
def outside_inference() -> Iterator[None]:
    """For what the engine makes and keeps: it could not change tensors that were made in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class PassesTogether:
    """As many passes of a module on every rank, though each runs as many as it needs: who needs no more goes along."""

    def __init__(self, lm: nn.Module, ranks: Ranks) -> None:
        self._lm, self._ranks = lm, ranks
        self._is_in_a_pass = self._goes_along = False

    @contextmanager
    def counted(self) -> Iterator[None]:
        """While it is open, passes are announced to the other ranks; closing it waits for theirs. Collective."""
        with ExitStack() as hooks:
            hooks.callback(self._lm.register_forward_pre_hook(self._begin).remove)
            hooks.callback(self._lm.register_forward_hook(self._end).remove)
            try:
                yield
            finally:
                # A rank that failed inside of a pass is no longer where the others are; they learn of it when it ends.
                if not self._is_in_a_pass:
                    self._go_along()

    def _begin(self, *given: Any) -> None:
        if not self._goes_along:
            self._ranks.any(True)
        self._is_in_a_pass = True

    def _end(self, *given: Any) -> None:
        self._is_in_a_pass = False

    @torch.inference_mode()
    def _go_along(self) -> None:
        """Run one token for each pass that others announce, until no rank announces one."""
        self._goes_along = True
        token_1 = torch.zeros(1, dtype=torch.long, device=causal_of(self._lm).get_input_embeddings().weight.device)
        while self._ranks.any(False):
            agreement.model_logits(self._lm, [token_1], last=1)
