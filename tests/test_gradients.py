"""One update through DeepSpeed against the same update in plain PyTorch: logits of every position, autograd, AdamW."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import gradient_ranks as ranks_script
import pytest
import torch
from gradient_ranks import BLEND_LIVE, EMA_RATE, OPTIM, STEPS, VARIANTS, Variant
from support import TESTS, run_ranks
from torch import Tensor

from opsd_cli.data.problems import Rollout
from opsd_cli.engine.policy import Policy
from opsd_cli.engine.zero_config import learning_rate

pytestmark = pytest.mark.slow

TEMPERATURE = 1.3


def oracle_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities, in the plainest form."""
    return (p.exp() * (p - q)).sum(-1)


ORACLE_DIVERGENCES = {
    "forward_kl": lambda student, teacher: oracle_kl(teacher, student),
    "reverse_kl": lambda student, teacher: oracle_kl(student, teacher),
    "jsd": lambda student, teacher: jsd(student, teacher, beta=0.3),
}


def jsd(student: Tensor, teacher: Tensor, *, beta: float) -> Tensor:
    mixture = (beta * teacher.exp() + (1 - beta) * student.exp()).log()
    return beta * oracle_kl(teacher, mixture) + (1 - beta) * oracle_kl(student, mixture)


def completion_logprobs(lm: torch.nn.Module, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    """One row at a time, no padding, no masks."""
    logits = lm(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    return (logits[len(prompt) - 1 : -1] / TEMPERATURE).log_softmax(-1)


def teacher_logprobs(variant: Variant, policy: Policy, frozen: Policy, rollout: Rollout) -> Tensor:
    """Whose weights answer: the policy's own, those of a second model, or both."""
    prompt, completion = rollout.prompt.teacher_ids, rollout.completion_ids
    if variant.teacher == "live":
        return completion_logprobs(policy.lm, prompt, completion)
    other = completion_logprobs(frozen.lm, prompt, completion)
    if variant.teacher != "blend":
        return other
    live = completion_logprobs(policy.lm, prompt, completion)
    return ((1 - BLEND_LIVE) * other + BLEND_LIVE * live).log_softmax(-1)


def move(frozen: Policy, policy: Policy, *, share: float) -> None:
    """teacher <- (1 - share) * teacher + share * student, on weights in which the adapter is merged."""
    held = dict(frozen.named_parameters())
    adapters = dict(policy.named_parameters())
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            continue
        current = parameter.detach()
        if name.endswith(".base_layer.weight"):
            stem = name.removesuffix("base_layer.weight")
            up, down = (adapters[f"{stem}lora_{side}.default.weight"].detach() for side in "BA")
            current = current + 2.0 * up @ down  # alpha 8 over rank 4
        with torch.no_grad():
            held[name].mul_(1 - share).add_(share * current)


def plain(variant: Variant) -> Variant:
    """What of a variant changes its result: all others of them have one oracle."""
    alike = {name: getattr(variant, name) for name in ("tied", "lora", "teacher", "divergence")}
    return Variant("plain", 0, **alike)


@cache
def oracle(root: Path, variant: Variant) -> dict[str, Tensor]:
    """Two updates without DeepSpeed, chunks, pairs or micro-batches."""
    policy, _ = ranks_script.make_policy(ranks_script.source_of(root, variant), variant)
    frozen, _ = ranks_script.make_policy(ranks_script.source_of(root, variant), variant)
    if variant.lora:
        frozen.lm.disable_adapter_layers()
        if variant.teacher in ("ema", "sync"):  # these begin as the student, whose adapter is not zero here
            move(frozen, policy, share=1.0)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps, weight_decay=OPTIM.weight_decay
    )
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        terms = []
        for rollout in ranks_script.make_rollouts(step):
            if rollout.finish_reason == "length":
                continue
            with torch.no_grad():
                teacher = teacher_logprobs(variant, policy, frozen, rollout)
            student = completion_logprobs(policy.lm, rollout.prompt.student_ids, rollout.completion_ids)
            terms.append(ORACLE_DIVERGENCES[variant.divergence](student, teacher))
        optimizer.zero_grad()
        torch.cat(terms).mean().backward()
        found |= {f"grad{step}/{name}": p.grad.clone() for name, p in trained.items()}
        found[f"norm{step}"] = torch.nn.utils.clip_grad_norm_(trained.values(), OPTIM.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, OPTIM, steps=STEPS)
        before = [p.detach().clone() for p in trained.values()]
        optimizer.step()
        moved = [(p.detach() - old).norm() for p, old in zip(trained.values(), before, strict=True)]
        found[f"update{step}"] = torch.stack(moved).norm()
        if variant.teacher in ("ema", "sync"):
            move(frozen, policy, share=EMA_RATE if variant.teacher == "ema" else 1.0)
    return found | {f"weight/{name}": p.detach() for name, p in trained.items()}


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm().clamp(min=1e-12))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("gradients")
    for tied in (True, False):
        ranks_script.make_model(root / ("tied" if tied else "untied"), tied=tied)

    @cache
    def of(world_size: int) -> Path:
        run_ranks([TESTS / "gradient_ranks.py", root], world_size)
        return root

    return of


@pytest.mark.parametrize(
    ("variant", "world_size"),
    [pytest.param(variant, ranks, id=f"{variant.name}-{ranks}") for variant in VARIANTS for ranks in variant.ranks],
)
def test_an_update_through_zero_equals_plain_pytorch(found, variant: Variant, world_size: int):
    root = found(world_size)
    got = torch.load(root / f"{variant.name}_{world_size}.pt")
    expected = oracle(root, plain(variant))
    assert got.keys() >= expected.keys()
    errors = {name: relative_error(got[name], value) for name, value in expected.items()}
    # The second gradient is taken after an Adam update, which divides rounding by a small number.
    # So does the length of an update.
    loose = ("grad1", "update")
    assert max(error for name, error in errors.items() if not name.startswith(loose)) <= 1e-5, errors
    assert max(errors.values()) <= 1e-4, errors
