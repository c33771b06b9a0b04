"""A model answers: one prompt, streamed as it is written, or many at once. Prompts are those of a run's student or
teacher, or plain messages in the model's own chat format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig, TextStreamer

from opsd_cli.data.cells import UNUSABLE
from opsd_cli.data.chat import Mode
from opsd_cli.data.files import read_table
from opsd_cli.data.problems import Problem, Turn
from opsd_cli.data.seeds import derive_seed
from opsd_cli.engine.device import card_of, choose_dtype, forbid_reduced_precision
from opsd_cli.engine.loading import causal_of, find_source, load_tokenizer
from opsd_cli.engine.process_group import alone
from opsd_cli.rank.build import load_trained
from opsd_cli.rank.recorder import quiet_libraries
from opsd_cli.rank.run_data import make_renderer
from opsd_cli.sampling.batch_decoder import BatchLimits
from opsd_cli.sampling.choose_decoder import Completer
from opsd_cli.sampling.token_sampling import Draw
from opsd_cli.settings.config import Config, SamplingSettings
from opsd_cli.settings.errors import DataError

SHOWN = 60  # characters of a text in a message
Role = Literal["plain", "student", "teacher"]
"""How a prompt is worded: as it is, as the student's message, or as the teacher's, with the reference in it."""


@dataclass(frozen=True)
class Asked:
    """What is asked: a question, what was said before it, and for the teacher's prompt the reference."""

    question: str
    earlier: tuple[Turn, ...] = ()
    system: str = ""
    solution: str = ""
    answer: str | None = None


COLUMNS = ("prompt", "question", "system", "solution", "answer")  # of a line of JSON


def read_asked(file: Path, *, system: str) -> Iterator[Asked]:
    """The prompts of a file: of .jsonl one from each object with `prompt` or `question`, else one from each line that
    is not blank. `system` is for those that have none of their own. Raises DataError with the line that cannot be
    read."""
    if file.suffix != ".jsonl":
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")  # a text may hold what only `splitlines` breaks at
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read: {error}") from None
        yield from (Asked(line, (), system) for line in lines if line.strip())
        return
    for _, (number, row) in read_table(file, COLUMNS).rows:
        if isinstance(row, str):
            raise DataError(f"{file}:{number}: {row}")
        question = row.get("prompt", row.get("question"))
        if not isinstance(question, str) or not question.strip():
            raise DataError(f"{file}:{number}: needs an object with `prompt` or `question` as text")
        answer = row.get("answer")
        own = str(row.get("system") or system)
        yield Asked(question, (), own, str(row.get("solution") or ""), None if answer is None else str(answer))


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    finish_reason: Literal["stop", "length"]


class Talker:
    """A model with its tokenizer and prompts, in this process. Use `close` when done: templates are rendered in a child
    process."""

    def __init__(self, config: Config, *, device: str) -> None:
        forbid_reduced_precision()
        quiet_libraries()
        self.config, self.device = config, torch.device(device)
        dtype, _ = choose_dtype(config.model.dtype, [card_of(self.device)])
        source = find_source(config.model, dtype=dtype)
        self.tokenizer = load_tokenizer(source, chat_template=config.model.chat_template)
        self._renderer = make_renderer(config, self.tokenizer)
        self._model = load_trained(config, source, self.device)
        causal = causal_of(self._model.lm)
        self.own_settings: GenerationConfig = causal.generation_config
        self.end_ids = self._renderer.end_ids(self.own_settings)
        pad = self.tokenizer.pad_token_id
        self._completer = Completer(self._model, alone(), end_ids=self.end_ids, pad_id=pad)

    def close(self) -> None:
        """End the process that renders templates."""
        self._renderer.close()

    def prompt_ids(self, asked: Asked, role: Role) -> tuple[int, ...]:
        """A prompt as token ids. Raises DataError for text that no tokenizer can read, and for a prompt that is longer
        than prompts.max_tokens, where it is worded for a role."""
        for text in (asked.question, asked.system, asked.solution, asked.answer or ""):
            if UNUSABLE.search(text):
                raise DataError(f"{text[:SHOWN]!r} holds a NUL or bytes that are not UTF-8; give it as UTF-8 text")
        if role == "plain":
            system = [asked.system]
            return self._renderer.chat.prompt_ids(
                [asked.question],
                systems=system,
                earlier=[asked.earlier],
                mode=Mode(self._renderer.student_mode.thinking),
            )[0]
        problem = Problem(
            id="asked", question=asked.question, solution=asked.solution, answer=asked.answer, system=asked.system,
            earlier=asked.earlier,
        )  # fmt: skip
        pairs, _ = self._renderer.fitting([problem], [0], seed=self.config.run.seed, with_other=False)
        if (pair := pairs[0]) is None:
            raise DataError(f"the prompt is longer than prompts.max_tokens={self.config.prompts.max_tokens}; raise it")
        return pair.student_ids if role == "student" else pair.teacher_ids

    def stream(
        self, ids: Sequence[int], sampling: SamplingSettings, *, seed: int, show: Callable[[str], None]
    ) -> Answer:
        """Answer one prompt, and `show` the text piece by piece as it is written. KeyboardInterrupt passes; what was
        shown until then was said."""

        class Pieces(TextStreamer):  # its own prints
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                show(text)

        greedy = sampling.temperature == 0
        drawn = {} if greedy else {
            "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k,
        }  # fmt: skip
        settings = GenerationConfig(
            do_sample=not greedy, max_new_tokens=sampling.max_completion_tokens, eos_token_id=list(self.end_ids),
            pad_token_id=self._completer.pad_id, **drawn,
        )  # fmt: skip
        torch.manual_seed(seed)
        prompt = torch.tensor([list(ids)], device=self.device)
        with torch.no_grad():
            generate: Any = self._model.lm.generate  # torch types every attribute of a module as a tensor
            written = generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=settings,
                streamer=Pieces(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
            )  # fmt: skip
        new = written[0, len(ids) :].tolist()
        ended = bool(new) and new[-1] in self.end_ids
        return Answer(self.text_of(new), len(new), "stop" if ended else "length")

    def answer_all(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingSettings,
        *,
        seed: int,
        report_done: Callable[[int], None] = lambda done: None,
    ) -> Iterator[list[Answer]]:
        """Answer many prompts, as evaluation does; in parts, so that what is there can be written down."""
        settings = self.config.eval

        def report(before: int, done: int) -> None:
            report_done(before + done)

        at_once = 4 * settings.max_rows
        for first in range(0, len(prompts), at_once):
            some = prompts[first : first + at_once]
            done = self._completer.complete(
                [Draw(tuple(ids), derive_seed(seed, "generate", first + n)) for n, ids in enumerate(some)],
                sampling=sampling,
                limits=BatchLimits(settings.max_rows, settings.cache_tokens),
                should_stop=lambda: False,
                report_done=partial(report, first),
            )
            yield [Answer(self.text_of(one.ids), len(one.ids), one.finish_reason) for one in done]

    def text_of(self, ids: Sequence[int]) -> str:
        """Token ids as text, without control tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def own_sampling(talker: Talker, *, of_run: bool) -> SamplingSettings:
    """How answers are drawn where nothing is typed: as a run is evaluated, or as a model's own settings say."""
    settings, own = talker.config.eval, talker.own_settings
    heat, top_p, top_k = settings.temperature, settings.top_p, settings.top_k
    if not of_run:
        drawn = bool(own.do_sample)
        heat = float(own.temperature or 1.0) if drawn else 0.0
        top_p, top_k = (float(own.top_p or 1.0), int(own.top_k or 0)) if drawn else (1.0, 0)
    return SamplingSettings(
        max_completion_tokens=settings.max_completion_tokens, temperature=heat, top_p=top_p, top_k=top_k
    )
