"""`opsd probe`: whether training is likely to help, measured before any of it."""

from __future__ import annotations

import json
import os
import sys

from opsd_cli.commands.flags import Flags, device_of
from opsd_cli.settings.errors import ConfigError, ExitCode
from opsd_cli.settings.recipe_files import find_folders

HELP = """\
opsd probe recipe=quickstart                     student and teacher on held-out problems, and what that says
opsd probe recipe=gsm8k --problems 200 --rollouts 8
opsd probe recipe=quickstart context=answer_only another context
opsd probe recipe=quickstart --json              everything, for programs

Nothing is trained or kept. Measured: accuracy under the student's prompt and under the teacher's, their gap problem by
problem; a ladder of what the teacher is shown (first step, all but last, answer only); two controls (another problem's
reference, one with a wrong answer); the share of failed rollouts that the context repairs, less what another try does;
avg@k and pass@k of rollouts drawn as in training; where the divergence sits, by class of token.

--problems N    held-out problems (100, at most eval.problems)
--rollouts K    completions of each, drawn as in training (4)
--recipes DIR   a folder of your own recipes; --plugin FILE registers parts
"""

MOST_ROLLOUTS = 64


def main(arguments: list[str]) -> int:
    """Run `opsd probe ...`. Raises what `opsd train` would refuse."""
    flags = Flags("probe")
    flags.add_argument("--recipes", metavar="DIR")
    flags.add_argument("--problems", type=int, default=100, metavar="N")
    flags.add_argument("--rollouts", type=int, default=4, metavar="K")
    flags.add_argument("--json", action="store_true")
    given = flags.read(arguments)
    if not given.words:
        raise ConfigError("name a recipe: opsd probe recipe=quickstart (see `opsd probe --help`)")
    if given.problems < 2:
        raise ConfigError(f"--problems {given.problems}: a probe needs at least 2")
    if not 1 <= given.rollouts <= MOST_ROLLOUTS:
        raise ConfigError(f"--rollouts {given.rollouts}: 1 to {MOST_ROLLOUTS} can be drawn")
    from opsd_cli.preflight import check

    _, (member, *others) = check(given.words, find_folders(given.recipes))
    if others:
        raise ConfigError("these words stand for several runs; opsd probe measures one")
    from dataclasses import replace

    from opsd_cli.api.measured_session import MeasuredSession
    from opsd_cli.api.probe import check_probe, run_probe
    from opsd_cli.insight.prospects import as_dict, judge

    config = member.config
    check_probe(config)
    device = device_of(config)
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, which peft imports, warns of it
    # Nothing is trained: a few training prompts are enough, and what is held out is measured once.
    config = replace(
        config,
        train=replace(config.train, steps=1, problems_per_step=2, gradient_checkpointing=False),
        eval=replace(config.eval, problems=min(given.problems, config.eval.problems)),
    )
    _tell("loading data and model")
    with MeasuredSession(config, device=device) as session:
        probe = run_probe(
            session, recipe=" ".join(given.words), problems=given.problems, rollouts=given.rollouts, tell=_tell
        )
    sampling = config.sampling
    verdict = judge(probe, temperature=sampling.temperature, max_tokens=sampling.max_completion_tokens)
    if given.json:
        print(json.dumps(as_dict(probe, verdict), indent=1, ensure_ascii=False))
    else:
        from opsd_cli.ui.foresight_text import probe_lines

        print("\n".join(probe_lines(probe, verdict)))
    return ExitCode.DONE


def _tell(phase: str) -> None:
    print(f"opsd: {phase}", file=sys.stderr)
