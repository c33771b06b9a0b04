"""The Triton kernel without a GPU: its arithmetic in triton's interpreter, and its compilation for a real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: it comes with torch for CUDA and with the extra dev")


@pytest.mark.slow
def test_the_kernel_equals_plain_pytorch_for_every_divergence():
    found = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kernel_check.py"))],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    differences = json.loads(found.stdout)
    assert len(differences) >= 20
    for name, difference in differences.items():
        # A bfloat16 gradient has 8 bits: the same number may be rounded to either side.
        assert difference < (1e-2 if "bfloat16" in name else 1e-4), name


@pytest.mark.parametrize("kind", [0, 4])
def test_the_kernel_compiles_for_a_gpu(kind: int):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from opsd_cli.loss.triton_rows import _rows

    chosen = {"KIND": kind, "STUDENT_CAP": True, "TEACHER_CAP": False, "BLOCK": 4096}
    pointers = {"student_ptr": "*bf16", "teacher_ptr": "*bf16", "target_ptr": "*i64", "columns_ptr": "*fp32"}
    kinds = (
        dict.fromkeys(_rows.arg_names, "fp32") | {"vocabulary": "i32"} | pointers | dict.fromkeys(chosen, "constexpr")
    )
    constants = {(_rows.arg_names.index(name),): value for name, value in chosen.items()}
    source = ASTSource(_rows, kinds, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert compiled.asm["cubin"]
