"""CPU or GPU: torch is asked, in a process of its own, and only where something hints at a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opsd_cli.launch import devices
from opsd_cli.launch.devices import Answer, Choice, ask, choose_ranks, decide, gpu_hint, why_no_gpu
from opsd_cli.settings.errors import ConfigError, OutsideError

CPU_BUILD = Answer(0, "Torch not compiled with CUDA enabled", "2.13.0+cpu", None)
TWO_GPUS = Answer(2, "", "2.13.0+cu130", "13.0")
HINT = "this machine has /dev/nvidia0"
ON_A_CPU_BUILD = pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build of torch")


def environ_with(torch_source: str, folder: Path, **variables: str) -> dict[str, str]:
    """An environment in which `import torch` runs `torch_source`: a build or a driver that this machine has not."""
    (folder / "torch.py").write_text(torch_source)
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": "0", **variables}


CUDA_BUILD = """
import os, types
__version__ = "2.13.0+cu130"
version = types.SimpleNamespace(cuda="13.0", hip=None)
class Sum:
    def sum(self): return self
    def item(self): return 2.0
def ones(count, device):
    broken = os.environ.get("BROKEN")
    if broken and device == f"cuda:{broken}":
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\\nCompile with ...")
    return Sum()
def init():
    if "PROBLEM" in os.environ:
        raise RuntimeError(os.environ["PROBLEM"])
cuda = types.SimpleNamespace(
    init=init, device_count=lambda: int(os.environ["COUNT"]), get_device_name=lambda index: f"card {index}"
)
"""


def test_torch_is_not_asked_without_any_sign_of_a_gpu(tmp_path):
    """A torch stands by that would be a note if it were imported."""
    quiet = environ_with("raise SystemExit('asked')", tmp_path, PATH=str(tmp_path))
    for hidden in ("", " ", "-1", "-1,0"):
        assert choose_ranks(None, "auto", environ=quiet | {"CUDA_VISIBLE_DEVICES": hidden}) == Choice(1, "cpu")
    if gpu_hint({"PATH": str(tmp_path)}) is None:  # not on a machine with a driver
        del quiet["CUDA_VISIBLE_DEVICES"]
        assert choose_ranks(2, "auto", environ=quiet) == Choice(2, "cpu")
    assert choose_ranks(3, "cpu", environ=quiet) == Choice(3, "cpu")


@pytest.mark.parametrize("chosen", ["0", "0,1", "NoDevFiles", "GPU-8f2b", "MIG-1"])
def test_what_only_hints_at_a_gpu_makes_us_ask(chosen, tmp_path):
    hint = gpu_hint({"CUDA_VISIBLE_DEVICES": chosen, "PATH": str(tmp_path)})
    assert hint == f"CUDA_VISIBLE_DEVICES is {chosen}" or hint.startswith("this machine has ")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert gpu_hint({"PATH": str(tmp_path)}).startswith("this machine has ")


@ON_A_CPU_BUILD
@pytest.mark.slow
def test_variables_of_a_gpu_beside_a_cpu_build_end_on_the_cpu_with_one_line_that_says_why():
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1"}
    choice = choose_ranks(None, "auto", environ=environ)
    (note,) = choice.notes
    assert (choice.ranks, choice.device) == (1, "cpu")
    assert f"torch {torch.__version__} is a CPU build; to use a GPU install a CUDA build (https://" in note
    assert "\n" not in note
    with pytest.raises(OutsideError, match=r"launcher\.device=cuda, but torch can use no GPU here: torch .* CPU build"):
        choose_ranks(None, "cuda", environ={**os.environ, "CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.parametrize(
    ("source", "variables", "reason"),
    [
        (CUDA_BUILD, {"PROBLEM": "No CUDA GPUs are available", "CUDA_VISIBLE_DEVICES": "NoDevFiles"},
         "No CUDA GPUs are available (torch 2.13.0+cu130, built for CUDA 13.0) with CUDA_VISIBLE_DEVICES=NoDevFiles"),
        (CUDA_BUILD, {"PROBLEM": "Found no NVIDIA driver on your system.\nInstall one"},
         "Found no NVIDIA driver on your system. Install one"),
        (CUDA_BUILD, {"COUNT": "2", "BROKEN": "1"},
         "cuda:1 (card 1): CUDA error: no kernel image is available for execution on the device Compile"),
        (CUDA_BUILD, {"COUNT": "0"}, "No CUDA GPUs are available"),
        ("import os\nos.abort()", {}, "the process that asked torch ended with exit code -6"),
        ("raise ImportError('libcudart.so.13: cannot open shared object file')", {},
         "torch cannot be imported: libcudart.so.13: cannot open"),
        ("print('hello')\nraise SystemExit(3)", {}, "ended with exit code 3"),
        ("import time\ntime.sleep(60)", {}, "torch did not answer within 2 s"),
    ],
    ids=["no devices", "no driver", "a card too old", "none", "crash", "broken install", "no answer", "hangs"],
)  # fmt: skip
def test_whatever_keeps_torch_from_a_gpu_ends_on_the_cpu_and_is_an_error_when_one_is_asked_for(
    source, variables, reason, tmp_path
):
    environ = environ_with(source, tmp_path, **variables)
    choice = choose_ranks(None, "auto", environ=environ, seconds=2.0)
    (note,) = choice.notes
    assert (choice.ranks, choice.device) == (1, "cpu")
    assert note.startswith("running on the CPU although ")
    assert reason in note
    assert "\n" not in note
    with pytest.raises(OutsideError) as raised:
        choose_ranks(None, "cuda", environ=environ, seconds=2.0)
    assert reason in str(raised.value)
    assert "launcher.device=cpu runs on the CPU" in str(raised.value)


def test_there_is_one_rank_per_gpu_that_torch_can_use_unless_told_otherwise(tmp_path):
    environ = environ_with(CUDA_BUILD, tmp_path, COUNT="2", CUDA_VISIBLE_DEVICES="GPU-a,MIG-b")
    assert choose_ranks(None, "auto", environ=environ) == Choice(2, "cuda")
    assert choose_ranks(1, "cuda", environ=environ) == Choice(1, "cuda")
    with pytest.raises(ConfigError, match=r"launcher\.ranks is 3 but torch sees 2 GPUs with CUDA_VISIBLE"):
        choose_ranks(3, "auto", environ=environ)


def test_a_rank_started_from_outside_tries_its_own_device_only(tmp_path):
    environ = environ_with(CUDA_BUILD, tmp_path, COUNT="2", BROKEN="1")
    assert ask(environ, only=0).devices == 2
    assert "cuda:1 (card 1)" in ask(environ, only=1).problem
    assert ask(environ | {"COUNT": "1"}, only=3).devices == 1  # the one that its task was given
    assert "cuda:0 (card 0)" in ask(environ | {"COUNT": "1", "BROKEN": "0"}, only=3).problem


def test_a_list_of_devices_that_cuda_cuts_short_is_said(tmp_path):
    for chosen, note in [("0,1", False), ("0, 1,", False), ("0,1,7", True), ("0,0,1,1", True)]:
        choice = decide(None, "auto", TWO_GPUS, hint=HINT, environ={"CUDA_VISIBLE_DEVICES": chosen})
        assert (choice.ranks, choice.device, bool(choice.notes)) == (2, "cuda", note)
    assert "names 4 devices and torch sees 2" in choice.notes[0]


def test_a_long_complaint_of_torch_is_cut_and_made_harmless():
    said = why_no_gpu(Answer(0, "The driver\x1b[31m is too old. " * 40, "2.13.0", "13.0"), {})
    assert "\\x1b" in said
    assert len(said) < 400
    assert "CPU build" in why_no_gpu(CPU_BUILD, {})


def test_torch_is_asked_once_for_an_environment(tmp_path):
    count = tmp_path / "count"
    source = f"open({str(count)!r}, 'a').write('x')\n{CUDA_BUILD}"
    environ = environ_with(source, tmp_path, COUNT="1")
    for _ in range(3):
        assert choose_ranks(None, "auto", environ=environ).device == "cuda"
    assert count.read_text() == "x"


@pytest.mark.slow
def test_asking_torch_prints_one_line_of_json():
    command = [sys.executable, "-P", str(devices.SCRIPT)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout)["torch"] == torch.__version__
