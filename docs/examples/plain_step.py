"""On-policy self-distillation in one file: transformers, torch and a loop. No DeepSpeed, no recipes, nothing hidden.

    python docs/examples/plain_step.py                      # the bundled model, about a minute on a CPU
    python docs/examples/plain_step.py Qwen/Qwen3-0.6B 50   # another model, other steps (needs a GPU to be quick)

One set of weights plays two roles. The student sees a question and writes a completion; the teacher, the same weights
as they were at step 0, sees the question together with its worked solution and predicts each token of that completion.
The student is pulled towards the teacher by KL(teacher || student) at every token of its own completion. `opsd train`
computes the same loss and gradient, in bounded memory and on many GPUs: tests/test_plain_step.py holds this file to it.

Shape letters: N completion tokens of a step, V vocabulary.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from opsd_cli.data.arithmetic import (
    Arithmetic,  # word problems, generated; put your own (question, solution, answer) here
)
from opsd_cli.data.problems import Problem

TINY = Path(__file__).parents[2] / "opsd_cli" / "assets" / "tiny"
TEACHER = """{question}

Reference solution:
{solution}

Understand the reference solution, then solve the problem yourself, in your own words."""
PROBLEMS_PER_STEP, LONGEST, LEARNING_RATE, MAX_GRAD_NORM = 16, 64, 1e-3, 1.0

Rollout = tuple[list[int], list[int], list[int]]
"""Student's prompt, teacher's prompt, completion: token ids. The same completion follows both prompts."""


def prompt_ids(tokenizer, text: str) -> list[int]:
    """A user's message as token ids that end where the assistant begins to write."""
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def both_prompts(tokenizer, problem: Problem) -> tuple[list[int], list[int]]:
    """The problem as the student sees it, and as the teacher sees it."""
    shown = TEACHER.format(question=problem.question, solution=problem.solution)
    return prompt_ids(tokenizer, problem.question), prompt_ids(tokenizer, shown)


@torch.no_grad()
def sample(model, tokenizer, prompts: list[list[int]], *, greedy: bool = False) -> list[list[int]]:
    """One completion of each prompt, from the current weights. It ends in an end id unless it reached LONGEST."""
    ends, pad = end_ids(model), tokenizer.pad_token_id
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    drawn = model.generate(
        ids, attention_mask=mask, max_new_tokens=LONGEST, pad_token_id=pad, eos_token_id=ends,
        do_sample=not greedy, temperature=None if greedy else 1.0, top_p=None, top_k=None if greedy else 0,
    )  # fmt: skip
    completions = []
    for row in drawn[:, width:].tolist():
        end = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
        completions.append(row[:end])
    return completions


def end_ids(model) -> list[int]:
    ids = model.generation_config.eos_token_id
    return [ids] if isinstance(ids, int) else list(ids)


def token_logprobs(model, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
    """log p(. | prompt, completion so far) at every completion token of all rows, one row after another, [N, V]."""
    rows = [torch.tensor(prompt + completion) for prompt, completion in zip(prompts, completions, strict=True)]
    # Padded on the right, where a causal model does not look.
    logits = model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)).logits
    # The prompt's last token predicts the completion's first; the completion's last token predicts nothing.
    picked = [row[len(prompt) - 1 :][: len(c)] for row, prompt, c in zip(logits, prompts, completions, strict=True)]
    return torch.cat(picked).float().log_softmax(dim=1)


def forward_kl(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    """KL(teacher || student) at each token, [N], from log-probabilities. This is the line to change."""
    return (teacher_NV.exp() * (teacher_NV - student_NV)).sum(dim=1)


def backward(model, teacher, rollouts: list[Rollout]) -> float:
    """Accumulate the gradient of the mean divergence over all completion tokens; returns the mean."""
    student_prompts, teacher_prompts, completions = (list(part) for part in zip(*rollouts, strict=True))
    with torch.no_grad():
        teacher_NV = token_logprobs(teacher, teacher_prompts, completions)
    student_NV = token_logprobs(model, student_prompts, completions)
    # One mean over all tokens of the step: a long completion counts for as many tokens as it has.
    loss = forward_kl(teacher_NV, student_NV).mean()
    loss.backward()
    return loss.item()


def accuracy(model, tokenizer, problems: list[Problem]) -> float:
    """Share of the problems whose greedy completion ends in the right answer, without the solution in view."""
    completions = sample(model, tokenizer, [prompt_ids(tokenizer, p.question) for p in problems], greedy=True)
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    right = [t.rpartition("####")[2].strip() == p.answer for t, p in zip(texts, problems, strict=True)]
    return sum(right) / len(right)


def main(path: str = str(TINY), steps: int = 60, held_out: int = 200) -> tuple[float, float]:
    """Train; returns accuracy on `held_out` problems before and after."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    teacher = copy.deepcopy(model).requires_grad_(False).eval()  # the weights at step 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    data = Arithmetic(
        instruction="", data_seed=0, steps_min=1, steps_max=3, known_share=0.25, retention_problems=0,
        train_problems=steps * PROBLEMS_PER_STEP, validation_problems=0, test_problems=held_out,
    ).load()  # fmt: skip
    before = accuracy(model, tokenizer, list(data.test))
    print(f"before: {before:.1%} of {len(data.test)} held-out problems")
    for step in range(steps):
        problems = data.train[step * PROBLEMS_PER_STEP : (step + 1) * PROBLEMS_PER_STEP]
        prompts = [both_prompts(tokenizer, problem) for problem in problems]
        completions = sample(model, tokenizer, [student for student, _ in prompts])
        rollouts = [
            (student, theirs, completion)
            for (student, theirs), completion in zip(prompts, completions, strict=True)
            if completion[-1] in end_ids(model)  # one that was cut says nothing about how to end
        ]
        loss = backward(model, teacher, rollouts)
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"step {step + 1:3}  KL {loss:.4f}")
    after = accuracy(model, tokenizer, list(data.test))
    print(f"after: {after:.1%}")
    return before, after


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
