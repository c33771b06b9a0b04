"""The policy: one causal language model and its tokenizer. Owns loading, adapters, and one way to run the decoder and
hand the hidden states of chosen positions to a reader inside the output head. Does not know DeepSpeed, divergences
or how completions are drawn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from opsd_cli.data.hub import Tell, hub_errors, look_up, tell_stderr
from opsd_cli.data.pairing import TokenBatch
from opsd_cli.engine.last_mlp import forward_replaced, only_where
from opsd_cli.engine.packed import Layout, run_rows
from opsd_cli.loss.chunked_head import Head
from opsd_cli.settings.config import LoraSettings, ModelSettings
from opsd_cli.settings.errors import ConfigError, DataError

Read = Callable[[Tensor, Head], Tensor]
"""Given hidden states [N, D] and the head's numbers, returns one tensor; called while the head's weight is whole."""

OFFLINE_WAYS = "work offline with model=tiny dataset.path=FOLDER, or with recipe=quickstart"
BUNDLED = "bundled:"


@dataclass(frozen=True)
class Source:
    """Where a model is loaded from and how."""

    path: str
    revision: str | None
    dtype: torch.dtype
    attention: str
    trust_remote_code: bool
    cached_only: bool  # the hub cannot be reached: only a copy on this disk can help

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
            "local_files_only": self.cached_only,
        }

    def beside(self, path: str, revision: str | None) -> Source:
        """Another model, loaded in the same way."""
        path, revision, cached_only = resolve(path, revision, key="teacher.path")
        return replace(self, path=path, revision=revision, cached_only=cached_only)


class Policy(nn.Module):
    """One set of weights that plays both roles, seen through its hidden states.

    `lm` is a transformers model or, with LoRA, the peft model around it. Calling the policy runs the decoder on a
    batch, picks the hidden states that predict completion tokens, and calls `read` inside the output head's own
    call: there its weight is whole at every ZeRO stage, and ranks make the same module calls whatever their N is.
    """

    def __init__(
        self, lm: nn.Module, *, causal: PreTrainedModel, layout: Layout, last_mlp: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.lm, self.layout = lm, layout
        self._causal, self._last_mlp = [causal], [last_mlp]  # in lists: the same modules are not registered twice
        self._transforms = logit_transforms(causal.config.to_dict())

    @property
    def causal(self) -> PreTrainedModel:
        """The transformers model, inside the adapters if there are any."""
        return self._causal[0]

    @property
    def has_adapter(self) -> bool:
        return self.lm is not self.causal

    def forward(self, batch: TokenBatch, read: Read) -> Tensor:
        with self._only_read(batch):
            hidden_LD = run_rows(self.causal.get_decoder(), batch.input_ids_L, batch.lengths, layout=self.layout)
        hidden_ND = hidden_LD.index_select(0, batch.predict_N)
        head = self.causal.get_output_embeddings()
        with forward_replaced(head, lambda hidden_ND: read(hidden_ND, self.head(head))):
            return head(hidden_ND)

    def _only_read(self, batch: TokenBatch) -> AbstractContextManager[None]:
        """Leave out of the last layer what nobody reads. Not where layers are run a second time in the backward pass,
        which happens after this."""
        (mlp,) = self._last_mlp
        again = self.causal.is_gradient_checkpointing and self.training
        if mlp is None or again:
            return nullcontext()
        return only_where(mlp, batch.predict_N)

    def head(self, module: nn.Module) -> Head:
        return Head(module.weight, module.bias, **self._transforms)

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """The weights as loaded, while the adapter stays in memory. Without an adapter it would change nothing."""
        assert self.has_adapter, "adapter_off needs LoRA"
        with self.lm.disable_adapter() if self.has_adapter else nullcontext():
            yield


def logit_transforms(config: dict[str, Any]) -> dict[str, float | None]:
    """What a model does between its head's matrix product and its logits, read from its config.

    Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`, Gemma soft-caps.
    """
    scale = config.get("logit_scale") or 1.0
    return {
        "scale": scale / (config.get("logits_scaling") or 1.0),
        "softcap": config.get("final_logit_softcapping"),
    }


def find_source(model: ModelSettings, *, dtype: torch.dtype, tell: Tell = tell_stderr) -> Source:
    """The settings made concrete: a bundled name becomes a folder, a hub id a commit. `dtype` is `model.dtype`, decided
    for all ranks (`device.choose_dtype`)."""
    path, revision, cached_only = resolve(model.path, model.revision, key="model.path", tell=tell)
    return Source(path, revision, dtype, model.attention, model.trust_remote_code, cached_only)


def resolve(path: str, revision: str | None, *, key: str, tell: Tell = tell_stderr) -> tuple[str, str | None, bool]:
    """Where a model really is: path or hub id, commit, and whether only a cached copy can help. `key` is the setting
    that named it, for messages."""
    if path.startswith(BUNDLED):
        folder = Path(__file__).parents[1] / "assets" / path.removeprefix(BUNDLED)
        if not folder.is_dir():
            raise ConfigError(f"{key} is {path!r}, which is not bundled; use bundled:tiny")
        return str(folder), None, True
    if looks_like_a_folder(path):
        if not (Path(path) / "config.json").is_file():
            raise DataError(f"{key} is {path!r}, but there is no {Path(path) / 'config.json'}")
        return path, None, True
    commit = look_up("model", path, revision=revision, hint=OFFLINE_WAYS, tell=tell)
    return path, commit or revision, commit is None


def looks_like_a_folder(path: str) -> bool:
    """A hub id is `name` or `owner/name`; anything that exists, or is written as a path, is a folder."""
    return Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1


def load_tokenizer(source: Source, *, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; `chat_template` is a file that replaces its own template. Errors: one line each."""
    with model_errors(source), hub_errors(f"the tokenizer of model {source.path}", hint=OFFLINE_WAYS):
        tokenizer = AutoTokenizer.from_pretrained(source.path, **source.arguments)
    if chat_template is not None:
        file = Path(chat_template)
        if not file.is_file():
            raise ConfigError(f"model.chat_template is {chat_template!r}, but there is no such file")
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    return tokenizer


def load_causal(source: Source) -> PreTrainedModel:
    """The model with its weights, in evaluation mode, on the CPU. Only safetensors are read."""
    with model_errors(source), hub_errors(f"model {source.path}", hint=OFFLINE_WAYS):
        causal = AutoModelForCausalLM.from_pretrained(
            source.path,
            dtype=source.dtype,
            attn_implementation=source.attention,
            use_safetensors=True,
            **source.arguments,
        )
    if not isinstance(causal.get_output_embeddings(), nn.Linear):
        raise DataError(f"model {source.path} has no linear output head, so its logits cannot be made in chunks")
    return causal.eval()


@contextmanager
def model_errors(source: Source) -> Iterator[None]:
    """What transformers says of a folder it cannot use, in one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "trust_remote_code" in str(error):
            first = (
                "it needs code of its own, which is not run unless asked for: read that code, then pin "
                "model.revision=COMMIT and type model.trust_remote_code=true"
            )
        raise DataError(f"model {source.path} cannot be loaded: {first}") from error


def meta_causal(source: Source, causal: PreTrainedModel) -> PreTrainedModel:
    """The same architecture without memory: every parameter on the meta device, buffers shared with `causal`."""
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(
            copy.deepcopy(causal.config), dtype=source.dtype, attn_implementation=source.attention,
            trust_remote_code=source.trust_remote_code,
        )  # fmt: skip
    buffers = dict(causal.named_buffers())
    for name, _ in list(twin.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        twin.get_submodule(owner).register_buffer(leaf, buffers[name], persistent=False)
    twin.requires_grad_(False)
    return twin.eval()


def add_adapter(causal: PreTrainedModel, lora: LoraSettings, *, seed: int) -> nn.Module:
    """LoRA around `causal` through peft; the model itself where `lora.rank` is 0. Seeded, so all ranks agree."""
    if lora.rank == 0:
        return causal.requires_grad_(True)
    from peft import LoraConfig, get_peft_model

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
