"""Secrets are redacted from everything that is written or shown: tokens of well-known services, recognised by their
form, and the values of environment variables that are named like a secret."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, BinaryIO, TextIO

REDACTED = "[redacted]"

TOKENS = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9_]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}"
    r"|glpat-[A-Za-z0-9_-]{16,}|xox[abprs]-[A-Za-z0-9-]{10,}|AKIA[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{30,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----)"
)
"""Hugging Face, OpenAI and Anthropic, GitHub, GitLab, Slack, AWS, Google, and private keys."""

NAMED = re.compile(r"(?i)((?:key|token|secret|password)[\"']?\s*[=:]\s*[\"']?)([0-9a-f]{32,64})(?![0-9a-f])")
"""Hexadecimal digits (Weights & Biases uses 40) after a name such as `key=`; alone they may be a commit."""

SECRET_NAME = re.compile(r"(?i)(^|_)(token|key|secret|password|passwd|credentials)$")
SHORTEST = 12
"""Shorter values of environment variables are not redacted: they may be words."""


def redact(text: str) -> str:
    """The text with every secret in it replaced."""
    pattern = _of_environment(_values(os.environ))
    if pattern is not None:
        text = pattern.sub(REDACTED, text)
    return NAMED.sub(rf"\1{REDACTED}", TOKENS.sub(REDACTED, text))


def holds_secret(text: str) -> bool:
    """Whether there is a secret in the text."""
    return redact(text) != text


def _values(environ: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(sorted(v for k, v in environ.items() if len(v) >= SHORTEST and SECRET_NAME.search(k)))


@lru_cache(maxsize=8)
def _of_environment(values: tuple[str, ...]) -> re.Pattern[str] | None:
    """What matches these values, longer ones first."""
    return re.compile("|".join(map(re.escape, sorted(values, key=len, reverse=True)))) if values else None


class RedactingStream(io.TextIOBase):
    """A text stream that redacts each complete line. Replaces stdout and stderr of a rank; what native code writes to
    the file descriptor does not pass through it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._waiting = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a plain attribute of the base class
        return self._stream.encoding

    @property
    def buffer(self) -> BinaryIO:
        """Bytes are not redacted."""
        return self._stream.buffer

    def write(self, text: str) -> int:
        """Write the lines that are complete."""
        lines, newline, self._waiting = (self._waiting + text).rpartition("\n")
        if newline:
            self._stream.write(redact(lines) + newline)
        return len(text)

    def flush(self) -> None:
        """Write an unfinished line too."""
        waiting, self._waiting = self._waiting, ""
        self._stream.write(redact(waiting))
        self._stream.flush()

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


def redact_output() -> None:
    """Redact stdout and stderr of this process from now on, also for loggers that exist already."""
    plain = (sys.stdout, sys.stderr)
    streams: list[Any] = [RedactingStream(stream) for stream in plain]
    sys.stdout, sys.stderr = streams
    for handler in _handlers():
        if handler.stream in plain:
            handler.setStream(streams[plain.index(handler.stream)])


def _handlers() -> list[logging.StreamHandler[Any]]:
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = [handler for log in loggers if isinstance(log, logging.Logger) for handler in log.handlers]
    return [handler for handler in handlers if isinstance(handler, logging.StreamHandler)]
