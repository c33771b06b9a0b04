"""Write the picture of imports and the file tree of docs/code.md: every file of opsd_cli with at most five words.

    python scripts/make_file_tree.py            # writes the tree where it has changed
    python scripts/make_file_tree.py --check    # writes nothing; exit 1 when it is out of date

A folder's line is the docstring of its `__init__.py`; a file's words are in WORDS below. A file without words, words
without a file and more than five words are errors, so that a new, renamed or deleted file is noticed.
tests/test_docs.py checks it.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from graphlib import TopologicalSorter
from pathlib import Path

import grimp

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "opsd_cli"
PAGE = REPOSITORY / "docs" / "code.md"
MOST_WORDS = 5
COLUMN = 26  # at which the words begin

WORDS: dict[str, dict[str, str]] = {
    "": {
        "cli": "words to an exit code",
        "plugins": "imports every built-in part",
        "preflight": "checks a command line whole",
        "checks": "all rules between settings",
    },
    "api": {
        "session": "composes, samples, trains in process",
        "measured_session": "measures what looks need",
        "saved_run": "a run for notebooks",
        "checkup": "doctor: data, files, weights",
        "prompt_checkup": "doctor: templates and prompts",
        "trial": "doctor: a step in small",
        "probe": "student and teacher before training",
        "exporting": "a checkpoint as model folder",
        "talking": "a model answers",
    },
    "commands": {
        "new": "writes a part to change",
        "train": "the train command",
        "evaluate": "the eval command",
        "export": "the export command",
        "generate": "prompts, files, chats",
        "harness": "tasks of lm-evaluation-harness",
        "completion": "Tab in bash, zsh, fish",
        "own_recipes": "edits, validates recipes",
        "sweep": "sweeps, and their ranked table",
        "members": "runs the members of sweeps",
        "watch": "follows one run or several",
        "plan": "memory and time, beforehand",
        "inspect": "shows prompts and tokens",
        "doctor": "machine and recipe, examined",
        "probe": "will training help",
        "compare": "arms over seeds",
        "runs": "lists runs, compares two",
        "report": "what came of runs",
        "recipes": "lists, shows, copies recipes",
        "flags": "argparse with one-line errors",
    },
    "settings": {
        "config": "the typed sections",
        "typed_config": "trees to Config and back",
        "compose": "Hydra, and only Hydra",
        "composition": "one choice of options, checked",
        "recipe_scan": "refuses code in recipes",
        "command_line": "grammar of the typed words",
        "registry": "name to frozen dataclass",
        "suggestions": "did you mean",
        "idle_settings": "settings that do nothing",
        "resume_rules": "what a resume may change",
        "plugin_files": "runs the user's plug-ins",
        "errors": "errors and exit codes",
        "paths": "paths as people type them",
        "recipe_nodes": "what recipes' YAML nodes say",
        "trees": "dotted keys in nested settings",
        "schema": "JSON Schema for editors",
        "memory_errors": "recognises that memory ran out",
        "recipe_files": "finds, reads, writes out recipes",
        "known_devices": "cards, clusters, their peaks",
    },
    "data": {
        "problems": "Problem, PromptPair, Rollout",
        "datasets": "GSM8K, files, hub datasets",
        "files": "files and folders to tables",
        "rows": "tables to checked problems",
        "cells": "messages, typed answers, nested columns",
        "hub": "explains hub failures, retries",
        "arithmetic": "generated word problems",
        "contexts": "who sees which text",
        "privileged": "what only teachers see",
        "prompts": "problems to token ids",
        "prompt_cache": "rendered prompts, kept",
        "control_tokens": "control tokens written in data",
        "chat": "chat templates and their endings",
        "template_renderer": "the child that renders them",
        "answers": "grades completions",
        "graders": "which completions are right",
        "second_opinion": "math-verify as a grader",
        "token_rules": "rules of the user's own",
        "answer_marks": "#### and boxed answers",
        "answer_forms": "numbers, letters, words, times, dates",
        "stated_answers": "finds the stated answer",
        "quantities": "numbers as people write them",
        "number_words": "numbers written out in words",
        "plain_text": "one way to write signs",
        "units": "quantities in different units",
        "references": "grades the references themselves",
        "microbatches": "plans micro-batches over ranks",
        "shared_rows": "sends rows to their scorers",
        "pairing": "aligns student and teacher tokens",
        "stream": "which problems steps take",
        "seeds": "randomness from seed, step, index",
    },
    "loss": {
        "types": "heads, scores, mixtures, losses",
        "aligned": "two distributions, token by token",
        "by_value": "gradients by autograd, and checks",
        "divergences": "formulas and their gradients",
        "routed": "one divergence or another",
        "clip": "limits large contributions",
        "support": "restricts to top tokens",
        "token_weights": "which tokens count",
        "token_factors": "gates, prefixes, importance",
        "chunked_head": "head and loss in chunks",
        "chunk_rows": "loss rows, PyTorch or kernel",
        "triton_rows": "the same in one kernel",
    },
    "teachers": {
        "teachers": "live, initial, ema, sync, blend",
    },
    "sampling": {
        "samplers": "static, dataset, mixtures of both",
        "vllm": "completions by vLLM",
        "vllm_engine": "vLLM in this process",
        "shared_engine": "vLLM in several ranks together",
        "vllm_transfer": "hands vLLM the weights",
        "sampler_trial": "other samplers beside the model",
        "apart": "sampling processes beside the ranks",
        "sampling_child": "one such process",
        "weight_channel": "messages and weights to them",
        "choose_decoder": "fast or transformers' own decoder",
        "batch_decoder": "rows enter and leave",
        "token_sampling": "draws one token",
        "static_decoder": "the same, captured on GPUs",
        "hf_decoder": "any model's own forward",
        "whole_row_decoder": "without a cache",
        "decoder_trial": "rows change, logits must not",
        "llama_decoder": "fast forward for Llama models",
        "llama_weights": "its weights and norms",
        "device_loop": "draws on a GPU, unattended",
        "graphs": "captures work in CUDA graphs",
        "paged_decoder": "fast forward for GPUs",
        "paged_attention": "a cache in pages",
        "attention_kernels": "the same in Triton",
        "drawing_kernels": "draws one token in Triton",
        "live_weights": "weights that graphs read",
    },
    "engine": {
        "base": "what both engines share",
        "plain": "one process, without DeepSpeed",
        "zero": "DeepSpeed around the policy",
        "zero_config": "what DeepSpeed is told",
        "deepspeed_internals": "DeepSpeed's private parts we use",
        "loading": "model, tokenizer, adapter",
        "model_files": "what lies in a folder",
        "loaded_weights": "loaded against asked for",
        "model_limits": "lengths, ids, teachers it allows",
        "policy": "a model as hidden states",
        "packed": "rows without padding",
        "neighbours": "long rows beside each other",
        "placement": "where sharded weights are whole",
        "small_cards": "MLPs in pieces, activations aside",
        "quantized": "frozen weights in 4 bits",
        "fused_attention": "aligns masks for GPU attention",
        "logits_check": "checks logits at load",
        "agreement": "how far two results differ",
        "update_norm": "how far an update moved",
        "weight_copies": "frozen and moving copies",
        "merging": "adapters merged by peft",
        "wide_adapters": "experts' adapters, in float32",
        "generation_view": "same weights, for generation",
        "layer_by_layer": "weights whole in one layer",
        "device": "devices and number formats",
        "flops": "operations of passes, utilisation",
        "process_group": "collectives outside DeepSpeed",
        "training_state": "what a checkpoint holds",
        "tensor_shards": "tensors in pieces, by name",
        "checkpoint": "saves, checks, prunes checkpoints",
        "saved_weights": "reads checkpoints without DeepSpeed",
        "fingerprint": "which weights were loaded",
        "atomic_files": "files that appear whole",
        "disk_space": "disk space a run needs",
        "export": "writes a Hugging Face folder",
    },
    "training": {
        "loop": "one step, and the loop",
        "engine_protocol": "what steps ask of engines",
        "interruptions": "stops, memory, numbers not finite",
        "time_budget": "seconds that steps may take",
        "step_report": "metrics, and rollouts to show",
        "clock": "seconds, operations, memory of steps",
    },
    "rank": {
        "entry": "main of one process",
        "context": "config, ranks, recorder, stop flag",
        "run_data": "data, tokenizer, prompts, read first",
        "data_checks": "refuses unfit data",
        "build_zero": "the engine of a run",
        "build": "config to live objects",
        "run": "resume, steps, evaluations, export",
        "plan": "how this run is computed",
        "measure": "evaluates, records, compares",
        "advice": "warnings before the first step",
        "alarms": "acts on monitored signs",
        "sampling_process": "a process that only draws",
        "recorder": "events and samples",
        "drift_monitor": "when to warn or stop",
        "from_initial": "KL from the initial policy",
    },
    "run": {
        "folder": "layout of the run folder",
        "rank_errors": "errors that ranks leave",
        "plugin_copies": "copies of plug-in files",
        "lock": "one process per run",
        "events": "events.jsonl and its metrics",
        "evaluations": "completions of each evaluation",
        "summary": "summary.json",
        "heartbeat": "signs of life of ranks",
    },
    "launch": {
        "start": "starts, resumes, checks a run",
        "launchers": "local, env",
        "over_ssh": "deepspeed: ranks on other machines",
        "slurm": "slurm: job and batch script",
        "submit": "submits jobs and follows them",
        "slurm_queue": "sbatch, squeue, scontrol, scancel",
        "slurm_job": "batch step of a job",
        "attempt": "one try at a run",
        "supervisor": "starts and ends ranks",
        "tracking": "the process that tracks",
        "watchdog": "notices ranks that hang",
        "process_groups": "children, signals, parents that die",
        "devices": "GPUs or CPU, how many",
        "ask_torch": "asks torch, in a process",
        "remote_rank": "what runners start elsewhere",
        "far_end": "checks and keeps one rank",
        "far_ranks": "orders to ranks elsewhere",
        "keeper": "starts and ends that rank",
        "hub": "where keepers meet",
        "link": "messages between two keepers",
        "runner_log": "what pdsh and ssh said",
        "torchrun_slurm": "ranks started from outside",
        "exit_messages": "says how a run ended",
        "rank_environ": "a rank's environment, cores, ports",
        "share": "cores, cards, ports between runs",
    },
    "insight": {
        "earlier_members": "what a sweep has left",
        "evaluation": "held-out accuracy",
        "paired": "is a change noise",
        "estimates": "numbers with their intervals",
        "prospects": "what a probe says",
        "arms": "arms beside each other",
        "findings": "what a look has found",
        "machine": "what the machine offers",
        "duplicates": "rows that are there twice",
        "at_k": "avg@k, pass@k, maj@k",
        "model_card": "README.md of exported models",
        "harness": "runs and reads lm-evaluation-harness",
        "history": "a run from its folder",
        "versus": "runs beside each other",
        "report": "what a report says",
        "expected": "a run against its recipe",
        "charts": "what a report draws",
        "track": "sends a run to trackers",
        "trackers": "TensorBoard, wandb, trackio, MLflow",
        "samples": "sample rollouts by token",
        "token_view": "what each role expected",
        "model_shape": "a model's matrices, counted",
        "architectures": "config.json to matrices",
        "older_architectures": "those before Llama",
        "model_lookup": "finds config.json, reads headers",
        "plan": "fits, what to change, growth",
        "plan_setup": "settings to what plans take",
        "plan_case": "what decides a rank's memory",
        "plan_drawing": "memory while completions are drawn",
        "plan_held": "memory between phases",
        "plan_memory": "peak memory, closed form",
        "plan_time": "seconds of a step",
    },
    "ui": {
        "display": "the screen of a run",
        "lines": "flowing facts, curves of blocks",
        "fleet": "the screen of several runs",
        "view": "events folded into a state",
        "frame": "one frame of the screen",
        "closing": "the last lines and tables",
        "theme": "consoles and number formats",
        "columns": "plain tables",
        "plots": "charts as SVG",
        "pages": "HTML without scripts; inspect's",
        "differences": "words of one text only",
        "inspect_text": "inspect on a terminal",
        "foresight_text": "what looks ahead say",
        "report_page": "a report as HTML",
        "report_text": "a report as text",
        "sample_view": "tokens shaded by divergence",
    },
    "safety": {
        "secrets": "finds and redacts secrets",
        "sandbox": "a killable child process",
        "commit_points": "where a test may kill",
        "terminal": "control codes made visible",
    },
    "cpu": {
        "matmul": "the faster CPU matrix product",
        "allocator": "keeps freed memory",
    },
    "testing": {
        "fault_points": "where tests make runs fail",
        "pretended_ranks": "ranks as threads",
    },
}


def main(arguments: Sequence[str]) -> int:
    """Write, or with --check compare; returns the exit code."""
    page = PAGE.read_text("utf-8")
    wanted = with_tree(page)
    if page == wanted:
        return 0
    print(f"{PAGE.name}: {'out of date' if '--check' in arguments else 'written'}")
    if "--check" in arguments:
        return 1
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


def with_tree(page: str) -> str:
    """The page with the tree and the picture of today between their marks."""
    for mark, lines in (("tree", tree_lines()), ("imports", import_lines())):
        text = "```text\n" + "\n".join(lines) + "\n```\n"
        page, count = re.subn(
            rf"(<!-- generated: {mark} -->\n).*?(<!-- end -->)",
            lambda m, text=text: m[1] + text + m[2],
            page,
            flags=re.DOTALL,
        )
        if count != 1:
            raise ValueError(f"{PAGE.name} has {count} places for {mark}")
    return page


def import_lines() -> Iterator[str]:
    """Which folder imports which, as a triangle: a folder stands above everything that it imports."""
    graph = grimp.build_graph("opsd_cli", exclude_type_checking_imports=True, cache_dir=None)
    uses: dict[str, set[str]] = {}
    for module in graph.modules:
        folder = folder_of(module)
        targets = {folder_of(name) for name in graph.find_modules_directly_imported_by(module)}
        uses[folder] = uses.get(folder, set()) | (targets - {folder})
    sorter = TopologicalSorter({name: sorted(uses[name]) for name in sorted(uses)})
    order = tuple(reversed(tuple(sorter.static_order())))
    width = max(map(len, order))
    yield " " * (width + 4) + " ".join(f"{number:>2}" for number in range(1, len(order) + 1))
    for number, name in enumerate(order, 1):
        cells = (" x" if other in uses[name] else " ." for other in order[number:])
        yield f"{number:>2} {name:<{width}} " + "   " * number + " ".join(cells)


def folder_of(module: str) -> str:
    """A module's folder; the four files beside the folders are one, and so are the names in `opsd_cli` itself."""
    parts = module.split(".")
    if len(parts) == 1:
        return "(version)"
    return parts[1] if (PACKAGE / parts[1]).is_dir() else parts[1] + ".py"


def tree_lines() -> Iterator[str]:
    """One line for each folder and file, in the order of WORDS."""
    folders = {path.parent.relative_to(PACKAGE).as_posix().removeprefix(".") for path in PACKAGE.rglob("*.py")}
    compare("folders", folders, {*WORDS})
    yield "opsd_cli/"
    for folder, words in WORDS.items():
        compare(f"files of opsd_cli/{folder}", {path.stem for path in (PACKAGE / folder).glob("[!_]*.py")}, {*words})
        if folder:
            yield f"  {folder}/".ljust(COLUMN) + purpose(folder)
        for name, description in words.items():
            if len(description.split()) > MOST_WORDS:
                raise ValueError(f"{folder}/{name}: more than {MOST_WORDS} words: {description}")
            yield f"{'    ' if folder else '  '}{name}.py".ljust(COLUMN) + description


def compare(what: str, there: set[str], described: set[str]) -> None:
    if there != described:
        raise ValueError(f"{what} without words: {sorted(there - described)}; not there: {sorted(described - there)}")


def purpose(folder: str) -> str:
    """What a folder is for: the first line of its docstring."""
    docstring = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text("utf-8")))
    if not docstring:
        raise ValueError(f"opsd_cli/{folder}/__init__.py has no docstring")
    return docstring.splitlines()[0]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
