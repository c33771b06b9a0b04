"""Load a model, its tokenizer and its adapter from the hub, a folder or the package. Whatever a user can get wrong
about a model is reported here, each in one line.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from opsd_cli.data.hub import Tell, hub_errors, look_up, tell_stderr
from opsd_cli.engine.loaded_weights import check_loaded, loaded_in_words, switch_off_dropout
from opsd_cli.engine.merging import merged_parameters
from opsd_cli.engine.model_files import check_folder, check_tokenizer
from opsd_cli.engine.process_group import Made, Ranks
from opsd_cli.engine.quantized import four_bit_options, keep_differentiable
from opsd_cli.engine.wide_adapters import widen_adapters
from opsd_cli.settings.config import LoraSettings, ModelSettings
from opsd_cli.settings.errors import ConfigError, DataError, OpsdError
from opsd_cli.settings.memory_errors import is_out_of_memory

OFFLINE_WAYS = "work offline with model=tiny dataset.path=FOLDER, or with recipe=quickstart"
ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = "bundled:"
CPU = torch.device("cpu")
NO_SDPA = "scaled_dot_product_attention"  # what transformers names where an architecture cannot use it


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
    dropout: bool = False  # in training, as the model's own config says

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
    return Source(
        path, revision, dtype, model.attention, model.trust_remote_code, cached_only, model.quantize, model.dropout
    )


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
        check_folder(Path(path), key=key)
        return path, None, True
    commit = look_up("model", path, revision=revision, hint=OFFLINE_WAYS, tell=tell)
    return path, commit or revision, commit is None


def asked_once(source: Source, ranks: Ranks, read: Callable[[Source], Made]) -> Made:
    """What `read` makes of a model's files. Of a node one rank asks the hub, and the others find in its cache what that
    has fetched. Collective."""
    if source.cached_only:
        return read(source)
    return ranks.node.in_turn(partial(read, source), partial(read, replace(source, cached_only=True)))


def load_tokenizer(source: Source, *, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; `chat_template` is a file that replaces its own template."""
    if Path(source.path).is_dir():
        check_tokenizer(Path(source.path))
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


def read_config(source: Source) -> PreTrainedConfig:
    """The settings of a model, as transformers reads them. Raises DataError for one that is quantised."""
    with model_errors(source), hub_errors(f"the config of model {source.path}", hint=OFFLINE_WAYS):
        config = AutoConfig.from_pretrained(source.path, **source.arguments)
    quantised = config.to_dict().get("quantization_config") or text_settings(config).get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else str(quantised)
        raise DataError(
            f"model {source.path} holds quantised weights (quant_method {method}), which cannot be trained; use the "
            "checkpoint that it was made from"
        )
    return config


def text_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings of the language model: of a model that also sees or hears they stand one level down."""
    return config.get_text_config(decoder=True).to_dict()


def load_causal(source: Source, *, device: torch.device = CPU, told: Tell = lambda line: None) -> PreTrainedModel:
    """The model with its weights, in evaluation mode, on the CPU, or quantised on `device`. Only safetensors are read;
    what is loaded must be what the config asks for, and `told` hears of it. Where an architecture has no sdpa, its
    attention is `eager`."""
    read_config(source)
    quantized = four_bit_options(source.dtype, device) if source.quantize == "4bit" else {}

    def load(attention: str) -> PreTrainedModel:
        loaded: Any = AutoModelForCausalLM.from_pretrained(  # a pair, with output_loading_info
            source.path,
            dtype=source.dtype,
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told with the rest of what does not fit
            **source.arguments,
            **quantized,
        )
        causal, report = loaded
        check_loaded(causal, report, path=source.path)
        told(loaded_in_words(causal, report))
        return cast(PreTrainedModel, causal)

    with model_errors(source), hub_errors(f"model {source.path}", hint=OFFLINE_WAYS):
        causal = with_attention(source.attention, load)
    if quantized:
        keep_differentiable(causal)
    head = causal.get_output_embeddings()
    # The exact type: a subclass may compute something that the chunked loss, which has only the weight, would not.
    if type(head) is not nn.Linear:
        raise DataError(
            f"model {source.path} has no linear output head (it is {type(head).__name__}), so its logits cannot be "
            "computed in chunks; use another model"
        )
    if not source.dropout:
        switch_off_dropout(causal)
    return causal.eval()


def with_attention(attention: str, build: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    """What `build` makes with that attention, or with `eager` where the architecture has no sdpa."""
    try:
        return build(attention)
    except ValueError as error:
        if attention != "sdpa" or NO_SDPA not in str(error):
            raise
        return build("eager")


@dataclass(frozen=True)
class LoadedModel:
    """A model that is not trained, to draw completions from; `lm` may have an adapter."""

    lm: nn.Module
    source: Source
    keeps_addresses: ClassVar[bool] = True
    gathers_layers: ClassVar[str] = ""

    @property
    def causal(self) -> PreTrainedModel:
        return causal_of(self.lm)

    @contextmanager
    def generating(self) -> Iterator[nn.Module]:
        yield self.lm

    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Its weights under the names of the model without an adapter, an adapter merged."""
        yield from merged_parameters(self.lm)


def load_model(source: Source, *, device: torch.device) -> LoadedModel:
    causal = load_causal(source, device=device).requires_grad_(False)
    return LoadedModel(causal if source.quantize == "4bit" else causal.to(device), source)


class model_errors:
    """Turn what transformers raises inside the block, for a model that it cannot use, into one line. Of which kind it
    is depends on the architecture (a wrong number in config.json is a KeyError, a TypeError, a ZeroDivisionError and
    others), so all kinds are taken; what is out of memory passes unchanged."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, OpsdError) or is_out_of_memory(error):
            return
        raise DataError(f"model {self.source.path} cannot be loaded: {describe_failure(error)}") from error


def describe_failure(error: Exception) -> str:
    """What transformers could not do with a model, in one line."""
    text = " ".join(str(error).split("\n\n")[0].split())
    if "trust_remote_code" in str(error):
        return (
            "it needs code of its own, which is not run unless asked for: read that code, then pin "
            "model.revision=COMMIT and type model.trust_remote_code=true"
        )
    if isinstance(error, ImportError):
        return f"it needs a package that is not installed here ({text})"
    if isinstance(error, OSError | ValueError) or type(error).__module__ != "builtins":
        return text or type(error).__name__
    return f"{type(error).__name__}: {text}; a setting in its config.json may be wrong"


def meta_causal(source: Source, causal: PreTrainedModel) -> PreTrainedModel:
    """The same architecture without weights: every parameter on the meta device, buffers shared with `causal`."""
    config = copy.deepcopy(causal.config)
    if source.quantize == "4bit":
        del config.quantization_config  # which says how `causal` was loaded, and not what the architecture is

    def build(attention: str) -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=source.dtype, attn_implementation=attention,
            trust_remote_code=source.trust_remote_code,
        )  # fmt: skip

    with torch.device("meta"):
        twin = with_attention(source.attention, build)
    # Buffers, such as rotary frequencies, are computed at construction, which on the meta device computes nothing. The
    # same goes for tensors that a module keeps as plain attributes, such as its first frequencies.
    own = {
        name.replace(".base_layer", ""): module
        for name, module in causal.named_modules()
        if not isinstance(module, BaseTunerLayer)
    }
    for name, module in twin.named_modules():
        module._buffers.update(own[name]._buffers)
        vars(module).update({key: value for key, value in vars(own[name]).items() if isinstance(value, Tensor)})
    return twin.requires_grad_(False).eval()


def causal_of(lm: nn.Module) -> PreTrainedModel:
    """The transformers model, inside the adapter if there is one."""
    return cast(PreTrainedModel, lm.get_base_model() if isinstance(lm, PeftModel) else lm)


def add_adapter(causal: PreTrainedModel, lora: LoraSettings, *, seed: int) -> nn.Module:
    """LoRA around `causal` through peft; the model itself where `lora.rank` is 0. Seeded, so that all ranks agree."""
    if lora.rank == 0:
        return causal.requires_grad_(True)
    targets = "all-linear" if lora.targets == ("all-linear",) else list(lora.targets)
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, about names of older versions
        torch.manual_seed(seed)
        try:
            lm = get_peft_model(causal, settings)
        except (ValueError, TypeError, RuntimeError, AttributeError, LookupError, ImportError) as error:
            if is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())
            raise ConfigError(f"lora.targets {list(lora.targets)} do not fit this model: {reason}") from error
    widen_adapters(lm)
    ends = (causal.get_output_embeddings(), causal.get_input_embeddings())
    outside = [name for name, module in causal.named_modules() if module in ends and isinstance(module, BaseTunerLayer)]
    if outside:
        raise ConfigError(
            f"lora.targets names {', '.join(sorted(outside))}: embeddings and output head stay frozen under LoRA, "
            "since both roles share them; choose among the attention and MLP projections, or [all-linear]"
        )
    return lm
