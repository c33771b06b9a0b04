"""How vLLM is handed weights that lie in its own process: a weight-transfer engine of vLLM's kind, known to vLLM's
factory. Those that vLLM brings carry weights between processes (NCCL needs a device for each side, CUDA IPC another
process and a GPU); here there is nothing to carry, and a tensor is passed on as it is. What surrounds it is vLLM's: the
session of `start_weight_update` to `finish_weight_update`, and a reload layer by layer that keeps the addresses which
captured graphs read. Imports vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

BACKEND = "opsd_in_process"


@dataclass
class NothingToAgreeOn(WeightTransferInitInfo):
    """Both sides are one process."""


@dataclass
class NamedWeights(WeightTransferUpdateInfo):
    """Parameters by the names of the checkpoint, whole; read one at a time."""

    weights: Iterable[tuple[str, Tensor]]


class InProcessTransfer(WeightTransferEngine[NothingToAgreeOn, NamedWeights]):
    """Loads tensors of this process into vLLM's model."""

    init_info_cls = NothingToAgreeOn
    update_info_cls = NamedWeights

    def init_transfer_engine(self, init_info: NothingToAgreeOn) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: NamedWeights) -> None:
        self.model.load_weights(update_info.weights)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            refresh_tied_heads(self)

    def shutdown(self) -> None:
        pass


def refresh_tied_heads(engine: InProcessTransfer) -> None:
    """On a CPU vLLM (0.32) computes with packed copies of the weights, and its reload packs what was loaded by name
    only. A head that is tied to the embedding has no name of its own: without this it stays that of the first weights.
    """
    for layer in engine.model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)


@cache
def register() -> str:
    """Make vLLM know it; its name there."""
    WeightTransferEngineFactory.register_engine(BACKEND, InProcessTransfer)
    return BACKEND
