"""What a probe has measured of a recipe before any training, and what that says of training: types, and the verdict in
words. The gap between student and teacher's prompt predicts the gain of training, on average and as far as a context
can (2605.30070); what a control gives too, or another try, is no reason to train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from opsd_cli.insight.estimates import Estimate, points
from opsd_cli.insight.paired import Comparison, compare

Outlook = Literal["likely", "uncertain", "unlikely"]
STUDENT, TEACHER = "student", "teacher"
CONTROL, MISLEADING = "another problem's reference", "misleading reference"
LADDER = ("first step", "all but last", "answer only")

LITTLE_LEFT = 0.9  # accuracy of the student from which on no context can add much
MUCH_CUT = 0.25  # of the rollouts
FEW_RIGHT = 0.05
WORSE_THAN_GREEDY = 0.5  # of greedy accuracy, below which the rollouts are drawn too wildly
COPIES = 0.5  # of what a misleading reference states
ANSWER_SHARE = 0.8  # of the gap, that the bare answer gives


@dataclass(frozen=True)
class Arm:
    """One prompt under which the model answered the held-out problems, greedily or as eval.* says."""

    accuracy: float
    low: float  # 95 % Wilson interval
    high: float
    truncated: float  # share cut by the length limit
    tokens: float  # of a completion, mean
    right: Mapping[str, bool]  # by problem


@dataclass(frozen=True)
class Sampled:
    """The student's rollouts, drawn as in training."""

    rollouts: int  # for each problem
    average: Estimate  # avg@k: share of right rollouts
    passed: Mapping[int, float]  # k -> pass@k, unbiased
    truncated: float  # share cut by the length limit
    stated: float  # share that states an answer
    recovered: Estimate | None  # share of failed rollouts that the teacher's prompt repairs; None: none failed
    again: Estimate | None  # share that another try without context repairs
    recovery: Estimate | None  # the first less the second


@dataclass(frozen=True)
class Copying:
    """Under a reference with a wrong answer."""

    copied: Estimate  # share of completions that state it
    unprompted: float  # share of the student's own that happen to


@dataclass(frozen=True)
class ClassShare:
    tokens: int
    nats: float  # mean KL(teacher || student) of a token
    share: float  # of all nats


@dataclass(frozen=True)
class Probe:
    """Everything that was measured. `arms` are by name, student and teacher first."""

    recipe: str
    problems: int
    arms: Mapping[str, Arm]
    sampled: Sampled
    copying: Copying | None
    classes: Mapping[str, ClassShare]

    def gain(self, arm: str, over: str = STUDENT) -> Comparison | None:
        """What an arm adds to another, problem by problem; None where the probe has not both."""
        if arm not in self.arms or over not in self.arms:
            return None
        return compare(self.arms[over].right, self.arms[arm].right)


@dataclass(frozen=True)
class Verdict:
    """Whether training is likely to help, and why, a line each."""

    outlook: Outlook
    reasons: tuple[str, ...]


def judge(probe: Probe, *, temperature: float, max_tokens: int) -> Verdict:
    """The verdict. `temperature` and `max_tokens` are those of the rollouts."""
    against = list(_against(probe))
    cautions = list(_cautions(probe, temperature=temperature, max_tokens=max_tokens))
    outlook: Outlook = "unlikely" if against else "uncertain" if cautions else "likely"
    return Verdict(outlook, (*against, *cautions, *_for(probe)))


def _against(probe: Probe) -> Sequence[str]:
    """What speaks against any training with this teacher."""
    gap, student = probe.gain(TEACHER), probe.arms[STUDENT]
    assert gap is not None
    if student.accuracy >= LITTLE_LEFT:
        return [
            f"the student has {student.accuracy:.1%} right already, so little is left to learn: use harder problems"
        ]
    found = []
    if gap.low <= 0:
        found.append(
            f"the teacher's prompt does not surely help: {points(gap)} over the student's. There is nothing to learn "
            "from such a teacher: try another context or a larger model, or measure more problems (--problems)"
        )
    over_control = probe.gain(TEACHER, CONTROL)
    if gap.low > 0 and over_control is not None and over_control.low <= 0:
        found.append(
            f"another problem's reference helps as much ({points(over_control)} between the two): what helps is the "
            "prompt's form and not what it says"
        )
    recovery = probe.sampled.recovery
    if gap.low > 0 and recovery is not None and recovery.low <= 0:
        found.append(
            f"of the student's failed rollouts the context repairs no more than another try does ({points(recovery)}): "
            "measure more rollouts (--rollouts), or choose another context"
        )
    return found


def _cautions(probe: Probe, *, temperature: float, max_tokens: int) -> Sequence[str]:
    """What may spoil it."""
    found, sampled, greedy = [], probe.sampled, probe.arms[STUDENT].accuracy
    if sampled.truncated > MUCH_CUT:
        found.append(
            f"{sampled.truncated:.0%} of the rollouts are cut by the length limit: raise "
            f"sampling.max_completion_tokens (now {max_tokens}), or draw less wildly: sampling.temperature (now "
            f"{temperature:g})"
        )
    wild = greedy >= 2 * FEW_RIGHT and sampled.average.value < WORSE_THAN_GREEDY * greedy
    if temperature > 0 and (wild or sampled.average.value < FEW_RIGHT):
        found.append(
            f"hardly a rollout is right ({sampled.average.value:.1%}; greedily {greedy:.1%}), so the teacher corrects "
            f"what leads nowhere: lower sampling.temperature (now {temperature:g}), use top-p, or easier problems"
        )
    gap, bare, without = probe.gain(TEACHER), probe.gain("answer only"), probe.gain("all but last")
    if gap is not None and gap.low > 0 and bare is not None and bare.gain >= ANSWER_SHARE * gap.gain:
        no_steps = without is not None and without.low <= 0
        found.append(
            f"the bare answer helps as much as the whole reference ({points(bare)})"
            + ("; without it the steps help nothing: the teacher may copy more than it understands" * no_steps)
        )
    if probe.copying is not None and probe.copying.copied.value > COPIES:
        found.append(
            f"shown a wrong answer the teacher states it in {probe.copying.copied.value:.0%} of its completions: it "
            "trusts its reference, so a wrong reference teaches a wrong answer"
        )
    return found


def _for(probe: Probe) -> Sequence[str]:
    """What speaks for it."""
    gap, recovery, over = probe.gain(TEACHER), probe.sampled.recovery, probe.gain(TEACHER, CONTROL)
    found = []
    if gap is not None and gap.low > 0:
        found.append(
            f"the teacher's prompt helps: {points(gap)} over the student's; training gains about so much on average"
        )
    if over is not None and over.low > 0:
        found.append(f"and it is what the reference says that helps: {points(over)} over another problem's")
    if recovery is not None and recovery.low > 0:
        found.append(f"it repairs failed rollouts: {points(recovery)} more of them than another try does")
    return found


def as_dict(probe: Probe, verdict: Verdict) -> dict[str, Any]:
    """For programs."""
    gains = {name: found for name in probe.arms if name != STUDENT and (found := probe.gain(name)) is not None}
    control = probe.gain(TEACHER, CONTROL)
    return {
        "recipe": probe.recipe,
        "problems": probe.problems,
        "outlook": verdict.outlook,
        "reasons": list(verdict.reasons),
        "arms": {name: _without_problems(arm) for name, arm in probe.arms.items()},
        "gain_over_student": {name: _plain(found) for name, found in gains.items()},
        "teacher_over_control": None if control is None else _plain(control),
        "sampled": {**asdict(probe.sampled), "passed": {str(k): v for k, v in probe.sampled.passed.items()}},
        "copying": None if probe.copying is None else asdict(probe.copying),
        "divergence_by_class": {name: asdict(share) for name, share in probe.classes.items()},
    }


def _without_problems(arm: Arm) -> dict[str, Any]:
    return {key: value for key, value in asdict(arm).items() if key != "right"}


def _plain(found: Comparison) -> dict[str, Any]:
    return {**asdict(found), "won": len(found.won), "lost": len(found.lost)}
