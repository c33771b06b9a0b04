"""The bundled tiny model: its files, its tokenizer, the text it was made from, and that it does what its card says."""

from __future__ import annotations

import json
import re
import sys
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from hypothesis import given, settings, strategies
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from opsd_cli.data.arithmetic import NEW_WORDINGS, Arithmetic
from opsd_cli.data.contexts import Context, Privileged
from opsd_cli.settings.config import ContextSettings
from opsd_cli.settings.recipe_files import find_folders, written_out

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[1]
TINY = REPOSITORY / "opsd_cli" / "assets" / "tiny"
sys.path.insert(0, str(REPOSITORY / "scripts"))

from make_tiny_model import MIXTURE  # noqa: E402
from tiny.documents import TEACHER_PROMPT, draw_chats  # noqa: E402
from tiny.measure import accuracy, complete, student_prompts, teacher_prompts  # noqa: E402
from tiny.pretrain import encode, pack  # noqa: E402
from tiny.tokenizer import ASSISTANT, END, PAD, SYSTEM, USER  # noqa: E402

NEW_WORDS = re.compile(r"acquire|harvest|squander|forfeit|dozen|double|triple|halve|third|quarter", re.IGNORECASE)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def recipe(group: str, name: str) -> dict:
    return yaml.safe_load(written_out(find_folders(), group, name))


def test_the_shipped_weights_are_small_and_of_a_standard_architecture(model):
    assert (TINY / "model.safetensors").stat().st_size <= 3_000_000
    assert isinstance(model, Qwen3ForCausalLM)
    with safe_open(TINY / "model.safetensors", framework="pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118


def test_the_special_tokens_are_distinct_single_tokens(tokenizer, model):
    ids = [tokenizer.encode(token) for token in (PAD, END, USER, ASSISTANT, SYSTEM)]
    assert len({id for (id,) in ids}) == 5
    assert tokenizer.eos_token == END
    assert tokenizer.pad_token == PAD
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id


def test_the_chat_template_marks_every_turn(tokenizer):
    messages = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|system|>s<|end|><|user|>u<|end|><|assistant|>a<|end|>"
    )
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|system|>s<|end|><|user|>u<|end|><|assistant|>"


@given(strategies.text(strategies.characters(exclude_categories=["Cs"])))
@settings(deadline=None)
def test_any_text_survives_the_tokenizer(text):
    tokenizer = AutoTokenizer.from_pretrained(TINY) if not _HELD else _HELD[0]
    _HELD[:] = [tokenizer]
    assert tokenizer.decode(tokenizer.encode(text)) == text


_HELD: list = []


def test_numbers_are_split_into_digits(tokenizer):
    assert tokenizer.tokenize("31+905=") == ["3", "1", "+", "9", "0", "5", "="]


def test_no_pretraining_text_holds_a_new_word():
    assert all(NEW_WORDS.search(wording.sentence) for wording in NEW_WORDINGS)
    for chat in islice(draw_chats(Random("a test"), MIXTURE), 5000):
        assert not NEW_WORDS.search(chat.prompt + chat.completion)


def test_the_pretraining_prompt_is_what_the_solution_context_renders():
    context = Context(ContextSettings(**recipe("context", "solution")))
    problem = _stories(1)[0]
    shown = Privileged(problem.solution, problem.answer)
    text = TEACHER_PROMPT.format(question=problem.question, solution=problem.solution)
    assert context.teacher_text(problem, instruction="", shown=shown) == text
    assert context.student_text(problem, instruction="") == problem.question


def test_completions_are_cut_between_tokens_only(tokenizer):
    for chat in islice(draw_chats(Random("a test"), MIXTURE), 500):
        whole = tokenizer.encode(USER + chat.prompt + END + ASSISTANT + chat.completion + END)
        assert encode(chat, tokenizer)[0] == whole


def test_packed_rows_keep_chats_whole_and_apart(tokenizer):
    chats = list(islice(draw_chats(Random("a test"), MIXTURE), 40))
    rows = list(pack(iter(chats), tokenizer, row_tokens=256))
    assert {len(part) for row in rows for part in (row.ids, row.chats, row.positions, row.weights)} == {256}
    packed = [id for row in rows for id, chat in zip(row.ids, row.chats, strict=True) if chat >= 0]
    encoded = [id for chat in chats for id in encode(chat, tokenizer)[0]]
    assert packed == encoded[: len(packed)]


def test_the_stored_figures_are_those_of_a_student_with_a_gap_and_a_teacher_without():
    for figures in json.loads((TINY / "figures.json").read_text())["figures"].values():
        assert 0.30 <= figures["student"] <= 0.60
        assert figures["teacher"] >= 0.95
        assert figures["wrong_reference"] <= 0.20
        assert figures["known_words"] >= 0.95
        assert figures["puzzles"] >= 0.85


def test_the_shipped_model_is_the_one_its_figures_describe(model, tokenizer):
    problems = _stories(100)
    stored = json.loads((TINY / "figures.json").read_text())["figures"]["validation"]
    student = accuracy(complete(model, student_prompts(problems), tokenizer=tokenizer), problems)
    teacher = accuracy(complete(model, teacher_prompts(problems), tokenizer=tokenizer), problems)
    assert student == pytest.approx(stored["student"], abs=0.15)
    assert teacher == pytest.approx(stored["teacher"], abs=0.05)


def _stories(count: int):
    fields = recipe("dataset", "arithmetic")
    del fields["name"]
    return (
        Arithmetic(**fields | {"train_problems": 0, "test_problems": 0, "validation_problems": count}).load().validation
    )
