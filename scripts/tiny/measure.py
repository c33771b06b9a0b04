"""What the tiny model can do, measured greedily: under the student's prompt, under the teacher's, and with controls.

Works with transformers alone, so that the shipped figures do not depend on the tool whose demonstration they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from opsd_cli.data.arithmetic import Arithmetic, Puzzles
from opsd_cli.data.problems import Problem
from tiny.documents import TEACHER_PROMPT

DATASETS = Path(__file__).resolve().parents[2] / "recipes" / "dataset"
BATCH = 100  # prompts generated together
MAX_COMPLETION = 64  # tokens; a right completion has at most 45


def figures(folder: Path) -> dict[str, dict[str, float]]:
    """Accuracies of the model in `folder`, for validation and test: `student` and `teacher` on dataset=arithmetic,
    `wrong_reference` (the teacher's prompt with the next problem's solution), `known_words` (the student on stories
    without new words) and `puzzles` (the student on dataset=puzzles)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stories = Arithmetic(**_recipe("arithmetic")).load()
    known = Arithmetic(**_recipe("arithmetic") | {"known_share": 1.0}).load()
    puzzles = Puzzles(**_recipe("puzzles")).load()
    measured: dict[str, dict[str, float]] = {}
    for split, told, plain, other in (
        ("validation", stories.validation, known.validation, puzzles.validation),
        ("test", stories.test, known.test, puzzles.test),
    ):
        questions = {
            "student": (student_prompts(told), told),
            "teacher": (teacher_prompts(told), told),
            "wrong_reference": (teacher_prompts(told, shift=1), told),
            "known_words": (student_prompts(plain), plain),
            "puzzles": (student_prompts(other), other),
        }
        measured[split] = {
            name: accuracy(complete(model, prompts, tokenizer=tokenizer), problems)
            for name, (prompts, problems) in questions.items()
        }
    return measured


def _recipe(dataset: str) -> dict:
    fields = yaml.safe_load((DATASETS / f"{dataset}.yaml").read_text())
    del fields["name"]
    return fields | {"train_problems": 0}


def student_prompts(problems: Sequence[Problem]) -> list[str]:
    """The questions."""
    return [problem.question for problem in problems]


def teacher_prompts(problems: Sequence[Problem], *, shift: int = 0) -> list[str]:
    """Under each question the reference of the problem `shift` places on (0: its own)."""
    shown = [problems[(i + shift) % len(problems)].solution for i in range(len(problems))]
    return [
        TEACHER_PROMPT.format(question=problem.question, solution=solution)
        for problem, solution in zip(problems, shown, strict=True)
    ]


def complete(
    model: PreTrainedModel,
    prompts: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int = MAX_COMPLETION,
) -> list[str]:
    """The greedy completion of each prompt, without special tokens."""
    completions: list[str] = []
    for start in range(0, len(prompts), BATCH):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + BATCH]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        ids_BS, mask_BS = inputs["input_ids"], inputs["attention_mask"]
        with torch.no_grad():
            output = model.generate(
                input_ids=ids_BS, attention_mask=mask_BS, max_new_tokens=max_tokens, do_sample=False
            )
        completions += tokenizer.batch_decode(output[:, ids_BS.shape[1] :], skip_special_tokens=True)
    return completions


def accuracy(completions: Sequence[str], problems: Sequence[Problem]) -> float:
    """Share of completions whose `#### answer` is the problem's."""
    right = [
        completion.rpartition("####")[2].strip() == problem.answer
        for completion, problem in zip(completions, problems, strict=True)
    ]
    return sum(right) / len(right)
