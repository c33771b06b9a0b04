"""A checkpoint of a run as a Hugging Face folder: of a run that has finished, was stopped, failed or is still going,
whatever ZeRO stage and ranks wrote it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import HfApi
from peft import PeftModel
from torch import nn

from opsd_cli.data.chat import ChatFormat
from opsd_cli.data.chat import end_ids as ends_of
from opsd_cli.data.hub import hub_errors
from opsd_cli.engine.export import Exporter, folder_of
from opsd_cli.engine.loading import Source, causal_of, find_source, load_tokenizer
from opsd_cli.engine.saved_weights import Which, find_checkpoint, load_saved, read_weights, step_of
from opsd_cli.insight.history import read_history
from opsd_cli.insight.model_card import Kind, Written, find_control, model_card
from opsd_cli.rank.recorder import quiet_libraries
from opsd_cli.run.folder import RunFolder, from_where_started, open_run_folder, read_config, shell_path
from opsd_cli.settings.config import LoraSettings, ModelSettings
from opsd_cli.settings.errors import ConfigError, OutsideError, display_path
from opsd_cli.settings.typed_config import typed_section

Format = Literal["bf16", "fp32"]
FORMATS = {"bf16": "bfloat16", "fp32": "float32"}
PLACES = (("model", "path"), ("model", "chat_template"))


@dataclass(frozen=True)
class Exported:
    """What was written, and what a user should know of it."""

    folder: Path
    step: int
    kind: Kind  # model, merged or adapter
    note: str  # what merging or rounding lost, measured; empty where nothing
    best_step: int | None  # of another checkpoint, which was the best by held-out accuracy


def export_run(
    run: str | Path,
    folder: str | Path,
    *,
    step: Which = "last",
    merge: bool = False,
    dtype: Format | None = None,
    trust_remote_code: bool = False,
    command: str = "",
    tell: Callable[[str], None] = lambda phase: None,
) -> Exported:
    """Write the weights of a run's checkpoint (`step`: a number, "last" or "best") to `folder`, which must not exist:
    the whole model, or under LoRA the adapter alone, or `merge`d with it. `dtype` None is the run's own format, float32
    where an adapter would lose more than 5 % by being merged; fp32 of all weights is the optimizer's own copy. Needs no
    plug-in of the run, no DeepSpeed and no GPU.

    Raises ConfigError for what cannot be asked of this run, DataError for a damaged checkpoint, OutsideError where the
    folder cannot be written.
    """
    origin, out = open_run_folder(run), Path(folder).absolute()
    if out.exists():
        raise ConfigError(f"{display_path(out)} exists and is never overwritten; give another folder")
    model, lora = _settings(origin, trust_remote_code=trust_remote_code)
    if merge and lora.rank == 0:
        raise ConfigError(
            f"{shell_path(origin.path)} trained all weights, so there is no adapter to merge: leave out --merge"
        )
    checkpoint = _checkpoint_to_write(origin, step)
    quiet_libraries()
    tell(f"reading {checkpoint.name}")
    wide = dtype == "fp32"  # of all weights the optimizer's own copy
    source = _source(model, checkpoint, wide=wide)
    tokenizer = load_tokenizer(source, chat_template=model.chat_template)
    tell("loading the model")
    lm = load_saved(source, lora, checkpoint, masters=wide).lm
    kind: Kind = "model" if lora.rank == 0 else "merged" if merge else "adapter"
    if kind == "adapter" and dtype == "bf16":
        lm = lm.to(torch.bfloat16)
    history, base = read_history(origin.path), folder_of(source)

    def card(note: str, written_in: torch.dtype) -> str:
        told = Written(step_of(checkpoint), kind, written_in, note, base, command)
        return model_card(history, told, control=find_control(history))

    exporter = Exporter(
        source, tokenizer,
        export_dtype=FORMATS[dtype] if dtype else model.export_dtype, own_template=model.chat_template is not None,
        end_ids=_end_ids(tokenizer, lm), card=card,
    )  # fmt: skip
    tell(f"writing {display_path(out)}")
    note = _write(exporter, lm, out, only_adapter=kind == "adapter")
    return Exported(out, step_of(checkpoint), kind, note, _better_step(origin, step_of(checkpoint)))


def _checkpoint_to_write(origin: RunFolder, step: Which) -> Path:
    """Raises ConfigError, which names the finished model where there is one."""
    try:
        return find_checkpoint(origin.checkpoints, step)
    except ConfigError as error:
        if origin.model.is_dir() and step == "last":
            raise ConfigError(f"{error}; its finished model is in {shell_path(origin.model)}") from None
        raise


def _source(model: ModelSettings, checkpoint: Path, *, wide: bool) -> Source:
    """The model that the run started from, in the format that it was trained in, or in float32."""
    held = {tensor.dtype for tensor in read_weights(checkpoint).values()}
    trained_in = held.pop() if len(held) == 1 else torch.float32
    return replace(find_source(model, dtype=torch.float32 if wide else trained_in), quantize="none")


def _write(exporter: Exporter, lm: nn.Module, out: Path, *, only_adapter: bool) -> str:
    """What merging or rounding lost, in words. Raises OutsideError where `out` cannot be written."""
    weights = {name: parameter.data for name, parameter in lm.named_parameters()}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if not only_adapter:
            return exporter.write_model(lm, weights, out)
        assert isinstance(lm, PeftModel)
        exporter.write_adapter(lm, weights, out)
        return ""
    except OSError as error:
        raise OutsideError(
            f"the model could not be written to {out} ({error}); free some space, or give another folder"
        ) from None


def _better_step(origin: RunFolder, step: int) -> int | None:
    """Of the checkpoint that was the best by held-out accuracy, where that is another one; None where nothing says."""
    try:
        best = step_of(find_checkpoint(origin.checkpoints, "best"))
    except ConfigError:
        return None
    return best if best != step else None


def checkpoint_of(run: str | Path, step: Which) -> Path:
    """The folder of a run's checkpoint. Raises ConfigError, with those that are there."""
    return find_checkpoint(open_run_folder(run).checkpoints, step)


def push_folder(folder: Path, repository: str, *, private: bool) -> str:
    """Upload an exported folder to the hub, into a repository that is made if there is none; returns its address.
    Raises DataError or OutsideError with what the hub or the network said."""
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    with hub_errors(f"model {repository}", hint="log in with `hf auth login`, with a token that may write"):
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Exported by opsd")
    return str(url)


def _settings(run: RunFolder, *, trust_remote_code: bool) -> tuple[ModelSettings, LoraSettings]:
    """What of a run's config an export needs: no part that a plug-in may have given."""
    tree: dict[str, Any] = from_where_started(run, read_config(run), PLACES)
    model: ModelSettings = typed_section("model", tree.get("model"), ModelSettings, {})
    lora: LoraSettings = typed_section("lora", tree.get("lora"), LoraSettings, {})
    if model.trust_remote_code and not trust_remote_code:
        raise ConfigError(
            f"the model of {shell_path(run.path)} runs code that comes with {model.path}; if you trust it, add "
            "--trust-remote-code"
        )
    return model, lora


def _end_ids(tokenizer: Any, lm: nn.Module) -> tuple[int, ...]:
    """Every id at which opsd ends a completion: the model's own ends, and what closes a turn in the chat template."""
    chat = ChatFormat(tokenizer, system=None)
    try:
        return tuple(sorted({*ends_of(tokenizer, causal_of(lm).generation_config), chat.turn_end_id}))
    finally:
        chat.close()
