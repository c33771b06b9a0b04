"""What the benchmarks of whole runs share: `opsd train` as a user types it, read back from its events, and models made
from a config with random weights. Owns no case."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
TINY = ROOT / "opsd_cli/assets/tiny"
SKIP = 2  # first steps, which allocate and compile
QUIET = ("eval.problems=0", "checkpoint.every=0", "samples.every=0", "loss.mask_truncated=false")
"""Nothing but steps; random weights never end a completion, so truncated ones must carry loss."""

QWEN3_1_7B = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_8B = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "tie_word_embeddings": False,
}  # fmt: skip
WIDE = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 151_936, "tie_word_embeddings": True,
}  # fmt: skip
MEDIUM = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 11, "num_attention_heads": 12,
    "num_key_value_heads": 6, "head_dim": 64, "vocab_size": 1024, "tie_word_embeddings": True,
}  # fmt: skip

SMALL = {
    "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 1024, "tie_word_embeddings": True,
}  # fmt: skip
"""In place of every real shape with `--gpu --small`: the same code in seconds."""


def random_model(folder: Path, shape: dict[str, int], *, dtype: torch.dtype) -> Path:
    """A Qwen3 of this shape with random weights and the bundled tokenizer."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    config = Qwen3Config(
        **shape, max_position_embeddings=4096, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(before)
    tokenizer.save_pretrained(folder)
    return folder


def train(folder: Path, words: Sequence[str], *, program: Sequence[str] = ("-m", "opsd_cli")) -> list[dict[str, float]]:
    """Run `opsd train recipe=quickstart` in `folder` with these words; the metrics of its steps but the first two."""
    folder.mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, *program, "train", "recipe=quickstart", "model.max_completion_tokens=null", *QUIET,
         f"run.root={folder}", "run.name=run", *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=folder, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"opsd train {' '.join(words)} failed:\n{done.stderr[-3000:]}")
    events = [json.loads(line) for line in (folder / "run" / "events.jsonl").read_text().splitlines()]
    return [event["metrics"] for event in events if event["kind"] == "step"][SKIP:]


def middle(steps: Sequence[dict[str, float]], metric: str) -> float:
    return statistics.median(step[metric] for step in steps)
