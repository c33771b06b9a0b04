"""The check that test_decoder_alignment runs on a CPU and that runs unchanged on a GPU: decode with rows that enter,
leave and move, look at every tensor that attention is given, and compare the logits of every step with the model's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3Config

from opsd_cli.sampling import llama_decoder
from opsd_cli.sampling.batch_decoder import BatchLimits, decode
from opsd_cli.sampling.llama_decoder import LlamaDecoder
from opsd_cli.sampling.token_sampling import Draw
from opsd_cli.settings.config import SamplingSettings

HEAD_SIZES = (32, 64, 80, 96, 128)
VOCABULARY = 97
LONGEST_PROMPT, LIMIT = 23, 60
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of the spread of the model's logits, as `completing` has it


@dataclass
class Text:
    """One row's tokens, and the logits after its prompt and after every token that it was given."""

    ids: list[int]
    logits: list[Tensor]


class RecordingDecoder(LlamaDecoder):
    """Keeps what every row was given and answered."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__(lm)
        self.open: dict[int, Text] = {}
        self.finished: list[Text] = []
        self.events: set[str] = set()

    def admit(self, slots: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        self.events.add("refill" if self.starts else "start")
        logits_nV = super().admit(slots, prompts)
        for slot, prompt, logits_V in zip(slots, prompts, logits_nV, strict=True):
            self.open[slot] = Text(list(prompt), [logits_V.clone()])
        return logits_nV

    def step(self, token_b: Tensor) -> Tensor:
        logits_bV = super().step(token_b)
        for slot, token in enumerate(token_b.tolist()):
            if slot in self.open:
                self.open[slot].ids.append(token)
                self.open[slot].logits.append(logits_bV[slot].clone())
        return logits_bV

    def release(self, slot: int) -> None:
        super().release(slot)
        self.finished.append(self.open.pop(slot))

    def keep(self, slots: Sequence[int]) -> None:
        self.events.add("compaction")
        super().keep(slots)
        self.open = {i: self.open[slot] for i, slot in enumerate(slots)}

    def _make_room(self) -> None:
        before = self.columns
        super()._make_room()
        self.events.add("growth" if self.columns > before else "move")


@dataclass
class Calls:
    """What `scaled_dot_product_attention` was given."""

    masked: int = 0
    plain: int = 0
    faults: set[str] = field(default_factory=set)

    def look(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        tensors = {"query": query, "key": key, "value": value}
        if mask is None:
            self.plain += 1
        else:
            self.masked += 1
            tensors["mask"] = mask
            if mask.shape[-1] % 8 or mask.shape[-1] != key.shape[2]:
                self.faults.add(f"mask of {mask.shape[-1]} keys for {key.shape[2]}")
        for name, tensor in tensors.items():
            if tensor.data_ptr() % 16:
                self.faults.add(f"{name} begins {tensor.data_ptr() % 16} bytes past an aligned address")
            if tensor.stride(-1) != 1 or any(stride % 8 for stride in tensor.stride()[:-1]):
                self.faults.add(f"{name} has strides {tensor.stride()}")
            if name != "mask" and not bool(torch.isfinite(tensor).all()):
                self.faults.add(f"{name} has numbers that are not finite")


@contextmanager
def watched_attention() -> Iterator[Calls]:
    calls, real = Calls(), F.scaled_dot_product_attention

    def look_and_attend(query, key, value, attn_mask=None, **more):
        calls.look(query, key, value, attn_mask)
        return real(query, key, value, attn_mask=attn_mask, **more)

    F.scaled_dot_product_attention = look_and_attend
    try:
        yield calls
    finally:
        F.scaled_dot_product_attention = real


@contextmanager
def unwritten_memory_is_nan() -> Iterator[None]:
    """What is allocated and not written holds NaN, which on a GPU it may at any time."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # PyTorch then fills what it does not initialise
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def small_model(head_size: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Random weights far enough from zero that a token's neighbours show in its logits."""
    torch.manual_seed(head_size)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=head_size, max_position_embeddings=256,
    )  # fmt: skip
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in lm.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    return lm.to(device=device, dtype=dtype)


def check_decoding(head_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Decode prompts of every length from 1 to LONGEST_PROMPT in few rows and few columns. Every tensor that attention
    is given must be aligned and finite, and the logits of every step those of the model."""
    lm = small_model(head_size, dtype, device)
    prompts = [[(5 * i + 3 * j) % VOCABULARY for j in range(i)] for i in range(1, LONGEST_PROMPT + 1)]
    sampling = SamplingSettings(max_completion_tokens=LIMIT, temperature=1.0, top_p=1.0, top_k=0)
    first_columns, llama_decoder.FIRST_COLUMNS = llama_decoder.FIRST_COLUMNS, 4  # so that the cache grows and moves
    try:
        with watched_attention() as calls, unwritten_memory_is_nan():
            decoder = RecordingDecoder(lm)
            decode(
                decoder, [Draw(prompt, seed) for seed, prompt in enumerate(prompts)],
                sampling=sampling, end_ids=range(3), limits=BatchLimits(5, 10**6), should_stop=lambda: False,
            )  # fmt: skip
    finally:
        llama_decoder.FIRST_COLUMNS = first_columns
    assert not calls.faults
    for text in decoder.finished:
        compare(lm, text)
    # The test is worth its name only if everything happened.
    assert len(decoder.finished) == len(prompts)
    assert calls.masked > 100
    assert calls.plain > 0
    assert decoder.events == {"start", "refill", "compaction", "growth", "move"}
    lengths = {len(text.ids) - i for text in decoder.finished for i in range(len(text.logits))}
    assert lengths >= set(range(1, 71))


def compare(lm: nn.Module, text: Text) -> None:
    """The logits after every token against one forward pass of the model over the whole text."""
    found_tV = torch.stack(text.logits).float()
    with torch.inference_mode():
        logits_SV = lm(input_ids=torch.tensor([text.ids], device=found_tV.device), use_cache=False).logits[0].float()
    expected_tV = logits_SV[-len(found_tV) :]
    dtype = next(lm.parameters()).dtype
    apart = float((found_tV - expected_tV).abs().max() / expected_tV.std())
    assert apart <= TOLERANCE[dtype], f"{apart:.3g} of the spread apart"
    assert dtype != torch.float32 or torch.equal(found_tV.argmax(1), expected_tV.argmax(1))
