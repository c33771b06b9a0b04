"""A tokenizer's chat format: messages -> text -> ids, and how a prompt and a completion end.

Chat templates come from strangers: each is rendered in a killable child process (`template_renderer`), and probed
before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from opsd_cli.data.problems import Turn
from opsd_cli.data.prompt_cache import FEWEST, key_of, load, save, tokenizer_print
from opsd_cli.safety.sandbox import BoundedChild, ChildError, ChildKilled, ChildStartError
from opsd_cli.settings.errors import ConfigError, DataError, OpsdError, OutsideError

Message = dict[str, str]
Variable = str | int | float | bool

RENDER_SECONDS = 10.0
RENDER_BATCH = 64
OWN_VARIABLES = frozenset([
    "enable_thinking", "date", "conversations", "messages", "chat_template", "add_generation_prompt",
    "continue_final_message", "tools", "documents", "return_assistant_tokens_mask",
    "bos_token", "eos_token", "pad_token", "unk_token",
])  # fmt: skip
"""What a request to the renderer holds itself."""

CLOCK = "strftime_now"  # a template that calls it asks for the date
PROBE_USER = "probe-of-the-user"
PROBE_SYSTEM = "probe-of-the-system"
PROBE_ASSISTANT = "probe-of-the-assistant"


def end_ids(tokenizer: Any, generation_config: Any | None) -> tuple[int, ...]:
    """Every token id that ends a completion: the tokenizer's end of sequence and those of the generation config.
    Raises DataError when there is none. A pad token with the same id does no harm: masks come from lengths."""
    ids: set[int] = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    configured = None if generation_config is None else generation_config.eos_token_id
    if configured is not None:
        ids.update([configured] if isinstance(configured, int) else configured)
    if not ids:
        raise DataError(f"tokenizer {tokenizer.name_or_path} has no end-of-sequence token, so no completion could end")
    return tuple(sorted(ids))


CLOSE_THINKING = "\n</think>\n\n"


@dataclass(frozen=True)
class Mode:
    """How one role's prompts are rendered: with or without thinking, and variables of the template."""

    thinking: bool
    variables: tuple[tuple[str, Variable], ...] = ()


def read_variables(written: Sequence[str]) -> tuple[tuple[str, Variable], ...]:
    """`NAME=VALUE` as names and values: a number, true or false, or text. Raises ConfigError for a taken name."""
    variables: list[tuple[str, Variable]] = []
    for text in written:
        name, _, value = text.partition("=")
        if name in OWN_VARIABLES:
            raise ConfigError(
                f"prompts.student_variables or prompts.teacher_variables has {text!r}, but opsd itself gives a "
                f"template {name}; for thinking use prompts.student_thinking and prompts.teacher_thinking"
            )
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        variables.append((name, parsed if isinstance(parsed, str | int | float) else value))
    return tuple(variables)


def opens_thinking(prompt: str) -> bool:
    """Whether a prompt ends inside a block of thinking."""
    return prompt.rfind("<think>") > prompt.rfind("</think>")


class Shares(Protocol):
    """The ranks of a node, which do the same and share it."""

    rank: int
    world_size: int

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""


class ChatFormat:
    """Prompts that end in a user message, after an optional system message and earlier turns, in the tokenizer's own
    chat format. A prompt may have a system message of its own, which follows the common one. Raises DataError when the
    template is missing, fails, loses a message, or exceeds the limits of time and memory."""

    def __init__(self, tokenizer: Any, *, system: str | None, date: str | None = None) -> None:
        if tokenizer.chat_template is None:
            raise DataError(
                f"tokenizer {tokenizer.name_or_path} has no chat template (a base model?); "
                "give one with model.chat_template=FILE"
            )
        self.tokenizer = tokenizer
        self.system = system
        self.date = date
        try:
            self.template = str(tokenizer.get_chat_template())
        except ValueError as error:
            named = ", ".join(sorted(tokenizer.chat_template))
            raise DataError(
                f"tokenizer {tokenizer.name_or_path} has several chat templates ({named}) and none named default; "
                "write the one to use to a file: model.chat_template=FILE"
            ) from error
        self._name = f"the chat template of {tokenizer.name_or_path}"
        self._child = BoundedChild("opsd_cli.data.template_renderer", seconds=RENDER_SECONDS)
        is_timeless = date is not None or CLOCK not in self.template
        self._tokenizer_print = tokenizer_print(tokenizer) if is_timeless else ""  # empty: nothing is kept
        self._ranks: Shares | None = None  # while all ranks make the same prompts
        self._before: dict[Mode, str] = {}  # what follows a prompt before an answer
        self.turn_end_id, self.closes_turns = self._find_turn_end()

    def prompt_ids(
        self,
        contents: Sequence[str],
        *,
        mode: Mode,
        systems: Sequence[str] | None = None,
        earlier: Sequence[Sequence[Turn]] | None = None,
    ) -> list[tuple[int, ...]]:
        """The prompt of each user message as token ids, up to where a completion begins. A template ignores what it
        does not know of `mode`. `systems`: a system message for each, added to the common one; `earlier`: what was
        said before it."""
        each = zip(contents, systems or [""] * len(contents), earlier or [()] * len(contents), strict=True)
        messages = [self._messages(content, system, turns) for content, system, turns in each]
        if len(messages) < FEWEST:
            return self.encode(self._render(messages, mode=mode))
        if not self._tokenizer_print:
            return self._made_in_shares(messages, mode=mode)
        date = self.date if CLOCK in self.template else None
        facts = (self._tokenizer_print, self.template, date, mode.thinking, mode.variables, messages)
        key, vocabulary = key_of(facts), len(self.tokenizer)
        kept = load(key, count=len(messages), vocabulary=vocabulary)
        if kept is not None and (self._ranks is None or all(self._ranks.gather(True))):
            return kept
        if kept is None and self._ranks is not None:
            self._ranks.gather(False)
        prompts = self._made_in_shares(messages, mode=mode)
        if kept is None and (self._ranks is None or self._ranks.rank == 0):
            save(key, prompts)
        return prompts

    @contextmanager
    def shared(self, ranks: Shares) -> Iterator[None]:
        """While it is open every rank asks for the same prompts, in the same order, and makes its share of them."""
        self._ranks = ranks
        try:
            yield
        finally:
            self._ranks = None

    def _made_in_shares(self, messages: Sequence[list[Message]], *, mode: Mode) -> list[tuple[int, ...]]:
        """Prompts of which each rank makes a part, and tells the others. What is wrong with one part is raised on every
        rank."""
        if self._ranks is None:
            return self.encode(self._render(messages, mode=mode))
        rank, ranks = self._ranks.rank, self._ranks.world_size
        first, last = len(messages) * rank // ranks, len(messages) * (rank + 1) // ranks
        own: list[tuple[int, ...]] | OpsdError
        try:
            own = self.encode(self._render(messages[first:last], mode=mode))
        except OpsdError as error:
            own = error
        parts = self._ranks.gather(own)
        for part in parts:
            if isinstance(part, OpsdError):
                raise part
        return [prompt for part in parts for prompt in part]

    def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids with at most one beginning-of-sequence token, and no special token that is not in the text."""
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        doubled = [bos is not None and list(ids[:2]) == [bos, bos] for ids in encoded]
        return [tuple(ids[1:] if twice else ids) for ids, twice in zip(encoded, doubled, strict=True)]

    def encode_completion(self, text: str, *, mode: Mode) -> tuple[int, ...]:
        """A written completion as it follows a prompt: what the template writes before it, its ids and the id that
        closes the turn."""
        return (*self.encode([self.before_answer(mode) + text])[0], self.turn_end_id)

    def before_answer(self, mode: Mode) -> str:
        """What stands between a prompt and an answer: nothing, or what closes the thinking that the prompt opens. The
        whole conversation says it; where that does not begin with the prompt, an open thought is closed."""
        if mode not in self._before:
            message = self._messages(PROBE_USER)
            prompt = self._render([message], mode=mode)[0]
            turn = [*message, {"role": "assistant", "content": PROBE_ASSISTANT}]
            whole = self._render([turn], mode=mode, generation_prompt=False)[0]
            before, found, _ = whole.rpartition(PROBE_ASSISTANT)
            if found and before.startswith(prompt):
                self._before[mode] = before.removeprefix(prompt)
            else:
                self._before[mode] = CLOSE_THINKING if opens_thinking(prompt) else ""
        return self._before[mode]

    def ending(self, *, mode: Mode, own_system: bool = False) -> str:
        """What follows the user's words in a prompt (with a system message of its own, if `own_system`): the
        end of that turn and the prefix of the completion."""
        own = PROBE_SYSTEM if own_system else ""
        text = self._render([self._messages(PROBE_USER, own)], mode=mode)[0]
        before, match, after = text.rpartition(PROBE_USER)
        if not match:
            raise DataError(f"{self._name} loses the user's message; use another: model.chat_template=FILE")
        for system, setting in ((self.system, "prompts.system"), (own, "context.teacher_system")):
            if system and system.strip() not in before:
                raise DataError(f"{self._name} ignores the system message; set {setting}=null")
        return after

    def prefix_length(self, *, mode: Mode) -> int:
        """How many last ids of a prompt belong to the completion's prefix, at least 1."""
        message = [self._messages(PROBE_USER)]
        opened = self._render(message, mode=mode)[0]
        closed = self._render(message, mode=mode, generation_prompt=False)[0]
        return max(1, len(self.encode([opened.removeprefix(closed)])[0])) if opened.startswith(closed) else 1

    def close(self) -> None:
        """Kill and reap the child process, if there is one."""
        self._child.close()

    def _messages(self, content: str, own_system: str = "", earlier: Sequence[Turn] = ()) -> list[Message]:
        text = "\n\n".join(part for part in (self.system, own_system) if part)
        system = [{"role": "system", "content": text}] if text else []
        turns = [{"role": role, "content": said} for role, said in earlier]
        return [*system, *turns, {"role": "user", "content": content}]

    def _render(
        self, conversations: Sequence[list[Message]], *, mode: Mode, generation_prompt: bool = True
    ) -> list[str]:
        way_out = "use another: model.chat_template=FILE"
        if any(message["role"] == "system" for messages in conversations for message in messages):
            setting = "context.teacher_system" if self.system is None else "prompts.system"
            way_out += f", or leave out the system message: {setting}=null"
        texts: list[str] = []
        for start in range(0, len(conversations), RENDER_BATCH):
            request = {
                **dict(mode.variables),
                **self.tokenizer.special_tokens_map,
                "enable_thinking": mode.thinking,
                "date": self.date,
                "conversations": conversations[start : start + RENDER_BATCH],
                "chat_template": self.template,
                "add_generation_prompt": generation_prompt,
            }
            try:
                texts += self._child.ask(request)
            except ChildKilled as error:
                limit = f"{RENDER_SECONDS:g} s, {self._child.memory_mib} MiB"
                raise DataError(f"{self._name} exceeds its limits ({limit}): {error}; {way_out}") from None
            except ChildStartError as error:
                raise OutsideError(f"chat templates cannot be rendered: {error}") from None
            except ChildError as error:
                raise DataError(f"{self._name} fails: {error}; {way_out}") from None
        return texts

    def _find_turn_end(self) -> tuple[int, bool]:
        """The first special id that the template writes after an assistant's words, else the tokenizer's end; and
        whether the template writes any."""
        turn = [*self._messages(PROBE_USER), {"role": "assistant", "content": PROBE_ASSISTANT}]
        text = self._render([turn], mode=Mode(thinking=False), generation_prompt=False)[0]
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        _, match, after = text.rpartition(PROBE_ASSISTANT)
        ids = self.encode([after])[0] if match else ()
        closing = next((id for id in ids if id in special), None)
        return (end_ids(self.tokenizer, None)[0], False) if closing is None else (closing, True)
