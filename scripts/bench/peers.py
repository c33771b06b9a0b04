"""The contenders of `step.py`, each run by it in a process of its own: `python peers.py NAME WORKLOAD FOLDER`. The last
line printed is what was measured, as JSON. Owns how a user of each library would write this step; nothing of opsd is
used but the problems and their wording.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import json
import os
import resource
import statistics
import sys
import time

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, TrainerCallback

CONTEXT = (
    "\n\nReference solution:\n{privileged_context}\n\nUnderstand the reference solution, then solve the problem "
    "yourself, in your own words."
)


def problems(count: int) -> list[tuple[str, str]]:
    """Question and solution, as `recipe=quickstart` trains on them."""
    from opsd_cli.data.arithmetic import Arithmetic
    from opsd_cli.preflight import check
    from opsd_cli.settings.recipe_files import find_folders

    _, (member,) = check(["recipe=quickstart"], find_folders())
    dataset = member.config.dataset
    assert isinstance(dataset, Arithmetic)
    return [(problem.question, problem.solution) for problem in dataset.load().train[:count]]


def model_and_tokenizer(work: dict) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    dtype = torch.bfloat16 if work["gpu"] else torch.float32
    tokenizer, device = AutoTokenizer.from_pretrained(work["model"]), torch.device(device_of(work))
    if work["shape"] is None:
        model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=dtype, attn_implementation="sdpa")
        return model.to(device), tokenizer
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Qwen3Config(**work["shape"], max_position_embeddings=4096, **ids)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa"), tokenizer


def device_of(work: dict) -> str:
    return "cuda" if work["gpu"] and torch.cuda.is_available() else "cpu"


def peak_gib(work: dict) -> float:
    if device_of(work) == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def synchronize(work: dict) -> None:
    if device_of(work) == "cuda":
        torch.cuda.synchronize()


def run_trl(work: dict, folder: str) -> dict[str, float]:
    """A step at `completion` tokens; on a card, where `generate` takes half a minute for them, at an eighth and a
    quarter of them, and in a straight line from there: nothing in a step grows more slowly."""
    if work["shape"] is None:
        return trl_step(work, folder)
    short, longer = (work | {"completion": max(1, work["completion"] // part)} for part in (8, 4))
    low, high = trl_step(short, folder), trl_step(longer, folder)
    slope = (high["step"] - low["step"]) / max(1, longer["completion"] - short["completion"])
    step = high["step"] + slope * (work["completion"] - longer["completion"])
    print(f"# trl: {low['step']:.2f} s at {short['completion']} tokens, {high['step']:.2f} at {longer['completion']}",
          file=sys.stderr)  # fmt: skip
    return {"step": step, "peak_gib": high["peak_gib"]}


def trl_step(work: dict, folder: str) -> dict[str, float]:
    """trl.experimental.sdft with full_logits: alpha 0 is the forward KL, the teacher the base model."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    model, tokenizer = model_and_tokenizer(work)
    made = problems(work["problems"] * work["steps"])
    # With a shape the base model is the teacher, by switching the adapter off; a copy would be loaded from a folder.
    adapter = None if work["shape"] is None else LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    rows = [{"prompt": [{"role": "user", "content": q}], "privileged_context": s} for q, s in made]
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: object, **more: object) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *args: object, **more: object) -> None:
            synchronize(work)
            ends.append(time.perf_counter())

    least = work["completion"] if work["gpu"] else 0  # random weights then draw as many tokens as ours
    rows_at_once = work["micro_batch_rows"] or work["problems"]
    settings = SDFTConfig(
        output_dir=folder, max_steps=work["steps"], per_device_train_batch_size=rows_at_once, num_generations=1,
        gradient_accumulation_steps=work["problems"] // rows_at_once,
        max_completion_length=work["completion"], max_prompt_length=None, temperature=1.0, learning_rate=work["lr"],
        adam_beta2=0.95, weight_decay=0.0, max_grad_norm=1.0, warmup_steps=0, lr_scheduler_type="constant",
        distillation_mode="full_logits", distillation_alpha=0.0, teacher_model_kind="base", disable_dropout=True,
        teacher_prompt_template="{prompt}" + CONTEXT, gradient_checkpointing=work["gpu"], bf16=work["gpu"],
        use_cpu=device_of(work) == "cpu", generation_kwargs={"min_new_tokens": least},
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        SDFTTrainer(
            model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            callbacks=[Clock()], peft_config=adapter,
        ).train()  # fmt: skip
    seconds = [after - before for before, after in itertools.pairwise(ends)][work["skip"] :]
    found = {"step": statistics.median(seconds), "peak_gib": peak_gib(work)}
    del model
    gc.collect()  # trainers stand in circles of references
    if device_of(work) == "cuda":
        torch.cuda.empty_cache()
    return found


def run_deepspeed(work: dict, folder: str) -> dict[str, float]:
    """DeepSpeed's HybridEngineRollout and generalized_jsd_loss around a ZeRO engine, the teacher a frozen copy."""
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29555",
    }
    if not work["gpu"]:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.runtime.rollout.base import RolloutRequest, SamplingConfig
    from deepspeed.runtime.rollout.hybrid_engine_rollout import HybridEngineRollout
    from deepspeed.runtime.rollout.opsd import generalized_jsd_loss

    model, tokenizer = model_and_tokenizer(work)
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=work["lr"], betas=(0.9, 0.95), weight_decay=0.0)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": work["problems"], "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0, "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": work["gpu"]},
        },
    )  # fmt: skip
    device = next(model.parameters()).device
    if work["gpu"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    sampling = SamplingConfig(max_new_tokens=work["completion"], temperature=1.0)
    rollout_engine = HybridEngineRollout(engine, tokenizer)
    seconds: dict[str, list[float]] = {name: [] for name in ("step", "sample", "score", "update")}
    lengths: list[float] = []
    made = problems(work["problems"] * work["steps"])

    def padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, prompts))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        return ids, mask

    def response_logits(lm: torch.nn.Module, prompts: tuple[Tensor, Tensor], response: Tensor, mask: Tensor) -> Tensor:
        ids, prompt_mask = prompts
        whole_mask = torch.cat([prompt_mask, mask], dim=1)
        positions = (whole_mask.cumsum(dim=1) - 1).clamp(min=0)
        logits = lm(
            input_ids=torch.cat([ids, response], dim=1), attention_mask=whole_mask, position_ids=positions,
            use_cache=False, logits_to_keep=response.shape[1] + 1,
        ).logits  # fmt: skip
        return logits[:, :-1].float()

    def chat(texts: list[str]) -> tuple[Tensor, Tensor]:
        turns = [[{"role": "user", "content": text}] for text in texts]
        return padded([tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"] for turn in turns])

    def now() -> float:
        synchronize(work)
        return time.perf_counter()

    for step in range(work["steps"]):
        batch = made[step * work["problems"] : (step + 1) * work["problems"]]
        begin = now()
        student_prompts = chat([question for question, _ in batch])
        teacher_prompts = chat([question + CONTEXT.format(privileged_context=solution) for question, solution in batch])
        engine.eval()
        drawn = rollout_engine.generate(RolloutRequest(*student_prompts), sampling)
        engine.train()
        width = student_prompts[0].shape[1]
        response, mask = drawn.input_ids[:, width:], drawn.attention_mask[:, width:]
        sampled = now()
        with torch.no_grad():
            teacher_logits = response_logits(teacher, teacher_prompts, response, mask)
        scored = now()
        student_logits = response_logits(engine, student_prompts, response, mask)
        engine.backward(generalized_jsd_loss(student_logits, teacher_logits, mask, beta=0.0).loss)
        engine.step()
        end = now()
        for name, taken in zip(seconds, (end - begin, sampled - begin, scored - sampled, end - scored), strict=True):
            seconds[name].append(taken)
        lengths.append(float(mask.sum()) / len(mask))
    found = {name: statistics.median(values[work["skip"] :]) for name, values in seconds.items()}
    return found | {"peak_gib": peak_gib(work), "completion": statistics.median(lengths[work["skip"] :])}


def main() -> None:
    name, work, folder = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
    found = {"trl": run_trl, "deepspeed": run_deepspeed}[name](work, folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
