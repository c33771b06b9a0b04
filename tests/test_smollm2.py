"""A real language model end to end: SmolLM2-135M-Instruct on GSM8K, through the commands a user types. `OPSD_SMOLLM2`
is the folder of the model as safetensors; without it there is nothing to run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support import GSM8K, opsd
from transformers import AutoModelForCausalLM, AutoTokenizer

MODEL = os.environ.get("OPSD_SMOLLM2", "")
DATA = Path(os.environ.get("OPSD_GSM8K", str(GSM8K)))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(MODEL, "config.json").is_file(), reason="OPSD_SMOLLM2 names no model's folder"),
    pytest.mark.skipif(not (DATA / "train.jsonl").is_file(), reason="OPSD_GSM8K names no folder with GSM8K"),
    pytest.mark.timeout(1800),
]
ROWS = 24


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of two steps on a few rows."""
    folder = tmp_path_factory.mktemp("gsm8k")
    for name in ("train.jsonl", "test.jsonl"):
        (folder / name).write_text("".join((DATA / name).open(encoding="utf-8").readlines()[:ROWS]), encoding="utf-8")
    return [
        "recipe=gsm8k", "model=hf", f"model.path={Path(MODEL).absolute()}", f"dataset.path={folder}",
        "dataset.validation_problems=4", "train.steps=2", "train.problems_per_step=1", "train.rollouts_per_problem=1",
        "sampling.max_completion_tokens=12", "eval.max_completion_tokens=12", "eval.problems=1", "eval.before=false",
        "eval.teacher_prompt=false", "checkpoint.every=0",
    ]  # fmt: skip


def run(*words: str, cwd: Path) -> str:
    done = opsd(*words, cwd=cwd, seconds=1500, cold=True, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr + done.stdout


def test_a_dry_run_shows_the_plan(words: list[str], tmp_path: Path):
    assert "student prompt" in run("train", "--dry-run", *words, cwd=tmp_path)


@pytest.mark.parametrize("how", ["lora=r16", "lora=none"])
def test_it_is_trained_evaluated_exported_and_reloaded(how: str, words: list[str], tmp_path: Path):
    run("train", *words, how, "run.name=real", cwd=tmp_path)
    folder = tmp_path / "runs" / "real"
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert len([event for event in events if event["kind"] == "step"]) == 2
    assert any("drawn by the fast forward pass" in line for line in events[0]["plan"])
    exported = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder / "model")("Mia has 4 coins.", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = exported(input_ids=ids).logits
        assert not torch.equal(logits, base(input_ids=ids).logits)
        if how != "lora=none":
            adapted = PeftModel.from_pretrained(base, folder / "model" / "adapter").eval()
            torch.testing.assert_close(adapted(input_ids=ids).logits, logits, rtol=1e-3, atol=1e-3)
    run("eval", "runs/real", cwd=tmp_path)
