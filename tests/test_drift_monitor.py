"""The guard and the signs it watches."""

from __future__ import annotations

import math

import pytest

from opsd_cli.data.problems import Problem, PromptPair, Rollout
from opsd_cli.rank.drift_monitor import DriftMonitor, count_signs, repeats_itself
from opsd_cli.settings.config import GuardSettings, TrainSettings

SETTINGS = GuardSettings(
    action="warn", window=3, entropy_ratio=3.0, entropy_gap=1.0, length_ratio=2.0, truncated_share=0.5,
    repeated_share=0.5, leak_share=0.2, accuracy_drop=0.1, spike_ratio=5.0, nonfinite_patience=2,
)  # fmt: skip
TRAIN = TrainSettings(
    steps=10, problems_per_step=4, rollouts_per_problem=2, updates_per_step=1, micro_batch_tokens=64,
    gradient_checkpointing=False, offload_activations=False, mlp_tiles=1, halve_on_oom=False,
    seconds=None, share_prompts=True,
)  # fmt: skip
CALM = {
    "loss/objective": 0.2,
    "entropy/student": 0.5,
    "entropy/gap": 0.1,
    "rollout/length_mean": 40.0,
    "rollout/truncated": 0.0,
}


def judged(guard: DriftMonitor, metrics: dict[str, float]) -> str | None:
    guard.add_step(metrics)
    verdict = guard.verdict_on_step()
    return verdict and verdict.message


def verdicts(*last: dict[str, float]) -> list[str | None]:
    guard = DriftMonitor(SETTINGS, TRAIN)
    return [judged(guard, metrics) for metrics in [CALM] * 6 + list(last)]


def test_a_calm_run_is_left_alone():
    assert verdicts(CALM, CALM) == [None] * 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"entropy/student": 5.0}, "entropy/student has risen from 0.5 to 5"),
        ({"entropy/student": 0.01}, "entropy/student has fallen"),
        ({"rollout/length_mean": 200.0}, "guard.length_ratio=2.0"),
        ({"entropy/gap": 1.2}, "the teacher's has risen from 0.1 to 1.2 nats (mean of 3 steps), more than guard"),
        (
            {"rollout/truncated": 0.8},
            "80% of the completions of the last 3 steps are cut by the length limit; raise sampling",
        ),
        ({"rollout/leaked": 0.4}, "guard.leak_share=0.2"),
        ({"rollout/repeated": 0.9}, "guard.repeated_share=0.5"),
    ],
)
def test_a_lasting_drift_is_named_with_its_numbers_and_its_setting(change: dict[str, float], words: str):
    assert words in str(verdicts(*[CALM | change] * 3)[-1])


def test_a_sampler_that_draws_from_other_weights_is_told_at_the_first_step():
    guard = DriftMonitor(SETTINGS, TRAIN)
    assert guard.parted() is None
    guard.add_step(CALM | {"sampler/logprob_gap": 0.03})
    assert guard.parted() is None, "as far as rounding in bfloat16 explains"
    guard.add_step(CALM | {"sampler/logprob_gap": 0.8})
    assert "0.8 nats a token from the trainer's (sampler/logprob_gap)" in guard.parted().message


def test_a_gap_that_was_there_from_the_start_or_that_leaves_the_student_more_certain_is_no_drift():
    for start, end in ((2.0, 2.5), (-3.0, -0.5)):
        guard = DriftMonitor(SETTINGS, TRAIN)
        steps = [CALM | {"entropy/gap": start}] * 6 + [CALM | {"entropy/gap": end}] * 3
        assert [judged(guard, metrics) for metrics in steps] == [None] * 9


def test_nothing_is_said_before_two_windows_have_passed():
    guard = DriftMonitor(SETTINGS, TRAIN)
    assert [judged(guard, CALM | {"rollout/truncated": 1.0}) for _ in range(5)] == [None] * 5


def test_a_fall_of_held_out_accuracy_is_measured_from_its_best():
    guard = DriftMonitor(SETTINGS, TRAIN)
    assert guard.verdict_on_accuracy(0, 0.5) is None
    assert guard.verdict_on_accuracy(10, 0.7) is None
    assert guard.verdict_on_accuracy(20, 0.65) is None
    assert "10.1%" not in str(guard.verdict_on_accuracy(30, 0.5))
    assert "70.0% at step 10" in str(guard.verdict_on_accuracy(30, 0.5))
    assert guard.best_step == 10


def test_a_replayed_run_comes_to_the_same_verdict():
    metrics = [CALM] * 6 + [CALM | {"rollout/truncated": 1.0}] * 3
    straight = DriftMonitor(SETTINGS, TRAIN)
    expected = [judged(straight, item) for item in metrics]
    resumed = DriftMonitor(SETTINGS, TRAIN)
    resumed.replay([{"kind": "step", "step": i + 1, "metrics": item} for i, item in enumerate(metrics[:7])])
    assert [judged(resumed, item) for item in metrics[7:]] == expected[7:]


def test_repetition_talk_of_the_reference_and_bare_answers_are_counted():
    pair = PromptPair(Problem("p", "q", "a long worked solution of the problem " * 3, "7"), (1,), (2,))
    texts = [
        "the answer is " * 40,
        "As the reference solution says, 7",
        "7",
        "First 3 + 4 = 7, so the answer must be 7.",
    ]
    rollouts = [Rollout(pair, (1,), "stop", ()) for _ in texts]
    counts = count_signs(rollouts, texts, [False, True, True, True])
    assert counts == {"rollout/empty": 0.0, "rollout/repeated": 1.0, "rollout/leaked": 1.0, "rollout/bare": 1.0}
    assert not repeats_itself(
        "An ordinary sentence that says each thing once and is long enough to be compressed, isn't it?" * 1
    )


def test_refused_updates_are_counted_in_a_row_also_over_a_resume_and_are_no_part_of_a_window():
    refused = {"optim/skipped": 1.0, "optim/grad_norm": math.nan, "rollout/length_mean": 900.0}
    guard = DriftMonitor(SETTINGS, TRAIN)
    for metrics in [CALM] * 6 + [refused, CALM, refused, refused]:
        assert judged(guard, metrics) is None
        assert guard.spike() is None
    resumed = DriftMonitor(SETTINGS, TRAIN)
    written = [CALM] * 6 + [refused, CALM, refused, {"optim/skipped": 1.0, "optim/grad_norm": "nan"}]
    resumed.replay([{"kind": "step", "step": i + 1, "metrics": item} for i, item in enumerate(written)])
    assert guard.refused_in_a_row == resumed.refused_in_a_row == 2
    resumed.add_step(CALM)
    assert resumed.refused_in_a_row == 0


def test_a_spike_of_the_objective_is_told_with_the_window_it_stands_out_of():
    guard = DriftMonitor(SETTINGS, TRAIN)
    for value in (0.2, 0.1, 0.3):
        guard.add_step(CALM | {"loss/objective": value})
        assert guard.spike() is None
    guard.add_step(CALM | {"loss/objective": 0.9})  # 4.5 times the mean
    assert guard.spike() is None
    guard.add_step(CALM | {"loss/objective": 2.6})
    assert guard.spike().message == (
        "the objective has jumped to 2.6, above guard.spike_ratio=5.0 times its mean over the 3 steps before (0.433, "
        "standard deviation 0.34, largest 0.9)"
    )
    assert guard.verdict_on_step() is None, "a spike is no reason to stop"


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"rollout/length_mean": 0.0}, "every completion is empty"),
        (CALM | {"rollout/length_mean": 1.0, "rollout/empty": 1.0}, "every completion is empty"),
        ({"rollout/length_mean": 9.0, "rollout/truncated": 1.0}, "raise sampling.max_completion_tokens"),
        ({"rollout/length_mean": 9.0, "rollout/without_context": 1.0}, "raise train.rollouts_per_problem"),
        (
            {"rollout/length_mean": 9.0, "rollout/without_context": 1.0, "rollout/truncated": 1.0},
            "so that no rollout has a privileged context; raise sampling.max_completion_tokens",
        ),
        (
            {"rollout/length_mean": 9.0, "rollout/without_context": 1.0, "rollout/context_too_long": 0.5},
            "longer than prompts.max_tokens",
        ),
        ({"rollout/length_mean": 9.0, "rollout/without_context": 0.9}, "look at token_rule, tokens.keep"),
        ({"rollout/length_mean": 9.0, "rollout/truncated": 0.5}, "look at token_rule, tokens.keep"),
        (CALM | {"tokens/passed_gate": 0.0}, "lower tokens.gate_min"),
        (CALM | {"loss/objective": 1e-9, "kl/forward": -1e-9}, "the teacher equals the student"),
    ],
)
def test_a_run_that_learns_nothing_is_told_why_after_a_window(metrics: dict[str, float], words: str):
    guard = DriftMonitor(SETTINGS, TRAIN)
    assert [judged(guard, metrics) for _ in range(2)] == [None, None]
    reason = judged(guard, metrics)
    assert reason.startswith("no learning signal in the last 3 steps: ")
    assert words in reason
    assert judged(guard, CALM) is None, "one step that teaches ends it"


def signs(*metrics: dict[str, float], at_end: bool = False) -> list[str | None]:
    """What is said after each of these first steps, of 8 rollouts each."""
    guard, said = DriftMonitor(SETTINGS, TRAIN), []
    for number, item in enumerate(metrics, start=1):
        guard.add_step(item)
        sign = guard.first_sign(at_end=at_end and number == len(metrics))
        said.append(sign and sign.message)
    return said


CUT = {"rollout/length_mean": 9.0, "rollout/truncated": 1.0}


def test_what_every_rollout_shows_is_said_after_32_of_them_or_at_the_end_of_a_shorter_run():
    reason = "every completion is cut by the length limit and carries no loss; raise sampling.max_completion_tokens"
    *before, said = signs(CUT, CUT, CUT, CUT)
    assert before == [None] * 3
    assert said.startswith(f"no learning signal in the first 4 steps: {reason}")
    assert signs(CUT, at_end=True)[0].startswith(f"no learning signal in the first step: {reason}")
    assert signs(CUT, CALM, CUT, CUT, CUT, at_end=True) == [None] * 5, "one step that teaches is enough"
    refused = DriftMonitor(SETTINGS, TRAIN)
    refused.add_step({"optim/skipped": 1.0})
    assert refused.first_sign(at_end=True) is None


def test_completions_that_are_all_the_same_text_are_named():
    alike = CALM | {"rollout/distinct": 1 / 8}
    assert "every completion of each of the first 4 steps is the same text" in signs(alike, alike, alike, alike)[-1]
    assert "every completion of the first step is the same text" in signs(alike, at_end=True)[-1]
    assert signs(*[CALM | {"rollout/distinct": 2 / 8}] * 4) == [None] * 4


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_run_of_fewer_than_two_windows_is_judged_by_its_shares_at_its_end(steps: int):
    cut = CALM | {"rollout/truncated": 1.0}
    guard = DriftMonitor(SETTINGS, TRAIN)
    assert [judged(guard, cut) for _ in range(steps)] == [None] * steps
    last = "step" if steps == 1 else f"{min(steps, 3)} steps"
    assert guard.verdict_at_end() == (
        "rollout/truncated",
        f"100% of the completions of the last {last} are cut by the length limit; raise "
        "sampling.max_completion_tokens (rollout/truncated, guard.truncated_share=0.5)",
    )
    calm = DriftMonitor(SETTINGS, TRAIN)
    assert calm.verdict_at_end() is None
    calm.add_step(CALM)
    assert calm.verdict_at_end() is None


def test_a_run_of_two_windows_is_not_judged_again_at_its_end():
    guard = DriftMonitor(SETTINGS, TRAIN)
    for _ in range(6):
        guard.add_step(CALM | {"rollout/truncated": 1.0})
    assert guard.verdict_on_step().name == "rollout/truncated"
    assert guard.verdict_at_end() is None
