"""bfloat16 against fp32: the gradient of an update through DeepSpeed, however it is split."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path

import half_precision_ranks as script
import pytest
import torch
from gradient_ranks import OPTIM, Variant, make_policy, source_of
from support import TESTS, run_ranks
from test_gradients import ORACLE_DIVERGENCES, completion_logprobs
from torch import Tensor

from opsd_cli.engine.zero_config import learning_rate

pytestmark = pytest.mark.slow

COSINE, NORM = 0.9995, 0.01  # to the fp32 reference
SPLIT = 3e-3  # relative L2 difference of two ways of splitting: what rounding each micro-batch's gradient once leaves
SPLIT_TILES = 5e-3  # the same, of each piece of an MLP
SPLIT_PACKED = 1e-2  # where attention itself depends on which rows run together


def reference(root: Path, variant: Variant) -> Tensor:
    """The gradient in fp32 of the same weights, which bfloat16 holds exactly; one rollout at a time, by autograd."""
    policy = make_policy(source_of(root, variant), replace(variant, tiles=1))[0].bfloat16().float()
    terms = []
    for rollout in script.make_rollouts():
        with torch.no_grad():
            if variant.lora:
                with policy.adapter_off():
                    teacher = completion_logprobs(policy.lm, rollout.prompt.teacher_ids, rollout.completion_ids)
            else:
                teacher = completion_logprobs(policy.lm, rollout.prompt.teacher_ids, rollout.completion_ids)
        student = completion_logprobs(policy.lm, rollout.prompt.student_ids, rollout.completion_ids)
        terms.append(ORACLE_DIVERGENCES[variant.divergence](student, teacher))
    torch.cat(terms).mean().backward()
    return flat({name: p.grad for name, p in policy.named_parameters() if p.requires_grad})


def flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient[name].flatten() for name in sorted(gradient)]).double()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("half")
    for tied in (True, False):
        script.make_model(root / ("tied" if tied else "untied"), tied=tied)

    @cache
    def of(world_size: int) -> Path:
        run_ranks([TESTS / "half_precision_ranks.py", root], world_size)
        return root

    return of


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("variant", script.VARIANTS, ids=lambda variant: variant.name)
def test_a_bfloat16_gradient_is_the_fp32_one_however_it_is_split(found, variant: Variant, world_size: int):
    made = gradients(found(world_size), variant, world_size)
    right, total = reference(found(world_size), variant), made.pop("sum", None)
    assert min(float(torch.cosine_similarity(g, right, dim=0)) for g in made.values()) >= COSINE
    assert max(abs(float(g.norm() / right.norm()) - 1.0) for g in made.values()) <= NORM
    apart = {(a, b): relative(made[a], made[b]) for a, b in combinations(made, 2)}
    limit = SPLIT_PACKED if variant.name == script.PACKED else SPLIT_TILES if variant.tiles > 1 else SPLIT
    assert max(apart.values()) <= limit, apart
    if total is not None:  # of single rollouts, added up outside: accumulation itself loses nothing
        assert relative(made[str(script.ROLLOUTS)], total) <= 1e-5


@pytest.mark.parametrize("variant", script.VARIANTS, ids=lambda variant: variant.name)
def test_ranks_add_up_their_bfloat16_gradients_in_fp32(found, variant: Variant):
    """Each rollout is a micro-batch of its own, on one rank and on two."""
    one, two = (gradients(found(ranks), variant, ranks)[str(script.ROLLOUTS)] for ranks in (1, 2))
    assert relative(two, one) <= 1e-5


@pytest.mark.parametrize("stage", [2, 3])
def test_adamw_in_bfloat16_makes_the_updates_of_bfloat16_weights_and_is_resumed(found, stage: int):
    """Against torch's AdamW on weights in bfloat16, whose gradient is rounded once, after it was added up and cut."""
    made = torch.load(found(1) / f"half_states_{stage}_1.pt", weights_only=False)
    assert made["types"] == {torch.bfloat16}
    assert made["moments"] >= 2
    weights = {name: torch.nn.Parameter(value.clone()) for name, value in made["weights0"].items()}
    optimizer = torch.optim.AdamW(
        weights.values(), lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps, weight_decay=OPTIM.weight_decay
    )
    for number in range(2):
        scale = min(1.0, OPTIM.max_grad_norm / made[f"clipped_from{number}"])
        for name, gradient in made[f"gradient{number}"].items():
            weights[name].grad = (gradient * scale).bfloat16()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, replace(OPTIM, warmup_steps=0), steps=4)
        optimizer.step()
        after = made[f"weights{number + 1}"]
        moved = sum(float((after[name].float() - made["weights0"][name].float()).norm()) for name in after)
        off = sum(float((after[name].float() - p.detach().float()).norm()) for name, p in weights.items())
        assert off < 0.1 * moved  # DeepSpeed rounds before it cuts, too
    assert all(torch.equal(made["resumed"][name], after[name]) for name in after)


def gradients(root: Path, variant: Variant, world_size: int) -> dict[str, Tensor]:
    stored = torch.load(root / f"half_{variant.name}_{world_size}.pt")
    return {split: flat(gradient) for split, gradient in stored.items()}
