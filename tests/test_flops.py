"""The closed form of a model's floating-point operations against what torch counts while it runs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from zoo import FAMILIES

from opsd_cli.data.pairing import TokenBatch, filler_batch
from opsd_cli.engine.flops import PEAKS, PassMeter, cost_of, pairs, peak_flops
from opsd_cli.engine.loading import add_adapter
from opsd_cli.engine.policy import Policy
from opsd_cli.loss.types import Work
from opsd_cli.settings.config import LoraSettings
from opsd_cli.training.clock import compute_metrics

LENGTH, PREDICTED = 64, 40
RECURRENT = {"qwen3_5", "lfm2", "mamba", "mamba2", "falcon_h1", "recurrent_gemma"}
MATRICES = ("aten.mm", "aten.addmm")


def model(family: str, **sizes: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = FAMILIES[family].config()
    vars(config).update(sizes)
    # Operations that torch counts: neither fused attention nor experts in groups.
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **eager).eval()


def by_kind(counter: FlopCounterMode) -> dict[str, int]:
    """Operations that matrices took, and that attention took, which has no matrix of the model's."""
    counts = {str(name): number for name, number in counter.get_flop_counts()["Global"].items()}
    return {
        "matrices": sum(counts.get(name, 0) for name in MATRICES),
        "attention": sum(number for name, number in counts.items() if "bmm" in name),
    }


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_forward_pass_of_every_family_has_the_operations_that_torch_counts(family):
    causal = model(family)
    cost = cost_of(causal)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        causal.get_decoder()(torch.randint(2, 250, (1, LENGTH)), use_cache=False)
    counted = by_kind(counter)
    whole = 2 * sum(each for each, _ in cost.attention) * LENGTH**2  # without a mask, as a plain product makes it
    if family not in RECURRENT:  # whose recurrences are products, too, of no matrix
        assert counted == {"matrices": 2 * cost.layers * LENGTH, "attention": whole}
    else:
        assert 2 * cost.layers * LENGTH == pytest.approx(counted["matrices"], rel=0.15)


def test_a_prompt_that_rows_share_counts_once():
    """As one row read on: its tokens, and the attention of those after the prompt to all of theirs."""
    cost = cost_of(model("qwen3"))
    once, rows = PassMeter(cost), (LENGTH, LENGTH - 10, LENGTH)
    once.add_pass(rows, PREDICTED, trains=True, repeats=True, shared=(0, 30, 30))
    tokens = sum(rows) - 60
    attention = cost.attend(LENGTH) + cost.attend(LENGTH - 10, seen=30) + cost.attend(LENGTH, seen=30)
    forward = cost.layers * tokens + attention
    backward = (cost.layers + cost.trained) * tokens + 2 * attention
    head = (2 * cost.head + cost.head_trained) * PREDICTED
    assert once.take() == Work(2.0 * (forward + backward + head), 2.0 * forward)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_training_pass_has_the_operations_that_torch_counts(adapter, checkpoints):
    causal = model("llama", num_hidden_layers=6)
    lora = LoraSettings(rank=4 if adapter else 0, alpha=8, dropout=0.0, targets=("all-linear",))
    policy = Policy(add_adapter(causal, lora, seed=0), layout="padded").train()
    if checkpoints:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids_L, predict_N = torch.randint(2, 250, (LENGTH,)), torch.arange(LENGTH - PREDICTED - 1, LENGTH - 1)
    batch = TokenBatch(ids_L, predict_N, (LENGTH,))
    with FlopCounterMode(display=False) as counter:
        (value,) = policy(batch, lambda hidden_ND, head: (head.logits(hidden_ND).square().sum(),))
        value.backward()
    counted, work = by_kind(counter), policy.meter.take()
    seen = (LENGTH + 1) / (2 * LENGTH)  # of the positions of a row, those before a token
    expected = counted["matrices"] + seen * counted["attention"]
    # An adapter's first layer needs no gradient of its inputs, which are embeddings that stay; and torch stops
    # computing a layer again before its last product, of which nothing is kept.
    limit = 0.04 if checkpoints else 0.03 if adapter else 1e-9
    assert work.flops + work.repeated == pytest.approx(expected, rel=limit)
    assert (work.repeated > 0) is checkpoints
    assert policy.meter.take() == Work(0, 0)


def test_scoring_is_a_forward_pass_and_a_second_model_is_counted_too():
    policy, other = (Policy(model("llama", num_hidden_layers=layers), layout="padded") for layers in (2, 4))
    policy.meter.include(other.meter)
    batch = replace(filler_batch(0).student, input_ids_L=torch.randint(2, 250, (8,)), lengths=(8,))
    found = []
    for one in (policy, other):
        with torch.no_grad():
            one(batch, lambda hidden_ND, head: (hidden_ND,))
        found.append(policy.meter.take())
    head = 2 * policy.meter.cost.head
    assert found[1].flops - head == pytest.approx(2 * (found[0].flops - head))
    assert found[0].repeated == found[1].repeated == 0


def test_drawing_reads_a_prompt_once_and_every_token_but_the_last():
    causal, prompt, completions = model("llama"), 20, (5, 9)
    meter = PassMeter(cost_of(causal))
    meter.add_draws(prompt, completions)
    matrices = attention = 0
    with torch.no_grad():
        for place, length in enumerate(completions):
            with FlopCounterMode(display=False) as counter:
                made = causal(torch.randint(2, 250, (1, prompt)), use_cache=True, logits_to_keep=1)
            if place == 0:
                matrices, attention = by_kind(counter).values()
                attention *= (prompt + 1) / (2 * prompt)
            else:
                matrices += 2 * meter.cost.head  # the first token of the second completion
            for _ in range(length - 1):
                with FlopCounterMode(display=False) as counter:
                    made = causal(torch.tensor([[3]]), past_key_values=made.past_key_values)
                counted = by_kind(counter)
                matrices, attention = matrices + counted["matrices"], attention + counted["attention"]
    found = meter.take().flops
    assert found == pytest.approx(matrices + attention, rel=2 * meter.cost.head / found)


def test_a_window_limits_what_a_token_sees():
    assert [pairs(length, None) for length in (0, 1, 5)] == [0, 1, 15]
    assert pairs(10, 4) == sum(min(place, 4) for place in range(1, 11))
    cost = cost_of(model("mistral", sliding_window=8))
    assert {window for _, window in cost.attention} == {8}
    assert cost.attend(30, seen=12) == sum(each * (pairs(30, w) - pairs(12, w)) for each, w in cost.attention)


def test_utilisation_is_told_of_cards_whose_peak_is_known_and_speed_everywhere():
    meter = SimpleNamespace(take=lambda: Work(flops=2e12, repeated=0.5e12))
    ranks = SimpleNamespace(world_size=2, all_sum=lambda values: [2 * value for value in values])
    engine = SimpleNamespace(meter=meter, ranks=ranks, peak_flops=None)
    assert compute_metrics(engine, 2.0) == {
        "compute/tflop": 4.0, "compute/gflops_per_second": 1000.0, "compute/repeated": 0.25,
    }  # fmt: skip
    engine.peak_flops = 2e12
    assert compute_metrics(engine, 2.0)["compute/mfu"] == 0.5
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989e12
    assert peak_flops("NVIDIA H100 PCIe", torch.bfloat16) == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.float32) is None
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float16) == 312e12
    assert peak_flops("cpu", torch.bfloat16) is None
    assert peak_flops("Radeon", torch.bfloat16) is None
    assert all(peak_flops(f"NVIDIA {card}", torch.bfloat16) == peak * 1e12 for card, peak in PEAKS.items())
