"""A run's weights as a Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opsd_cli.engine.atomic_files import WRITE_ERRORS, part_of, publish, remove_leftovers
from opsd_cli.engine.loading import Source, meta_causal
from opsd_cli.engine.policy import Policy
from opsd_cli.engine.weight_copies import merged
from opsd_cli.engine.zero import ZeroEngine
from opsd_cli.safety.commit_points import reach
from opsd_cli.settings.errors import OutsideError

ADAPTER = "adapter"


def export(
    engine: ZeroEngine, policy: Policy, source: Source, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write `folder` so that AutoModelForCausalLM.from_pretrained(folder) gives the trained model; under LoRA also
    `folder`/adapter for peft. Collective; rank 0 writes, holding one copy of the weights in memory. The folder appears
    when it is whole. Raises OutsideError on every rank when it cannot be written."""
    whole = dict(engine.whole_parameters())
    problem = None
    if engine.ranks.rank == 0:
        try:
            write_model(policy, source, tokenizer, whole, folder)
        except WRITE_ERRORS as error:
            shutil.rmtree(part_of(folder), ignore_errors=True)
            problem = f"the model could not be written to {folder} ({error}); free some space and resume"
    (problem, *_) = engine.ranks.gather(problem)
    if problem:
        raise OutsideError(problem)


def write_model(
    policy: Policy, source: Source, tokenizer: PreTrainedTokenizerBase, whole: dict[str, Tensor], folder: Path
) -> None:
    """Write the whole weights, the tokenizer and what describes them as `folder`, replacing it in one move."""
    final, folder = folder, part_of(folder)
    remove_leftovers(final.parent, final.name)
    folder.mkdir(parents=True)
    reach("export.folder")
    tokenizer.save_pretrained(folder)
    reach("export.tokenizer")
    if isinstance(policy.lm, PeftModel):
        save_adapter(policy.lm, whole, folder / ADAPTER)
        whole = merged(policy.lm, whole)
    twin = meta_causal(source, policy.causal)
    twin.save_pretrained(folder, state_dict=with_tied_names(twin, whole))
    reach("export.weights")
    publish(folder, final)
    reach("export.renamed")


def save_adapter(lm: PeftModel, whole: dict[str, Tensor], folder: Path) -> None:
    """The adapter alone, as peft loads it."""
    folder.mkdir(exist_ok=True)
    config = lm.peft_config[lm.active_adapter]
    config.save_pretrained(folder)
    weights = get_peft_model_state_dict(lm, state_dict=whole, save_embedding_layers=False)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "adapter_model.safetensors")


def with_tied_names(twin: torch.nn.Module, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every name of the module, tied parameters under both of theirs, as save_pretrained expects them."""
    by_identity: dict[int, Tensor] = {id(p): whole[name] for name, p in twin.named_parameters()}
    return {name: by_identity[id(p)] for name, p in twin.named_parameters(remove_duplicate=False)}
