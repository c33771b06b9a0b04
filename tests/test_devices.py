"""Where tensors live: every part of a step works on a device that refuses to meet the CPU, gives there what it gives on
the CPU, and makes the host wait only where it must."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, product

import pytest
import torch
from divergence_table import DIVERGENCES
from pretend_device import DEVICE, PretendedDevice
from support import token_rules
from torch import Tensor

from opsd_cli.data.pairing import PairedBatch, TokenBatch, filler_batch, pair
from opsd_cli.data.problems import Problem, PromptPair, Rollout
from opsd_cli.loss import chunk_rows
from opsd_cli.loss.chunk_rows import LossInputs
from opsd_cli.loss.chunked_head import distill
from opsd_cli.loss.clip import apply_clip
from opsd_cli.loss.divergences import (
    AtSampledToken,
)
from opsd_cli.loss.support import restrict_support
from opsd_cli.loss.token_factors import factors_of
from opsd_cli.loss.types import Head, TokenLoss, TokenMixture, TokenScores
from opsd_cli.sampling.token_sampling import draw_token
from opsd_cli.settings.config import ClipSettings, SamplingSettings, SupportSettings
from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.registry import plugin_names
from opsd_cli.training.step_report import TokenMeter

CPU = torch.device("cpu")
D, V = 6, 23
SUPPORTS = [
    SupportSettings(side="full", k=1, rest="tail"),
    *(SupportSettings(side=side, k=4, rest="tail") for side in ("teacher", "student", "union")),
    *(SupportSettings(side="union", k=4, rest=rest) for rest in ("renormalise", "drop")),
]
CLIPS = [ClipSettings(kind=kind, limit=0.05) for kind in ("none", "entry", "neutral", "token")]
TARGETS = ("teacher", "own head", "mixture")
DTYPES = (torch.float32, torch.bfloat16)
FACTORS = [(gate, cap) for gate in ("none", "student_entropy", "teacher_entropy", "privilege") for cap in (None, 1.5)]


@pytest.fixture
def device() -> Iterator[PretendedDevice]:
    with PretendedDevice() as pretended:
        yield pretended


def host(tree):
    """The same on the CPU."""
    if isinstance(tree, dict):
        return {name: host(part) for name, part in tree.items()}
    return [host(part) for part in tree] if isinstance(tree, list) else tree.detach().cpu()


def rollouts(number: int = 3, *, place: int = 0) -> list[Rollout]:
    """Prompts of three roles and completions, all of unequal lengths; the last was not drawn."""
    problem = Problem("p", "q", "s", "1")
    made = []
    for i in range(number):
        prompts = PromptPair(problem, (2,) * (3 + i), (3,) * (7 - i), (4,) * (2 + i))
        ids = tuple((5 * i + 3 * j) % V for j in range(2 + 2 * i))
        logprobs = tuple(-0.5 - 0.25 * j for j in range(len(ids))) if i < number - 1 else ()
        made.append(Rollout(prompts, ids, "stop", logprobs, place + i))
    return made


def paired(*, place: int = 0) -> PairedBatch:
    (batch,) = pair([[(rollout, [1.0] * len(rollout.completion_ids)) for rollout in rollouts(place=place)]])
    return batch


def test_the_pretended_device_refuses_what_a_gpu_refuses_and_counts_what_it_waits_for(device: PretendedDevice):
    here, there = torch.arange(4.0), torch.arange(4.0).to(DEVICE)
    for mix in (
        lambda: here + there,
        lambda: there[torch.tensor([0, 1])],
        lambda: torch.cat([here, there]),
        lambda: there.lerp_(here, 0.5),
        lambda: here.mul(there.sum()),
        lambda: torch.rand(3, device=DEVICE, generator=torch.Generator()),
        lambda: torch.nn.functional.scaled_dot_product_attention(
            *[there.view(1, 1, 4, 1)] * 3, attn_mask=torch.ones(4, 4, dtype=torch.bool)
        ),
    ):
        with pytest.raises(RuntimeError, match=r"two devices|same device"):
            mix()
    with pytest.raises(RuntimeError, match="without waiting"):
        there.to("cpu", non_blocking=True)
    device.waits.clear()
    assert (there * torch.tensor(2.0)).tolist() == [0.0, 2.0, 4.0, 6.0]
    assert bool(there[there > 1].sum() == 5)
    torch.tensor([1], device=DEVICE)
    here.to(DEVICE, non_blocking=True)
    assert device.waits == ["read", "shape", "read", "upload"]


@pytest.mark.parametrize("make", [paired, lambda: filler_batch(0)], ids=["rollouts", "filler"])
def test_a_batch_moves_whole_and_is_not_waited_for(make, device: PretendedDevice):
    batch = make().to(DEVICE)
    roles = [part for part in vars(batch).values() if isinstance(part, TokenBatch)]
    assert len(roles) == 3
    tensors = [part for owner in (batch, *roles) for part in vars(owner).values() if isinstance(part, Tensor)]
    assert len(tensors) == 11
    assert {tensor.device for tensor in tensors} == {DEVICE}
    assert not device.waits


def scored(
    where: torch.device, divergence, target: str, gate: str, cap: float | None, dtype: torch.dtype
) -> tuple[list, TokenMeter]:
    """The loss of a batch, its gradients, and a meter that was given it."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(where, dtype, non_blocking=True)

    batch, n = paired().to(where), len(paired().target_ids_N)
    student_ND, weight_VD, bias_V = (draw(*shape).requires_grad_() for shape in ((n, D), (V, D), (V,)))
    head, own = Head(weight_VD, bias_V, scale=0.7, softcap=9.0), Head(draw(V, D), None)
    one, other = TokenScores(draw(n, D), None), TokenScores(draw(n, D), own)
    mixture = TokenMixture(((1.4, one), (-0.6, other)), student_weight=0.2)
    rules = token_rules(gate=gate, gate_min=0.1, prefix_nats=30.0 if gate == "privilege" else 0.0)
    inputs = LossInputs(
        head, {"teacher": one, "own head": other, "mixture": mixture, "none": None}[target],
        batch.target_ids_N, batch.weights_N, divergence, temperature=1.2,
        chunk_bytes=4 * V * 15, factors=factors_of(rules, batch, importance_cap=cap), right_N=batch.right_N,
    )  # fmt: skip
    loss = distill(student_ND, inputs)
    meter = TokenMeter()
    meter.add(batch, loss, padded=False)
    loss.weighted_sum.backward()
    gradients = [leaf.grad for leaf in (student_ND, weight_VD, bias_V)]
    return [loss.weighted_sum, loss.value_N, loss.diagnostics, gradients], meter


def cases() -> Iterator[tuple]:
    """Every divergence over every support with every clip that goes with it; targets, factors and types in turn."""
    in_turn = cycle(product(TARGETS, FACTORS, DTYPES))
    for divergence, support, clip in product(DIVERGENCES.values(), SUPPORTS, CLIPS):
        if isinstance(divergence, AtSampledToken) and (support.side, clip.kind) != ("full", "none"):
            continue
        try:
            whole = restrict_support(apply_clip(divergence, clip), support)
        except ConfigError:
            continue
        target, (gate, cap), dtype = next(in_turn)
        yield whole, target if divergence.needs_teacher else "none", gate, cap, dtype


@pytest.mark.slow
def test_every_loss_and_its_meter_work_where_the_model_is_and_wait_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunk_rows, "GPU_SHARE", 2)
    assert {type(one).plugin_name for one in DIVERGENCES.values()} == set(plugin_names("divergence"))
    number = 0
    for case in cases():
        with PretendedDevice() as device:
            there, meter = scored(DEVICE, *case)
            means = meter.reduced(list)
            assert device.waits == ["read"], case  # all averages, at once
            there = host(there)
        here, expected = scored(CPU, *case)
        rtol, atol = (1e-4, 1e-5) if case[-1] == torch.float32 else (1e-2, 1e-3)
        torch.testing.assert_close(there, host(here), rtol=rtol, atol=atol)
        assert means == pytest.approx(expected.reduced(list), rel=rtol, abs=atol)
        number += 1
    assert number > 100


def test_what_tokens_cost_is_read_once_whatever_the_number_of_batches(device: PretendedDevice):
    meter, made = TokenMeter(), []
    for batch in (paired().to(DEVICE), filler_batch(0).to(DEVICE), paired(place=9).to(DEVICE)):
        value_N = torch.arange(len(batch.target_ids_N), device=DEVICE) + 100.0 * len(made)
        meter.keep_token_losses(batch, TokenLoss(value_N.sum(), value_N, {}))
        made += batch.rollouts
    assert not device.waits
    losses = meter.token_losses()
    assert device.waits == ["read"]
    assert len(losses) == 6
    assert [losses[rollout.key][0] for rollout in made] == [0.0, 2.0, 6.0, 300.0, 302.0, 306.0]
    assert all(len(losses[rollout.key]) == len(rollout.completion_ids) for rollout in made)


def test_a_token_is_drawn_alike_under_every_sampling_setting(device: PretendedDevice):
    logits_BV, uniform_B = 3 * torch.randn(7, V), torch.rand(7)
    for temperature, top_k, top_p in product((0.0, 0.7, 1.0), (0, 5), (1.0, 0.6)):
        sampling = SamplingSettings(max_completion_tokens=1, temperature=temperature, top_p=top_p, top_k=top_k)
        expected = draw_token(logits_BV, sampling, uniform_B if temperature else None)
        device.waits.clear()
        there = [tensor.to(DEVICE, non_blocking=True) for tensor in (logits_BV, uniform_B)]
        found = draw_token(there[0], sampling, there[1] if temperature else None)
        assert not device.waits
        assert torch.equal(host(found[0]), expected[0])
        torch.testing.assert_close(host(found[1]), expected[1])
