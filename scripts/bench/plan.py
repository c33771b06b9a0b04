"""Benchmark: what `opsd plan` says of a rank's memory beside what real runs of two steps held, on a CPU.

    python scripts/bench/plan.py --keep found.jsonl        # 53 runs, half an hour on an idle machine
    python scripts/bench/plan.py --only tiny_              # those whose name begins so

The bundled model, 100 M parameters with random weights, and with `--smollm2 FOLDER` SmolLM2-135M; under LoRA and all
weights, ZeRO stages 0 to 3, 1, 2 and 4 ranks, other teachers. What is measured is the heap in blocks of 4 KiB and more
beyond what the process held before it loaded the model: a library of 60 lines counts it, which is compiled here and
preloaded, so a C compiler and glibc are needed. Resident memory is printed beside it: it also has pages of libraries
that are touched for the first time, and lacks those of buffers that are never filled.

The plan is given the rows that were drawn: how long completions become is the model's business. Owns the cases.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from whole_runs import MEDIUM, QUIET, random_model

from opsd_cli.insight.model_lookup import find_model
from opsd_cli.insight.plan_case import MIB, Rows
from opsd_cli.insight.plan_memory import memory_of
from opsd_cli.insight.plan_setup import Device, setup_of
from opsd_cli.preflight import check
from opsd_cli.settings.recipe_files import find_folders

HERE = Path(__file__).parent
WORDS = (
    "recipe=quickstart", "model.max_completion_tokens=null", *QUIET, "train.steps=2", "launcher.threads=1",
    "launcher.device=cpu", "train.micro_batch_tokens=512",
)  # fmt: skip
SHORT = ("sampling.max_completion_tokens=16", "eval.max_completion_tokens=16")
TINY = ("sampling.max_completion_tokens=32", "eval.max_completion_tokens=32")
PHASES = {"time/sample": "drawing", "time/score": "teacher", "time/update": "student, update"}


@dataclass(frozen=True)
class Case:
    name: str
    words: tuple[str, ...]


def cases(models: Mapping[str, Path]) -> Iterator[Case]:
    """The grid. In fp32 one rank runs stages 1 and 2 as stage 0, so the larger models do not repeat them."""
    for model, (own, problems, rows) in sizes(models).items():
        for adapter in ("r16", "none"):
            for ranks in (1, 2, 4) if (model, adapter) == ("tiny", "none") else (1, 2):
                for stage in range(4):
                    if ranks == 1 and stage in (1, 2) and model != "tiny":
                        continue
                    words = (*own, f"lora={adapter}", f"zero=stage{stage}", *ranks_words(ranks, problems), *rows)
                    yield Case(f"{model}_{adapter}_s{stage}_r{ranks}", words)
    one = ("lora=none", "zero=stage0", *ranks_words(1, 8), *TINY)
    yield Case("tiny_none_live", (*one, "teacher=live"))
    yield Case("tiny_none_ck", (*one, "train.gradient_checkpointing=true"))
    yield Case("tiny_none_ema", (*one, "teacher=ema"))
    yield Case("tiny_none_ext", (*one, "teacher=external", "teacher.path=bundled:tiny_teacher"))
    yield Case("tiny_quick", ("launcher.ranks=1", "train.micro_batch_tokens=16384"))
    for model, (own, problems, rows) in sizes(models).items():
        words = (*own, "lora=none", "zero=stage3", "zero.gather=layer", *ranks_words(2, problems), *rows)
        yield Case(f"{model}_none_s3_r2_layer", words)
    for model, adapter in (("m100", "none"), ("smol", "r16")):
        if model in models:
            own, problems, rows = sizes(models)[model]
            more = (f"lora={adapter}", "zero=stage0", *ranks_words(1, problems), "train.gradient_checkpointing=false")
            yield Case(f"{model}_{adapter}_nock_s0_r1", (*own, *rows, *more))


def sizes(models: Mapping[str, Path]) -> dict[str, tuple[tuple[str, ...], int, tuple[str, ...]]]:
    """Of each model its words, problems of a rank and lengths."""
    folders = {
        name: (("model=hf", f"model.path={folder}"), 4, ("train.gradient_checkpointing=true", *SHORT))
        for name, folder in models.items()
    }
    return {"tiny": ((), 8, TINY)} | folders


def ranks_words(ranks: int, problems: int) -> tuple[str, ...]:
    return f"launcher.ranks={ranks}", f"train.problems_per_step={ranks * problems}"


def run(case: Case, folder: Path, library: Path) -> list[dict[str, Any]]:
    """What each rank measured."""
    environ = os.environ | {"OPSD_PEAKS": str(folder / "peaks"), "OMP_NUM_THREADS": "1", "LD_PRELOAD": str(library)}
    command = [sys.executable, str(HERE / "plan_worker.py"), "train", *WORDS, *case.words]
    done = subprocess.run(
        [*command, f"run.root={folder}", "run.name=run"], cwd=folder, env=environ, text=True, check=False,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{case.name} failed:\n{done.stderr[-2000:]}")
    return [json.loads(file.read_text()) for file in sorted(folder.glob("peaks.*"))]


def predicted(case: Case, rank: Mapping[str, Any]) -> dict[str, float]:
    """What the plan says of each phase, for the rows that a rank had, bytes."""
    (config,) = (member.config for member in check([*WORDS, *case.words], find_folders())[1])
    teacher: Any = config.teacher
    other = find_model(teacher.path).shape if teacher.plugin_name == "external" else None
    launcher: Any = config.launcher
    cpu = Device("CPU", 0.0, is_gpu=False)
    setup = setup_of(config, find_model(config.model.path).shape, cpu, ranks=launcher.ranks, other=other)
    student, _, completion = max(batch[:3] for step in rank["batches"] for batch in step)
    rows = Rows(
        student, max(batch[1] for step in rank["batches"] for batch in step), completion,
        several=max(map(len, rank["batches"])) > 1, drawn=max(map(len, rank["drawn"])),
        prompt=max(map(max, rank["drawn"])), longest=config.sampling.max_completion_tokens,
    )  # fmt: skip
    return {phase.name: phase.total for phase in memory_of(replace(setup, rows=rows)).phases}


def row_of(case: Case, ranks: list[dict[str, Any]]) -> list[str]:
    """The rank that held most, by phase and at its peak, MiB."""
    rank = max(ranks, key=lambda rank: max(rank["phases"].values()))
    measured = {PHASES[name]: size for name, size in rank["phases"].items() if name in PHASES}
    form, peak = predicted(case, rank), max(measured.values())
    at = max(measured, key=lambda name: measured[name])
    above = (rank["resident"] - rank["base"]) / MIB
    most = max(form.values())
    return [case.name, at, f"{peak / MIB:.1f}", f"{most / MIB:.1f}", f"{most / peak - 1:+.1%}", f"{above:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="FILE", help="measurements; those that it has are not repeated")
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--smollm2", type=Path, metavar="FOLDER", help="SmolLM2-135M-Instruct, for its rows")
    options = parser.parse_args()
    known = options.keep.read_text().splitlines() if options.keep and options.keep.exists() else []
    found = {record["name"]: record["ranks"] for record in map(json.loads, known)}
    print("| case | peak in | measured, MiB | plan | off | resident |", "|---|---|---|---|---|---|", sep="\n")
    with tempfile.TemporaryDirectory() as scratch:
        library = Path(scratch) / "heap_peak.so"
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", HERE / "heap_peak.c", "-o", library], check=True)
        # In bfloat16, so that the weights of a run are made in memory: fp32 ones stay a part of the file, uncounted.
        models = {"m100": random_model(Path(scratch) / "m100", MEDIUM, dtype=torch.bfloat16)}
        models |= {"smol": options.smollm2} if options.smollm2 else {}
        for case in cases(models):
            if not case.name.startswith(options.only):
                continue
            if case.name not in found:
                with tempfile.TemporaryDirectory(dir=scratch) as folder:
                    found[case.name] = run(case, Path(folder), library)
                if options.keep:
                    with options.keep.open("a") as file:
                        file.write(json.dumps({"name": case.name, "ranks": found[case.name]}) + "\n")
            print(f"| {' | '.join(row_of(case, found[case.name]))} |", flush=True)


if __name__ == "__main__":
    main()
