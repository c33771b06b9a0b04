"""Benchmark: one loss, forward and backward, from hidden states; ours beside the others.

    python scripts/bench/loss.py            # V = 32,768 and 151,936, N = 512, about two minutes on two cores
    python scripts/bench/loss.py --full     # V = 262,144 and N = 2,048 as well; --tokens 8192 for more
    python scripts/bench/loss.py --gpu      # bfloat16, V = 151,936, N = 2,048 and 8,192: a minute on an H100
    python scripts/bench/loss.py --gpu --full  # other vocabularies as well
    python scripts/bench/loss.py --half     # bfloat16 on a CPU; in bfloat16 also what logits in fp32 cost

`products` is the bare minimum: two products for the logits of both roles and one back to the hidden states (and one
to the head's weight where it is trained), in the best of two chunk sizes and two ways, nothing in between. TRL is
trl.kernels.chunked_divergence; Liger has a JSD and no plain KL, and is compiled on a GPU only, which takes a while.
Memory is the peak beyond what was there before, including the gradients; `value` is how far the loss itself is from
ours, and more than 2 % of it fails the benchmark: then something else was measured. Owns the cases.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from measure import arguments, interleaved, peak_extra_mib, report, start
from torch import Tensor

import opsd_cli.plugins  # noqa: F401  (registers the divergences)
from opsd_cli.cpu.matmul import back, linear_into
from opsd_cli.loss.chunk_rows import LossInputs
from opsd_cli.loss.chunked_head import distill
from opsd_cli.loss.divergences import Divergence, ForwardKL, GeneralizedJSD, ReverseKL
from opsd_cli.loss.types import Head, TokenScores

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
CHUNK_BYTES = 256 * 2**20  # the default of loss.chunk_mib
DIVERGENCES: dict[str, tuple[Divergence, float]] = {
    "forward_kl": (ForwardKL(), 0.0),
    "reverse_kl": (ReverseKL(), 1.0),
    "jsd": (GeneralizedJSD(beta=0.5, normalize=False), 0.5),
}
"""Ours, and TRL's beta for the same."""


@dataclass(frozen=True)
class Shape:
    """One problem: N tokens, hidden size D, V words."""

    tokens: int
    hidden: int
    vocabulary: int


class Problem:
    """Hidden states of both roles, and one head they share."""

    def __init__(self, shape: Shape, *, trained: bool, device: torch.device, half: bool) -> None:
        # Where it is used: a head of 151,936 words takes the host seconds to draw.
        generator = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if half else torch.float32

        def draw(*sizes: int, scale: float) -> Tensor:
            return (scale * torch.randn(*sizes, generator=generator, device=device)).to(dtype)

        self.shape, self.trained = shape, trained
        self.student = draw(shape.tokens, shape.hidden, scale=1.0).requires_grad_()
        self.teacher = (self.student + draw(shape.tokens, shape.hidden, scale=0.3)).detach()
        self.weight = draw(shape.vocabulary, shape.hidden, scale=2.0 * shape.hidden**-0.5).requires_grad_(trained)
        self.targets = torch.randint(0, shape.vocabulary, (shape.tokens,), generator=generator, device=device)
        self.ones = torch.ones(shape.tokens, device=device)

    def clear(self) -> None:
        self.student.grad = self.weight.grad = None

    def ours(self, divergence: Divergence, *, wide_logits: bool = False, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
        self.clear()
        inputs = LossInputs(
            Head(self.weight, None), TokenScores(self.teacher, None), target_ids_N=self.targets,
            weights_N=self.ones, divergence=divergence, temperature=1.0, chunk_bytes=chunk_bytes,
            wide_logits=wide_logits,
        )  # fmt: skip
        loss = distill(self.student, inputs)
        loss.weighted_sum.backward()
        return loss.weighted_sum.detach()

    def naive(self, beta: float) -> Tensor:
        """Logits of all tokens, autograd: what one writes first."""
        self.clear()
        student = (self.student @ self.weight.T).float().log_softmax(dim=1)
        with torch.no_grad():
            teacher = (self.teacher @ self.weight.T).float().log_softmax(dim=1)
        total = plain_divergence(student, teacher, beta)
        total.backward()
        return total.detach()

    def trl(self, beta: float) -> Tensor:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        self.clear()
        value_N, _ = ChunkedDivergenceFunction.apply(
            self.student, self.weight, None, self.teacher, self.weight.detach(), None, beta
        )
        value_N.sum().backward()
        return value_N.sum().detach()

    def liger(self, beta: float) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        self.clear()
        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=self.student.is_cuda
        )
        total = loss(self.student, self.weight, self.teacher, self.weight.detach(), self.targets)
        total = total * self.shape.tokens
        total.backward()
        return total.detach()

    def products(self, rows: int, *, opsd: bool) -> None:
        """The matrix products that no exact loss can avoid, `rows` tokens at a time; `opsd` makes them the way that
        opsd has found to be the fastest on a CPU, otherwise torch makes them as it does by itself."""
        weight = self.weight.detach()
        buffers = weight.new_empty(2, rows, self.shape.vocabulary)
        gradient = torch.empty_like(self.student)
        of_weight = torch.zeros_like(weight) if self.trained else None
        for first in range(0, self.shape.tokens, rows):
            chunk = slice(first, min(first + rows, self.shape.tokens))
            student, teacher = self.student.detach()[chunk], self.teacher[chunk]
            both = buffers[:, : len(student)]
            for hidden, out in zip((student, teacher), both, strict=True):
                linear_into(out, hidden, weight) if opsd else torch.mm(hidden, weight.T, out=out)
            if opsd:
                gradient[chunk] = back(both[0], weight)
            else:
                torch.mm(both[0], weight, out=gradient[chunk])
            if of_weight is not None:
                of_weight.addmm_(both[0].T, student)


def plain_divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Sum over tokens, of log-probabilities."""

    def kl(target: Tensor, of: Tensor) -> Tensor:
        return torch.nn.functional.kl_div(of, target, reduction="sum", log_target=True)

    if beta == 0.0:
        return kl(teacher, student)
    if beta == 1.0:
        return kl(student, teacher)
    shares = math.log(1 - beta), math.log(beta)
    mixture = torch.logsumexp(torch.stack([student + shares[0], teacher + shares[1]]), dim=0)
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def cases_of(problem: Problem, name: str, *, naive: bool) -> dict[str, Callable[[], Tensor]]:
    divergence, beta = DIVERGENCES[name]
    cases: dict[str, Callable[[], Tensor]] = {"ours": lambda: problem.ours(divergence)}
    if find_spec("trl"):
        cases["trl"] = lambda: problem.trl(beta)
    if problem.weight.dtype == torch.bfloat16:
        cases["ours, fp32 logits"] = lambda: problem.ours(divergence, wide_logits=True)
    if problem.student.is_cuda:
        cases["ours, 1 GiB chunks"] = lambda: problem.ours(divergence, chunk_bytes=2**30)
    if naive:
        cases["naive"] = lambda: problem.naive(beta)
    if name == "jsd" and find_spec("liger_kernel"):
        cases["liger"] = lambda: problem.liger(beta)
    return cases


def measure(shape: Shape, name: str, options, device: torch.device, *, trained: bool) -> list[list[object]]:
    """One line of the table for each implementation."""
    problem = Problem(shape, trained=trained, device=device, half=options.gpu or options.half)
    naive_gib = 5 * shape.tokens * shape.vocabulary * 4 / 2**30
    cases = cases_of(problem, name, naive=naive_gib < (options.naive_gib or (40.0 if options.gpu else 6.0)))
    where = [f"{shape.vocabulary:,}", f"{shape.tokens:,}", name, "trained" if trained else "frozen"]
    values, failed = first_values(cases)
    memory = {case: peak_extra_mib(cases[case]) for case in values}
    # On a card all rows at once are one product; on a CPU the smaller ones stay in its cache.
    sizes = (512, 2048, shape.tokens) if options.gpu else (128, 512) if shape.tokens >= 512 else (shape.tokens,)
    ways = itertools.product(dict.fromkeys(sizes), (False,) if options.gpu else (False, True))
    bare = {f"products {way}": (lambda way=way: problem.products(way[0], opsd=way[1])) for way in ways}
    runs = {**{case: cases[case] for case in values}, **bare}
    seconds = interleaved(runs, rounds=options.rounds, cpu_seconds=options.cpu_seconds)
    least = min(seconds.pop(case) for case in bare)
    lines: list[list[object]] = [[*where, "products", 1e3 * least, 1.0, "", "", ""]]
    for case, taken in seconds.items():
        off = abs(values[case] / values["ours"] - 1.0)
        lines.append([*where, case, 1e3 * taken, taken / least, seconds["ours"] / taken, memory[case], f"{off:.1e}"])
    lines += [[*where, case, reason, "", "", "", ""] for case, reason in failed.items()]
    said = ", ".join(f"{case} {1e3 * taken:.3f} ms" for case, taken in {"products": least, **seconds}.items())
    print(f"# {', '.join(where)}: {said}", flush=True)
    return lines


def first_values(cases: dict[str, Callable[[], Tensor]]) -> tuple[dict[str, float], dict[str, str]]:
    """The loss by every implementation, and why those that have none cannot compute it here: another's kernel that
    does not compile must not end the measurement of the rest."""
    values, failed = {"ours": float(cases["ours"]())}, dict[str, str]()
    for case in [case for case in cases if case != "ours"]:
        try:
            values[case] = float(cases[case]())
        except (RuntimeError, ImportError) as error:
            failed[case] = f"failed: {str(error).strip().splitlines()[0][:80]}"
            print(f"# {case} {failed[case]}", flush=True)
    return values, failed


def shapes_of(options) -> list[Shape]:
    if options.gpu and options.small:
        return [Shape(48, 32, 1024)]
    if options.gpu:
        sizes, counts = [151_936, *([32_768, 262_144] if options.full else [])], [8192, 2048]
    else:
        sizes = [32_768, 151_936, *([262_144] if options.full else [])]
        counts = [512, *([2048] if options.full else [])]
    hidden = options.hidden or (2048 if options.gpu else 1024)
    return [Shape(count, hidden, size) for size in options.vocabulary or sizes for count in options.tokens or counts]


def main() -> int:
    parser = arguments(__doc__ or "", takes=("full", "small", "rounds", "cpu_seconds"))
    parser.add_argument("--half", action="store_true", help="bfloat16 on a CPU too")
    parser.add_argument("--vocabulary", type=int, nargs="*", help="words, instead of the usual sizes")
    parser.add_argument("--tokens", type=int, nargs="*", help="tokens, instead of the usual sizes")
    parser.add_argument("--hidden", type=int, help="hidden size (default 1,024; with --gpu 2,048)")
    parser.add_argument("--divergence", nargs="*", choices=DIVERGENCES, default=[*DIVERGENCES])
    parser.add_argument("--head", nargs="*", choices=["frozen", "trained"], help="default: both for forward_kl")
    parser.add_argument(
        "--naive-gib", type=float, help="leave naive out where it needs more memory (default 6; with --gpu 40)"
    )
    options = parser.parse_args()
    options.rounds = options.rounds or (7 if options.gpu and not options.small else 3)  # a card takes milliseconds
    device = start(options)
    lines = []
    for shape in shapes_of(options):
        for name in options.divergence:
            for head in options.head or (["frozen", "trained"] if name == "forward_kl" else ["frozen"]):
                lines += measure(shape, name, options, device, trained=head == "trained")
    head = ["V", "N", "divergence", "head", "what", "ms", "x products", "ours / it", "peak extra MiB", "value"]
    report(options, head, lines)
    others = [line for line in lines if line[-1] and float(line[-1]) > 2e-2]
    for line in others:
        print(f"# {', '.join(map(str, line[:5]))} computes something else: its value is {line[-1]} off")
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(main())
