"""Makes the bundled external teacher, `bundled:tiny_teacher`: the tiny model after a longer, gentler quickstart, so
that on-policy distillation from another model can be compared offline.

    python scripts/make_tiny_teacher.py              # about 3 CPU minutes
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ASSETS = Path(__file__).parents[1] / "opsd_cli" / "assets"
WORDS = ("recipe=quickstart", "optim.lr=2e-4", "train.steps=240", "run.seed=0", "eval.split=validation")
KEPT = ("chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS / "tiny_teacher")
    parser.add_argument("--model", type=Path, help="a finished run's model/ instead of training one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or train(Path(folder))
        arguments.out.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            shutil.copyfile(model / name, arguments.out / name)
        weights = {name: tensor.to(torch.float16) for name, tensor in load_file(model / "model.safetensors").items()}
        save_file(weights, arguments.out / "model.safetensors", metadata={"format": "pt"})
    print(f"written: {arguments.out}")


def train(root: Path) -> Path:
    """Run the longer quickstart; returns its model folder."""
    command = [sys.executable, "-m", "opsd_cli", "train", *WORDS, f"run.root={root}", "run.name=teacher"]
    subprocess.run(command, check=True)
    return root / "teacher" / "model"


if __name__ == "__main__":
    main()
