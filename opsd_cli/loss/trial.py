"""A trial of a divergence, with its support and clip, on a few random tokens. Apart from the loss so that a divergence
that cannot work as it is configured is refused before a model is loaded, and not at the first step."""

from __future__ import annotations

import torch

from opsd_cli.loss.divergences import AlignedTokens, Divergence
from opsd_cli.settings.config import SupportSettings
from opsd_cli.settings.errors import ConfigError

TOKENS = 3


def try_out(divergence: Divergence, *, name: str, support: SupportSettings) -> None:
    """Raises ConfigError when `divergence` looks at what the support leaves out, or returns anything but a value for
    each token [n] and a finite gradient for each logit [n, V]."""
    vocabulary = 2 * support.k + 8  # more than any choice of k tokens of both roles, so that there is a rest
    generator = torch.Generator().manual_seed(0)
    student_nV, teacher_nV = torch.randn(2, TOKENS, vocabulary, generator=generator).log_softmax(dim=2)
    sampled_n = torch.tensor([0, vocabulary // 2, vocabulary - 1])
    try:
        value_n, gradient_nV = divergence.value_and_gradient(AlignedTokens(student_nV, teacher_nV, sampled_n))
    except ConfigError as error:
        raise ConfigError(*(f"divergence={name}: {problem}" for problem in error.problems)) from None
    for what, made, shape in (("value", value_n, (TOKENS,)), ("gradient", gradient_nV, (TOKENS, vocabulary))):
        if made.shape != shape:
            raise ConfigError(
                f"divergence={name}: the {what} of {TOKENS} tokens over {vocabulary} entries has shape "
                f"{list(made.shape)}, which must be {list(shape)}"
            )
        if not bool(made.isfinite().all()):
            raise ConfigError(f"divergence={name}: the {what} of random distributions is not finite")
