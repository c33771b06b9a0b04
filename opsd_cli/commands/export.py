"""`opsd export`: the weights of a run's checkpoint as a Hugging Face folder, on this disk or also on the hub."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from opsd_cli.commands.flags import Flags, step_word
from opsd_cli.settings.errors import ConfigError, ExitCode, OpsdError, OutsideError, display_path
from opsd_cli.settings.paths import typed_path

if TYPE_CHECKING:
    from opsd_cli.api.exporting import Exported

HELP = """\
opsd export runs/NAME OUT                      the newest checkpoint as a Hugging Face folder; the run may be stopped,
                                               failed or still going
opsd export runs/NAME OUT --step 40            that of a step; --step best: the best by held-out accuracy
opsd export runs/NAME OUT --merge              a LoRA adapter merged into its model (without: the adapter alone)
opsd export runs/NAME OUT --dtype bf16         bf16 or fp32; fp32 of all weights is the optimizer's own, unrounded
opsd export runs/NAME OUT --push OWNER/NAME    ... and uploaded to the hub, private unless --public

OUT must not exist. Beside the weights it holds tokenizer, chat template, generation settings with every end of a
completion, and README.md: a model card with method, data, results with intervals, control arm and limits.
--trust-remote-code   run code that comes with the model; needed where the run was trained with it

GGUF: python llama.cpp/convert_hf_to_gguf.py OUT (https://github.com/ggml-org/llama.cpp), on a merged or whole model.
"""


def main(arguments: list[str]) -> int:
    """Run `opsd export ...`."""
    flags = Flags("export")
    flags.add_argument("--step", default="last", metavar="N")
    flags.add_argument("--merge", action="store_true")
    flags.add_argument("--dtype", choices=("bf16", "fp32"))
    flags.add_argument("--push", metavar="ID")
    flags.add_argument("--public", action="store_true")
    flags.add_argument("--trust-remote-code", action="store_true")
    given = flags.read(arguments)
    if len(given.words) != 2:
        raise ConfigError("name a run and a folder to write: opsd export runs/NAME OUT (see `opsd export --help`)")
    if given.public and given.push is None:
        raise ConfigError("--public is for --push: nothing is uploaded without it")
    step = step_word(given.step)
    run, out = given.words
    if given.push is not None:
        _check_id(given.push)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, which accelerate imports, says that it found no card
    from opsd_cli.api.exporting import export_run

    made = export_run(
        run,
        typed_path(out),
        step=step,
        merge=given.merge,
        dtype=given.dtype,
        trust_remote_code=given.trust_remote_code,
        command=shlex.join(["opsd", "export", *arguments]),
        tell=lambda phase: print(f"opsd: {phase}", file=sys.stderr),
    )
    _say(made)
    if given.push is not None:
        _push(made.folder, given.push, private=not given.public)
    return ExitCode.DONE


def _say(made: Exported) -> None:
    kinds = {"model": "the whole model", "merged": "the model with its adapter merged", "adapter": "the adapter"}
    print(f"opsd: {kinds[made.kind]} after step {made.step}", file=sys.stderr)
    if made.note:
        print(f"opsd: {made.note}", file=sys.stderr)
    if made.best_step is not None:
        print(f"opsd: accuracy while training was best at step {made.best_step}: --step best", file=sys.stderr)
    shown = display_path(made.folder)
    if made.kind != "adapter":
        print(f"opsd: try it: opsd generate {shlex.quote(shown)} --chat", file=sys.stderr)
    print(shown)


def _check_id(repository: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"--push {repository}: {str(error).split(': ')[0]}; give OWNER/NAME") from None


def _push(folder: Path, repository: str, *, private: bool) -> None:
    """Upload the folder. Raises OutsideError where that fails; the folder stays."""
    from opsd_cli.api.exporting import push_folder

    shown = shlex.quote(display_path(folder))
    try:
        url = push_folder(folder, repository, private=private)
    except OpsdError as error:
        raise OutsideError(
            f"{repository} was not uploaded ({error}); the model is in {shown}: upload it later with "
            f"`hf upload {repository} {shown}`"
        ) from None
    print(f"opsd: uploaded to {url}", file=sys.stderr)
