"""The Hugging Face hub, when it fails: what that means to the user (another name, a token, or waiting), a few visible
retries, and the fallback to cached copies. Callers load through their own library, under `hub_errors`.

huggingface_hub retries downloads by itself, but not the one request that `look_up` makes, and not visibly.

    commit = look_up("model", "Qwen/Qwen3-1.7B", revision=None, hint=...)  # None: only a cached copy can help
    with hub_errors("model Qwen/Qwen3-1.7B", hint=...):
        AutoTokenizer.from_pretrained("Qwen/Qwen3-1.7B", local_files_only=commit is None)
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Literal

from opsd_cli.settings.errors import DataError, OpsdError, OutsideError

Tell = Callable[[str], None]

RETRY_SECONDS = (2, 4)  # waits before the second and the third try
REQUEST_SECONDS = 10.0
NETWORK_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp", "socket", "ssl")
HINT_DATASET = "work offline with `dataset.path=FOLDER model=tiny`, or with `recipe=quickstart`"


def tell_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def offline() -> bool:
    """The user asked for no network: HF_HUB_OFFLINE is set."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def look_up(
    kind: Literal["dataset", "model"],
    name: str,
    *,
    revision: str | None,
    hint: str = HINT_DATASET,
    tell: Tell = tell_stderr,
) -> str | None:
    """The commit of `name` on the hub now, or None when the hub cannot be reached, which `tell` reports: then only a
    cached copy can help. Tries three times and counts down in between. Raises DataError at once for a name or revision
    that the hub does not have or does not show."""
    if offline():
        return None
    for wait in (*RETRY_SECONDS, None):
        try:
            return _ask_hub(kind, name, revision=revision, hint=hint)
        except OutsideError as error:
            reason = str(error).split(";")[0]
        for left in range(wait or 0, 0, -1):
            tell(f"{reason}; trying again in {left} s")
            time.sleep(1)
    tell(f"{reason}; looking for a cached copy")
    return None


def _ask_hub(kind: str, name: str, *, revision: str | None, hint: str) -> str | None:
    from huggingface_hub import HfApi

    # Read here, not at import: the library freezes its own copy when it is first imported.
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    ask = api.dataset_info if kind == "dataset" else api.model_info
    with hub_errors(f"{kind} {name}", hint=hint):
        return ask(name, revision=revision, timeout=REQUEST_SECONDS).sha


class hub_errors:
    """Turn what a hub client raises inside the block into one line: DataError (another name, access, a revision) or
    OutsideError (the hub or the network). Errors that have nothing to do with the hub pass unchanged."""

    def __init__(self, what: str, *, hint: str = HINT_DATASET) -> None:
        self.what, self.hint = what, hint

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        explained = None if error is None else explain_hub_failure(error, self.what, hint=self.hint)
        if explained is not None:
            raise explained from error


def explain_hub_failure(error: BaseException, what: str, *, hint: str = HINT_DATASET) -> OpsdError | None:
    """What a hub client's error means: `what` is "model NAME" or "dataset NAME", `hint` the way to work offline. None
    when neither the error nor anything that caused it came from the hub or the network."""
    if isinstance(error, OpsdError):
        return None
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for refusal in filter(None, map(_refusal, chain)):
        return DataError(f"{what}: {refusal}")
    for outage in filter(None, map(_outage, chain)):
        return OutsideError(f"{what}: {outage}; try again later, or {hint}")
    return None


def _refusal(error: BaseException) -> str | None:
    """Why the hub refuses, where retrying will not change its answer."""
    from huggingface_hub import errors as hub

    if isinstance(error, hub.GatedRepoError):
        return "access is gated; ask for it on its hub page, then run `hf auth login`"
    if isinstance(error, hub.RepositoryNotFoundError):
        return "no such name on the hub, or no access to it; check the spelling, or run `hf auth login`"
    if isinstance(error, hub.RevisionNotFoundError):
        return "the hub has no such revision; check `revision`"
    if isinstance(error, hub.DisabledRepoError):
        return "the hub has disabled it"
    if isinstance(error, hub.HFValidationError):
        return "neither an existing folder nor a hub id, which looks like OWNER/NAME"
    if isinstance(error, hub.RemoteEntryNotFoundError):
        first_line = str(error).strip().split("\n")[0][:200]
        return f"a file is missing from its hub repository ({first_line})"
    if isinstance(error, hub.HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        return f"the hub refuses (HTTP {status}); run `hf auth login`" if status in (401, 403) else None
    return None


def _outage(error: BaseException) -> str | None:
    """How the hub or the way to it failed."""
    from huggingface_hub import errors as hub

    if isinstance(error, hub.HfHubHTTPError):
        status = error.response.status_code
        return "too many requests to the hub (HTTP 429)" if status == 429 else f"the hub fails (HTTP {status})"
    timed_out = "timeout" in type(error).__name__.lower()
    if type(error).__module__.split(".")[0] in NETWORK_LIBRARIES:
        return "the hub does not answer" if timed_out else "the hub cannot be reached"
    if isinstance(error, ConnectionError | TimeoutError | hub.LocalEntryNotFoundError):
        reason = "HF_HUB_OFFLINE is set" if offline() else "the hub cannot be reached"
        return f"{reason}, and there is no cached copy"
    return None
