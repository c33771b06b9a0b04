"""From a value written as a formula to its gradient, by autograd, and the check of a closed form against that. Used
inside the blocks of rows that the loss works on, so what autograd keeps is of one block. Importing it does not import
torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from opsd_cli.loss.aligned import AlignedTokens, through_softmax
from opsd_cli.settings.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

CHECKED_TOKENS, CHECKED_ENTRIES = 4, 32
TOLERANCE = 1e-6  # of a closed form in float64, relative to the largest number beside it


@runtime_checkable
class HasValue(Protocol):
    """A divergence, or a wrapper of one, that can be written as a formula of differentiable operations."""

    def value(self, tokens: AlignedTokens) -> Tensor: ...


@runtime_checkable
class Wraps(Protocol):
    """A clip or a support, whose value is made of that of another divergence."""

    @property
    def base(self) -> Any: ...


def differentiated(formula: Callable[[AlignedTokens], Tensor], tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
    """What `formula` returns, and the gradient of its sum with respect to the student's log-probabilities taken as
    independent variables [n, V]. The teacher is a constant. Raises ConfigError where the formula does not depend on the
    student."""
    from torch import autograd, enable_grad

    leaf_nV = tokens.student_logprobs_nV.detach().requires_grad_()
    # The student's probabilities are made again from the leaf, so that what they add to the gradient is not lost.
    with enable_grad():
        value = formula(replace(tokens, student_logprobs_nV=leaf_nV, given_student_nV=None))
        if not value.requires_grad:
            raise ConfigError("its value does not depend on the student's distribution, so it has no gradient")
        (gradient_nV,) = autograd.grad(value.sum(), leaf_nV)
    return value.detach(), gradient_nV


def value_and_gradient(formula: Callable[[AlignedTokens], Tensor], tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
    """The value of each token [n] and its gradient with respect to the student's logits [n, V]."""
    value_n, gradient_nV = differentiated(formula, tokens)
    return value_n, through_softmax(gradient_nV, tokens.student_probs_nV)


def has_own_value(divergence: Any) -> bool:
    """Whether `value` says what `value_and_gradient` computes: a subclass that redefines the closed form alone inherits
    a formula of something else."""
    if isinstance(divergence, Wraps) and not has_own_value(divergence.base):
        return False
    if not isinstance(divergence, HasValue):
        return False
    line = type(divergence).__mro__

    def place(*names: str) -> int:
        return next(i for i, owner in enumerate(line) if any(name in vars(owner) for name in names))

    return place("value", "entry_values") <= place("value_and_gradient")


def check_closed_form(divergence: Any, *, tolerance: float = TOLERANCE) -> float:
    """The largest difference between a divergence's closed form and autograd of its `value` on a few random tokens, in
    float64, relative to the largest number of each; 0 where it has no value to compare with. Raises ConfigError with
    the worst entry where it is above `tolerance`."""
    import torch

    if not has_own_value(divergence):
        return 0.0
    generator, shape = torch.Generator().manual_seed(0), (2, CHECKED_TOKENS, CHECKED_ENTRIES)
    logits = 2.0 * torch.randn(shape, generator=generator, dtype=torch.float64)
    student_nV, teacher_nV = logits.log_softmax(dim=2)
    sampled_n = torch.arange(CHECKED_TOKENS) * (CHECKED_ENTRIES // CHECKED_TOKENS)
    right_n = torch.arange(CHECKED_TOKENS) % 2 == 0
    made = divergence.value_and_gradient(AlignedTokens(student_nV, teacher_nV, sampled_n, right_n=right_n))
    tokens = AlignedTokens(student_nV, teacher_nV, sampled_n, right_n=right_n)
    expected = value_and_gradient(divergence.value, tokens)
    worst = 0.0
    for what, got, right in zip(("value", "gradient"), made, expected, strict=True):
        if got.shape != right.shape:
            raise ConfigError(
                f"the closed form's {what} has shape {list(got.shape)}, and `value` asks for {list(right.shape)}"
            )
        apart = (got - right).abs()
        relative = float(apart.max() / right.abs().max().clamp(min=1e-12))
        if not relative <= tolerance:
            place = [int(i) for i in torch.unravel_index(apart.argmax(), apart.shape)]
            raise ConfigError(
                f"the closed form's {what} is not that of `value`: at {place} of {CHECKED_TOKENS} random tokens it is "
                f"{float(got[tuple(place)]):.6g}, and autograd of `value` gives {float(right[tuple(place)]):.6g}; "
                "mend it, or leave `value_and_gradient` out: autograd then does the work"
            )
        worst = max(worst, relative)
    return worst
