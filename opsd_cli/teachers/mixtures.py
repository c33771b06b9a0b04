"""Target transforms: what the student is pulled towards, when it is made of more than one pass of the teacher.
Importing it does not import torch.

    barycentre  log q' = w log q + (1 - w) log p: between teacher and student, p held constant (DemoPSD, 2607.02502)
    guided      log q' = log q + w (log q - log q_other): what the context adds beyond the other prompt, amplified.
                other = free: the teacher's weights without any reference; reference_only: with the reference and no
                problem (Purified OPSD, 2607.02234); wrong: with another problem's reference (contrast)

Both are renormalised over the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opsd_cli.settings.config import TargetSettings

if TYPE_CHECKING:
    from opsd_cli.data.pairing import PairedBatch
    from opsd_cli.loss.types import TokenMixture, TokenScores
    from opsd_cli.teachers.teachers import Teacher


def score_target(teacher: Teacher, batch: PairedBatch, settings: TargetSettings) -> TokenScores | TokenMixture:
    """Score a batch with the teacher and combine the passes as the settings say."""
    scores = teacher.score(batch.teacher)
    if settings.kind == "teacher":
        return scores
    from opsd_cli.loss.types import TokenMixture

    if settings.kind == "barycentre":
        return TokenMixture(scores.weighted(settings.weight), student_weight=1.0 - settings.weight)
    assert batch.other is not None, "a guided target needs the other prompt"
    other = teacher.score(batch.other)
    return TokenMixture(scores.weighted(1.0 + settings.weight) + other.weighted(-settings.weight))
