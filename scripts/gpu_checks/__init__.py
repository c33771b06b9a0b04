"""What `scripts/gpu_check.py` checks, a file for each group, and the order in which groups are started."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """A file of this folder. `seconds` is what all its checks may take together before the group counts as hanging."""

    name: str
    about: str
    seconds: int
    alone: bool = False  # nothing else may use the card at the same time
    module: str = ""  # of another package, for a test

    @property
    def file(self) -> str:
        return self.module or f"gpu_checks.{self.name}"


GROUPS = (
    Group("quickstart", "recipe=quickstart learns in bf16 and in fp32 what it learns on a CPU", 220),
    Group("runs", "whole `opsd train` runs: stopped, resumed, out of memory", 200),
    Group("methods", "two steps of every teacher, divergence, clip, support and sampler", 200),
    Group("stages", "two steps at every ZeRO stage, with offload, adapters and in fp32", 200),
    Group("decoding", "decoders against the model's own forward, at every length", 200),
    Group("graphs", "tokens of captured graphs against the model's own, at every size, after updates, under LoRA", 200),
    Group("loss", "kernels and plain PyTorch of the loss against float64", 180),
    Group("gradients", "a bf16 gradient against the fp32 one, in 1, 4 and 16 micro-batches", 150),
    Group("layout", "packed rows against padded ones, attention against float64", 120),
    Group("drawing", "tokens drawn by the million: none impossible, frequencies right, as on the CPU", 120),
    Group("memory", "running out of memory, and recovering from it", 120),
    Group("process", "process group, buffers, parameters and fingerprint of one rank", 100),
    Group("tokens", "milliseconds of a drawn token at real shapes, beside generate of transformers", 120, alone=True),
    Group("speed", "seconds and memory of a step at a real shape, by phase", 120, alone=True),
)
"""The longest first: they decide how long everything takes."""
