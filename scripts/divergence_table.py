"""Every divergence with its formula, written out plainly: the one table by which closed forms, the loss and the kernel
are judged, in the tests and on a GPU. Autograd of the formula, in float64, is the reference for the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from opsd_cli.loss.divergences import (
    CrossEntropy,
    Divergence,
    ForwardKL,
    GeneralizedJSD,
    Renyi,
    ReverseKL,
    SampledToken,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)
from opsd_cli.loss.routed import Routed

Formula = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From log p, log q [n, V] and the sampled tokens [n] to the value [n]."""


def kl(left_nV: Tensor, right_nV: Tensor) -> Tensor:
    """KL(left || right) of log-probabilities."""
    return (left_nV.exp() * (left_nV - right_nV)).sum(-1)


def mixed(p_nV: Tensor, q_nV: Tensor, teacher_share: float) -> Tensor:
    """log(a q + (1 - a) p)."""
    return torch.logaddexp(q_nV + math.log(teacher_share), p_nV + math.log(1.0 - teacher_share))


def jsd(beta: float, scale: float) -> Formula:
    def value(p_nV: Tensor, q_nV: Tensor, _: Tensor) -> Tensor:
        mixture_nV = mixed(p_nV, q_nV, beta)
        return scale * (beta * kl(q_nV, mixture_nV) + (1.0 - beta) * kl(p_nV, mixture_nV))

    return value


def renyi(order: float) -> Formula:
    return lambda p, q, y: (q.exp() ** order * p.exp() ** (1.0 - order)).sum(-1).log() / (order - 1.0)


def entropy(logprobs_nV: Tensor) -> Tensor:
    return -(logprobs_nV.exp() * logprobs_nV).sum(-1)


def at(logprobs_nV: Tensor, tokens_n: Tensor) -> Tensor:
    return logprobs_nV.gather(1, tokens_n.unsqueeze(1)).squeeze(1)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": ForwardKL(),
    "reverse_kl": ReverseKL(),
    "jsd": GeneralizedJSD(beta=0.3, normalize=False),
    "jsd_normalized": GeneralizedJSD(beta=0.8, normalize=True),
    "skew_forward_kl": SkewForwardKL(alpha=0.1),
    "skew_reverse_kl": SkewReverseKL(alpha=0.2),
    "total_variation": TotalVariation(),
    "sampled_token": SampledToken(),
    "cross_entropy": CrossEntropy(),
    "renyi": Renyi(order=0.4),
    "renyi_above_1": Renyi(order=1.5),
    "routed": Routed(by="teacher_entropy", above="forward_kl", below="reverse_kl", bound=0.9),
    "routed_by_gap": Routed(by="entropy_gap", above="total_variation", below="jsd", bound=0.0),
}
FORMULAS: dict[str, Formula] = {
    "forward_kl": lambda p, q, y: kl(q, p),
    "reverse_kl": lambda p, q, y: kl(p, q),
    "jsd": jsd(0.3, 1.0),
    "jsd_normalized": jsd(0.8, 5.0),
    "skew_forward_kl": lambda p, q, y: kl(q, mixed(p, q, 0.1)),
    "skew_reverse_kl": lambda p, q, y: kl(p, mixed(p, q, 0.8)),
    "total_variation": lambda p, q, y: 0.5 * (p.exp() - q.exp()).abs().sum(-1),
    "sampled_token": lambda p, q, y: -(at(q, y) - at(p, y)).detach() * at(p, y),
    "cross_entropy": lambda p, q, y: -at(p, y),
    "renyi": renyi(0.4),
    "renyi_above_1": renyi(1.5),
    "routed": lambda p, q, y: torch.where(entropy(q) > 0.9, kl(q, p), kl(p, q)),
    "routed_by_gap": lambda p, q, y: torch.where(
        entropy(p.detach()) > entropy(q), 0.5 * (p.exp() - q.exp()).abs().sum(-1), jsd(0.5, 1.0)(p, q, y)
    ),
}


def logprobs(raw_nV: Tensor, *, scale: float, softcap: float | None, temperature: float) -> Tensor:
    """From the product with the head to log-probabilities."""
    logits_nV = raw_nV * scale
    if softcap is not None:
        logits_nV = softcap * torch.tanh(logits_nV / softcap)
    return (logits_nV / temperature).log_softmax(-1)


def describe(p_nV: Tensor, q_nV: Tensor, sampled_n: Tensor) -> dict[str, Tensor]:
    """What is logged about every token, whatever is minimised."""
    return {
        "logprob/student": p_nV.gather(1, sampled_n.unsqueeze(1)).squeeze(1),
        "entropy/student": -(p_nV.exp() * p_nV).sum(-1),
        "entropy/teacher": -(q_nV.exp() * q_nV).sum(-1),
        "kl/forward": kl(q_nV, p_nV),
        "kl/reverse": kl(p_nV, q_nV),
        "agree/top1": (p_nV.argmax(-1) == q_nV.argmax(-1)).to(p_nV.dtype),
    }
