"""Pretraining of the tiny model: rows packed from whole chats, Muon for the matrices, AdamW for the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tiny.documents import KNOWABLE, Chat
from tiny.tokenizer import ASSISTANT, END, USER, VOCABULARY

PROMPT_WEIGHT = 0.1  # of the loss of a prompt's tokens; the completion's are in the chat


@dataclass(frozen=True)
class Training:
    """The numbers of a pretraining."""

    steps: int
    rows: int
    row_tokens: int
    lr: float
    warmup_steps: int
    decay_from: float  # share of the steps after which the rate falls linearly to 0


@dataclass(frozen=True)
class Row:
    """One packed row: ids, the chat each id belongs to, its position there and its loss weight; all the same length."""

    ids: list[int]
    chats: list[int]
    positions: list[int]
    weights: list[float]


def new_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> Qwen3ForCausalLM:
    """Qwen3 with 0.92 M parameters and random weights."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def pretrain(
    model: Qwen3ForCausalLM,
    chats: Iterator[Chat],
    *,
    tokenizer: PreTrainedTokenizerFast,
    training: Training,
    report: Callable[[int, float, float], None],
) -> None:
    """Train in place for `training.steps` steps. `report(step, loss, seconds)` is called after each."""
    optimizers = _optimizers(model, training.lr)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: _rate(step, training)) for o in optimizers]
    rows = pack(chats, tokenizer, row_tokens=training.row_tokens)
    model.train()
    started = time.perf_counter()
    for step in range(training.steps):
        loss = _loss(model, [next(rows) for _ in range(training.rows)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        report(step + 1, loss.item(), time.perf_counter() - started)
    model.eval()


def pack(chats: Iterator[Chat], tokenizer: PreTrainedTokenizerFast, *, row_tokens: int) -> Iterator[Row]:
    """Rows of exactly `row_tokens`: whole chats one after another, the first that does not fit opens the next row."""
    row = Row([], [], [], [])
    for chat in chats:
        ids, weights = encode(chat, tokenizer)
        if len(row.ids) + len(ids) > row_tokens:
            yield _filled(row, row_tokens, tokenizer.pad_token_id)
            row = Row([], [], [], [])
        number = row.chats[-1] + 1 if row.chats else 0
        row.ids.extend(ids)
        row.chats.extend([number] * len(ids))
        row.positions.extend(range(len(ids)))
        row.weights.extend(weights)


def encode(chat: Chat, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[float]]:
    """Token ids of a chat, and the loss weight of predicting each."""
    ids = tokenizer.encode(USER + chat.prompt + END + ASSISTANT)
    weights = [PROMPT_WEIGHT] * len(ids)
    for text, weight in (*chat.pieces, (END, KNOWABLE)):
        piece = tokenizer.encode(text)
        ids += piece
        weights += [weight] * len(piece)
    return ids, [0.0, *weights[1:]]


def _filled(row: Row, length: int, pad: int) -> Row:
    missing = length - len(row.ids)
    return Row(
        row.ids + [pad] * missing,
        row.chats + [-1] * missing,
        row.positions + [0] * missing,
        row.weights + [0.0] * missing,
    )


def _loss(model: Qwen3ForCausalLM, rows: list[Row]) -> torch.Tensor:
    """Weighted mean of the next-token losses; a token attends to its own chat only."""
    ids_BS = torch.tensor([row.ids for row in rows])
    chats_BS = torch.tensor([row.chats for row in rows])
    positions_BS = torch.tensor([row.positions for row in rows])
    weights_BS = torch.tensor([row.weights for row in rows])
    same_chat_BSS = chats_BS[:, :, None] == chats_BS[:, None, :]
    causal_SS = torch.ones(ids_BS.shape[1], ids_BS.shape[1], dtype=torch.bool).tril()
    mask_B1SS = (same_chat_BSS & causal_SS)[:, None]
    logits = model(input_ids=ids_BS, attention_mask=mask_B1SS, position_ids=positions_BS, use_cache=False).logits
    losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids_BS[:, 1:].flatten(), reduction="none")
    weights = weights_BS[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def _optimizers(model: Qwen3ForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _rate(step: int, training: Training) -> float:
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    left = (training.steps - step) / (training.steps * (1 - training.decay_from))
    return min(1.0, left)
