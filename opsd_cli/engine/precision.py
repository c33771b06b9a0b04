"""How exactly a process multiplies matrices on a GPU. One choice for all layers, so it is made in one place."""

from __future__ import annotations

import torch


def forbid_reduced_precision() -> None:
    """Add up every matrix product in fp32.

    torch lets cuBLAS add up parts of a half-precision product in half precision, which shows where the sum is long: the
    gradient of the hidden states is one over the whole vocabulary. TF32, with ten bits, is off by default in torch and
    stays off whatever a library imported before has set: fp32 means fp32.
    """
    products = torch.backends.cuda.matmul
    products.allow_bf16_reduced_precision_reduction = False
    products.allow_fp16_reduced_precision_reduction = False
    products.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
