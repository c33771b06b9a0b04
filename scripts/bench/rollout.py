"""Benchmark: completions drawn per second, from prompts to token ids; ours beside transformers and DeepSpeed.

    python scripts/bench/rollout.py          # the bundled tiny model, about three minutes on one core
    python scripts/bench/rollout.py --full   # a 100 M-parameter Qwen3 from config as well
    python scripts/bench/rollout.py --gpu    # Qwen3-1.7B from config, random weights, bfloat16; under two minutes

`ours` is the static sampler; `any model` is the same with the model's own forward, as for architectures it does not
know; `generate` is transformers' with a static batch, prompts in the order of the dataset; `deepspeed` DeepSpeed's
HybridEngineRollout with the same batches, which goes on to the limit where completions end early (its continuous
batches and its graphs are for greedy decoding only, its shared prefill for its kernels for GPUs); `continuous` is
transformers' generate_batch without warm-up. Equal lengths: every prompt and completion as long as the others.
Ragged: the tiny model at temperature 1 until it ends. Long tail: random weights and an end token among every 32 (on a
GPU 64), which gives lengths a geometric distribution. Groups: 8 rollouts of each prompt. On a GPU the table has the
milliseconds of each case as well, and only `ours` and `generate` unless --full is given. Owns the cases;
`decode_token.py` takes single tokens apart.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
import yaml
from measure import arguments, interleaved, report, start
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    Qwen3Config,
)

from opsd_cli.data.arithmetic import Arithmetic
from opsd_cli.engine.loading import LoadedModel, Source, load_causal, load_tokenizer, resolve
from opsd_cli.engine.process_group import alone
from opsd_cli.sampling.batch_decoder import BatchLimits, decode
from opsd_cli.sampling.choose_decoder import Completer
from opsd_cli.sampling.hf_decoder import HFDecoder
from opsd_cli.sampling.token_sampling import Draw
from opsd_cli.settings.config import SamplingSettings

REPOSITORY = Path(__file__).resolve().parents[2]
NEVER = (-1,)
OTHERS = ("generate", "deepspeed", "continuous")
CACHE_TOKENS = 131072
SIZES = {
    "tiny, random": {
        "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    },
    "100 M, random": {
        "vocab_size": 32000, "hidden_size": 640, "intermediate_size": 1920, "num_hidden_layers": 14,
        "num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 64,
    },
    "1.7 B, random": {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 4096,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is drawn, from which model, with how many rows at once."""

    name: str
    lm: PreTrainedModel
    draws: list[Draw]
    rows: int
    limit: int
    end_ids: tuple[int, ...]

    @property
    def sampling(self) -> SamplingSettings:
        return SamplingSettings(max_completion_tokens=self.limit, temperature=1.0, top_p=1.0, top_k=0)

    @property
    def generation(self) -> GenerationConfig:
        return GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=self.limit,
            eos_token_id=list(self.end_ids), pad_token_id=0,
        )  # fmt: skip


def ours(case: Case, completer: Completer) -> list[int]:
    made = completer.complete(
        case.draws, sampling=case.sampling, limits=BatchLimits(case.rows, CACHE_TOKENS), should_stop=lambda: False
    )
    return [len(done.ids) for done in made]


def any_model(case: Case) -> list[int]:
    made = decode(
        HFDecoder(case.lm, pad_id=0), case.draws, sampling=case.sampling, end_ids=case.end_ids,
        limits=BatchLimits(case.rows, CACHE_TOKENS), should_stop=lambda: False,
    )  # fmt: skip
    return [len(done.ids) for done in made]


def generate(case: Case) -> list[int]:
    return in_static_batches(
        case, lambda ids, mask: case.lm.generate(input_ids=ids, attention_mask=mask, generation_config=case.generation)
    )


def deepspeed(case: Case) -> list[int]:
    os.environ.setdefault("DS_ACCELERATOR", case.lm.device.type)
    from deepspeed.runtime.rollout.base import RolloutRequest, SamplingConfig
    from deepspeed.runtime.rollout.hybrid_engine_rollout import HybridEngineRollout

    sampling = SamplingConfig(max_new_tokens=case.limit, temperature=1.0)
    # Of the engine it reads the module, of the tokenizer these two.
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=list(case.end_ids))
    rollouts = HybridEngineRollout(SimpleNamespace(module=case.lm), tokenizer)
    return in_static_batches(case, lambda ids, mask: rollouts.generate(RolloutRequest(ids, mask), sampling).input_ids)


def in_static_batches(case: Case, draw: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> list[int]:
    """Batches of `rows` prompts, padded on the left; what stands after the first end token does not count."""
    torch.manual_seed(0)
    lengths: list[int] = []
    ends = torch.tensor(case.end_ids)
    for begin in range(0, len(case.draws), case.rows):
        prompts = [list(draw.prompt_ids) for draw in case.draws[begin : begin + case.rows]]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=case.lm.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=case.lm.device)
        made = draw(ids, mask)[:, width:].cpu()
        ended = torch.isin(made, ends)
        lengths += torch.where(ended.any(1), ended.int().argmax(1) + 1, made.shape[1]).tolist()
    return lengths


def continuous(case: Case) -> list[int]:
    page = 32
    longest = max(len(draw.prompt_ids) for draw in case.draws) + case.limit
    settings = ContinuousBatchingConfig(
        page_size=page, num_blocks=case.rows * (longest // page + 2), max_batch_tokens=2048,
        max_requests_per_batch=case.rows, return_logprobs=True, seed=0,
    )  # fmt: skip
    made = case.lm.generate_batch(
        [list(draw.prompt_ids) for draw in case.draws],
        generation_config=case.generation, continuous_batching_config=settings, warmup=False,
    )  # fmt: skip
    return [len(output.generated_tokens) for output in made.values()]


def measured(case: Case, options: argparse.Namespace) -> list[object]:
    """One row of the table."""
    completer = Completer(LoadedModel(case.lm, source=None), alone(), end_ids=case.end_ids, pad_id=0)
    ways: dict[str, Callable[[], list[int]]] = {
        "ours": lambda: ours(case, completer),
        "any model": lambda: any_model(case),
        "generate": lambda: generate(case),
        "deepspeed": lambda: deepspeed(case),
        "continuous": lambda: continuous(case),
    }
    if options.gpu and not options.full:  # each token of theirs takes as long as ten of ours
        ways = {name: ways[name] for name in ("ours", "generate")}
    lengths: dict[str, list[int]] = {}
    runs = {name: lambda name=name, way=way: lengths.update({name: way()}) for name, way in ways.items()}
    seconds = interleaved(runs, rounds=options.rounds, cpu_seconds=options.cpu_seconds)
    rates = {name: sum(lengths[name]) / seconds[name] for name in ways}
    print(
        f"# {case.name}, {case.rows} rows: " + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()),
        flush=True,
    )
    mean = sum(lengths["ours"]) / len(lengths["ours"])
    row = [case.name, len(case.draws), case.rows, f"{mean:.0f} / {max(lengths['ours'])}"]
    if options.gpu:
        row += [1000 * seconds[name] for name in ways]
    others = [rates["ours"] / rates[name] for name in OTHERS if name in ways]
    return [*row, *rates.values(), *others]


def heads(options: argparse.Namespace) -> list[str]:
    """Of the columns of `measured`."""
    ways = ["ours", "any model", *OTHERS]
    ways = ["ours", "generate"] if options.gpu and not options.full else ways
    first = ["tokens per second", "completions", "rows", "length: mean / longest"]
    milliseconds = [f"{name}, ms" for name in ways] if options.gpu else []
    return [*first, *milliseconds, *ways, *(f"ours / {name}" for name in OTHERS if name in ways)]


def tiny_cases() -> list[Case]:
    """The bundled tiny model on the questions it was made for, and its shape with random weights."""
    source = Source(resolve("bundled:tiny", None, key="model.path")[0], None, torch.float32, "sdpa", False, True)
    lm, tokenizer = load_causal(source), load_tokenizer(source)
    fields = yaml.safe_load((REPOSITORY / "recipes" / "dataset" / "arithmetic.yaml").read_text())
    del fields["name"]
    problems = Arithmetic(**fields).load().train
    chats = [[{"role": "user", "content": problem.question}] for problem in problems]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    lengths = [len(prompt) for prompt in prompts]
    common = max(set(lengths), key=lengths.count)
    equal = [prompt for prompt in prompts if len(prompt) == common]
    ends = (tokenizer.eos_token_id,)
    return [
        Case("tiny, equal", lm, draws(equal[:16]), 16, 32, NEVER),
        Case("tiny, equal", lm, draws(equal[:64]), 64, 32, NEVER),
        Case("tiny, ragged", lm, draws(prompts[:16]), 16, 64, ends),
        Case("tiny, ragged", lm, draws(prompts[:256]), 64, 64, ends),
        Case("tiny, groups of 8", lm, draws(prompts[:32], rollouts=8), 64, 64, ends),
        long_tail("tiny, random", prompts=256, width=40, limit=128, every=32, device=torch.device("cpu")),
    ]


def random_cases(size: str, *, rounds_of: int, width: int, limit: int, every: int, device: torch.device) -> list[Case]:
    """Equal lengths at 16 and 64 rows, a long tail, and groups, of a model from config."""
    tail = long_tail(size, prompts=64 * rounds_of, width=width, limit=limit, every=every, device=device)
    prompts = [list(draw.prompt_ids) for draw in tail.draws]
    longest = max(prompts, key=len)
    equal = draws([longest[i % len(longest) :] + longest[: i % len(longest)] for i in range(64)])
    groups = draws(prompts[: 8 * rounds_of], rollouts=8)
    return [
        Case(f"{size}, equal", tail.lm, equal[:16], 16, limit // 4, NEVER),
        Case(f"{size}, equal", tail.lm, equal, 64, limit // 4, NEVER),
        tail,
        Case(f"{size}, groups of 8", tail.lm, groups, 64, limit, tail.end_ids),
    ]


def long_tail(size: str, *, prompts: int, width: int, limit: int, every: int, device: torch.device) -> Case:
    """Random weights, prompts of half to the whole width, and an end token among every so many."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        lm = AutoModelForCausalLM.from_config(Qwen3Config(**SIZES[size]), dtype=dtype, attn_implementation="sdpa")
    vocabulary = SIZES[size]["vocab_size"]
    lengths = torch.randint(width // 2, width + 1, (prompts,)).tolist()
    ids = [torch.randint(1, vocabulary, (length,)).tolist() for length in lengths]
    ends = tuple(range(0, vocabulary, every))
    return Case(f"{size}, long tail", lm.eval(), draws(ids), 64, limit, ends)


def draws(prompts: Sequence[Sequence[int]], *, rollouts: int = 1) -> list[Draw]:
    return [Draw(prompt, rollouts * i + g) for i, prompt in enumerate(prompts) for g in range(rollouts)]


def main() -> None:
    options = arguments(__doc__ or "", takes=("full", "small", "rounds", "cpu_seconds")).parse_args()
    options.rounds = options.rounds or (1 if options.gpu else 3)
    device = start(options)
    transformers.logging.set_verbosity_error()
    cases = [] if options.gpu else tiny_cases()
    if options.small:
        cases += random_cases("tiny, random", rounds_of=1, width=16, limit=8, every=8, device=device)
    elif options.gpu:
        cases += random_cases("1.7 B, random", rounds_of=2, width=512, limit=256, every=64, device=device)
    elif options.full:
        cases += random_cases("100 M, random", rounds_of=1, width=64, limit=64, every=32, device=device)
    report(options, heads(options), [measured(case, options) for case in cases])


if __name__ == "__main__":
    main()
