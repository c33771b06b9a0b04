"""The check at load that a row's logits are its own at the lengths of the run: rotations that follow the longest row of
a batch, experts with a capacity, routing over a batch or windows longer than the usual trial rows show in long rows
only, and not every model's config tells of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd_cli.engine import agreement
from opsd_cli.engine.model_limits import longest_row
from opsd_cli.engine.packed import Layout, LayoutChoice, run_rows, usable_layout
from opsd_cli.engine.process_group import Ranks
from opsd_cli.settings.errors import DataError
from opsd_cli.settings.memory_errors import is_out_of_memory

MOST_TOKENS = 2048  # of the longer row
MOST_OPERATIONS = {"cpu": 1e11, "cuda": 1e15}  # of the whole check: a few seconds
PASSES = 7  # operations for each weight and token of the longer row: both rows alone and together, two each
PLACES = 48  # of each row that are compared
SHARES = {torch.float32: 0.9, torch.float64: 0.9}
"""The share of places that must agree; elsewhere fewer, since rounding sends single tokens to other experts."""
SHARE_IN_HALF = 0.75


@dataclass(frozen=True)
class LongRows:
    """Two rows as long as the run's, and what each gives by itself."""

    rows: tuple[Tensor, Tensor]
    places_P: Tensor  # among the tokens of both rows, one after the other
    alone_PV: Tensor
    limit: float

    @property
    def longest(self) -> int:
        return len(self.rows[0])


@torch.no_grad()
def long_rows(causal: PreTrainedModel, longest: int) -> LongRows | None:
    """Rows of at most `longest` tokens, run by the model's own attention; None where the usual trial rows are as
    long, or a check of longer ones would take too long."""
    weight = causal.get_input_embeddings().weight
    size = sum(parameter.numel() for parameter in causal.parameters())
    affordable = MOST_OPERATIONS.get(weight.device.type, MOST_OPERATIONS["cuda"]) / (PASSES * size)
    positions = longest_row(causal.config)
    length = int(min(longest, MOST_TOKENS, affordable, *([] if positions is None else [positions[0]])))
    if length <= max(agreement.PROBE_LENGTHS):
        return None
    ids_L = (7919 * torch.arange(1, 2 * length + 1, device=weight.device) + 3) % len(weight)
    rows = ids_L[:length], ids_L[length : length + 2 * length // 3]
    places = [torch.linspace(0, len(row) - 1, PLACES, device=weight.device).long() for row in rows]
    alone_PV = torch.cat([_logits(causal, (row,), place, "padded") for row, place in zip(rows, places, strict=True)])
    # How far rounding goes, in two batch shapes of short rows: in long ones it could not be told from what is sought.
    short = agreement.probe_rows(causal)
    noise_N = agreement.deviation(
        agreement.model_logits(causal, short, padded=True), agreement.model_logits(causal, short)
    )
    limit = agreement.model_limit(_typical(noise_N, causal.dtype), causal.dtype)
    return LongRows(rows, torch.cat([places[0], length + places[1]]), alone_PV, limit)


@torch.no_grad()
def find_neighbours(causal: PreTrainedModel, layout: Layout, long: LongRows | None) -> str:
    """What is wrong with long rows that run together in that layout, in words; empty where nothing is."""
    if long is None:
        return ""
    try:
        together_PV = _logits(causal, long.rows, long.places_P, layout)
    except (TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        return f"rows of {long.longest} tokens cannot be run like that ({first_line(error)})"
    apart = _typical(agreement.deviation(together_PV, long.alone_PV), causal.dtype)
    if apart <= long.limit:  # not `>`, or NaN would pass
        return ""
    found = agreement.describe(apart, long.limit)
    return f"logits of a row of {long.longest} tokens depend on the rows beside it: they change {found}"


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _logits(causal: PreTrainedModel, rows: tuple[Tensor, ...], places_P: Tensor, layout: Layout) -> Tensor:
    """The head's product [P, V] at some places of rows that run together."""
    hidden_LD = run_rows(causal.get_decoder(), torch.cat(rows), [len(row) for row in rows], layout=layout)
    return causal.get_output_embeddings()(hidden_LD.index_select(0, places_P))


def _typical(deviation_N: Tensor, dtype: torch.dtype) -> Tensor:
    return deviation_N.quantile(SHARES.get(dtype, SHARE_IN_HALF))


def choose_layout(causal: PreTrainedModel, ranks: Ranks, *, longest: int) -> LayoutChoice:
    """How all ranks run rows of at most `longest` tokens. Collective. Raises DataError for a model whose rows depend on
    each other in every layout."""
    kind = causal.config.model_type
    try:
        long = long_rows(causal, longest)  # before another attention is set
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        if is_out_of_memory(error):
            raise
        raise DataError(
            f"a model of type {kind} cannot be run here in {str(causal.dtype).removeprefix('torch.')}: its own forward "
            f"pass fails on rows of at most {longest} tokens ({first_line(error)}); try another model.dtype or "
            "model.attention"
        ) from error
    choice = usable_layout(causal, ranks, also=lambda layout: find_neighbours(causal, layout, long))
    problem = "" if choice.layout != "padded" else ranks.refusal(find_neighbours(causal, "padded", long))
    if problem:
        raise DataError(
            f"a model of type {kind} cannot be trained here: {problem}; lower prompts.max_tokens "
            "or sampling.max_completion_tokens (and eval's) to where they do not, or use another model"
        )
    return choice
