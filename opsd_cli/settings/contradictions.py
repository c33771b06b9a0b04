"""Settings that are fine one by one and impossible together. Owns the checks across sections, each one line
that names what to change. Checks no type and no range.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opsd_cli.settings.config import Config


def contradictions(config: Config, *, plugins: Sequence[str]) -> list[str]:
    """Problems that need more than one field to see; a plug-in adds its own with a method `contradictions`."""
    problems = []
    if config.zero.offload_parameters == "cpu" and config.zero.stage != 3:
        problems.append(
            f"zero.offload_parameters=cpu needs zero.stage=3 (got {config.zero.stage}); use zero=stage3_offload"
        )
    if config.zero.offload_optimizer == "cpu" and config.zero.stage == 0:
        problems.append("zero.offload_optimizer=cpu needs zero.stage 1 or higher (got 0)")
    if config.sampling.temperature == 0 and config.train.rollouts_per_problem > 1:
        problems.append(
            "sampling.temperature=0 is greedy, so the rollouts of a problem would be the same; "
            f"set train.rollouts_per_problem=1 (got {config.train.rollouts_per_problem}) or a temperature above 0"
        )
    model = config.model
    if model.trust_remote_code and model.revision is None and not Path(model.path).expanduser().is_dir():
        problems.append(
            f"model.trust_remote_code=true runs code that comes with {model.path}; "
            "pin what was read: model.revision=COMMIT"
        )
    for kind in plugins:
        check = getattr(getattr(config, kind), "contradictions", None)
        if check is not None:
            problems += check(config)
    return problems
