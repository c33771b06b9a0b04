"""The gradient of the real engine in bf16 against the same gradient in plain PyTorch and fp32 on the CPU: its
direction, its length, and that cutting a batch into more micro-batches does not change it."""

from __future__ import annotations

import math
from functools import cache, partial

import torch
from torch import Tensor

from gpu_checks import build
from gpu_checks.check import Bench, Check, Figure, Found
from opsd_cli.data.problems import Rollout
from opsd_cli.loss.divergences import ForwardKL
from opsd_cli.settings.config import LoraSettings
from opsd_cli.teachers.teachers import Initial, Teacher

VOCABULARY = 512
PIECES = (1, 4, 16)
COSINE, NORM, APART = 5e-4, 1e-2, 3e-3
ON_A_CPU = ((1, 0), (2, build.LORA.rank))
ONE_OF_MANY = "on a card only: a CPU checks two of these"
EXACT = {"1 - cosine": 1e-6, "norm": 1e-4, "micro-batches": 1e-4}  # in fp32
ROUNDED = {"1 - cosine": COSINE, "norm": NORM, "micro-batches": APART}


def checks(bench: Bench) -> list[Check]:
    made = []
    for stage in range(4):
        for name, lora in (("all weights", build.NO_LORA), ("LoRA", build.LORA)):
            run = partial(compare, bench, stage, lora, torch.bfloat16)
            made.append(
                Check(f"bf16 stage {stage}, {name}", run, "" if (stage, lora.rank) in ON_A_CPU else ONE_OF_MANY)
            )
    for stage in (2, 3):
        run = partial(compare, bench, stage, build.NO_LORA, torch.bfloat16, offload=True)
        made.append(Check(f"bf16 stage {stage} offloaded, all weights", run, ONE_OF_MANY))
    exact = partial(compare, bench, dtype=torch.float32)
    made.append(Check("fp32 stage 0, all weights", partial(exact, 0, build.NO_LORA)))
    made.append(Check("fp32 stage 3, LoRA", partial(exact, 3, build.LORA), ONE_OF_MANY))
    return made


def compare(bench: Bench, stage: int, lora: LoraSettings, dtype: torch.dtype, *, offload: bool = False) -> Found:
    """One engine; the gradient of the same sixteen rollouts in 1, 4 and 16 micro-batches."""
    causal = build.random_model(config(), dtype=dtype, device=bench.device)
    engine = build.engine_of(causal, bench, stage=stage, lora=lora, offload=offload)
    teacher = Initial().build(engine)
    pieces = PIECES if not bench.is_small else (PIECES[0], PIECES[-1])
    found = {count: accumulated(engine, teacher, bench, count) for count in pieces}
    expected, whole = oracle(lora, dtype), found[1]
    assert float(whole.norm()) > 0, "no gradient at all"
    measured = {
        "1 - cosine": max(1.0 - cosine(gradient, expected) for gradient in found.values()),
        "norm": max(abs(float(gradient.norm() / expected.norm()) - 1.0) for gradient in found.values()),
        "micro-batches": max(float((found[count] - whole).norm() / whole.norm()) for count in pieces[1:]),
    }
    limits = EXACT if dtype is torch.float32 else ROUNDED
    return Found(tuple(Figure(name, value, limits[name]) for name, value in measured.items()))


def accumulated(
    engine: build.WatchedEngine, teacher: Teacher, bench: Bench, pieces: int, *, keep: bool = False
) -> Tensor:
    """The gradient of all rollouts in so many micro-batches; the engine forgets it afterwards, unless told to `keep`
    it."""
    batches = build.in_pieces(rollouts(), pieces, bench.device)
    tokens = sum(float(batch.weights_N.sum()) for batch in batches)
    for place, batch in enumerate(batches):
        loss = build.loss_of(engine, teacher, batch, divergence=ForwardKL())
        engine.backward(loss.weighted_sum, denominator=tokens, last=place == pieces - 1)
    whole = flat(build.gradients(engine))
    if not keep:
        engine.drop_gradients()
    return whole


def config():
    return build.qwen3(hidden=64, layers=2, heads=4, kv_heads=2, head_size=32, vocabulary=VOCABULARY)


@cache
def rollouts() -> list[Rollout]:
    pairs = build.prompt_pairs(max(PIECES), VOCABULARY, student=9, teacher=21)
    return build.random_rollouts(pairs, VOCABULARY, length=12)


@cache
def oracle(lora: LoraSettings, dtype: torch.dtype) -> Tensor:
    """Logits of every position, autograd, one row at a time; weights rounded as the engine's are."""
    cpu = torch.device("cpu")
    causal = build.random_model(config(), dtype=dtype, device=cpu)
    policy = build.policy_of(build.converted(causal, dtype=torch.float32, device=cpu), lora)
    frozen = build.converted(causal, dtype=torch.float32, device=cpu)
    if dtype is torch.bfloat16 and lora.rank:
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(parameter.data.to(torch.bfloat16))
    terms = []
    for rollout in rollouts():
        student = logprobs(policy.lm, rollout.prompt.student_ids, rollout.completion_ids)
        with torch.no_grad():
            teacher = logprobs(frozen, rollout.prompt.teacher_ids, rollout.completion_ids)
        terms.append((teacher.exp() * (teacher - student)).sum(-1))
    torch.cat(terms).mean().backward()
    return flat({name: p.grad for name, p in policy.named_parameters() if p.requires_grad})


def logprobs(lm: torch.nn.Module, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    logits = lm(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def flat(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([named[name].flatten() for name in sorted(named)])


def cosine(left: Tensor, right: Tensor) -> float:
    left, right = left.double(), right.double()
    value = float(left @ right / (left.norm() * right.norm()))
    return value if math.isfinite(value) else -1.0
