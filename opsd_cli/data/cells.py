"""One cell of a row, as text: columns inside columns (`reward_model.ground_truth`), lists of chat messages, typed
answers and lists of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

from opsd_cli.data.problems import Turn

UNUSABLE = re.compile("[\0\ud800-\udfff]")  # NUL, and half a surrogate pair, which no encoding can write
MAX_NAMES = 200  # of columns inside columns
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}  # as other formats name them


class CellError(Exception):
    """What is wrong with a cell, in words that follow its column's name."""


def cell(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column, or of `column.key` inside one; a number picks an item of a list. None where it is not."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, Sequence) and not isinstance(value, str) and re.fullmatch(r"-?\d{1,6}", part):
            value = value[int(part)] if -len(value) <= int(part) < len(value) else None
        else:
            return None
    return value


def column_of(name: str, columns: Sequence[str]) -> str:
    """The column that a name, perhaps with dots, is found in."""
    return name if name in columns else name.split(".")[0]


def names_in(row: Mapping[str, Any]) -> Iterator[str]:
    """Every name by which `cell` finds something in a row."""
    waiting: list[tuple[str, Any]] = list(row.items())
    for _ in range(MAX_NAMES):
        if not waiting:
            return
        name, value = waiting.pop(0)
        yield name
        if isinstance(value, Mapping):
            waiting += [(f"{name}.{key}", inside) for key, inside in value.items()]


def text_cell(value: object, *, number_allowed: bool = False) -> str:
    """A cell as stripped text. Raises CellError."""
    if value is None:
        raise CellError("is missing or null")
    if number_allowed:
        value = _written(value)
    if not isinstance(value, str):
        raise CellError(f"is {type(value).__name__}, not text")
    text = value.strip()
    if not text:
        raise CellError("is empty")
    if UNUSABLE.search(text):
        raise CellError("holds a NUL or half a surrogate pair")
    return text


def _written(value: object) -> object:
    """A typed value as it would be written."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float | Decimal):
        if not math.isfinite(value):
            raise CellError(f"is {value}")
        return repr(value) if isinstance(value, float) else str(value)
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    return str(value) if isinstance(value, int) else value


def accepted_answers(value: object) -> tuple[str, ...]:
    """Every answer that a cell accepts: one value, or a list of them. Raises CellError."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        answers = tuple(dict.fromkeys(text_cell(item, number_allowed=True) for item in value))
        if not answers:
            raise CellError("is an empty list")
        return answers
    return (text_cell(value, number_allowed=True),)


def shown_cell(value: object) -> str:
    """Any cell as the text that a context shows: text as it is, numbers and dates as they are written, a list as lines,
    chat messages as `role: text`, anything else as JSON; empty where there is none. Raises CellError."""
    if value is None:
        return ""
    messages = _messages(value)
    if messages is not None:
        value = "\n\n".join(f"{role}: {text}" for role, text in messages)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        value = "\n".join(map(shown_cell, value))
    elif isinstance(value, Mapping):
        value = json.dumps(value, ensure_ascii=False, default=str)
    written = _written(value)
    if not isinstance(written, str):
        raise CellError(f"is {type(value).__name__}, which no context can show")
    return text_cell(written) if written.strip() else ""


# Chat messages ------------------------------------------------------------------------------------------------------


def question_cell(value: object) -> tuple[str, str, tuple[Turn, ...]]:
    """A question, its system message (empty: none) and the turns before the question, from text, or from chat messages:
    perhaps one of the system, then user and assistant in turn. Answers of the assistant at the end are left out. Raises
    CellError."""
    messages = _messages(value)
    if messages is None:
        return text_cell(value), "", ()
    while messages and messages[-1][0] == "assistant":
        messages.pop()
    system = text_cell(messages.pop(0)[1]) if messages and messages[0][0] == "system" else ""
    roles = [role for role, _ in messages]
    if not roles or roles != [("user", "assistant")[place % 2] for place in range(len(roles))]:
        said = " ".join([*(["system"] if system else []), *roles]) or "none"
        raise CellError(
            f"has the messages {said}; a conversation is taken: perhaps system, then user and assistant in turn"
        )
    *earlier, (_, question) = messages
    return text_cell(question), system, tuple((role, text_cell(text)) for role, text in earlier)


def solution_cell(value: object) -> str:
    """A solution from text, or from the last message of chat messages, which must be the assistant's."""
    messages = _messages(value)
    if messages is None:
        return text_cell(value)
    if not messages or messages[-1][0] != "assistant":
        raise CellError("has no message of the assistant at its end")
    return text_cell(messages[-1][1])


def _messages(value: object) -> list[tuple[str, object]] | None:
    """Roles and texts of chat messages; None for what is no list of messages."""
    if not isinstance(value, list) or not value or not all(isinstance(item, Mapping) for item in value):
        return None
    messages: list[tuple[str, object]] = []
    for item in value:
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if not isinstance(role, str):
            return None
        messages.append((ROLES.get(role, role), _content(content)))
    return messages


def _content(content: object) -> object:
    """The text of a message that is written in parts."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    parts = [text for text in texts if isinstance(text, str)]
    if len(parts) < len(content):
        raise CellError("has a message with something that is not text")
    return "".join(parts)
