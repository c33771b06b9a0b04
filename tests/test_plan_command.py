"""`opsd plan`: what it prints, what its exit code says, and that what it advises is so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from recipe_support import opsd

from opsd_cli.launch.devices import present_cards
from opsd_cli.settings.known_devices import CARDS, CLUSTERS

L4 = ("recipe=gsm8k", "--device", "l4", "lora=none")


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    code, out, err = opsd(capsys, "plan", *words, "--json")
    assert code in (0, 2), err
    found = json.loads(out)
    assert found["fits"] == (code == 0)
    return found


def test_the_whole_command_never_imports_torch():
    code = (
        "import sys; from opsd_cli.cli import main; words = ['recipe=gsm8k', '--device', 'h100', '--scale']; "
        "rc = main(['plan', *words]); "
        "assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules); sys.exit(rc)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for part in ("1,720,574,976 weights", "H100 SXM 80 GB", "fits:", "train.micro_batch_tokens=", "1,024", "saves"):
        assert part in done.stdout


def test_the_parts_of_a_phase_are_its_whole_and_the_peak_is_the_highest(capsys: pytest.CaptureFixture[str]):
    found = plan(capsys, "recipe=gsm8k", "--device", "h100")
    wholes = {name: sum(parts.values()) for name, parts in found["phases"].items()}
    assert found["peak_bytes"] == max(wholes.values()) == wholes[found["peak_phase"]]
    assert found["model"]["trained"] == 69_730_304


def test_what_does_not_fit_has_exit_code_2_and_each_change_that_is_named_makes_it_fit(
    capsys: pytest.CaptureFixture[str],
):
    found = plan(capsys, *L4)
    assert not found["fits"]
    assert {change["words"] for change in found["changes"]} == {"lora=r16", "zero=stage2_offload"}
    for change in found["changes"]:
        again = plan(capsys, *L4[:3], *([] if "lora" in change["words"] else ["lora=none"]), *change["words"].split())
        assert again["fits"], change
        assert again["peak_bytes"] == pytest.approx(change["peak_bytes"], rel=0.001)


def test_a_model_that_is_larger_than_a_card_is_said_to_become_shards_on_the_cpu(capsys: pytest.CaptureFixture[str]):
    words = ("recipe=gsm8k_full", "model.path=Qwen/Qwen3-32B", "--device", "a100_40", "--ranks", "16")
    notes = plan(capsys, *words)["notes"]
    assert sum(note.startswith("all weights (61.0 GiB) are more than can be used") for note in notes) == 1
    (drawn,) = [
        note for note in notes if note.startswith("completions are drawn with weights that are gathered a layer")
    ]
    assert drawn.endswith("sampler=dataset eval.problems=0 draws none")
    for other in (("zero=stage2",), ("model.path=Qwen/Qwen3-4B",)):
        assert not any("weights" in note for note in plan(capsys, *words, *other)["notes"])
    assert not any("layer" in note for note in plan(capsys, *words, "zero.gather=model")["notes"])
    none_drawn = ("sampler=dataset", "eval.problems=0")
    assert not any("layer" in note for note in plan(capsys, *words, *none_drawn)["notes"])
    assert any(
        "layer" in note for note in plan(capsys, *words, "model.path=Qwen/Qwen3-4B", "zero.gather=layer")["notes"]
    )


@pytest.mark.parametrize("spread", [("--ranks", "8"), ("--ranks", "1", "zero=stage3_offload")])
def test_drawing_layer_by_layer_takes_less_memory_and_more_time(capsys: pytest.CaptureFixture[str], spread: tuple):
    words = ("recipe=gsm8k_full", "model.path=Qwen/Qwen3-4B", "--device", "a100", *spread)
    whole, layer = (plan(capsys, *words, f"zero.gather={way}") for way in ("model", "layer"))
    gathered = [one["phases"]["drawing"]["gathered"] for one in (whole, layer)]
    assert 0.1 * gathered[0] < gathered[1] < 0.3 * gathered[0]
    assert layer["seconds"]["links"] > 10 * max(1.0, whole["seconds"]["links"])


def test_the_largest_micro_batch_is_the_last_that_fits(capsys: pytest.CaptureFixture[str]):
    words = (
        "recipe=gsm8k",
        "--device",
        "l4",
        "model=qwen3_8b",
        "--prompt-tokens",
        "100",
        "--teacher-prompt-tokens",
        "300",
    )
    largest, row = plan(capsys, *words)["largest_micro_batch_tokens"], 300 + 1024
    assert largest % row == 0
    assert plan(capsys, *words, f"train.micro_batch_tokens={largest}")["fits"]
    assert not plan(capsys, *words, f"train.micro_batch_tokens={2 * largest}")["fits"]


def test_self_distillation_saves_as_much_as_the_other_model_weighs(capsys: pytest.CaptureFixture[str]):
    words = ("recipe=gsm8k", "--device", "h100", "--prompt-tokens", "100", "sampling.max_completion_tokens=64")
    found = plan(capsys, *words)
    once, twice, four_times = found["second_model"]
    assert once["peak_bytes"] - found["peak_bytes"] == pytest.approx(2 * found["model"]["parameters"], rel=0.02)
    assert 0 < once["saved"] < twice["saved"] < four_times["saved"] < 1


def test_on_more_machines_a_step_takes_longer_and_without_a_network_nothing_is_said(capsys: pytest.CaptureFixture[str]):
    known = plan(capsys, "recipe=gsm8k", "--device", "dgx_h100", "lora=none", "--ranks", "16")["scale"]
    unknown = plan(capsys, "recipe=gsm8k", "--device", "h100", "lora=none", "--ranks", "16")["scale"]
    by_place = {(one["stage"], one["ranks"]): one for one in known}
    assert by_place[3, 16]["seconds"] > by_place[3, 8]["seconds"] > by_place[3, 1]["seconds"] > 0
    assert [one["seconds"] is None for one in unknown] == [one["ranks"] > 8 for one in unknown]
    assert len(known) == 3 * 11


def test_a_step_on_an_h100_takes_about_what_it_was_measured_to_take(capsys: pytest.CaptureFixture[str]):
    """docs/performance.md: 32 completions of 512 tokens, adapters of rank 64: 1.56 + 0.10 + 0.58 s."""
    words = ("recipe=gsm8k", "--device", "h100", "sampling.max_completion_tokens=512", "--prompt-tokens", "48")
    seconds = plan(capsys, *words, "--teacher-prompt-tokens", "110")["seconds"]
    assert seconds["total"] == pytest.approx(2.25, rel=0.15)
    assert seconds["drawing"] == pytest.approx(1.56, rel=0.15)


def test_devices_lists_every_card_and_cluster_with_its_source(capsys: pytest.CaptureFixture[str]):
    code, out, _ = opsd(capsys, "plan", "--devices")
    assert code == 0
    for one in [*CARDS.values(), *CLUSTERS.values()]:
        assert one.name in out
        assert one.source in out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("recipe=gsm8k", "--device", "h10"), "h10: no such device"),
        (("recipe=gsm8k", "--ranks", "0"), "--ranks is 0, and must be at least 1"),
        (("recipe=gsm8k", "--prompt-tokens", "-3"), "--prompt-tokens is -3"),
        (("recipe=gsm8k", "optim.lr=1e-5,1e-6"), "lists several values"),
        (("recipe=gsm8k", "model=hf", "model.path=./nowhere"), "there is no config.json"),
        (("--devices", "recipe=gsm8k"), "takes nothing else"),
    ],
)
def test_a_wrong_word_is_one_line(words: tuple[str, ...], problem: str, capsys: pytest.CaptureFixture[str]):
    code, out, err = opsd(capsys, "plan", *words)
    assert (code, out) == (2, "")
    assert problem in err
    assert err.count("\n") == 1


def test_the_cards_of_a_machine_are_told_by_nvidia_smi_without_those_that_are_hidden(tmp_path: Path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\necho 'NVIDIA L4, 23034'\n")
    program.chmod(0o755)
    environ = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    assert present_cards(environ) == [("NVIDIA H100 80GB HBM3", 81559 / 1024), ("NVIDIA L4", 23034 / 1024)]
    assert present_cards(environ | {"CUDA_VISIBLE_DEVICES": "1"}) == [("NVIDIA L4", 23034 / 1024)]
    assert present_cards(environ | {"CUDA_VISIBLE_DEVICES": ""}) == []
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert present_cards(environ) == []
