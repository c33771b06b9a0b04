"""Make the bundled tiny model from nothing, or check the shipped one. No download, no data but what is generated here.

    python scripts/make_tiny_model.py            # about 15 minutes on one CPU core; writes opsd_cli/assets/tiny
    python scripts/make_tiny_model.py --out DIR  # the same, elsewhere
    python scripts/make_tiny_model.py --check    # measures the shipped model again, exit 1 when its figures are off

Needs torch 2.9 or newer (torch.optim.Muon). Owns the recipe's numbers and the order of the steps; the parts are in
`scripts/tiny/`. The model card that it writes, README.md, says what the model is and how it came by its weakness.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from itertools import islice
from pathlib import Path
from random import Random

os.environ["TOKENIZERS_PARALLELISM"] = "false"
REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
import transformers  # noqa: E402
from tiny.card import model_card  # noqa: E402
from tiny.documents import Mixture, draw_chats  # noqa: E402
from tiny.measure import figures  # noqa: E402
from tiny.pretrain import Training, new_model, pretrain  # noqa: E402
from tiny.tokenizer import train_tokenizer  # noqa: E402

ASSETS = REPOSITORY / "opsd_cli" / "assets" / "tiny"
MAX_TOKENS = 2048  # positions of the model
TOKENIZER_CHATS = 8000
TOLERANCE = 0.01  # of an accuracy: another CPU rounds differently
MIXTURE = Mixture(
    student_story=0.25,
    teacher_story=0.36,
    student_puzzle=0.19,
    teacher_puzzle=0.05,
    invented=0.5,
    slips=0.35,
)
TRAINING = Training(steps=4500, rows=4, row_tokens=256, lr=2e-3, warmup_steps=50, decay_from=0.3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder of the model")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the generated text")
    parser.add_argument("--check", action="store_true", help="measure the model in --out, compare with figures.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the same numbers on every machine of one kind, and shared cores are no trouble
    transformers.utils.logging.disable_progress_bar()
    return check(arguments.out) if arguments.check else make(arguments.out, seed=arguments.seed)


def make(out: Path, *, seed: int) -> int:
    """Tokenizer, pretraining, float16 weights, figures and model card into `out`."""
    started = time.perf_counter()
    texts = (f"{chat.prompt}\n{chat.completion}" for chat in draw_chats(Random(f"tokenizer {seed}"), MIXTURE))
    tokenizer = train_tokenizer(islice(texts, TOKENIZER_CHATS), max_length=MAX_TOKENS)
    model = new_model(tokenizer, seed=seed)
    chats = draw_chats(Random(f"pretraining {seed}"), MIXTURE)
    pretrain(model, chats, tokenizer=tokenizer, training=TRAINING, report=_report)
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    measured = figures(out)
    made = {
        "seed": seed,
        "parameters": model.num_parameters(),
        "tokens": TRAINING.steps * TRAINING.rows * TRAINING.row_tokens,
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (out / "figures.json").write_text(json.dumps({"made": made, "figures": measured}, indent=2) + "\n")
    (out / "README.md").write_text(model_card(made, measured, positions=MAX_TOKENS))
    _show(measured)
    return 0


def check(out: Path) -> int:
    """1 when a measured figure differs from the stored one by more than TOLERANCE."""
    stored = json.loads((out / "figures.json").read_text())["figures"]
    measured = figures(out)
    _show(measured)
    off = [
        f"{split} {name}: {measured[split][name]:.3f}, stored {stored[split][name]:.3f}"
        for split in stored
        for name in stored[split]
        if abs(measured[split][name] - stored[split][name]) > TOLERANCE
    ]
    print("\n".join(["differs from figures.json:", *off]) if off else f"as stored in {out / 'figures.json'}")
    return 1 if off else 0


def _report(step: int, loss: float, seconds: float) -> None:
    if step % 100 == 0:
        print(f"step {step}/{TRAINING.steps}  loss {loss:.3f}  {seconds:.0f} s", flush=True)


def _show(measured: dict[str, dict[str, float]]) -> None:
    for split, accuracies in measured.items():
        print(split, "  ".join(f"{name} {value:.1%}" for name, value in accuracies.items()))


if __name__ == "__main__":
    sys.exit(main())
