"""Cards and clusters are found by torch's name and by the name one types."""

from __future__ import annotations

import pytest

from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.known_devices import CARDS, CLUSTERS, named, peak_tflops, recognise

TORCH_NAMES = {
    "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100_pcie", "NVIDIA H100 NVL": "h100_nvl",
    "NVIDIA H200": "h200", "NVIDIA B200": "b200", "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA A100-SXM4-40GB": "a100_40",
    "NVIDIA A100-PCIE-40GB": "a100_pcie_40", "NVIDIA A100 80GB PCIe": "a100_pcie", "NVIDIA L4": "l4",
    "NVIDIA L40": "l40",
    "NVIDIA L40S": "l40s", "NVIDIA A40": "a40", "NVIDIA A30": "a30", "NVIDIA A10": "a10", "NVIDIA A10G": "a10g",
    "NVIDIA RTX 6000 Ada Generation": "rtx_6000_ada", "NVIDIA RTX A6000": "rtx_a6000",
    "NVIDIA GeForce RTX 5090": "rtx_5090", "NVIDIA GeForce RTX 4090": "rtx_4090", "NVIDIA GeForce RTX 3090": "rtx_3090",
    "Tesla V100-SXM2-16GB": "v100_16", "Tesla V100-SXM2-32GB": "v100", "Tesla T4": "t4",
}  # fmt: skip


def test_every_card_is_found_by_the_name_that_torch_gives_it():
    assert {name: card.name for name in TORCH_NAMES if (card := recognise(name))} == TORCH_NAMES
    assert set(TORCH_NAMES.values()) == set(CARDS), "a card without a name of torch's"


@pytest.mark.parametrize("name", ["NVIDIA GeForce GTX 1080", "cpu", "NVIDIA L400", "NVIDIA A1000", ""])
def test_another_card_is_not_taken_for_one_of_the_table(name: str):
    assert recognise(name) is None
    assert peak_tflops(name, "bfloat16") is None


def test_a_peak_is_of_a_number_format_that_the_card_has():
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bfloat16") == 989
    assert peak_tflops("NVIDIA H100 80GB HBM3", "float32") == 67
    assert peak_tflops("Tesla T4", "bfloat16") is None
    assert peak_tflops("Tesla T4", "float16") == 65


def test_every_cluster_is_of_a_card_that_is_known_and_names_its_source():
    for name, cluster in CLUSTERS.items():
        card, found = named(name)
        assert (card.name, found) == (cluster.card, cluster)
    assert all(one.source for one in [*CARDS.values(), *CLUSTERS.values()])


def test_an_unknown_device_is_one_line_with_the_name_meant():
    with pytest.raises(ConfigError, match="h10: no such device - did you mean 'h100'"):
        named("h10")
