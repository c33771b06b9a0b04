"""The typed `Config`: the sections of a run, their types and ranges. What goes with what, `opsd_cli.checks` says. No
field has a default: defaults live in `recipes/` only, and a test keeps the two key sets equal."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from opsd_cli.settings.registry import (
    RegisteredDataset,
    RegisteredDivergence,
    RegisteredGrader,
    RegisteredLauncher,
    RegisteredSampler,
    RegisteredTeacher,
    RegisteredTokenRule,
    settings,
)

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Signed = Annotated[float, Field(ge=-1, le=1)]
Power = Annotated[float, Field(ge=0)]
PassPowers = Annotated[tuple[Power, Power], Field(strict=False)]
Strings = Annotated[tuple[str, ...], Field(strict=False)]
Control = Literal["none", "shuffled", "first_step", "all_but_last", "wrong"]

Variables = Annotated[tuple[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*=")], ...], Field(strict=False)]

FIGURE = r"^(((teacher_|retention_)?(before|after))|completion_tokens)=\d+(\.\d+)?\+-\d+(\.\d+)?$"
Figures = Annotated[tuple[Annotated[str, Field(pattern=FIGURE)], ...], Field(strict=False)]

DATE = r"^\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])$"
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$"


@settings
class RunSettings:
    name: Annotated[str, Field(pattern=RUN_NAME)] | None  # None: from recipe, method and model, then numbered
    root: str  # folder that holds run folders
    seed: NonNegative


@settings
class TrainSettings:
    steps: NonNegative
    seconds: Annotated[float, Field(gt=0)] | None  # that steps may take together; None: no limit
    problems_per_step: Positive
    rollouts_per_problem: Positive
    updates_per_step: Positive  # optimizer updates on the rollouts of one step; above 1 the later ones are off-policy
    micro_batch_tokens: Positive  # tokens (student or teacher, the larger) of one forward and backward
    share_prompts: bool  # rollouts of a problem, where they are scored together, run a prompt that they share once
    gradient_checkpointing: bool
    offload_activations: bool  # what checkpointing keeps of the student's pass lies in host memory
    mlp_tiles: Positive  # pieces in which the MLPs take a micro-batch's tokens
    halve_on_oom: bool  # repeat a step that runs out of memory, in micro-batches of half the size


@settings
class SamplingSettings:
    max_completion_tokens: Positive
    temperature: Annotated[float, Field(ge=0)]  # 0 is greedy
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: NonNegative  # 0 is off


@settings
class PromptSettings:
    system: str | None  # a system message before both prompts
    max_tokens: Positive  # of either prompt
    overflow: Literal["drop", "shorten"]  # shorten cuts the privileged context only
    max_dropped_share: Share  # more than this share of problems dropped is an error
    student_thinking: bool
    teacher_thinking: bool
    allow_different_endings: bool
    control_tokens: Literal["refuse", "escape"]  # in the data: an error, or made harmless
    date: Annotated[str, Field(pattern=DATE)] | None  # that a template is told; None: of the run's start
    student_variables: Variables  # NAME=VALUE, for the chat template
    teacher_variables: Variables


@settings
class LossSettings:
    temperature: Annotated[float, Field(gt=0)]  # both logits are divided by it
    mask_truncated: bool  # completions cut by the length limit carry no loss
    importance_cap: Annotated[float, Field(gt=0)] | None  # cap of p_now / p_sampler, a factor on each token; None: off
    chunk_mib: Positive | None  # bound of the [n, V] products of the loss, all passes together; None: by the device
    reduction: Literal["token", "sequence", "problem"]  # what weighs alike in the mean over a step
    logits_dtype: Literal["auto", "float32"]  # of both roles' logits; auto: the type of the model's head


@settings
class EvalSettings:
    split: Literal["validation", "test"]
    problems: NonNegative  # 0: no evaluation; more than available: all
    samples: Positive  # completions of each problem
    second_grader: str | None  # a grader that is asked too; None: none
    every: NonNegative  # steps; 0 is only before and after
    before: bool
    teacher_prompt: bool  # also measure accuracy under the teacher's prompt
    max_completion_tokens: Positive
    temperature: Annotated[float, Field(ge=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: NonNegative  # 0 is off
    max_rows: Positive  # completions generated at once
    cache_tokens: Positive  # rows x positions of the key-value cache


@settings
class CheckpointSettings:
    every: NonNegative  # steps; 0 is only at the end or on a signal
    keep_last: Annotated[int, Field(ge=2)]  # 1 is refused: a failed save would leave nothing


@settings
class SampleSettings:
    every: NonNegative  # steps; 0 is never
    count: Positive  # rollouts each time


@settings
class ModelSettings:
    path: str  # hub id, local folder, or `bundled:tiny`
    revision: str | None
    checkpoint: str | None  # of a run of opsd's: a folder checkpoints/step_N, whose weights are put into the model
    dtype: Literal["auto", "float32", "float16", "bfloat16"]  # auto: what every rank's device can (engine.device)
    attention: Literal["sdpa", "eager", "flash_attention_2"]
    quantize: Literal["none", "4bit"]  # of what is frozen under LoRA
    dropout: bool  # in training, as the model's own config says; false: none
    # Of model/ with adapters merged; auto: that of the weights, or float32 where it would lose what was learnt.
    export_dtype: Literal["auto", "weights", "float32"]
    trust_remote_code: bool
    chat_template: str | None  # file with a Jinja chat template to use in place of the tokenizer's
    max_completion_tokens: Positive | None  # lowers the recipe's limits (settings.composition); None: off
    teacher: str | None  # a larger model with the same tokenizer, for teacher=external


@settings
class ContextSettings:
    """What each role is shown. Placeholders: {{question}} {{instruction}}; the teacher's also {{solution}} {{answer}},
    and those made from a step's rollouts, {{sibling}} {{feedback}}."""

    name: str
    student: str
    teacher: str
    teacher_system: str | None  # a system message that the teacher alone has
    # What a teacher sees instead of its problem's solution; shuffled: another problem's.
    control: Control
    for_both: Strings  # columns that the student may be shown too
    sibling: Literal["correct", "any", "majority", "shortest", "longest"]  # which rollout {{sibling}} is
    verdicts: Literal["reference", "majority", "none"]  # which rollouts are right, for the context and tokens.keep
    write: str | None  # a message that asks the policy, in the step, for the text that {{written}} shows
    write_tokens: Positive  # of such a text


@settings
class OptimSettings:
    lr: Annotated[float, Field(gt=0)]
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)]
    eps: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: NonNegative
    max_grad_norm: Annotated[float, Field(gt=0)]
    state_dtype: Literal["float32", "bfloat16"]  # of AdamW's moments and of the weights that it updates


@settings
class ZeroSettings:
    stage: Annotated[int, Field(ge=0, le=3)]
    offload_optimizer: Literal["none", "cpu"]
    offload_parameters: Literal["none", "cpu"]  # stage 3 only
    bucket_mib: Positive  # gradient and all-gather bucket, MiB
    hpz_ranks: Positive  # ranks of a node, that hold all parameters between them for the backward pass; 1: off
    overlap: bool  # gradients are reduced while the backward pass goes on
    persist_below: NonNegative  # stage 3 only: parameters of no more numbers than this stay whole on every rank
    gather: Literal["auto", "model", "layer"]  # stage 3 only: what is whole at once while completions are drawn


@settings
class LoraSettings:
    rank: NonNegative  # of the adapters of peft; 0: all weights are trained
    alpha: Positive
    dropout: Annotated[float, Field(ge=0, lt=1)]
    targets: Strings  # module names, or ["all-linear"]


@settings
class SupportSettings:
    side: Literal["full", "teacher", "student", "union"]  # whose k likeliest tokens; full: all tokens, exact
    k: Positive
    rest: Literal["renormalise", "tail", "drop"]  # how the rest of the probability is treated


@settings
class ClipSettings:
    kind: Literal["none", "entry", "neutral", "token"]
    limit: Annotated[float, Field(gt=0)]  # nats


@settings
class TargetSettings:
    kind: Literal["teacher", "barycentre", "guided", "average"]
    # barycentre: share of the teacher; guided: strength, below 0 towards other; average: share of other.
    weight: Annotated[float, Field(ge=-1)]
    temperature: Annotated[float, Field(gt=0)]  # the teacher's own: its log-probabilities are divided by it
    other: Literal["none", "free", "wrong", "reference_only", "view"]  # guided, average: the prompt of the second pass
    view: str | None  # with other=view, the message of the second pass, as context.teacher


@settings
class TokenSettings:
    """Which completion tokens carry loss, and how much (`loss.token_weights`). Rules multiply."""

    skip_first: NonNegative  # tokens at the start of a completion without loss
    first: NonNegative  # tokens of a completion that may carry loss, from its start; 0: all
    prefix_nats: Annotated[float, Field(ge=0)]  # the teacher's entropy, summed along it, that ends a prefix; 0: none
    prefix_of: Literal["all", "wrong"]  # the completions that first and prefix_nats cut
    ramp: Share  # weights rise from 1 - ramp to 1 + ramp along a completion
    skip_special: bool  # no loss on control tokens, except the end of the sequence
    keep: Literal["all", "correct", "wrong"]  # rollouts by their answer
    pass_powers: PassPowers  # a, b: a problem weighs p^a (1 - p)^b by the share p of its right rollouts; 0, 0: as all
    gate: Literal["none", "student_entropy", "teacher_entropy", "entropy_gap", "privilege", "right_answer"]
    gate_min: float  # nats; above it a token passes
    gate_width: Annotated[float, Field(ge=0)]  # nats; over which the factor changes; 0: at once
    gate_low: Signed  # factor of a token that does not pass; below 0 it pushes away from the target
    gate_high: Signed  # factor of a token that passes


@settings
class GuardSettings:
    action: Literal["off", "warn", "stop"]  # stop: restore the best checkpoint and end
    window: Positive  # steps averaged; the first window is what later ones are compared with
    entropy_ratio: Annotated[float, Field(gt=1)]  # student entropy over its first window's, or below its inverse
    entropy_gap: Annotated[float, Field(gt=0)]  # nats; student entropy over the teacher's, above the first window's
    length_ratio: Annotated[float, Field(gt=1)]  # completion length, likewise
    truncated_share: PositiveShare  # completions cut by the length limit
    repeated_share: PositiveShare  # completions that repeat themselves
    leak_share: PositiveShare  # completions that speak of the reference
    accuracy_drop: PositiveShare  # of held-out accuracy below the best so far
    spike_ratio: Annotated[float, Field(gt=1)]  # the objective over its mean in the window before; only ever a warning
    nonfinite_patience: Positive  # refused updates in a row after which the run stops, guard or not


@settings
class TrackSettings:
    to: Literal["none", "tensorboard", "wandb", "trackio", "mlflow"]
    project: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._/-]{0,99}$")]


@settings
class ExpectedSettings:
    """What a run of a recipe came to, which `opsd report --check` compares others with (insight.expected). Data only:
    nothing of it changes a run."""

    figures: Figures  # NAME=VALUE+-TOLERANCE
    problems: NonNegative | None  # held-out problems that the accuracies are of
    version: str | None  # of opsd that made them
    model: str | None  # fingerprint of the weights it began with
    dataset: str | None  # fingerprint of the data
    source: str | None  # where and how they were measured


@settings
class Config:
    """One run. A plug-in section holds the registered dataclass of the chosen name."""

    run: RunSettings  # where the run is kept, and its seed
    train: TrainSettings  # the loop's numbers
    sampling: SamplingSettings  # how completions are drawn
    prompts: PromptSettings  # how a problem becomes two prompts
    loss: LossSettings  # from two hidden states to one number per token
    eval: EvalSettings  # held-out accuracy before, during and after training
    checkpoint: CheckpointSettings  # what a resume needs, how often, how many
    samples: SampleSettings  # rollouts written to samples.jsonl
    model: ModelSettings  # which causal language model
    context: ContextSettings
    optim: OptimSettings  # AdamW, its schedule and the clip
    zero: ZeroSettings  # how DeepSpeed shards
    lora: LoraSettings  # low-rank adapters
    support: SupportSettings  # the part of the vocabulary a divergence is taken over (loss.support)
    clip: ClipSettings  # how tokens with a large divergence are limited (loss.clip)
    target: TargetSettings  # the teacher's pass, perhaps mixed with others (teachers.mixtures)
    tokens: TokenSettings
    guard: GuardSettings  # what happens when a run drifts (rank.drift_monitor)
    track: TrackSettings  # where else the run is shown (launch.tracking)
    expected: ExpectedSettings
    dataset: RegisteredDataset
    divergence: RegisteredDivergence
    grader: RegisteredGrader
    launcher: RegisteredLauncher
    sampler: RegisteredSampler
    teacher: RegisteredTeacher
    token_rule: RegisteredTokenRule
