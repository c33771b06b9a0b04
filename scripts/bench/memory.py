"""Benchmark: peak memory of on-policy self-distillation (OPSD) beside on-policy distillation (OPD), whose teacher is a
second model.

    python scripts/bench/memory.py        # 40 M parameters, vocabulary 151,936, on the CPU: about ten minutes
    python scripts/bench/memory.py --gpu  # Qwen3-1.7B and 8B, random weights, bfloat16: under two minutes on an H100

OPD is `teacher=external` with a model of 1, 2 or 4 times the weights; OPSD is `teacher=initial` (under LoRA the
weights without the adapter, otherwise a frozen copy) or `teacher=live`. `naive` holds the logits of all tokens and lets
autograd keep what it wants, as most code does; `fused` is opsd's loss. On a CPU memory is that of the process less what
an idle one has. Owns the cases of a CPU; those of a card, where it is the peak of torch's allocator over one step, are
in `memory_on_card.py`, the naive loss is in `naive_worker.py`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import memory_on_card
import torch
from measure import arguments, report, start
from whole_runs import WIDE, random_model, train

NAIVE = Path(__file__).with_name("naive_worker.py")
LORA = {"lora": "r16", "full": "none"}


@dataclass(frozen=True)
class Case:
    """One way to train one model."""

    adapter: str  # lora or full
    loss: str  # naive or fused
    teacher: str  # words for the command line
    label: str


def cases(teachers: dict[int, Path], adapters: Sequence[str]) -> list[Case]:
    """OPD with each teacher, and OPSD, for LoRA and full fine-tuning and both losses."""
    found = []
    for adapter in adapters:
        for loss in ("naive", "fused"):
            own = {"initial": "OPSD, initial", **({"live": "OPSD, live"} if adapter == "full" else {})}
            found += [Case(adapter, loss, f"teacher={kind}", label) for kind, label in own.items()]
            found += [
                Case(adapter, loss, f"teacher=external teacher.path={path}", f"OPD, teacher {times}x")
                for times, path in teachers.items()
            ]
    return found


def idle_gib() -> float:
    """What a process holds that has imported everything and loaded nothing."""
    # Not ru_maxrss, which a child inherits from a parent as large as this process.
    code = "import deepspeed, peft, opsd_cli.rank.entry; print(open('/proc/self/status').read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def measure(name: str, shape: dict[str, int], options, scratch: Path) -> None:
    dtype = torch.float32
    model = random_model(scratch / name, shape, dtype=dtype)
    teachers = {
        times: random_model(scratch / f"{name}_{times}x", memory_on_card.wider(shape, times), dtype=dtype)
        for times in options.teachers
    }
    idle, problems, completion = idle_gib(), 8, 128
    peaks: dict[Case, float] = {}
    for number, case in enumerate(cases(teachers, options.weights)):
        words = [
            f"model.path={model}", f"lora={LORA[case.adapter]}", *case.teacher.split(), "train.steps=3",
            f"train.problems_per_step={problems}", f"sampling.max_completion_tokens={completion}",
            f"eval.max_completion_tokens={completion}", "loss.chunk_mib=256", "train.gradient_checkpointing=true",
            "launcher.device=cpu",
        ]  # fmt: skip
        program = ("-m", "opsd_cli") if case.loss == "fused" else (str(NAIVE),)
        try:
            steps = train(scratch / f"{name}_run_{number}", words, program=program)
        except SystemExit as failed:
            if "out of memory" not in str(failed):
                raise
            peaks[case] = float("inf")
            continue
        peaks[case] = max(step["memory/peak_gib"] for step in steps) - idle
        print(f"# {name}, {case.adapter}, {case.loss}, {case.label}: {peaks[case]:.2f} GiB", flush=True)
    rows = []
    for case, peak in peaks.items():
        if case.label.startswith("OPD"):
            own = {
                other.label: value
                for other, value in peaks.items()
                if other.label.startswith("OPSD") and (other.adapter, other.loss) == (case.adapter, case.loss)
            }
            for label, value in own.items():
                rows.append([name, case.adapter, case.loss, case.label, peak, label, value, f"{1 - value / peak:.0%}"])
    report(options, ["model", "weights", "loss", "OPD", "GiB", "OPSD", "GiB", "saved"], rows)


def main() -> None:
    parser = arguments(__doc__ or "", takes=("small",))
    parser.add_argument("--teachers", type=int, nargs="*", default=[1, 2, 4], help="sizes of OPD's teacher")
    parser.add_argument("--weights", nargs="*", default=[*LORA], choices=LORA, help="what is trained (default: both)")
    shapes = memory_on_card.SHAPES
    parser.add_argument("--models", nargs="*", default=[*shapes], choices=shapes, help="with --gpu (default: both)")
    options = parser.parse_args()
    device = start(options)
    if options.gpu:
        memory_on_card.main(options, device)
        return
    with tempfile.TemporaryDirectory() as scratch:
        measure("wide", WIDE, options, Path(scratch))


if __name__ == "__main__":
    main()
