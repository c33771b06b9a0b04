"""One tokenizer's chat format: messages -> text -> ids, and how a prompt and a completion end. Owns the trust
in chat templates, which come from strangers: each is rendered in a bounded child process, and probed before
it is used. Knows no problems and no length limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opsd_cli.safety.sandbox import BoundedChild, ChildError, ChildKilled, ChildStartError
from opsd_cli.settings.errors import DataError, OutsideError

Message = dict[str, str]

RENDER_SECONDS = 10.0
RENDER_BATCH = 64
PROBE_USER = "probe-of-the-user"
PROBE_SYSTEM = "probe-of-the-system"
PROBE_ASSISTANT = "probe-of-the-assistant"


def read_chat_template(path: str) -> str:
    """The text of `model.chat_template=FILE`. Raises DataError when it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"model.chat_template={path}: cannot be read: {error}") from None


def end_ids(tokenizer: Any, generation_config: Any | None) -> tuple[int, ...]:
    """Every token id that ends a completion: the tokenizer's end of sequence and the generation config's,
    which may be several. Raises DataError when there is none. A pad token with the same id does no harm:
    masks come from lengths."""
    found: set[int] = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    configured = None if generation_config is None else generation_config.eos_token_id
    if configured is not None:
        found.update([configured] if isinstance(configured, int) else configured)
    if not found:
        raise DataError(f"tokenizer {tokenizer.name_or_path} has no end-of-sequence token, so no completion could end")
    return tuple(sorted(found))


class ChatFormat:
    """Prompts of one user message, after an optional system message, in the tokenizer's own chat format (or
    in `chat_template`, a Jinja text). A prompt may have a system message of its own, which follows the common
    one. Raises DataError when the template is missing, fails, loses a message, or passes the limits of time
    and memory."""

    def __init__(self, tokenizer: Any, *, system: str | None, chat_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.system = system
        self.template: str = chat_template or self._own_template()
        self._child = BoundedChild("opsd_cli.data.template_child", seconds=RENDER_SECONDS)
        self.turn_end_id = self._find_turn_end()

    def prompt_texts(
        self, contents: Sequence[str], *, thinking: bool, systems: Sequence[str | None] | None = None
    ) -> list[str]:
        """The prompt of each user message, up to where a completion begins. A template without a thinking
        mode ignores `thinking`. `systems`: a system message for each, added to the common one."""
        each = systems or [None] * len(contents)
        messages = [self._messages(content, system) for content, system in zip(contents, each, strict=True)]
        return self._render(messages, thinking=thinking)

    def prompt_ids(
        self, contents: Sequence[str], *, thinking: bool, systems: Sequence[str | None] | None = None
    ) -> list[tuple[int, ...]]:
        """`prompt_texts` as token ids, with one beginning-of-sequence token at most."""
        return self.encode(self.prompt_texts(contents, thinking=thinking, systems=systems))

    def encode(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids, adding no special token of the tokenizer's own accord."""
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [self._one_bos(ids) for ids in encoded]

    def encode_completion(self, text: str) -> tuple[int, ...]:
        """A written completion as the model would have ended it: its ids and the id that closes the turn."""
        return (*self.encode([text])[0], self.turn_end_id)

    def ending(self, *, thinking: bool, own_system: bool = False) -> str:
        """What follows the user's words in a prompt (with a system message of its own, if `own_system`): the
        end of that turn and the prefix of the completion."""
        own = PROBE_SYSTEM if own_system else None
        text = self.prompt_texts([PROBE_USER], thinking=thinking, systems=[own])[0]
        before, found, after = text.rpartition(PROBE_USER)
        if not found:
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

    @property
    def _name(self) -> str:
        return f"the chat template of {self.tokenizer.name_or_path}"

    def _own_template(self) -> str:
        if self.tokenizer.chat_template is None:
            raise DataError(
                f"tokenizer {self.tokenizer.name_or_path} has no chat template (a base model?); "
                "give one with model.chat_template=FILE"
            )
        return str(self.tokenizer.get_chat_template())

    def _messages(self, content: str, own_system: str | None = None) -> list[Message]:
        text = "\n\n".join(part for part in (self.system, own_system) if part is not None)
        system = [{"role": "system", "content": text}] if text else []
        return [*system, {"role": "user", "content": content}]

    def _render(
        self, conversations: Sequence[list[Message]], *, thinking: bool, generation_prompt: bool = True
    ) -> list[str]:
        variables = {**self.tokenizer.special_tokens_map, "enable_thinking": thinking}
        texts: list[str] = []
        for start in range(0, len(conversations), RENDER_BATCH):
            request = {
                "conversations": conversations[start : start + RENDER_BATCH],
                "template": self.template,
                "generation_prompt": generation_prompt,
                "variables": variables,
            }
            texts += self._ask(request)
        return texts

    def _ask(self, request: dict[str, Any]) -> list[str]:
        way_out = "use another: model.chat_template=FILE"
        if any(message["role"] == "system" for messages in request["conversations"] for message in messages):
            setting = "context.teacher_system" if self.system is None else "prompts.system"
            way_out += f", or leave out the system message: {setting}=null"
        try:
            return list(self._child.ask(request))
        except ChildKilled as error:
            limit = f"{RENDER_SECONDS:g} s, {self._child.memory_mib} MiB"
            raise DataError(f"{self._name} passes its limits ({limit}): {error}; {way_out}") from None
        except ChildStartError as error:
            raise OutsideError(f"chat templates cannot be rendered: {error}") from None
        except ChildError as error:
            raise DataError(f"{self._name} fails: {error}; {way_out}") from None

    def _one_bos(self, ids: Sequence[int]) -> tuple[int, ...]:
        bos = self.tokenizer.bos_token_id
        doubled = bos is not None and list(ids[:2]) == [bos, bos]
        return tuple(ids[1:] if doubled else ids)

    def _find_turn_end(self) -> int:
        """The first special id that the template writes after an assistant's words, else the tokenizer's
        end."""
        turn = [*self._messages(PROBE_USER), {"role": "assistant", "content": PROBE_ASSISTANT}]
        text = self._render([turn], thinking=False, generation_prompt=False)[0]
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        _, found, after = text.rpartition(PROBE_ASSISTANT)
        ids = self.encode([after])[0] if found else ()
        return next((id for id in ids if id in special), end_ids(self.tokenizer, None)[0])
