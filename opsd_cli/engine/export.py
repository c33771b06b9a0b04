"""A run's weights as a Hugging Face folder: that of the model which it started from, with new weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from opsd_cli.engine import agreement
from opsd_cli.engine.atomic_files import part_of, publish, remove_leftovers
from opsd_cli.engine.base import PolicyEngine
from opsd_cli.engine.loading import Source, causal_of, with_attention
from opsd_cli.engine.merging import kept_share, merge
from opsd_cli.safety.commit_points import reach
from opsd_cli.settings.errors import DataError, OpsdError, OutsideError
from opsd_cli.settings.memory_errors import is_out_of_memory

CARD = "README.md"
GENERATION = "generation_config.json"
MODEL_FILES = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")
"""Written anew, or about the files of the weights; everything else of a folder comes along."""
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ckpt", ".data")
TEMPLATE_FOLDER = "additional_chat_templates"
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json", TEMPLATE_FOLDER)
KEPT_ENOUGH = 0.95  # of an update; with less, merged weights are written in fp32 unless a format is asked for


@dataclass(frozen=True)
class Exporter:
    """What an export needs beside the weights. `own_template`: the tokenizer's chat template is not the model's own."""

    source: Source
    tokenizer: PreTrainedTokenizerBase
    export_dtype: str  # `model.export_dtype`, or bfloat16
    own_template: bool
    end_ids: Sequence[int] = ()  # every id at which a completion ended in training
    # README.md of a folder, given what was lost and the format of the weights; None: that of the model it came from.
    card: Callable[[str, torch.dtype], str] | None = None

    def export(self, engine: PolicyEngine, folder: Path) -> str:
        """Write `folder` so that AutoModelForCausalLM.from_pretrained(folder) gives the trained model; under LoRA also
        `folder`/adapter for peft. Collective; rank 0 writes, holding two copies of the weights in memory. The folder
        appears once it is complete and has been read back. Returns what merging an adapter has lost, in words.

        Raises on every rank: OutsideError if the folder cannot be written, DataError if what was read back is not what
        was trained."""
        weights = dict(engine.whole_parameters())
        problem: OpsdError | None = None
        note = ""
        if engine.ranks.rank == 0:
            try:
                note = self.write_model(engine.module_of(weights), weights, folder)
            except (OSError, SafetensorError) as error:
                problem = OutsideError(
                    f"the model could not be written to {folder} ({error}); free some space and resume"
                )
            except OpsdError as error:
                problem = error
            except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
                if is_out_of_memory(error):
                    problem = OutsideError(
                        f"out of memory while the model was written to {folder}; rank 0 holds two copies of it in host "
                        "memory: free some and resume"
                    )
                else:
                    problem = DataError(
                        f"transformers cannot write this architecture ({engine.policy.causal.config.model_type}) to "
                        f"{folder} ({type(error).__name__}: {error}); the weights are in the newest checkpoint"
                    )
            if problem:
                shutil.rmtree(part_of(folder), ignore_errors=True)
        # Rank 0 alone knows; the others must fail with it instead of ending as if the model were there.
        problem, note = engine.ranks.from_first((problem, note))
        if problem:
            raise problem
        return note

    def write_model(self, lm: nn.Module, weights: dict[str, Tensor], folder: Path) -> str:
        """Write `lm`, whose parameters are `weights`, as `folder`, replacing it in one move. Returns what merging has
        lost, in words. `weights` is emptied."""
        part = self._begin(folder)
        causal, note = self.merged(lm, weights, part / "adapter")
        weights.clear()
        causal.generation_config = GenerationConfig.from_model_config(causal.config)
        causal.save_pretrained(part)
        self._complete(part, note, causal.dtype)
        reach("export.weights")
        check_written(causal, part, self.source)
        publish(part, folder)
        reach("export.renamed")
        return note

    def write_adapter(self, lm: PeftModel, weights: dict[str, Tensor], folder: Path) -> None:
        """Write the adapter alone as `folder`, for peft, with tokenizer and generation settings beside it."""
        part = self._begin(folder)
        adapter = save_adapter(lm, weights, part)
        GenerationConfig.from_model_config(causal_of(lm).config).save_pretrained(part)
        self._complete(part, "", next(iter(adapter.values())).dtype)
        publish(part, folder)

    def _begin(self, folder: Path) -> Path:
        part = part_of(folder)
        remove_leftovers(folder.parent, folder.name)
        part.mkdir(parents=True)
        reach("export.folder")
        self.tokenizer.save_pretrained(part)
        reach("export.tokenizer")
        return part

    def _complete(self, part: Path, note: str, dtype: torch.dtype) -> None:
        """What stands beside weights: the files of the model's own folder, every end of a completion, the card."""
        self.copy_others(part)
        add_end_ids(part / GENERATION, self.end_ids)
        if self.card is not None:
            (part / CARD).write_text(self.card(note, dtype), encoding="utf-8")

    def merged(self, lm: nn.Module, weights: dict[str, Tensor], adapter: Path) -> tuple[PreTrainedModel, str]:
        """The model as it is written, and what merging its adapter has lost, in words. The adapter is written first, so
        that it is there whatever comes of merging."""
        if not isinstance(lm, PeftModel):
            assert isinstance(lm, PreTrainedModel)
            return self._rounded(lm)
        save_adapter(lm, weights, adapter)
        dtype, note = self.merged_dtype(lm)
        rows = agreement.probe_rows(lm)[-2:]
        with torch.no_grad():
            adapted_NV = agreement.model_logits(lm, rows)
            causal = merge(lm, dtype)
            merged_NV = agreement.model_logits(causal, rows)
        deviation = agreement.deviation(merged_NV, adapted_NV).median()
        limit = max(agreement.MODEL_LIMITS[min(self.source.dtype, dtype, key=lambda one: one.itemsize)])
        if not deviation <= limit:
            raise DataError(
                f"the adapter merged into its model is not what was trained: logits deviate "
                f"{agreement.describe(deviation, limit)}; resume with model.export_dtype=float32"
            )
        return causal, note

    def _rounded(self, causal: PreTrainedModel) -> tuple[PreTrainedModel, str]:
        """A model without an adapter in the format that was asked for, and what that loses."""
        if self.export_dtype != "bfloat16" or self.source.dtype.itemsize <= 2:
            return causal, ""
        rows = agreement.probe_rows(causal)
        with torch.no_grad():
            trained_NV = agreement.model_logits(causal, rows)
            rounded = causal.to(torch.bfloat16)
            rounded_NV = agreement.model_logits(rounded, rows)
        apart = float(agreement.deviation(rounded_NV, trained_NV).median())
        same = int((rounded_NV.argmax(-1) == trained_NV.argmax(-1)).sum())
        return rounded, (
            f"rounded to bfloat16, logits deviate by {agreement.percent(apart)} of their spread, and "
            f"{same} of {len(trained_NV)} most likely tokens stay the same (on tokens at random)"
        )

    def merged_dtype(self, lm: PeftModel) -> tuple[torch.dtype, str]:
        """The format of the merged weights, and what it loses, in words."""
        own = torch.bfloat16 if self.export_dtype == "bfloat16" else self.source.dtype
        if self.export_dtype == "float32" or own.itemsize >= torch.float32.itemsize:
            return torch.float32 if self.export_dtype == "float32" else own, ""
        kept, name = kept_share(lm, own), str(own).removeprefix("torch.")
        share = f"{100 * kept:.0f} % of what the adapter has learnt"
        if self.export_dtype == "bfloat16":
            return own, (
                f"merged into {name} weights, the model holds {share}; the adapter beside it holds all, and so would "
                "--dtype fp32"
            )
        if kept >= KEPT_ENOUGH:
            return own, ""
        if self.export_dtype == "auto":
            return torch.float32, (
                f"merged into {name} weights, model/ would hold {share}, so it is written in float32, which holds all; "
                "model/adapter holds all of it too, for the model that it was trained on"
            )
        return own, (
            f"merged into {name} weights, model/ holds {share}; model/adapter holds all of it, and so would "
            "model.export_dtype=float32"
        )

    def copy_others(self, part: Path) -> None:
        """Everything of the model's own folder that is not weights, over what transformers writes: its generation
        settings with every end of sequence, its chat templates, its licence."""
        origin = folder_of(self.source)
        if origin is None:
            return
        # Of what lies in folders only templates: others hold weights in other forms, the adapter of an earlier export
        # or, where a model is trained in its own folder, this very run.
        for file in sorted([*origin.iterdir(), *(origin / TEMPLATE_FOLDER).glob("*")]):
            name = file.relative_to(origin)
            is_hidden = file.name.startswith(".")
            is_template = self.own_template and name.parts[0] in TEMPLATE_FILES
            is_weights = file.suffix in WEIGHT_ENDINGS or name.name in MODEL_FILES
            if file.is_file() and not (is_hidden or is_template or is_weights):
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, part / name)


def folder_of(source: Source) -> Path | None:
    """Where the files of a model lie on this disk; of one from the hub those that were fetched."""
    if Path(source.path).is_dir():
        return Path(source.path)
    try:
        return Path(snapshot_download(source.path, revision=source.revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):  # not in the cache; a folder that is there no more
        return None


def add_end_ids(file: Path, end_ids: Sequence[int]) -> None:
    """Have a generation config name every end of a completion, so that whoever generates stops where training did: a
    model's own often lacks the token that closes a turn."""
    held = json.loads(file.read_text(encoding="utf-8"))
    named = held.get("eos_token_id")
    known = [] if named is None else [named] if isinstance(named, int) else list(named)
    if missing := [token for token in end_ids if token not in known]:
        ids = [*known, *missing]
        held["eos_token_id"] = ids[0] if len(ids) == 1 else ids
        file.write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")


def check_written(causal: PreTrainedModel, folder: Path, source: Source) -> None:
    """Read a folder back through transformers. Raises DataError where it does not give exactly the weights of
    `causal`."""

    def load(attention: str) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=causal.dtype, attn_implementation=attention, trust_remote_code=source.trust_remote_code
        )

    read = with_attention(source.attention, load).state_dict()
    for name, tensor in causal.state_dict().items():
        if name not in read or not torch.equal(read[name], tensor.cpu()):
            raise DataError(
                f"the model was written to {folder} and read back, and {name} is not what was trained; resume to try "
                "again, and report this architecture "
                f"({causal.config.model_type}): the weights are in the newest checkpoint"
            )


def save_adapter(lm: PeftModel, weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The adapter alone, as peft loads it; returns its weights."""
    folder.mkdir(exist_ok=True)
    lm.peft_config[lm.active_adapter].save_pretrained(folder)
    adapter = get_peft_model_state_dict(lm, state_dict=weights, save_embedding_layers=False)
    save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, folder / "adapter_model.safetensors")
    return adapter
