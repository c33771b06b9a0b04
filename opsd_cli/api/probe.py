"""A recipe's student and teacher measured before training: on held-out problems under every prompt that tells
something, and along rollouts drawn as in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from opsd_cli.api.measured_session import MeasuredSession
from opsd_cli.data.contexts import Context
from opsd_cli.data.privileged import Privileged
from opsd_cli.data.problems import Problem, PromptPair, Rollout
from opsd_cli.data.seeds import derive_seed
from opsd_cli.insight.at_k import chance_of_one
from opsd_cli.insight.estimates import Estimate, mean, ratio
from opsd_cli.insight.evaluation import Outcome
from opsd_cli.insight.paired import wilson_interval
from opsd_cli.insight.prospects import (
    CONTROL,
    MISLEADING,
    STUDENT,
    TEACHER,
    Arm,
    ClassShare,
    Copying,
    Probe,
    Sampled,
)
from opsd_cli.insight.samples import CLASSES
from opsd_cli.rank.run_data import make_renderer
from opsd_cli.settings.config import Config, Control
from opsd_cli.settings.errors import ConfigError, DataError
from opsd_cli.teachers.teachers import External

LOOKED_AT = 16  # rollouts whose tokens are compared
CONTROLS: dict[str, Control] = {
    CONTROL: "shuffled",
    MISLEADING: "wrong",
    "first step": "first_step",
    "all but last": "all_but_last",
}


def check_probe(config: Config) -> None:
    """Raise ConfigError for a recipe whose teacher a probe cannot measure."""
    context = Context(config.context)
    if config.teacher.plugin_name == "none":
        raise ConfigError(
            "teacher=none: there is no teacher to probe; choose a method that has one, such as method=opsd"
        )
    if isinstance(config.teacher, External):
        raise ConfigError(
            "teacher=external: the teacher is another model; measure it with `opsd eval MODEL recipe=...`, and the "
            "student with `opsd eval`, on the same problems"
        )
    if context.is_sampled:
        raise ConfigError(
            f"context={context.name} is made of a step's rollouts, so before training it shows nothing; probe "
            "context=solution, which shows what the best of them could"
        )


def run_probe(
    session: MeasuredSession, *, recipe: str, problems: int, rollouts: int, tell: Callable[[str], None]
) -> Probe:
    """Measure. Raises ConfigError where the recipe holds out no problems with answers."""
    config = replace(session.config, context=replace(session.config.context, control="none"))
    held_out = [pair.problem for pair in session.held_out[:problems]]
    if not held_out:
        raise ConfigError("there are no held-out problems with answers to probe: set eval.problems, or eval.split")
    arms: dict[str, Arm] = {}
    said: dict[str, list[Outcome]] = {}
    pairs = _pairs(session, config, held_out)
    for name, some, role in ((STUDENT, pairs, "student"), (TEACHER, pairs, "teacher")):
        tell(f"measuring: {name}")
        arms[name], said[name] = _arm(session, some, role)
    shown: dict[str, Privileged] = {}
    for name, arm_config, questions in _others(config, held_out):
        tell(f"measuring: {name}")
        arms[name], said[name] = _arm(session, _pairs(session, arm_config, questions), "teacher")
        if name == MISLEADING:
            each = Context(arm_config.context).privileged(questions, seed=config.run.seed)
            shown = {problem.id: one for problem, one in zip(questions, each, strict=True)}
    tell(f"drawing {rollouts} rollouts of each problem, as in training")
    drawn = _draw(session, pairs, rollouts, "student", 0)
    sampled = _sampled(session, pairs, drawn, rollouts, tell)
    tell("comparing token by token")
    return Probe(
        recipe=recipe,
        problems=len(pairs),
        arms=arms,
        sampled=sampled,
        copying=_copying(session, said, shown) if shown else None,
        classes=_classes(session, drawn),
    )


def _others(config: Config, held_out: Sequence[Problem]) -> list[tuple[str, Config, Sequence[Problem]]]:
    """The arms beside student and teacher that the context can show, in its own words."""
    found: list[tuple[str, Config, Sequence[Problem]]] = []
    for name, control in CONTROLS.items():
        changed = replace(config, context=replace(config.context, control=control))
        try:
            Context(changed.context).privileged(held_out, seed=config.run.seed)
        except (ConfigError, DataError):  # it shows no reference, or there is no second problem
            continue
        found.append((name, changed, held_out))
    if "solution" in Context(config.context).teacher_placeholders:
        bare = [replace(one, solution=f"The answer is {one.answer}.") for one in held_out]
        found.append(("answer only", config, bare))
    return found


def _pairs(session: MeasuredSession, config: Config, problems: Sequence[Problem]) -> list[PromptPair]:
    renderer = make_renderer(config, session.tokenizer)
    try:
        return renderer.render(problems, seed=config.run.seed, with_other=False)[0]
    finally:
        renderer.close()


def _arm(session: MeasuredSession, pairs: Sequence[PromptPair], role: str) -> tuple[Arm, list[Outcome]]:
    found, outcomes = session.outcomes(pairs, role="teacher" if role == "teacher" else "student")
    right = {one.problem: one.correct for one in outcomes}
    return Arm(found.accuracy, found.low, found.high, found.truncated, found.length_mean, right), outcomes


def _draw(session: MeasuredSession, pairs: Sequence[PromptPair], count: int, role: str, draw: int) -> list[Rollout]:
    seed = derive_seed(session.config.run.seed, "probe", role, draw)
    return session.draw(pairs, role="teacher" if role == "teacher" else "student", rollouts=count, seed=seed)


def _sampled(
    session: MeasuredSession,
    pairs: Sequence[PromptPair],
    drawn: Sequence[Rollout],
    count: int,
    tell: Callable[[str], None],
) -> Sampled:
    right = session.grade(drawn)
    by_problem = [right[start : start + count] for start in range(0, len(right), count)]
    wrong = [pair for pair, grades in zip(pairs, by_problem, strict=True) if not all(grades)]
    failed = [[not grade for grade in grades] for grades in by_problem if not all(grades)]
    recovered = again = recovery = None
    if wrong:
        tell("answering again what failed, with the context and without")
        grades = {role: session.grade(_draw(session, wrong, count, role, 1)) for role in ("teacher", "student")}
        repaired = {
            role: [
                float(sum(right and was_wrong for right, was_wrong in zip(some[i * count :], lost, strict=False)))
                for i, lost in enumerate(failed)
            ]
            for role, some in grades.items()
        }
        sizes = [float(sum(lost)) for lost in failed]
        recovered, again = ratio(repaired["teacher"], sizes), ratio(repaired["student"], sizes)
        more = [a - b for a, b in zip(repaired["teacher"], repaired["student"], strict=True)]
        recovery = ratio(more, sizes)
    average = mean([sum(grades) / count for grades in by_problem])
    assert average is not None, "there are problems"
    ks = [k for k in (1, 2, 4, 8, 16) if k <= count]
    return Sampled(
        rollouts=count,
        average=average,
        passed={k: sum(chance_of_one(count, sum(grades), k) for grades in by_problem) / len(by_problem) for k in ks},
        truncated=sum(one.finish_reason == "length" for one in drawn) / len(drawn),
        stated=session.stated_share(drawn),
        recovered=recovered,
        again=again,
        recovery=recovery,
    )


def _copying(session: MeasuredSession, said: dict[str, list[Outcome]], shown: dict[str, Privileged]) -> Copying:
    """How often the completions state the wrong answer of the reference."""

    def stating(outcomes: Sequence[Outcome]) -> int:
        return sum(session.states([(one.completion, (shown[one.problem].answer,)) for one in outcomes]))

    count, total = stating(said[MISLEADING]), len(said[MISLEADING])
    unprompted = stating(said[STUDENT]) / len(said[STUDENT])
    return Copying(Estimate(count / total, *wilson_interval(count, total)), unprompted)


def _classes(session: MeasuredSession, drawn: Sequence[Rollout]) -> dict[str, ClassShare]:
    """Where the divergence sits, by class of token, along one rollout of each of some problems."""
    some = [one for one in drawn if one.number == 0 and one.completion_ids][:LOOKED_AT]
    if not some:
        return {}
    tokens = [token for view in session.inspect(some) for token in view.tokens]
    whole = sum(token.forward_kl for token in tokens)
    found: dict[str, ClassShare] = {}
    for kind in CLASSES:
        nats = [token.forward_kl for token in tokens if token.kind == kind]
        if nats:
            found[kind] = ClassShare(len(nats), sum(nats) / len(nats), sum(nats) / whole if whole > 0 else 0.0)
    return found
