"""The device of a rank, the number format all ranks choose, and how long they wait for each other."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch

from opsd_cli.engine.device import Card, align_local_rank, choose_dtype, device_index, names_of, pick_device
from opsd_cli.engine.process_group import LONGEST, nccl_device, patience_for
from opsd_cli.settings.errors import ConfigError

CPU = Card("cpu")
GTX = Card("NVIDIA GeForce GTX 1080", (6, 1))
V100 = Card("Tesla V100-SXM2-16GB", (7, 0))
T4 = Card("Tesla T4", (7, 5))
A100 = Card("NVIDIA A100-SXM4-40GB", (8, 0))
H100 = Card("NVIDIA H100 80GB HBM3", (9, 0))


@pytest.mark.parametrize(
    ("local_rank", "visible", "index"), [(0, 1, 0), (3, 1, 0), (0, 4, 0), (3, 4, 3)], ids=lambda value: str(value)
)
def test_a_rank_takes_its_own_device_or_the_only_one_it_sees(local_rank, visible, index):
    assert device_index(local_rank, visible) == index


def test_more_ranks_than_devices_are_refused_with_both_numbers():
    with pytest.raises(ConfigError, match=r"rank 5 \(LOCAL_RANK\) .* torch sees 4 GPUs .* at most 4 ranks"):
        device_index(5, 4)


@pytest.mark.parametrize(
    ("before", "device", "after"),
    [
        ({"LOCAL_RANK": "3"}, "cuda:0", {"LOCAL_RANK": "0"}),
        ({"LOCAL_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}, "cuda:0",
         {"LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}),
        ({"LOCAL_RANK": "2", "RANK": "6"}, "cuda:2", {"LOCAL_RANK": "2", "RANK": "6"}),
        ({"LOCAL_RANK": "3"}, "cpu", {"LOCAL_RANK": "3"}),
    ],
    ids=["one device per task", "of mpirun", "one per rank", "cpu"],
)  # fmt: skip
def test_libraries_that_take_local_rank_for_a_device_are_told_the_right_one(before, device, after):
    align_local_rank(before, torch.device(device))
    assert before == after


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine on which torch sees no GPU")
def test_a_rank_that_finds_no_gpu_says_what_torch_said():
    assert pick_device({"DS_ACCELERATOR": "cpu"}) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"launcher\.device is cuda, but torch can use no GPU here: \S.*device=cpu"):
        pick_device({"DS_ACCELERATOR": "cuda", "LOCAL_RANK": "0"})


@pytest.mark.parametrize(
    ("asked", "cards", "dtype", "why"),
    [
        ("auto", [CPU], torch.float32, "auto: a CPU"),
        ("auto", [A100, H100], torch.bfloat16, "auto: NVIDIA A100-SXM4-40GB + NVIDIA H100 80GB HBM3"),
        ("auto", [T4], torch.float16, "auto: Tesla T4 (7.5) has no bfloat16"),
        ("auto", [H100, V100, T4], torch.float16, "auto: Tesla V100-SXM2-16GB (7.0) has no bfloat16"),
        ("auto", [H100, GTX, T4], torch.float32,
         "auto: NVIDIA GeForce GTX 1080 (6.1) trains neither in bfloat16 nor in float16"),
        ("float16", [H100], torch.float16, ""),
        ("bfloat16", [H100, A100], torch.bfloat16, ""),
        ("bfloat16", [CPU, CPU], torch.bfloat16, ""),
        ("float32", [T4], torch.float32, ""),
    ],
)  # fmt: skip
def test_every_rank_chooses_the_number_format_that_the_least_of_the_cards_can(asked, cards, dtype, why):
    assert choose_dtype(asked, cards) == (dtype, why)
    assert choose_dtype(asked, cards[::-1])[0] == dtype


@pytest.mark.parametrize(
    ("cards", "advice"),
    [
        ([H100, T4], r"Tesla T4 \(7\.5\) has none: .* use model\.dtype=float16 or model\.dtype=float32$"),
        ([GTX], r"GTX 1080 \(6\.1\) has none: .*; use model\.dtype=float32$"),
    ],
)
def test_bfloat16_that_a_card_would_only_emulate_is_refused(cards, advice):
    with pytest.raises(ConfigError, match=advice):
        choose_dtype("bfloat16", cards)


def test_each_kind_of_device_is_named_once():
    assert names_of([T4, T4]) == "Tesla T4"
    assert names_of([T4, V100, T4]) == "Tesla T4 + Tesla V100-SXM2-16GB"


@pytest.mark.parametrize(
    ("stall", "save", "seconds"),
    [(1200.0, 1800.0, 2400), (7200.0, 1800.0, 7800), (None, 60.0, LONGEST.total_seconds()),
     (1e9, 5.0, LONGEST.total_seconds()), (5.0, 1e300, LONGEST.total_seconds())],
)  # fmt: skip
def test_a_collective_waits_longer_than_the_supervisor_does(stall, save, seconds):
    assert patience_for(stall_seconds=stall, save_seconds=save) == timedelta(seconds=seconds)
    assert LONGEST.total_seconds() * 1000 < 2**31


def test_nccl_is_bound_to_its_device_but_where_that_does_harm():
    gpu = torch.device("cuda", 1)
    assert nccl_device(gpu, world_size=2, version="2.13.0+cu130") == gpu
    assert nccl_device(gpu, world_size=2, version="2.6.0+cu124") == gpu
    assert nccl_device(gpu, world_size=2, version="2.7.0+cu126") is None
    assert nccl_device(gpu, world_size=1, version="2.13.0+cu130") is None
    assert nccl_device(torch.device("cpu"), world_size=2, version="2.13.0+cpu") is None
