"""Run by test_vllm on two ranks that hold one vLLM engine between them: what it completes beside our own decoder, after
every update, with draws on one rank only, and where one rank is asked to stop. Each rank leaves what it found."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from test_vllm import DRAWS, GREEDY, SAMPLED, Lent, change

from opsd_cli.engine.loading import Source, load_causal, resolve
from opsd_cli.engine.process_group import Ranks, alone, connect
from opsd_cli.sampling.batch_decoder import BatchLimits
from opsd_cli.sampling.choose_decoder import Completer
from opsd_cli.sampling.sampler_trial import find_fault
from opsd_cli.sampling.vllm_engine import Room, VllmEngine

CPU = torch.device("cpu")


def main(root: Path) -> None:
    ranks = connect(CPU)
    source = Source(resolve("bundled:tiny", None, key="model.path")[0], None, torch.float32, "sdpa", False, True)
    engine = VllmEngine(source, CPU, Room(8, 128, 0.4, 2**27), group=ranks.neighbours(2), graphs=True, sleeps=True)
    found: dict[str, Any] = {"numbers": sum(engine._llm.apply_model(embedding_of))}
    found["in shared memory"] = [path.name for path in Path("/dev/shm").glob("*cpushm*")]
    lm = load_causal(source).eval()
    found["whole"] = embedding_of(lm)
    found |= {"fault": find_fault(lambda: engine, Lent(lm, source)), "updates": []}
    mine = DRAWS[:3] if ranks.rank == 0 else DRAWS[3:]
    for update in range(3):
        found["updates"].append(compare(engine, lm, source, mine))
        change(lm, seed=update)
    found["sampled"] = ids(engine, mine, SAMPLED)
    found["sampled alone"] = ids(engine, DRAWS if ranks.rank else [], SAMPLED)
    found["stopped"] = stopped(engine, ranks)
    found["afterwards"] = ids(engine, mine, GREEDY)
    (root / f"{ranks.rank}.json").write_text(json.dumps(found))
    engine.close()


def embedding_of(lm: torch.nn.Module) -> int:
    """How many numbers it has: of other weights vLLM keeps packed copies alone on a CPU."""
    return sum(parameter.numel() for name, parameter in lm.named_parameters() if "embed_tokens" in name)


def compare(engine: VllmEngine, lm: torch.nn.Module, source: Source, draws: list) -> dict[str, Any]:
    """Our greedy completions and vLLM's, with the weights as they are."""
    completer, limits = Completer(Lent(lm, source), alone(), end_ids=(1,), pad_id=0), BatchLimits(8, 2**16)
    ours = completer.complete(draws, sampling=GREEDY, limits=limits, should_stop=lambda: False)
    engine.wake(completer.weights.merged_weights())
    theirs = engine.complete(draws, sampling=GREEDY, end_ids=(1,), should_stop=lambda: False)
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "ours": [[*own.ids, own.finish_reason] for own in ours],
        "vllm": [[*other.ids, other.finish_reason] for other in theirs],
        "gap": max(abs(p - q) for own, other in pairs for p, q in zip(own.logprobs, other.logprobs, strict=True)),
    }


def ids(engine: VllmEngine, draws: list, sampling) -> list[tuple[int, ...]]:
    return [done.ids for done in engine.complete(draws, sampling=sampling, end_ids=(1,), should_stop=lambda: False)]


def stopped(engine: VllmEngine, ranks: Ranks) -> list[int]:
    """The lengths of what this rank gets of long completions, where the second rank alone is asked to stop."""
    longer = replace(GREEDY, max_completion_tokens=90)
    done = engine.complete(DRAWS, sampling=longer, end_ids=(), should_stop=lambda: ranks.rank == 1)
    return [len(one.ids) for one in done]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
