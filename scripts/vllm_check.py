"""Trains with sampler=vllm, or another that is named, and, at every step, lets it and our own decoder complete the
step's prompts greedily with the weights of that moment: the same tokens, with log-probabilities that differ by
rounding. Exits with 1 where they differ. `scripts/test_vllm.sh` runs it; by hand, in an environment with vLLM:

    python scripts/vllm_check.py recipe=quickstart train.steps=4 lora=r16 launcher.ranks=2      words of `opsd train`
    python scripts/vllm_check.py recipe=quickstart train.steps=4 sampler=vllm_separate
    python scripts/vllm_check.py recipe=quickstart train.steps=4 sampler=separate         our own decoder, without vLLM
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

FAR = 1e-3  # nats between two log-probabilities of one token, which rounding in float32 does not explain
TIE = 1e-4  # nats between two tokens, below which either is the most likely one up to rounding
FILE = "OPSD_VLLM_CHECK"  # where each rank adds a line for each step


def compare(completer, request) -> dict:
    """vLLM's greedy completions of the request's prompts beside ours. Collective."""
    from dataclasses import replace

    from opsd_cli.sampling.batch_decoder import BatchLimits
    from opsd_cli.sampling.token_sampling import Draw
    from opsd_cli.sampling.vllm import ENGINES

    greedy = replace(request.sampling, temperature=0.0, top_k=0, top_p=1.0)
    draws = [Draw(pair.student_ids, seed=place) for place, pair in request.prompts]
    limits = BatchLimits(max_rows=64, cache_tokens=2**17)
    ours = completer.complete(draws, sampling=greedy, limits=limits, should_stop=lambda: False)
    if completer.apart is not None:
        completer.apart.settle()
    engine = completer.apart or ENGINES[0]
    engine.wake(completer.weights.merged_weights())
    theirs = engine.complete(draws, sampling=greedy, end_ids=completer.end_ids, should_stop=lambda: False)
    engine.sleep()
    equal, ties, tokens, gap = 0, 0, 0, 0.0
    for own, other in zip(ours, theirs, strict=True):
        pairs = list(zip(own.ids, other.ids, own.logprobs, other.logprobs, strict=False))
        same = next((i for i, (a, b, *_) in enumerate(pairs) if a != b), len(pairs))
        gap = max([gap, *(abs(p - q) for _, _, p, q in pairs[:same])])
        tokens += same
        if own.ids == other.ids and own.finish_reason == other.finish_reason:
            equal += 1
        elif same < len(pairs) and abs(pairs[same][2] - pairs[same][3]) < TIE:
            ties += 1
    return {"completions": len(draws), "equal": equal, "ties": ties, "tokens": tokens, "gap": gap}


def rank(argv: list[str]) -> int:
    """One rank of the run, whose sampler compares before it samples."""
    from opsd_cli.rank.entry import main
    from opsd_cli.sampling.samplers import StaticSampler
    from opsd_cli.sampling.vllm import VllmSampler

    def comparing(sample):
        def compare_and_sample(self, completer, request):
            line = {"updates": request.step, "rank": completer.ranks.rank} | compare(completer, request)
            with Path(os.environ[FILE]).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            return sample(self, completer, request)

        return compare_and_sample

    for sampler in (StaticSampler, VllmSampler):
        sampler.sample = comparing(sampler.sample)  # type: ignore[method-assign]
    return main(argv)


def train(words: list[str]) -> int:
    """The run, and what it found."""
    import opsd_cli.launch.launchers
    from opsd_cli.cli import main as command_line

    opsd_cli.launch.launchers.WORKER = ("-P", str(Path(__file__).resolve()))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.jsonl"
        os.environ[FILE] = str(file)
        sampler = [] if any(word.startswith("sampler=") for word in words) else ["sampler=vllm"]
        code = command_line(["train", *sampler, f"run.root={folder}/runs", "run.name=check", *words])
        if code:
            return code
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        events = [json.loads(line) for line in Path(folder, "runs/check/events.jsonl").read_text().splitlines()]
    for line in sorted(lines, key=lambda line: (line["updates"], line["rank"])):
        print(
            f"  after {line['updates']} updates, rank {line['rank']}: {line['equal']} of {line['completions']} greedy "
            f"completions equal ({line['tokens']} tokens, {line['ties']} parted at a tie), log-probabilities within "
            f"{line['gap']:.1e}"
        )
    steps = [event["metrics"] for event in events if event["kind"] == "step"]
    gaps = [metrics.get("sampler/logprob_gap") for metrics in steps]
    print("  sampler/logprob_gap of the steps: " + ", ".join("none" if gap is None else f"{gap:.1e}" for gap in gaps))
    if lags := [metrics["sampler/lag"] for metrics in steps if "sampler/lag" in metrics]:
        print("  sampler/lag of the steps: " + ", ".join(f"{lag:g}" for lag in lags))
        print(
            "  sampler: tokens/importance "
            + ", ".join(f"{metrics.get('tokens/importance', 1):.4f}" for metrics in steps)
        )
        # Of what older weights drew the gap is what an update changes.
        gaps = [gap for gap, lag in zip(gaps, lags, strict=True) if not lag]
    good = all(line["equal"] + line["ties"] == line["completions"] for line in lines)
    good &= all(gap is not None and gap < FAR for gap in gaps)  # and so each step had loss, and trained
    good &= all(line["gap"] < FAR for line in lines) and any(line["tokens"] for line in lines)
    print("  passed" if good else "  FAILED")
    return int(not good)


if __name__ == "__main__":
    is_rank = len(sys.argv) > 1 and Path(sys.argv[1]).is_dir()
    raise SystemExit(rank(sys.argv[1:]) if is_rank else train(sys.argv[1:]))
