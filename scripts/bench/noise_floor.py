"""Benchmark: the divergence of a model from itself, which should be zero: the noise that a type leaves in every loss.

    python scripts/bench/noise_floor.py                            # the bundled model, its own completions
    python scripts/bench/noise_floor.py --model FOLDER --problems 16
    python scripts/bench/noise_floor.py --gpu --model Qwen/Qwen3-1.7B

The same completions are scored twice by the same weights under the same prompt, once all rows together and once
differently: each row alone, or padded instead of packed. What is left is rounding. `exact` compares with the same
weights run in fp32. `teacher` is what is to be learnt: the divergence from the weights that also see the solution.
All are forward KL in nats for each token.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace

import torch
from measure import arguments, report, start
from torch import Tensor

import opsd_cli.plugins  # noqa: F401  (registers the parts of a method)
from opsd_cli.data.pairing import TokenBatch, pair
from opsd_cli.data.problems import Rollout
from opsd_cli.engine.device import card_of, forbid_reduced_precision
from opsd_cli.engine.loading import LoadedModel, load_causal
from opsd_cli.engine.packed import run_rows, usable_layout
from opsd_cli.engine.policy import Policy
from opsd_cli.engine.process_group import alone
from opsd_cli.loss.chunk_rows import LossInputs
from opsd_cli.loss.chunked_head import distill
from opsd_cli.loss.divergences import ForwardKL
from opsd_cli.loss.types import TokenScores
from opsd_cli.preflight import check
from opsd_cli.rank.run_data import load_run_data
from opsd_cli.sampling.batch_decoder import BatchLimits
from opsd_cli.sampling.choose_decoder import Completer
from opsd_cli.sampling.token_sampling import Draw
from opsd_cli.settings.recipe_files import find_folders


class Model:
    """One set of weights in one type, and how it scores a batch."""

    def __init__(self, source, device: torch.device) -> None:
        self.causal = load_causal(source).requires_grad_(False).to(device)
        self.attention = self.causal.config._attn_implementation
        self.layout = usable_layout(self.causal, alone()).layout
        self.packed_attention = self.causal.config._attn_implementation
        self.policy = Policy(self.causal, layout=self.layout)

    @torch.no_grad()
    def hidden(self, batches: list[TokenBatch], *, padded: bool = False) -> Tensor:
        """Hidden states [N, D] of the tokens that predict a completion."""
        layout = "padded" if padded else self.layout
        self.causal.set_attn_implementation(self.attention if layout == "padded" else self.packed_attention)
        made = [run_rows(self.causal.get_decoder(), b.input_ids_L, b.lengths, layout=layout) for b in batches]
        return torch.cat([hidden_LD[b.predict_N] for hidden_LD, b in zip(made, batches, strict=True)])

    def divergence(self, student_ND: Tensor, teacher: TokenScores, *, wide_logits: bool) -> Tensor:
        """Forward KL of each token."""
        zeros = torch.zeros(len(student_ND), dtype=torch.long, device=student_ND.device)
        inputs = LossInputs(
            self.policy.head.numbers(), teacher, target_ids_N=zeros,
            weights_N=torch.ones_like(zeros, dtype=torch.float32), divergence=ForwardKL(), temperature=1.0,
            chunk_bytes=2**28, wide_logits=wide_logits,
        )  # fmt: skip
        return distill(student_ND, inputs).value_N


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", default="bundled:tiny", help="folder or hub id (default: the bundled model)")
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--completion", type=int, default=96, help="tokens at most")
    options = parser.parse_args()
    device = start(options)
    forbid_reduced_precision()
    with tempfile.TemporaryDirectory() as scratch:
        words = ["recipe=quickstart", f"model.path={options.model}", f"run.root={scratch}", "eval.problems=0"]
        config = check(words, find_folders())[1][0].config
        run_data = load_run_data(config, [card_of(device)], lambda phase: None, train=True)
    exact, half = (Model(replace(run_data.source, dtype=t), device) for t in (torch.float32, torch.bfloat16))
    prompts = run_data.train_prompts.rendered[: options.problems]
    end_ids = run_data.renderer.end_ids(half.causal.generation_config)
    drawn = Completer(LoadedModel(half.causal, run_data.source), alone(), end_ids=end_ids, pad_id=0).complete(
        [Draw(p.student_ids, seed) for seed, p in enumerate(prompts)],
        sampling=replace(config.sampling, max_completion_tokens=options.completion),
        limits=BatchLimits(64, 131072),
        should_stop=lambda: False,
    )  # fmt: skip
    weighed = [
        (Rollout(p, done.ids, done.finish_reason, done.logprobs), [1.0] * len(done.ids))
        for p, done in zip(prompts, drawn, strict=True)
    ]
    (whole,) = pair([weighed])
    whole, single = whole.to(device), [batch.to(device).student for batch in pair([[one] for one in weighed])]
    truth = TokenScores(exact.hidden([whole.student]), exact.policy.head.numbers())
    lines: list[list[object]] = []
    for name, model, wide in (("fp32", exact, False), ("bf16", half, False), ("bf16, fp32 logits", half, True)):
        together = model.hidden([whole.student])
        others = {
            "rows alone": TokenScores(model.hidden(single), None),
            "rows padded": TokenScores(model.hidden([whole.student], padded=True), None),
            "exact": truth,
            "teacher": TokenScores(model.hidden([whole.teacher]), None),
        }
        for what, scores in others.items():
            value_N = model.divergence(together, scores, wide_logits=wide).double()
            lines.append([name, what, f"{float(value_N.mean()):.2e}", f"{float(value_N.quantile(0.99)):.2e}"])
    print(f"# {options.model}, {len(whole.target_ids_N)} tokens of {len(weighed)} completions, rows {half.layout}")
    report(options, ["type", "against", "mean KL", "99th percentile"], lines)


if __name__ == "__main__":
    main()
