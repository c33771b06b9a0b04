"""A tokenizer's chat format: messages -> text -> ids, and how a prompt and a completion end.

Chat templates come from strangers: each is rendered in a killable child process, which is this file run as a program,
and probed before it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opsd_cli.safety.sandbox import BoundedChild, ChildError, ChildKilled, ChildStartError, serve
from opsd_cli.settings.errors import DataError, OutsideError

Message = dict[str, str]

RENDER_SECONDS = 10.0
RENDER_BATCH = 64
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


class ChatFormat:
    """Prompts of one user message, after an optional system message, in the tokenizer's own chat format. A prompt may
    have a system message of its own, which follows the common one. Raises DataError when the template is missing,
    fails, loses a message, or exceeds the limits of time and memory."""

    def __init__(self, tokenizer: Any, *, system: str | None) -> None:
        if tokenizer.chat_template is None:
            raise DataError(
                f"tokenizer {tokenizer.name_or_path} has no chat template (a base model?); "
                "give one with model.chat_template=FILE"
            )
        self.tokenizer = tokenizer
        self.system = system
        try:
            self.template = str(tokenizer.get_chat_template())
        except ValueError as error:
            named = ", ".join(sorted(tokenizer.chat_template))
            raise DataError(
                f"tokenizer {tokenizer.name_or_path} has several chat templates ({named}) and none named default; "
                "write the one to use to a file: model.chat_template=FILE"
            ) from error
        self._name = f"the chat template of {tokenizer.name_or_path}"
        self._child = BoundedChild("opsd_cli.data.chat", seconds=RENDER_SECONDS)
        self.turn_end_id = self._find_turn_end()

    def prompt_ids(
        self, contents: Sequence[str], *, thinking: bool, systems: Sequence[str | None] | None = None
    ) -> list[tuple[int, ...]]:
        """The prompt of each user message as token ids, up to where a completion begins. A template without a
        thinking mode ignores `thinking`. `systems`: a system message for each, added to the common one."""
        each = systems or [None] * len(contents)
        messages = [self._messages(content, system) for content, system in zip(contents, each, strict=True)]
        return self.encode(self._render(messages, thinking=thinking))

    def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids with at most one beginning-of-sequence token, and no special token that is not in the text."""
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        doubled = [bos is not None and list(ids[:2]) == [bos, bos] for ids in encoded]
        return [tuple(ids[1:] if twice else ids) for ids, twice in zip(encoded, doubled, strict=True)]

    def encode_completion(self, text: str) -> tuple[int, ...]:
        """A written completion as the model would have ended it: its ids and the id that closes the turn."""
        return (*self.encode([text])[0], self.turn_end_id)

    def ending(self, *, thinking: bool, own_system: bool = False) -> str:
        """What follows the user's words in a prompt (with a system message of its own, if `own_system`): the
        end of that turn and the prefix of the completion."""
        own = PROBE_SYSTEM if own_system else None
        text = self._render([self._messages(PROBE_USER, own)], thinking=thinking)[0]
        before, match, after = text.rpartition(PROBE_USER)
        if not match:
            raise DataError(f"{self._name} loses the user's message; use another: model.chat_template=FILE")
        for system, setting in ((self.system, "prompts.system"), (own, "context.teacher_system")):
            if system is not None and system.strip() not in before:
                raise DataError(f"{self._name} ignores the system message; set {setting}=null")
        return after

    def prefix_length(self, *, thinking: bool) -> int:
        """How many last ids of a prompt belong to the completion's prefix, at least 1."""
        message = [self._messages(PROBE_USER)]
        opened = self._render(message, thinking=thinking)[0]
        closed = self._render(message, thinking=thinking, generation_prompt=False)[0]
        return max(1, len(self.encode([opened.removeprefix(closed)])[0])) if opened.startswith(closed) else 1

    def close(self) -> None:
        """Kill and reap the child process, if there is one."""
        self._child.close()

    def _messages(self, content: str, own_system: str | None = None) -> list[Message]:
        text = "\n\n".join(part for part in (self.system, own_system) if part is not None)
        system = [{"role": "system", "content": text}] if text else []
        return [*system, {"role": "user", "content": content}]

    def _render(
        self, conversations: Sequence[list[Message]], *, thinking: bool, generation_prompt: bool = True
    ) -> list[str]:
        way_out = "use another: model.chat_template=FILE"
        if any(message["role"] == "system" for messages in conversations for message in messages):
            setting = "context.teacher_system" if self.system is None else "prompts.system"
            way_out += f", or leave out the system message: {setting}=null"
        texts: list[str] = []
        for start in range(0, len(conversations), RENDER_BATCH):
            request = {
                **self.tokenizer.special_tokens_map,
                "enable_thinking": thinking,
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

    def _find_turn_end(self) -> int:
        """The first special id that the template writes after an assistant's words, else the tokenizer's end."""
        turn = [*self._messages(PROBE_USER), {"role": "assistant", "content": PROBE_ASSISTANT}]
        text = self._render([turn], thinking=False, generation_prompt=False)[0]
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        _, match, after = text.rpartition(PROBE_ASSISTANT)
        ids = self.encode([after])[0] if match else ()
        return next((id for id in ids if id in special), end_ids(self.tokenizer, None)[0])


if __name__ == "__main__":
    # transformers' own sandboxed renderer, which lacks the limits on time and memory that `serve` adds.
    from transformers.utils.chat_template_utils import render_jinja_template

    serve(lambda request: render_jinja_template(**request)[0])
