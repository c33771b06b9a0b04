"""The forms in which libraries say that memory ran out, which of them a step can recover from, and what a user is told.
The texts are those that users of these libraries have posted; those of this machine are raised for real."""

from __future__ import annotations

import errno
import json
import re

import pytest
import torch
from recipe_support import config_of
from test_runs import make_run, start

from opsd_cli.settings.errors import GuardError, OutsideError
from opsd_cli.settings.memory_errors import Shortage, is_out_of_memory, shortage_of
from opsd_cli.training.interruptions import explain_out_of_memory, within_memory

ASYNC = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable "
    "device-side assertions.\n"
)
NCCL = (
    "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.cpp:76, unhandled cuda error (run with NCCL_DEBUG=INFO "
    "for details), NCCL version 2.20.5\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
)
ALLOCATOR = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 23.69 GiB of which 3.05 MiB is "
    "free. Including non-PyTorch memory, this process has 23.27 GiB memory in use."
)
HOST = (
    "[enforce fail at alloc_cpu.cpp:114] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "8589934592 bytes. Error code 12 (Cannot allocate memory)"
)

FORMS = {
    "PyTorch's allocator": (torch.OutOfMemoryError(ALLOCATOR), "gpu"),
    "CUDA's runtime": (RuntimeError("CUDA error: out of memory" + ASYNC), "gpu"),
    "the same since torch 2.8": (torch.AcceleratorError("CUDA error: out of memory" + ASYNC), "gpu"),
    "CUDA's runtime, long ago": (RuntimeError("cuda runtime error (2) : out of memory at /pytorch/x.cu:25"), "gpu"),
    "CUDA's driver": (RuntimeError("CUDA driver error: out of memory"), "gpu"),
    "CUDA's driver by name": (RuntimeError("cuMemCreate failed: CUDA_ERROR_OUT_OF_MEMORY"), "gpu"),
    "a card of AMD": (torch.OutOfMemoryError("HIP out of memory. Tried to allocate 2.00 GiB"), "gpu"),
    "Triton, loading a kernel": (RuntimeError("Triton Error [CUDA]: out of memory"), "gpu"),
    "cuBLAS, a handle": (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "gpu"),
    "cuDNN": (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "gpu"),
    "cuDNN 9": (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), "gpu"),
    "cuBLAS on a full card": (
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), "suspected"),
    "NCCL": (torch.distributed.DistBackendError(NCCL + "Failed to CUDA calloc 67108864 bytes"), "nccl"),
    "NCCL, async": (torch.distributed.DistBackendError(NCCL + "Failed to CUDA calloc async 608 bytes"), "nccl"),
    "NCCL, by CUDA's words": (torch.distributed.DistBackendError(NCCL + "Cuda failure 2 'out of memory'"), "nccl"),
    "ordinary memory": (RuntimeError(HOST), "host"),
    "a mapped file": (
        RuntimeError("unable to mmap 23802932552 bytes from file <./model.safetensors>: Cannot allocate memory (12)"),
        "host"),
    "C++": (RuntimeError("std::bad_alloc"), "host"),
    "Python": (MemoryError(), "host"),
    "the system": (OSError(errno.ENOMEM, "Cannot allocate memory"), "host"),
}  # fmt: skip

OTHERS = {
    "shared memory of a kernel": RuntimeError(
        "out of resource: shared memory, Required: 131072, Hardware limit: 101376. Reducing block sizes or "
        "`num_stages` may help."
    ),
    "a kernel that failed": torch.AcceleratorError("CUDA error: device-side assert triggered" + ASYNC),
    "an address": RuntimeError("CUDA error: misaligned address" + ASYNC),
    "cuBLAS at work": RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
    "NCCL, otherwise": torch.distributed.DistBackendError(NCCL + "Cuda failure 1 'invalid argument'"),
    "a message of ours": OutsideError("out of memory at step 3 (CUDA out of memory)"),
    "a guard's": GuardError("CUDA out of memory"),
    "a full disk": OSError(errno.ENOSPC, "No space left on device"),
    "words": ValueError("out of memory"),
}


@pytest.mark.parametrize(("error", "of"), FORMS.values(), ids=FORMS.keys())
def test_memory_that_ran_out_is_recognised_and_recovered_from_where_nothing_else_broke(error, of):
    assert shortage_of(error).of == of
    assert "\n" not in shortage_of(error).line

    def work():
        raise error

    with pytest.raises(type(error)):
        within_memory(work, recovers=False)
    if of in ("gpu", "host") and not isinstance(error, OSError):
        assert within_memory(work, recovers=True) is None
    else:
        with pytest.raises(type(error)):
            within_memory(work, recovers=True)


@pytest.mark.parametrize("error", OTHERS.values(), ids=OTHERS.keys())
def test_what_only_sounds_like_it_is_not_taken_for_it(error):
    assert not is_out_of_memory(error)

    def work():
        raise error

    with pytest.raises(type(error)):
        within_memory(work, recovers=True)


def test_host_memory_that_really_runs_out_is_recognised():
    assert within_memory(lambda: torch.empty(2**46, dtype=torch.uint8), recovers=True) is None
    assert within_memory(lambda: bytearray(2**60), recovers=True) is None


@pytest.mark.slow
def test_a_run_whose_buffers_no_memory_holds_ends_with_advice_and_not_as_a_bug(tmp_path):
    """DeepSpeed's bucket of 64 TiB, refused by PyTorch's allocator on the host as a plain RuntimeError."""
    run = make_run(tmp_path / "run", "zero=stage2", 'model.dtype="bfloat16"', "zero.bucket_mib=67108864")
    assert start(run).wait(timeout=120) == 3
    message = json.loads(run.error_of(0).read_text())["message"]
    assert re.match(r"out of memory at step 1 \(.*DefaultCPUAllocator.*\); lower train\.micro_batch_tokens", message)
    assert not run.crash.exists()


def test_memory_that_could_not_be_locked_is_told_from_that_of_the_gpu():
    """CUDA says the same of both; where it was raised tells them apart."""

    def pin_memory():
        raise RuntimeError("CUDA error: out of memory" + ASYNC)

    with pytest.raises(RuntimeError) as caught:
        within_memory(lambda: pin_memory(), recovers=True)
    assert shortage_of(caught.value) == Shortage("pinned", "CUDA error: out of memory")


@pytest.mark.parametrize(
    ("form", "on_gpu", "words", "lacks"),
    [
        ("CUDA's runtime", True, ["out of memory at step 4 (CUDA error: out of memory); lower", "halve_on_oom did not"],
         []),
        ("NCCL", True, ["NCCL found no room for its buffers (Failed to CUDA calloc 67108864 bytes), and cannot go on",
                        "lower train.micro_batch_tokens"], ["halve_on_oom"]),
        ("cuBLAS on a full card", True, ["probably out of memory at step 4 (CUDA error: CUBLAS_STATUS_NOT_INITIALIZED",
                                         "CUDA_LAUNCH_BLOCKING=1 shows where"], ["halve_on_oom"]),
        ("ordinary memory", True, ["out of host memory at step 4", "launcher.ranks", "keep more on the GPU"],
         ["micro_batch_tokens"]),
        ("ordinary memory", False, ["out of memory at step 4 ([enforce fail", "lower train.micro_batch_tokens"], []),
    ],
    ids=["gpu", "nccl", "suspected", "host", "host of a CPU run"],
)  # fmt: skip
def test_what_is_advised_fits_what_ran_out(form, on_gpu, words, lacks):
    config = config_of("recipe=quickstart", "zero=stage2_offload", "train.halve_on_oom=true")
    message = explain_out_of_memory(FORMS[form][0], config, step=4, ranks=2, on_gpu=on_gpu)
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert not any(word in message for word in lacks), message
