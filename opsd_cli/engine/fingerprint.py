"""Which weights a model was loaded with, as a short text. Apart from `policy` because checkpoints keep it: a resume
refuses other weights, so it must come out the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

OF_BYTES = "bytes:"
"""What a fingerprint of bytes begins with. Earlier ones, sums of weights, begin with a digit or a letter up to f and
depend on the device that added."""

CHUNK_BYTES = 64 * 2**20  # of one tensor, brought to the CPU at a time


def fingerprint(causal: nn.Module) -> str:
    """The sha256 of a model's weights and stored buffers: name, type, shape and bytes of each, in the order of their
    names. Adapters do not count.

    No number is computed with, so it does not depend on device, threads or library, nor on the order in which a model
    makes its layers. A weight that is used in two places counts once. On a GPU a chunk at a time is copied.
    """
    held = dict(weights_of(causal))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashlib lets the others run meanwhile
        digests = pool.map(lambda name: digest_of(name, held[name]), sorted(held))
        return OF_BYTES + hashlib.sha256(b"".join(digests)).hexdigest()


def weights_of(causal: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a file of this model would hold, by the names it has without an adapter around it."""
    stored = causal.state_dict().keys()
    for name, tensor in (*causal.named_parameters(), *causal.named_buffers()):
        if name in stored and "lora_" not in name:
            yield name.replace(".base_layer", ""), tensor.detach()


def digest_of(name: str, tensor: Tensor) -> bytes:
    """The sha256 of one tensor."""
    digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    flat = tensor.reshape(-1)
    step = CHUNK_BYTES // tensor.element_size()
    for start in range(0, len(flat), step):
        digest.update(flat[start : start + step].cpu().view(torch.uint8).numpy())
    return digest.digest()
