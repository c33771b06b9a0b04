"""A run's weights as a Hugging Face folder."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opsd_cli.engine.atomic_files import WRITE_ERRORS, part_of, publish, remove_leftovers
from opsd_cli.engine.loading import Source, load_causal, meta_causal
from opsd_cli.engine.policy import Policy
from opsd_cli.engine.quantized import with_originals
from opsd_cli.engine.weight_copies import merge_adapter
from opsd_cli.engine.zero import ZeroEngine
from opsd_cli.safety.commit_points import reach
from opsd_cli.settings.errors import OutsideError


def export(
    engine: ZeroEngine, policy: Policy, source: Source, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write `folder` so that AutoModelForCausalLM.from_pretrained(folder) gives the trained model; under LoRA also
    `folder`/adapter for peft. Collective; rank 0 writes, holding one copy of the weights in memory. The folder appears
    once it is complete. Raises OutsideError on every rank if it cannot be written."""
    weights = dict(engine.whole_parameters())
    problem = None
    if engine.ranks.rank == 0:
        try:
            write_model(policy, source, tokenizer, weights, folder)
        except WRITE_ERRORS as error:
            shutil.rmtree(part_of(folder), ignore_errors=True)
            problem = f"the model could not be written to {folder} ({error}); free some space and resume"
    # Rank 0 alone knows; the others must fail with it instead of ending as if the model were there.
    (problem, *_) = engine.ranks.gather(problem)
    if problem:
        raise OutsideError(problem)


def write_model(
    policy: Policy, source: Source, tokenizer: PreTrainedTokenizerBase, weights: dict[str, Tensor], folder: Path
) -> None:
    """Write weights, tokenizer and configuration as `folder`, replacing it in one move. Where the frozen weights are
    quantised an adapter is merged into the original ones, which are loaded again."""
    part = part_of(folder)
    remove_leftovers(folder.parent, folder.name)
    part.mkdir(parents=True)
    reach("export.folder")
    tokenizer.save_pretrained(part)
    reach("export.tokenizer")
    if source.quantize == "4bit":
        weights = dict(with_originals(weights, load_causal(replace(source, quantize="none"))))
    if isinstance(policy.lm, PeftModel):
        save_adapter(policy.lm, weights, part / "adapter")
        weights = dict(merge_adapter(policy.lm, weights))
    twin = meta_causal(source, policy.causal)
    # save_pretrained expects tied parameters under both of their names; the engine yields each once.
    by_parameter = {id(parameter): weights[name] for name, parameter in twin.named_parameters()}
    named = twin.named_parameters(remove_duplicate=False)
    twin.save_pretrained(part, state_dict={name: by_parameter[id(parameter)] for name, parameter in named})
    reach("export.weights")
    publish(part, folder)
    reach("export.renamed")


def save_adapter(lm: PeftModel, weights: dict[str, Tensor], folder: Path) -> None:
    """The adapter alone, as peft loads it."""
    folder.mkdir(exist_ok=True)
    lm.peft_config[lm.active_adapter].save_pretrained(folder)
    adapter = get_peft_model_state_dict(lm, state_dict=weights, save_embedding_layers=False)
    save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, folder / "adapter_model.safetensors")
