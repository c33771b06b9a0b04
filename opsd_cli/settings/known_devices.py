"""Cards and clusters by name: memory, peak rates, links, each with its source. The one table of them, which `opsd plan`
computes with and model FLOPs utilisation is a share of; here because every other folder may import settings.

Rates are the vendor's peaks for dense products (without 2:4 sparsity) that are added up in fp32, as opsd's are: fp32
without TF32, which opsd switches off, and half precision on tensor cores. Memory is what `nvidia-smi` reports.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from opsd_cli.settings.errors import ConfigError
from opsd_cli.settings.registry import did_you_mean

Precision = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Card:
    """One kind of accelerator. Rates are peaks that no program reaches."""

    name: str  # as it is typed: h100
    title: str
    pattern: str  # of the name that torch and nvidia-smi give it
    memory_gib: float
    half_tflops: float  # bfloat16, and float16 likewise
    float32_tflops: float
    memory_gb_s: float  # bandwidth of its own memory
    link_gb_s: float  # to another card of the same machine, one way: NVLink, else PCI Express
    source: str
    has_bfloat16: bool = True

    def tflops(self, dtype: Precision) -> float | None:
        """The peak in a number format, TFLOP/s; None where the card would emulate it."""
        if dtype == "float32":
            return self.float32_tflops
        return None if dtype == "bfloat16" and not self.has_bfloat16 else self.half_tflops


@dataclass(frozen=True)
class Cluster:
    """Machines of several cards each, joined by a network."""

    name: str
    card: str  # name of a Card
    cards: int  # of a machine
    network_gb_s: float  # of a card to another machine, one way
    source: str


PCIE3, PCIE4, PCIE5 = 16.0, 32.0, 64.0  # GB/s of 16 lanes, one way
SHEET = "NVIDIA data sheet"

CARDS: dict[str, Card] = {card.name: card for card in (
    Card("b200", "B200", r"\bB200\b", 179.0, 2250, 75, 8000, 900, f"{SHEET}: DGX B200, per GPU"),
    Card("h200", "H200 SXM 141 GB", r"\bH200\b", 140.4, 989, 67, 4800, 450, f"{SHEET}: H200"),
    Card("h100_nvl", "H100 NVL 94 GB", r"\bH100 NVL\b", 93.6, 835, 60, 3900, 300, f"{SHEET}: H100 NVL"),
    Card("h100_pcie", "H100 PCIe 80 GB", r"\bH100 PCIe\b", 79.6, 756, 51, 2000, PCIE5, f"{SHEET}: H100 PCIe"),
    Card("h100", "H100 SXM 80 GB", r"\bH100\b", 79.6, 989, 67, 3350, 450, f"{SHEET}: H100"),
    Card("a100_40", "A100 SXM 40 GB", r"\bA100-SXM4-40GB\b", 40.0, 312, 19.5, 1555, 300, f"{SHEET}: A100"),
    Card("a100_pcie_40", "A100 PCIe 40 GB", r"\bA100-PCIE-40GB\b", 40.0, 312, 19.5, 1555, PCIE4, f"{SHEET}: A100"),
    Card("a100_pcie", "A100 PCIe 80 GB", r"\bA100 80GB PCIe\b", 80.0, 312, 19.5, 1935, PCIE4, f"{SHEET}: A100"),
    Card("a100", "A100 SXM 80 GB", r"\bA100\b", 80.0, 312, 19.5, 2039, 300, f"{SHEET}: A100"),
    Card("l40s", "L40S", r"\bL40S\b", 45.0, 362, 91.6, 864, PCIE4, f"{SHEET}: L40S"),
    Card("l40", "L40", r"\bL40\b", 45.0, 181, 90.5, 864, PCIE4, f"{SHEET}: L40"),
    Card("l4", "L4", r"\bL4\b", 22.5, 121, 30.3, 300, PCIE4, f"{SHEET}: L4"),
    Card("a40", "A40", r"\bA40\b", 45.0, 150, 37.4, 696, PCIE4, f"{SHEET}: A40"),
    Card("a30", "A30", r"\bA30\b", 24.0, 165, 10.3, 933, PCIE4, f"{SHEET}: A30"),
    Card("a10g", "A10G", r"\bA10G\b", 22.5, 70, 31.5, 600, PCIE4, "AWS: EC2 G5 instances"),
    Card("a10", "A10", r"\bA10\b", 22.5, 125, 31.2, 600, PCIE4, f"{SHEET}: A10"),
    Card("rtx_6000_ada", "RTX 6000 Ada", r"\bRTX 6000 Ada\b", 48.0, 364, 91.1, 960, PCIE4, "NVIDIA Ada white paper"),
    Card("rtx_a6000", "RTX A6000", r"\bRTX A6000\b", 48.0, 155, 38.7, 768, PCIE4, "NVIDIA GA102 white paper"),
    Card("rtx_5090", "GeForce RTX 5090", r"\bRTX 5090\b", 31.8, 210, 105, 1792, PCIE5, "NVIDIA Blackwell white paper"),
    Card("rtx_4090", "GeForce RTX 4090", r"\bRTX 4090\b", 24.0, 165, 82.6, 1008, PCIE4, "NVIDIA Ada white paper"),
    Card("rtx_3090", "GeForce RTX 3090", r"\bRTX 3090\b", 24.0, 71, 35.6, 936, PCIE4, "NVIDIA GA102 white paper"),
    Card("v100_16", "V100 SXM 16 GB", r"\bV100-SXM2-16GB\b", 16.0, 125, 15.7, 900, 150, f"{SHEET}: V100", False),
    Card("v100", "V100 SXM 32 GB", r"\bV100-SXM\d-32GB\b", 32.0, 125, 15.7, 900, 150, f"{SHEET}: V100", False),
    Card("t4", "T4", r"\bT4\b", 15.0, 65, 8.1, 320, PCIE3, f"{SHEET}: T4", False),
)}  # fmt: skip
"""By name; where one pattern is part of another's name, the narrower comes first."""

CLUSTERS: dict[str, Cluster] = {cluster.name: cluster for cluster in (
    Cluster("dgx_b200", "b200", 8, 50.0, "NVIDIA: DGX B200, 400 Gb/s InfiniBand for each GPU"),
    Cluster("dgx_h200", "h200", 8, 50.0, "NVIDIA: DGX H200, 400 Gb/s InfiniBand for each GPU"),
    Cluster("dgx_h100", "h100", 8, 50.0, "NVIDIA: DGX H100, 400 Gb/s InfiniBand for each GPU"),
    Cluster("aws_p5", "h100", 8, 50.0, "AWS: p5.48xlarge, 3,200 Gb/s EFA for 8 GPUs"),
    Cluster("dgx_a100", "a100", 8, 25.0, "NVIDIA: DGX A100, 200 Gb/s InfiniBand for each GPU"),
    Cluster("aws_p4d", "a100_40", 8, 6.25, "AWS: p4d.24xlarge, 400 Gb/s EFA for 8 GPUs"),
    Cluster("aws_g5", "a10g", 8, 1.56, "AWS: g5.48xlarge, 100 Gb/s for 8 GPUs"),
    Cluster("aws_g6e", "l40s", 8, 6.25, "AWS: g6e.48xlarge, 400 Gb/s EFA for 8 GPUs"),
)}  # fmt: skip


def recognise(device_name: str) -> Card | None:
    """The card that torch or `nvidia-smi` calls by this name; None for one that the table does not have."""
    return next((card for card in CARDS.values() if re.search(card.pattern, device_name)), None)


def peak_tflops(device_name: str, dtype: Precision) -> float | None:
    """The peak of a device by torch's name of it, TFLOP/s; None where it is not known (a CPU, another card)."""
    card = recognise(device_name)
    return None if card is None else card.tflops(dtype)


def named(name: str) -> tuple[Card, Cluster | None]:
    """A card by name, or a cluster and its card. Raises ConfigError for a name that the table does not have."""
    if cluster := CLUSTERS.get(name):
        return CARDS[cluster.card], cluster
    if card := CARDS.get(name):
        return card, None
    known = [*CARDS, *CLUSTERS]
    raise ConfigError(f"{name}: no such device{did_you_mean(name, known)}; `opsd plan --devices` lists all")
