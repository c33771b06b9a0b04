"""Benchmark: scoring the rollouts of groups and learning from them, where a prompt that they share is run once
(train.share_prompts) and where each row has its own.

    python scripts/bench/groups.py          # the bundled tiny model, groups of 2 to 16, a few minutes on one core
    python scripts/bench/groups.py --full   # a 100 M-parameter Qwen3 from config as well, random tokens
    python scripts/bench/groups.py --gpu    # Qwen3-1.7B from config, random weights and tokens, LoRA, bfloat16

The same rollouts both ways, in turn in one process: teacher's pass, student's pass, backward, no optimizer. The
tiny model draws them at temperature 1; elsewhere their lengths are given. Owns the cases.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from measure import arguments, interleaved, report, start
from on_card import parts_of
from whole_runs import MEDIUM, QWEN3_1_7B, SMALL, random_model

from opsd_cli.api import Session, compose
from opsd_cli.data.microbatches import plan_microbatches
from opsd_cli.data.pairing import pair
from opsd_cli.data.problems import Problem, PromptPair, Rollout
from opsd_cli.teachers.teachers import score_target
from opsd_cli.training.loop import Parts

WORDS = ("recipe=quickstart", "eval.problems=0", "dataset.retention_problems=0", "teacher=live")
ROLLOUTS = 32  # of a step, in groups of any size


def learn(parts: Parts, rollouts: Sequence[Rollout], *, shares: bool) -> int:
    """The gradient of a step. Returns the tokens that were run, under both prompts."""
    weighed = [(rollout, [1.0] * len(rollout.completion_ids)) for rollout in rollouts]
    budget, engine = parts.budget.tokens, parts.engine
    plan = plan_microbatches([weighed], rank=0, max_tokens=budget, padded=engine.pads, shares=shares)
    batches = [batch.to(engine.device) for batch in pair(plan, shares=shares)]
    for number, batch in enumerate(batches):
        target = None if parts.teacher is None else score_target(parts.teacher, batch, parts.config.target)
        loss = engine.student_loss(batch, target, parts.objective)
        engine.backward(loss.weighted_sum, denominator=1000.0, last=number == len(batches) - 1)
    engine.drop_gradients()
    return sum(batch.student.tokens + batch.teacher.tokens for batch in batches)


def of_lengths(problems: int, group: int, lengths: tuple[int, int, int]) -> list[Rollout]:
    """Random tokens: student's prompt, teacher's prompt and the longest completion have these lengths."""
    numbers = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(numbers.randrange(3, 1000) for _ in range(count))

    pairs = [PromptPair(Problem(str(p), "", "", "1"), ids(lengths[0]), ids(lengths[1])) for p in range(problems)]
    return [
        Rollout(prompts, ids(numbers.randrange(lengths[2] // 2, lengths[2] + 1)), "stop", (), place, number)
        for place, prompts in enumerate(pairs)
        for number in range(group)
    ]


def measured(name: str, parts: Parts, rollouts: Sequence[Rollout], options: argparse.Namespace) -> list[object]:
    """One row of the table."""
    tokens: dict[bool, int] = {}
    runs = {
        str(shares): lambda shares=shares: tokens.update({shares: learn(parts, rollouts, shares=shares)})
        for shares in (False, True)
    }
    seconds = interleaved(runs, rounds=options.rounds, cpu_seconds=options.cpu_seconds)
    own, once = seconds["False"], seconds["True"]
    group = sum(rollout.place == rollouts[0].place for rollout in rollouts)
    print(f"# {name}, groups of {group}: {own:.3f} and {once:.3f} s", flush=True)
    scale = 1000 if options.gpu else 1
    return [name, group, tokens[False], tokens[True], scale * own, scale * once, own / once]


def tiny(options: argparse.Namespace) -> list[list[object]]:
    rows = []
    for group in (2, 4, 8, 16):
        words = (f"train.problems_per_step={ROLLOUTS // group}", f"train.rollouts_per_problem={group}")
        with Session(compose(*WORDS, *words)) as session:
            prompts = session._parts.train_prompts.at(range(ROLLOUTS // group))
            rollouts = session.sample(prompts, rollouts=group)
            rows.append(measured("tiny", session._parts, rollouts, options))
    return rows


def medium(options: argparse.Namespace) -> list[list[object]]:
    with tempfile.TemporaryDirectory() as scratch:
        path = random_model(Path(scratch) / "model", MEDIUM, dtype=torch.float32)
        with Session(compose(*WORDS, f"model.path={path}")) as session:
            return [measured("100 M, random", session._parts, of_lengths(2, 4, (64, 160, 64)), options)]


def on_card(options: argparse.Namespace, device: torch.device) -> list[list[object]]:
    shape, lengths, problems = (SMALL, (8, 16, 8), 2) if options.small else (QWEN3_1_7B, (256, 640, 512), 4)
    rows = []
    for group in (4, 8):
        rollouts = of_lengths(problems, group, lengths)
        words = ("train.micro_batch_tokens=16384", "teacher=live")
        parts, _ = parts_of(shape, device, [rollout.prompt for rollout in rollouts], adapter="lora", words=words)
        rows.append(measured("small" if options.small else "1.7 B, random", parts, rollouts, options))
    return rows


def main() -> None:
    options = arguments(__doc__ or "", takes=("full", "small", "rounds", "cpu_seconds")).parse_args()
    options.rounds = options.rounds or (3 if options.gpu else 7)
    device = start(options)
    rows = on_card(options, device) if options.gpu else tiny(options)
    if options.full and not options.gpu:
        rows += medium(options)
    unit = "ms" if options.gpu else "s"
    head = ["", "group", "tokens, own prompts", "tokens, shared", f"own, {unit}", f"shared, {unit}", "own / shared"]
    report(options, head, rows)


if __name__ == "__main__":
    main()
