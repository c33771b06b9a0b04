"""Secrets are redacted from everything that is written or shown: tokens of well-known services, recognised by their
form, and the values of environment variables that are named like a secret."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
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
    values = (v for k, v in os.environ.items() if len(v) >= SHORTEST and SECRET_NAME.search(k))
    for value in sorted(values, key=len, reverse=True):  # longer ones first: one may hold another
        text = text.replace(value, REDACTED)
    return NAMED.sub(rf"\1{REDACTED}", TOKENS.sub(REDACTED, text))


def holds_secret(text: str) -> bool:
    return redact(text) != text


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
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for handler in (handler for log in loggers if isinstance(log, logging.Logger) for handler in log.handlers):
        if isinstance(handler, logging.StreamHandler) and handler.stream in plain:
            handler.setStream(streams[plain.index(handler.stream)])
