"""What a user should know before the first step: that the privileged context does not help or shows nothing, that an
evaluation was cut short, or what is odd about a tokenizer, its template and its settings. Each is a warning with the
numbers and what to change; none of them stops a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opsd_cli.data.chat import CLOCK, opens_thinking
from opsd_cli.data.contexts import PUBLIC, Context
from opsd_cli.data.problems import PromptPair
from opsd_cli.insight.evaluation import Evaluation
from opsd_cli.insight.paired import Comparison
from opsd_cli.rank.drift_monitor import Verdict
from opsd_cli.settings.config import Config, EvalSettings

USEFUL_GAIN = 0.15  # in accuracy. A solution in the prompt that may bring so much is not said to be of no help.
LITTLE_LEFT = 0.9  # accuracy of the student from which on no context can add much
FEW_STATED = 0.05  # share of completions that state an answer, below which accuracy says little
FEW_LOST = 0.005  # share of the weights that do not learn, too few to speak of
CUT_SHARE = 0.25  # of an evaluation's completions, from which on its accuracy says more of the limit than of the model
SUPPRESSING = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "forced_bos_token_id")


def about_context(config: Config, gained: Comparison, *, split: str, teacher: float) -> Verdict | None:
    """The student's accuracy against that under the teacher's prompt, `gained` what the latter adds: said where it does
    not help. Few problems prove nothing: there must be no gain, and hardly room for one in its 95 % interval. A control
    is meant not to help, and the accuracy of another model as teacher was not measured."""
    context = Context(config.context)
    if config.teacher.plugin_name in ("external", "none") or context.control != "none":
        return None
    is_worse, is_useless = gained.high < 0, gained.gain <= 0 and gained.high < USEFUL_GAIN
    shows_reference = not context.teacher_placeholders <= set(PUBLIC)
    if not (is_worse or (is_useless and shows_reference)):
        return None
    student = teacher - gained.gain
    numbers = (
        f"{teacher:.1%} right with it in the prompt, {student:.1%} without ({split}, {gained.problems} problems, "
        f"difference {100 * gained.gain:+.1f} points, 95 % interval {100 * gained.low:.1f} to {100 * gained.high:.1f})"
    )
    what = "the solution" if "solution" in context.teacher_placeholders else f"context={context.name}"
    if student >= LITTLE_LEFT:
        return Verdict("context", f"{what} adds nothing to what this model can do: {numbers}; use harder problems")
    return Verdict(
        "context",
        f"{what} does not help this model: {numbers}, so there is nothing to learn from such a teacher; look at both "
        f"prompts with --dry-run and at evaluations/step_000000_{split}_teacher.jsonl, then try another context or a "
        "larger model",
    )


def about_same_prompts(config: Config, prompts: Sequence[PromptPair]) -> Verdict | None:
    """Problems whose teacher is shown what the student is shown, though the context has something to show."""
    context = Context(config.context)
    if context.teacher == context.student and context.teacher_system is None:
        return None
    same = sum(pair.student_ids == pair.teacher_ids for pair in prompts)
    if not same:
        return None
    return Verdict(
        "same_prompts",
        f"the teacher's prompt is the same as the student's in {same:,} of {len(prompts):,} training problems, "
        f"although context={context.name} has more to show: nothing is learnt from these; look at one with --dry-run",
    )


def about_bfloat16_states(config: Config, lost: float) -> Verdict | None:
    """`lost` is the share of the trained weights (of this rank) that an update of optim.lr, AdamW's usual one, does not
    change."""
    if lost < FEW_LOST:
        return None
    return Verdict(
        "bfloat16_states",
        f"optim.state_dtype=bfloat16: {lost:.0%} of the trained weights are so large that an update of "
        f"optim.lr={config.optim.lr:g} is rounded away, so these do not learn; use optim.state_dtype=float32, an "
        "adapter (lora=r16), or a larger optim.lr",
    )


def about_cut_evaluation(evaluation: Evaluation, settings: EvalSettings) -> Verdict | None:
    """Completions that end before they state an answer count as wrong."""
    if evaluation.truncated < CUT_SHARE:
        return None
    return Verdict(
        "evaluation_cut",
        f"{evaluation.truncated:.0%} of the evaluation's completions were cut by the length limit, and one that states "
        f"no answer counts as wrong; raise eval.max_completion_tokens (now {settings.max_completion_tokens})",
    )


def about_unstated_answers(evaluation: Evaluation) -> Verdict | None:
    """Accuracy is 0 where no completion states an answer, whatever the model knows."""
    if evaluation.stated >= FEW_STATED:
        return None
    return Verdict(
        "unstated",
        f"only {evaluation.stated:.1%} of the completions state an answer in a form that is understood, so accuracy "
        "says little: ask for one with dataset.instruction, or raise eval.max_completion_tokens "
        f"({evaluation.truncated:.0%} were cut); docs/data.md lists the forms",
    )


def prompt_notes(template: str, ending: str, *, date: str | None) -> list[str]:
    """What the template does that the user should know of, a line each."""
    notes = []
    if CLOCK in template:
        notes.append(f"chat template: it asks for the date and is told {date} (prompts.date)")
    if opens_thinking(ending):
        notes.append("chat template: it opens a block of thinking; a reference solution closes it before it begins")
    return notes


def prompt_warnings(
    tokenizer: Any, prompt_ids: Sequence[int], *, vocabulary: int | None, generation: Any | None
) -> dict[str, str]:
    """Name -> what may be wrong with prompts and completions. `prompt_ids` is one prompt; `vocabulary` how many ids the
    model has (None: not known); `generation` its settings for generation, if it has any."""
    warnings = {}
    bos = tokenizer.bos_token_id
    if bos is not None and bos not in prompt_ids[:1] and tokenizer("a").input_ids[:1] == [bos]:
        warnings["no_bos"] = (
            f"prompts begin without the beginning-of-sequence token {tokenizer.bos_token!r} that the tokenizer puts "
            "before a text; if the model was trained with it, use a chat template that writes it: "
            "model.chat_template=FILE"
        )
    suppressed = [] if generation is None else [name for name in SUPPRESSING if vars(generation).get(name)]
    if suppressed:
        warnings["suppressed"] = (
            f"the model's generation settings have {', '.join(suppressed)}, which is not applied: completions may hold "
            "tokens that the model does not give elsewhere"
        )
    if vocabulary is not None and (missing := vocabulary - len(tokenizer)) > 0:
        warnings["no_token"] = (
            f"the model has {missing} more ids than its tokenizer has tokens; one that is drawn all the same stands "
            "for no text, and is graded as if it were not there"
        )
    return warnings
