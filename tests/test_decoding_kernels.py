"""The Triton kernels of decoding without a GPU: their arithmetic in triton's interpreter, and their compilation for a
real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: it comes with torch for CUDA and with the extra dev")

LONGS = ("table_ptr", "row_ptr", "position_ptr", "token_ptr", "key_ptr", "from_ptr", "to_ptr")
TYPES = dict.fromkeys(LONGS, "*i64")
TYPES |= dict.fromkeys(("parts_ptr", "logs_ptr", "largest_ptr", "sum_ptr", "uniform_ptr", "logprob_ptr"), "*fp32")
TYPES |= dict.fromkeys(("eps", "scale", "divisor", "below_one"), "fp32") | {"value_offset": "i64"}
HEADS: dict[str, Any] = {"HEADS": 32, "KV": 8, "E": 128, "PAGE": 64, "BLOCK_E": 128}


@pytest.mark.slow
def test_the_kernels_of_decoding_equal_plain_pytorch():
    found = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("decoding_kernel_check.py"))],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    differences = json.loads(found.stdout)
    assert len(differences) >= 50
    for name, difference in differences.items():
        # A float16 result has 11 bits, and plain PyTorch rounds between its operations.
        assert difference <= (5e-3 if "float16)" in name and "bfloat16" not in name else 1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize(("name", "constants"), [
    ("_rotate_and_store", HEADS | {"HAS_GAIN": True}),
    ("_attend", HEADS | {"GROUP": 2, "SPLITS": 2, "BLOCK_G": 16}),
    ("_combine", {"E": 128, "SPLITS": 8, "BLOCK_E": 128}),
    ("_gated", {"BLOCK": 1024}),
    ("_sum_blocks", {"BLOCK": 2048}),
    ("_likeliest_of_blocks", {"K": 20, "BLOCK": 2048}),
    ("_likeliest_keys", {"K": 20, "BLOCK": 2048}),
    ("_find", {"BLOCK": 2048, "BLOCKS": 128, "GREEDY": False}),
])  # fmt: skip
def test_a_kernel_of_decoding_compiles_for_a_gpu(name: str, constants: dict[str, Any]):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from opsd_cli.sampling import attention_kernels, drawing_kernels

    kernel = (vars(attention_kernels) | vars(drawing_kernels))[name]
    kinds = {each: TYPES.get(each, "*bf16" if each.endswith("_ptr") else "i32") for each in kernel.arg_names}
    source = ASTSource(
        kernel, kinds | dict.fromkeys(constants, "constexpr"),
        constexprs={(kernel.arg_names.index(each),): value for each, value in constants.items()},
    )  # fmt: skip
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
