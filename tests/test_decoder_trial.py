"""A decoder draws completions only where its logits are the model's own, however its rows change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from zoo import FAMILIES

from opsd_cli.engine.loading import LoadedModel
from opsd_cli.engine.process_group import alone
from opsd_cli.sampling.choose_decoder import Completer
from opsd_cli.sampling.decoder_trial import find_fault
from opsd_cli.sampling.hf_decoder import HFDecoder
from opsd_cli.sampling.llama_decoder import LlamaDecoder
from opsd_cli.sampling.whole_row_decoder import WholeRowDecoder
from opsd_cli.settings.errors import DataError


def model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[name].config()).eval()


class KeepsWrongRows(HFDecoder):
    """Drops the first rows whatever rows are to be dropped."""

    def keep(self, slots) -> None:
        super().keep(range(len(self.mask_bS) - len(slots), len(self.mask_bS)))


class ForgetsTheMask(HFDecoder):
    """Sees the padding of short rows."""

    def _forward(self, ids_bS: Tensor, position_bS: Tensor) -> Tensor:
        self.mask_bS = torch.ones_like(self.mask_bS)
        return super()._forward(ids_bS, position_bS)


class ForgetsTheCache(HFDecoder):
    """As a model that ignores the cache it is given: every token sees itself alone."""

    def _forward(self, ids_bS: Tensor, position_bS: Tensor) -> Tensor:
        return self.lm(input_ids=ids_bS, use_cache=False).logits[:, -1]


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        (HFDecoder, ""),
        (KeepsWrongRows, "after rows have left"),
        (ForgetsTheMask, "when rows of several lengths run together"),
        (ForgetsTheCache, "when rows of several lengths run together"),
    ],
)
def test_the_trial_finds_what_is_wrong_with_a_decoder(kind: type[HFDecoder], fault: str):
    found = find_fault(model("llama"), kind(model("llama"), pad_id=0))
    assert fault in found
    assert bool(found) == bool(fault)


class RefillsWrongly(WholeRowDecoder):
    """A row that enters beside others begins with what the row before it left."""

    def admit(self, slots, prompts) -> Tensor:
        left = {slot: self.rows[slot] for slot in slots} if self.live else {}
        return super().admit(
            slots, [[*left.get(slot, []), *prompt] for slot, prompt in zip(slots, prompts, strict=True)]
        )


def test_rows_that_enter_beside_others_are_tried_where_a_decoder_takes_them():
    assert "after a row has entered beside others" in find_fault(model("llama"), RefillsWrongly(model("llama")))
    assert find_fault(model("llama"), WholeRowDecoder(model("llama"))) == ""


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2", "falcon_h1"])
def test_recurrent_states_survive_rows_that_leave(name: str):
    assert find_fault(model(name), HFDecoder(model(name), pad_id=0)) == ""


def test_a_model_whose_cache_is_wrong_is_run_without_one_and_the_plan_says_so():
    completer = Completer(LoadedModel(model("mamba"), None), alone(), end_ids=(1,), pad_id=0)
    assert "without a cache, every token by a pass over its whole row: its logits deviate" in completer.choose_decoder()
    with completer.weights.generating() as lm:
        assert type(completer.loop(lm).decoder) is WholeRowDecoder


def test_a_model_that_no_decoder_runs_rightly_is_refused(monkeypatch: pytest.MonkeyPatch):
    causal = model("mamba")
    whole = causal.forward

    def forward(input_ids: Tensor, logits_to_keep: int = 0, **given):
        # A row's last logits depend on how many rows there are.
        made = whole(input_ids=input_ids, **given)
        made.logits = made.logits[:, -logits_to_keep:] + torch.randn_like(made.logits[:, -logits_to_keep:])
        return made

    monkeypatch.setattr(causal, "forward", forward)
    with pytest.raises(DataError, match=r"no completion can be drawn from this model \(type mamba\)"):
        Completer(LoadedModel(causal, None), alone(), end_ids=(1,), pad_id=0).choose_decoder()


def test_a_fast_pass_that_fails_on_this_machine_is_done_without(monkeypatch: pytest.MonkeyPatch):
    """As without a compiler, which a kernel needs at its first launch."""

    def step(self, token_b: Tensor) -> Tensor:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setattr(LlamaDecoder, "step", step)
    completer = Completer(LoadedModel(model("llama"), None), alone(), end_ids=(1,), pad_id=0)
    assert "the fast pass fails here (RuntimeError: Failed to find C compiler. Please" in completer.choose_decoder()
    with completer.weights.generating() as lm:
        assert type(completer.loop(lm).decoder) is HFDecoder
