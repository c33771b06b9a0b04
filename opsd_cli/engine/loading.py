"""Load a model, its tokenizer and its adapter from the hub, a folder or the package. Whatever a user can get wrong
about a model is reported here, each in one line.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from opsd_cli.data.hub import Tell, hub_errors, look_up, tell_stderr
from opsd_cli.engine.quantized import four_bit_options, keep_differentiable
from opsd_cli.settings.config import LoraSettings, ModelSettings
from opsd_cli.settings.errors import ConfigError, DataError

OFFLINE_WAYS = "work offline with model=tiny dataset.path=FOLDER, or with recipe=quickstart"
ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = "bundled:"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Source:
    """Where a model is loaded from, and how."""

    path: str
    revision: str | None
    dtype: torch.dtype
    attention: str
    trust_remote_code: bool
    cached_only: bool  # the hub cannot be reached: only a copy on this disk can be loaded
    quantize: Literal["none", "4bit"] = "none"  # of its layers

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
            "local_files_only": self.cached_only,
        }

    def beside(self, path: str, revision: str | None) -> Source:
        """Another model, loaded the same way, its weights as they are."""
        path, revision, cached_only = resolve(path, revision, key="teacher.path")
        return replace(self, path=path, revision=revision, cached_only=cached_only, quantize="none")


def find_source(model: ModelSettings, *, dtype: torch.dtype, tell: Tell = tell_stderr) -> Source:
    """Where the model of the settings is. `dtype` is `model.dtype` as decided for all ranks (`device.choose_dtype`)."""
    path, revision, cached_only = resolve(model.path, model.revision, key="model.path", tell=tell)
    return Source(path, revision, dtype, model.attention, model.trust_remote_code, cached_only, model.quantize)


def resolve(path: str, revision: str | None, *, key: str, tell: Tell = tell_stderr) -> tuple[str, str | None, bool]:
    """Where a model really is: its folder or hub id, its commit, and whether only a cached copy can be loaded. `key` is
    the setting that names it, for messages."""
    if path.startswith(BUNDLED):
        folder = ASSETS / path.removeprefix(BUNDLED)
        if not (folder / "config.json").is_file():
            bundled = ", ".join(sorted(f"{BUNDLED}{file.parent.name}" for file in ASSETS.glob("*/config.json")))
            raise ConfigError(f"{key} is {path!r}, which is not bundled; available: {bundled}")
        return str(folder), None, True
    # A hub id is `name` or `owner/name`; anything that exists, or is written as a path, is a folder.
    if Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        if not (Path(path) / "config.json").is_file():
            raise DataError(f"{key} is {path!r}, but there is no {Path(path) / 'config.json'}")
        return path, None, True
    commit = look_up("model", path, revision=revision, hint=OFFLINE_WAYS, tell=tell)
    return path, commit or revision, commit is None


def load_tokenizer(source: Source, *, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; `chat_template` is a file that replaces its own template."""
    with model_errors(source), hub_errors(f"the tokenizer of model {source.path}", hint=OFFLINE_WAYS):
        tokenizer = AutoTokenizer.from_pretrained(source.path, **source.arguments)
    if chat_template is not None:
        file = Path(chat_template)
        if not file.is_file():
            raise ConfigError(f"model.chat_template is {chat_template!r}, but there is no such file")
        try:
            tokenizer.chat_template = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"model.chat_template is {chat_template!r}, which cannot be read as text: {error}"
            ) from error
    return tokenizer


def load_causal(source: Source, *, device: torch.device = CPU) -> PreTrainedModel:
    """The model with its weights, in evaluation mode, on the CPU, or quantised on `device`. Only safetensors are
    read."""
    quantized = four_bit_options(source.dtype, device) if source.quantize == "4bit" else {}
    with model_errors(source), hub_errors(f"model {source.path}", hint=OFFLINE_WAYS):
        causal = AutoModelForCausalLM.from_pretrained(
            source.path,
            dtype=source.dtype,
            attn_implementation=source.attention,
            use_safetensors=True,
            **source.arguments,
            **quantized,
        )
    if quantized:
        keep_differentiable(causal)
    head = causal.get_output_embeddings()
    # The exact type: a subclass may compute something that the chunked loss, which has only the weight, would not.
    if type(head) is not nn.Linear:
        raise DataError(
            f"model {source.path} has no linear output head (it is {type(head).__name__}), so its logits cannot be "
            "computed in chunks; use another model"
        )
    return causal.eval()


@dataclass(frozen=True)
class LoadedModel:
    """A model that is not trained, to draw completions from."""

    causal: PreTrainedModel
    source: Source

    @contextmanager
    def generating(self) -> Iterator[PreTrainedModel]:
        yield self.causal

    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Its weights by name; there is no adapter to merge."""
        yield from ((name, parameter.data) for name, parameter in self.causal.named_parameters())


def load_model(source: Source, *, device: torch.device) -> LoadedModel:
    causal = load_causal(source, device=device).requires_grad_(False)
    return LoadedModel(causal if source.quantize == "4bit" else causal.to(device), source)


@contextmanager
def model_errors(source: Source) -> Iterator[None]:
    """Turn what transformers raises for a folder that it cannot use into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if "trust_remote_code" in str(error):
            reason = (
                "it needs code of its own, which is not run unless asked for: read that code, then pin "
                "model.revision=COMMIT and type model.trust_remote_code=true"
            )
        raise DataError(f"model {source.path} cannot be loaded: {reason}") from error


def check_same_tokens(other: Source, own: Source) -> None:
    """Raise ConfigError unless both models have the same tokens: completions travel as ids, so an id must mean the same
    text to both."""
    theirs, ours = (load_tokenizer(source).get_vocab() for source in (other, own))
    different = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if different:
        raise ConfigError(
            f"teacher.path {other.path} and model.path {own.path} have different tokenizers ({len(different)} tokens "
            f"differ, for example {different[0]!r}); distillation compares next-token distributions, so choose a "
            "teacher of the same model family"
        )


def meta_causal(source: Source, causal: PreTrainedModel) -> PreTrainedModel:
    """The same architecture without weights: every parameter on the meta device, buffers shared with `causal`."""
    config = copy.deepcopy(causal.config)
    if source.quantize == "4bit":
        del config.quantization_config  # which says how `causal` was loaded, and not what the architecture is
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(
            config, dtype=source.dtype, attn_implementation=source.attention,
            trust_remote_code=source.trust_remote_code,
        )  # fmt: skip
    # Buffers, such as rotary frequencies, are computed at construction, which on the meta device computes nothing.
    buffers = dict(causal.named_buffers())
    for name, _ in list(twin.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        twin.get_submodule(owner).register_buffer(leaf, buffers[name], persistent=False)
    return twin.requires_grad_(False).eval()


def causal_of(lm: nn.Module) -> PreTrainedModel:
    """The transformers model, inside the adapter if there is one."""
    return cast(PreTrainedModel, lm.get_base_model() if isinstance(lm, PeftModel) else lm)


def add_adapter(causal: PreTrainedModel, lora: LoraSettings, *, seed: int) -> nn.Module:
    """LoRA around `causal` through peft; the model itself where `lora.rank` is 0. Seeded, so that all ranks agree."""
    if lora.rank == 0:
        return causal.requires_grad_(True)
    targets = "all-linear" if lora.targets == ("all-linear",) else list(lora.targets)
    outside = {"lm_head", "embed_tokens"}.intersection(lora.targets)
    if outside:
        raise ConfigError(
            f"lora.targets names {', '.join(sorted(outside))}: the output head stays frozen under LoRA, since both "
            "roles share it; choose among the attention and MLP projections, or [all-linear]"
        )
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(causal, settings)
        except ValueError as error:
            raise ConfigError(f"lora.targets {list(lora.targets)} do not fit this model: {error}") from error
