"""What training has changed that it was not meant to: a model against the one it began as, on a text and on general
prompts that no recipe shows.

    python scripts/bench/forgetting.py INITIAL_MODEL MODEL [MODEL ...] [--text FILE]

INITIAL_MODEL and MODEL are Hugging Face folders (`runs/NAME/model`). Printed for each model: the perplexity of the
text, KL(initial || model) in nats a token along that text, and the same along the initial model's own greedy replies to
the prompts below. Everything is computed in float32 on the CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three animals that live in the forest.",
    "Why is the sky blue?",
    "Translate into Spanish: Good morning, my friend.",
    "What does a baker do?",
    "Give me a title for a story about a lost dog.",
    "Explain what a library is to a child.",
    "Which season comes after winter?",
    "Write a polite reply to an invitation.",
    "What is the opposite of cold?",
    "List the colours of a traffic light.",
)
REPLY_TOKENS = 48
TEXT_TOKENS = 2048  # of the text, in pieces of PIECE
PIECE = 512


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def text_rows(tokenizer: Any, text: str) -> list[tuple[list[int], int]]:
    """Rows of ids, and from which id on their tokens count."""
    ids = tokenizer(text, add_special_tokens=False).input_ids[:TEXT_TOKENS]
    return [(ids[start : start + PIECE], 1) for start in range(0, len(ids) - 1, PIECE)]


@torch.inference_mode()
def reply_rows(model: Any, tokenizer: Any) -> list[tuple[list[int], int]]:
    """The initial model's greedy replies to the prompts, after these."""
    rows = []
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        whole = model.generate(**asked, max_new_tokens=REPLY_TOKENS, do_sample=False, repetition_penalty=1.0)
        rows.append((whole[0].tolist(), asked["input_ids"].shape[1]))
    return rows


@torch.inference_mode()
def logprobs_of(model: Any, ids: Sequence[int], first: int) -> Tensor:
    """Log-probabilities [len(ids) - first, vocabulary] of what comes at each place from `first` on."""
    logits_SV = model(torch.tensor([ids])).logits[0]
    return logits_SV[first - 1 : -1].log_softmax(dim=1)


def compare(initial: Any, model: Any, rows: Sequence[tuple[list[int], int]]) -> dict[str, float]:
    """Perplexity of the rows under `model`, and KL(initial || model) in nats a token along them."""
    surprise = apart = 0.0
    count = 0
    for ids, first in rows:
        was_NV, now_NV = (logprobs_of(one, ids, first) for one in (initial, model))
        said_N = torch.tensor(ids[first:]).unsqueeze(1)
        surprise -= float(now_NV.gather(1, said_N).double().sum())
        apart += float((was_NV.exp() * (was_NV - now_NV)).double().sum())
        count += len(said_N)
    return {"perplexity": math.exp(surprise / count), "kl": apart / count, "tokens": count}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("initial")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--text", type=Path, default=ROOT / "docs" / "concepts.md")
    given = parser.parse_args(argv)
    tokenizer, initial = AutoTokenizer.from_pretrained(given.initial), load(given.initial)
    texts = {"text": text_rows(tokenizer, given.text.read_text(encoding="utf-8"))}
    texts["replies"] = reply_rows(initial, tokenizer)
    for folder in (given.initial, *given.models):
        model = initial if folder == given.initial else load(folder)
        found = {name: compare(initial, model, rows) for name, rows in texts.items()}
        print(
            json.dumps({
                "model": folder,
                "text_perplexity": round(found["text"]["perplexity"], 3),
                "text_kl": round(found["text"]["kl"], 5),
                "replies_kl": round(found["replies"]["kl"], 5),
            }),
            flush=True,
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
