"""Which weights a model was loaded with, as a short text. A resume refuses other weights by it, so it must come out the
same on every machine."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

OF_BYTES = "bytes:"
"""What a fingerprint of bytes begins with. Earlier versions of opsd summed weights, which depends on the device; those
fingerprints are hexadecimal numbers without a prefix."""

CHUNK_BYTES = 64 * 2**20  # of one tensor, copied to the CPU at a time


def fingerprint(causal: nn.Module) -> str:
    """The sha256 of a model's weights and stored buffers: name, type, shape and bytes of each, in the order of their
    names. Adapters do not count, and a weight that is used in two places counts once.

    No arithmetic is done, so it does not depend on device, threads or library, nor on the order in which a model
    creates its layers.
    """
    stored = causal.state_dict().keys()
    # The names that a file of this model has: without those of an adapter around it.
    tensors = {
        name.replace(".base_layer", ""): tensor.detach()
        for name, tensor in (*causal.named_parameters(), *causal.named_buffers())
        if name in stored and "lora_" not in name
    }
    # Threads are enough: hashlib releases the interpreter's lock.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        digests = pool.map(lambda name: digest_of(name, tensors[name]), sorted(tensors))
        return OF_BYTES + hashlib.sha256(b"".join(digests)).hexdigest()


def digest_of(name: str, tensor: Tensor) -> bytes:
    digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    flat = tensor.reshape(-1)
    step = CHUNK_BYTES // tensor.element_size()
    for start in range(0, len(flat), step):
        digest.update(flat[start : start + step].cpu().view(torch.uint8).numpy())
    return digest.digest()
