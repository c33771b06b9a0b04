"""What the tiny model can do, measured greedily: under the student's prompt, under the teacher's, and controls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from opsd_cli.data.problems import Problem
from tiny.documents import TEACHER_PROMPT


def student_prompts(problems: Sequence[Problem]) -> list[str]:
    return [problem.question for problem in problems]


def teacher_prompts(problems: Sequence[Problem], *, shift: int = 0) -> list[str]:
    """Under each question the reference of the problem `shift` places on (0: its own)."""
    shown = [problems[(i + shift) % len(problems)].solution for i in range(len(problems))]
    return [
        TEACHER_PROMPT.format(question=problem.question, solution=solution)
        for problem, solution in zip(problems, shown, strict=True)
    ]


def solves(
    model: Qwen3ForCausalLM,
    prompts: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerFast,
    max_tokens: int = 64,
    batch: int = 100,
) -> list[str]:
    """The greedy completion of each prompt."""
    completions: list[str] = []
    for start in range(0, len(prompts), batch):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + batch]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_tokens,
                do_sample=False,
            )
        completions += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return completions


def accuracy(completions: Sequence[str], problems: Sequence[Problem]) -> float:
    """Share of completions whose `#### answer` is the problem's."""
    right = [c.rpartition("####")[2].strip() == p.answer for c, p in zip(completions, problems, strict=True)]
    return sum(right) / len(right)
