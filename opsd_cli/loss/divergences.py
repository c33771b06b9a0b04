"""Divergences: what is minimised at one token, as a formula and its closed-form gradient. Batches, masks, chunks and
temperatures are dealt with elsewhere. Importing it does not import torch.

One entry of a divergence is a function of two aligned distributions over the vocabulary, the student's p and the
teacher's q, and of the sampled token. The gradient is with respect to the student's logits, never the teacher's.

To add one: a frozen dataclass with `value`, registered by name, and `recipes/divergence/<name>.yaml`: a `ByValue`, or
an `EntriesByValue` with `entry_values` where it is a sum over the vocabulary, gets its gradient from autograd. A closed
form (`value_and_gradient`, or `entries` of an `Entrywise`) is faster; beside a `value` it is checked against it before
a model is loaded. The ones below have both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeGuard

from pydantic import Field

from opsd_cli.loss import by_value
from opsd_cli.loss.aligned import AlignedTokens, rowwise_dot, through_softmax
from opsd_cli.settings.registry import plugin

if TYPE_CHECKING:
    from torch import Tensor

Inside = Annotated[float, Field(gt=0, lt=1)]


class Divergence(Protocol):
    """A plug-in of the group `divergence`."""

    @property
    def needs_teacher(self) -> bool: ...

    def value_and_gradient(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        """The value at each token [n] and its gradient with respect to the student's logits [n, V]."""


class AtSampledToken:
    """A divergence whose value depends on the sampled token alone: for it there is no part of the vocabulary to choose
    and nothing to clip, which is refused before anything is loaded."""


class ByValue(ABC):
    """A divergence that is written as its value: the gradient is autograd's. A class that redefines `value` alone gets
    autograd's too, also where a class it inherits from has a closed form: that one is of another value."""

    needs_teacher = True

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "value" in vars(cls) and not {"entries", "entry_values", "value_and_gradient"} & vars(cls).keys():
            cls.value_and_gradient = ByValue.value_and_gradient  # type: ignore[method-assign]

    @abstractmethod
    def value(self, tokens: AlignedTokens) -> Tensor:
        """The value at each token [n], by operations that torch can differentiate. What is to be held constant is
        detached."""

    def value_and_gradient(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        return by_value.value_and_gradient(self.value, tokens)


class Entrywise(ByValue):
    """A divergence that is a sum over the vocabulary: what an entry clip and a dropped rest of the vocabulary need. A
    class that defines `entries` and no `value_and_gradient` gets its value from its entries, also where a class it
    inherits from has a closed form: that one is of other entries."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if {"entries", "entry_values"} & vars(cls).keys() and "value_and_gradient" not in vars(cls):
            cls.value_and_gradient = Entrywise.value_and_gradient  # type: ignore[method-assign]
            if "entries" in vars(cls) and "value" not in vars(cls):
                cls.value = Entrywise.value  # type: ignore[method-assign]

    def value(self, tokens: AlignedTokens) -> Tensor:
        return self.entries(tokens)[0].sum(dim=1)

    @abstractmethod
    def entries(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        """Each vocabulary entry's contribution [n, V], and the gradient of their sum with respect to the student's
        log-probabilities taken as independent variables [n, V]."""

    def value_and_gradient(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        contribution_nV, gradient_nV = self.entries(tokens)
        return contribution_nV.sum(dim=1), through_softmax(gradient_nV, tokens.student_probs_nV)


class EntriesByValue(Entrywise):
    """A sum over the vocabulary that is written as the value of each entry; an entry may depend on that entry's two
    probabilities only. Their gradient is autograd's."""

    @abstractmethod
    def entry_values(self, tokens: AlignedTokens) -> Tensor:
        """Each vocabulary entry's contribution [n, V], by operations that torch can differentiate."""

    def value(self, tokens: AlignedTokens) -> Tensor:
        return self.entry_values(tokens).sum(dim=1)

    def entries(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        return by_value.differentiated(self.entry_values, tokens)


def is_autograds(divergence: Divergence) -> bool:
    """Whether the gradient is made by autograd, whatever clip and support stand around the divergence."""
    while isinstance(divergence, by_value.Wraps):
        divergence = divergence.base
    kind = type(divergence)
    return issubclass(kind, ByValue) and (
        kind.value_and_gradient is ByValue.value_and_gradient
        or (issubclass(kind, EntriesByValue) and kind.entries is EntriesByValue.entries)
    )


def is_sum_of_entries(divergence: Divergence) -> TypeGuard[Entrywise]:
    """Whether `entries` belong to `value_and_gradient`. Those of a subclass that redefines the value alone are still
    its parent's: they say nothing of it."""
    if not isinstance(divergence, Entrywise):
        return False
    places = [
        min(i for i, owner in enumerate(type(divergence).__mro__) if not vars(owner).keys().isdisjoint(names))
        for names in ({"entries", "entry_values"}, {"value_and_gradient"})
    ]
    return places[0] == places[1]


def log_mixture(tokens: AlignedTokens, teacher_share: float) -> Tensor:
    """log(a q + (1 - a) p), [n, V], for a share a of the teacher strictly between 0 and 1: from the probabilities, with
    one logarithm for each entry. Where both are zero in floating point the smallest positive number stands in for their
    mixture, so that it stays finite; every use is multiplied by p or q."""
    from torch import finfo

    mixture_nV = tokens.student_probs_nV.lerp(tokens.teacher_probs_nV, teacher_share)
    return mixture_nV.clamp_(min=finfo(mixture_nV.dtype).tiny).log_()


@plugin("divergence", "forward_kl")
class ForwardKL(Entrywise):
    """KL(q || p): mass-covering. Gradient p - q. The method's published choice (2601.18734 v3)."""

    def value(self, tokens: AlignedTokens) -> Tensor:
        return tokens.forward_kl_n

    def entries(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        return tokens.teacher_probs_nV * tokens.log_ratio_nV, -tokens.teacher_probs_nV

    def value_and_gradient(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        return tokens.forward_kl_n, tokens.student_probs_nV - tokens.teacher_probs_nV


@plugin("divergence", "reverse_kl")
class ReverseKL(Entrywise):
    """KL(p || q): mode-seeking. Gradient p * (log(p / q) - KL)."""

    def value(self, tokens: AlignedTokens) -> Tensor:
        return tokens.reverse_kl_n

    def entries(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        contribution_nV = -tokens.student_probs_nV * tokens.log_ratio_nV
        return contribution_nV, contribution_nV + tokens.student_probs_nV

    def value_and_gradient(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        value_n = tokens.reverse_kl_n
        return value_n, (-value_n.unsqueeze(1) - tokens.log_ratio_nV).mul_(tokens.student_probs_nV)


@plugin("divergence", "jsd")
class GeneralizedJSD(Entrywise):
    """beta * KL(q || m) + (1 - beta) * KL(p || m) with m = beta * q + (1 - beta) * p (2306.13649).

    It tends to 0 at both ends, so beta = 0.1 is about ten times smaller than the forward KL it leans towards;
    `normalize` divides by min(beta, 1 - beta), which makes the ends meet KL(q || p) and KL(p || q).
    """

    beta: Inside
    normalize: bool

    def value(self, tokens: AlignedTokens) -> Tensor:
        mixture_nV = log_mixture(tokens, self.beta)
        to_teacher_n = rowwise_dot(tokens.teacher_probs_nV, tokens.teacher_logprobs_nV - mixture_nV)
        to_student_n = rowwise_dot(tokens.student_probs_nV, tokens.student_logprobs_nV - mixture_nV)
        return self.scale * (self.beta * to_teacher_n + (1.0 - self.beta) * to_student_n)

    def entries(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        teacher_share, student_share = self.scale * self.beta, self.scale * (1.0 - self.beta)
        mixture_nV = log_mixture(tokens, self.beta)
        to_teacher_nV = tokens.teacher_probs_nV * (tokens.teacher_logprobs_nV - mixture_nV)
        to_student_nV = tokens.student_probs_nV * (tokens.student_logprobs_nV - mixture_nV)
        return teacher_share * to_teacher_nV + student_share * to_student_nV, student_share * to_student_nV

    def value_and_gradient(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        teacher_share, student_share = self.scale * self.beta, self.scale * (1.0 - self.beta)
        mixture_nV = log_mixture(tokens, self.beta)
        to_teacher_n = rowwise_dot(tokens.teacher_probs_nV, tokens.teacher_logprobs_nV - mixture_nV)
        # In place from here on: each of these tensors is a block of [n, V].
        ratio_nV = (tokens.student_logprobs_nV - mixture_nV).mul_(student_share)
        to_student_n = rowwise_dot(tokens.student_probs_nV, ratio_nV)
        gradient_nV = ratio_nV.sub_(to_student_n.unsqueeze(1)).mul_(tokens.student_probs_nV)
        return teacher_share * to_teacher_n + to_student_n, gradient_nV

    @property
    def scale(self) -> float:
        """What `normalize` multiplies by."""
        return 1.0 / min(self.beta, 1.0 - self.beta) if self.normalize else 1.0


@plugin("divergence", "skew_forward_kl")
class SkewForwardKL(Entrywise):
    """KL(q || alpha * q + (1 - alpha) * p): forward KL with a bounded log-ratio (2402.03898)."""

    alpha: Inside

    def entries(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        mixture_nV = log_mixture(tokens, self.alpha)
        # d mixture / d log p = (1 - alpha) * p / mixture, so the gradient is -q * (1 - alpha) * p / mixture.
        share_nV = (tokens.teacher_logprobs_nV + tokens.student_logprobs_nV - mixture_nV).exp()
        return tokens.teacher_probs_nV * (tokens.teacher_logprobs_nV - mixture_nV), (self.alpha - 1.0) * share_nV


@plugin("divergence", "skew_reverse_kl")
class SkewReverseKL(Entrywise):
    """KL(p || (1 - alpha) * q + alpha * p): reverse KL with a bounded log-ratio (2402.03898)."""

    alpha: Inside

    def entries(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        probs_nV = tokens.student_probs_nV
        ratio_nV = tokens.student_logprobs_nV - log_mixture(tokens, 1.0 - self.alpha)
        return probs_nV * ratio_nV, probs_nV * (ratio_nV + 1.0 - self.alpha * ratio_nV.exp())


@plugin("divergence", "total_variation")
class TotalVariation(Entrywise):
    """Half the L1 distance between p and q; bounded by 1, with a bounded gradient."""

    def entries(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        # d|p - q| / d log p = sign(p - q) * p; 0 where the two are equal.
        difference_nV = tokens.student_probs_nV - tokens.teacher_probs_nV
        return 0.5 * difference_nV.abs(), 0.5 * difference_nV.sign() * tokens.student_probs_nV


@plugin("divergence", "sampled_token")
class SampledToken(AtSampledToken):
    """Policy-gradient form of the reverse KL: -A * log p(y) with the advantage A = log q(y) - log p(y) held constant.
    Its expectation over y ~ p is the gradient of KL(p || q). The value is the surrogate, not an estimate of the KL:
    read `kl/reverse` for that."""

    needs_teacher = True

    def value(self, tokens: AlignedTokens) -> Tensor:
        return -tokens.at_target(tokens.log_ratio_nV).detach() * tokens.at_target(tokens.student_logprobs_nV)

    def value_and_gradient(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        advantage_n = tokens.at_target(tokens.log_ratio_nV)
        # -A * d log p(y): A * (p - onehot(y)).
        gradient_nV = tokens.student_probs_nV * advantage_n.unsqueeze(1)
        gradient_nV.scatter_add_(1, tokens.target_ids_n.unsqueeze(1), -advantage_n.unsqueeze(1))
        return -advantage_n * tokens.at_target(tokens.student_logprobs_nV), gradient_nV


@plugin("divergence", "cross_entropy")
class CrossEntropy(AtSampledToken):
    """-log p(y): no teacher at all. With sampler=dataset this is supervised fine-tuning on the reference solutions."""

    needs_teacher = False

    def value(self, tokens: AlignedTokens) -> Tensor:
        return -tokens.at_target(tokens.student_logprobs_nV)

    def value_and_gradient(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        gradient_nV = tokens.student_probs_nV.clone()
        ones_n1 = gradient_nV.new_ones(len(gradient_nV), 1)
        gradient_nV.scatter_add_(1, tokens.target_ids_n.unsqueeze(1), -ones_n1)
        return -tokens.at_target(tokens.student_logprobs_nV), gradient_nV


@plugin("divergence", "renyi")
class Renyi(ByValue):
    """log(sum q^order * p^(1 - order)) / (order - 1): the forward KL at order 1 (SR-OPSD, 2608.09745).

    Below 1 it leans towards what both find likely, above 1 it weighs what the student finds too unlikely more. The
    gradient is p - w with w ~ q^order * p^(1 - order), another distribution, so it is bounded whatever the order.
    """

    order: Annotated[float, Field(gt=0)]

    def value(self, tokens: AlignedTokens) -> Tensor:
        if self.order == 1.0:
            return tokens.forward_kl_n
        return self._exponents(tokens).logsumexp(dim=1) / (self.order - 1.0)

    def value_and_gradient(self, tokens: AlignedTokens) -> tuple[Tensor, Tensor]:
        if self.order == 1.0:
            return tokens.forward_kl_n, tokens.student_probs_nV - tokens.teacher_probs_nV
        exponents_nV = self._exponents(tokens)
        value_n = exponents_nV.logsumexp(dim=1) / (self.order - 1.0)
        return value_n, tokens.student_probs_nV - exponents_nV.softmax(dim=1)

    def _exponents(self, tokens: AlignedTokens) -> Tensor:
        """log(q^order * p^(1 - order)), [n, V]."""
        return self.order * tokens.teacher_logprobs_nV + (1.0 - self.order) * tokens.student_logprobs_nV
