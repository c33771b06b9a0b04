"""Seeds and order as functions of (seed, step, index), never of rank, batch layout or history."""

from __future__ import annotations

import hashlib
import random


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any mix of integers and words; equal parts give equal seeds on every machine."""
    digest = hashlib.blake2b("/".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def epoch_order(length: int, *, seed: int, epoch: int) -> list[int]:
    """The permutation in which epoch `epoch` visits `length` items."""
    order = list(range(length))
    random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
    return order
