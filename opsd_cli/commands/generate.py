"""`opsd generate`: a model answers a prompt, a file of prompts, or you, in the terminal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from opsd_cli.commands.evaluate import find_target
from opsd_cli.commands.flags import Flags
from opsd_cli.safety.terminal import escape_controls
from opsd_cli.settings.errors import ConfigError, DataError, ExitCode
from opsd_cli.settings.paths import typed_path
from opsd_cli.settings.recipe_files import find_folders

if TYPE_CHECKING:
    from opsd_cli.api.talking import Answer, Asked, Talker
    from opsd_cli.settings.config import Config, SamplingSettings

HELP = """\
opsd generate runs/NAME "What is 12+30?"         the model of a run, asked as its student was; written as it comes
opsd generate runs/NAME --step 40 "..."          a checkpoint of it; also last, best
opsd generate runs/NAME --as teacher --solution "12+30 = 42" "What is 12+30?"
opsd generate OUT --chat                         talk to it; OUT: a folder, a hub id, or a model option such as tiny
opsd generate OUT --file prompts.jsonl           a line of JSON for each line; .jsonl with prompt or question (and
                                                 solution, answer), or a text file with a prompt on each line
echo "What is 12+30?" | opsd generate OUT        a prompt from a pipe

--as plain|student|teacher   the words as they are (of models), the student's message (of runs) or the teacher's
--system TEXT   --max-tokens N   --temperature T   --top-p P   --top-k K   --seed N
Not typed, a run answers as it is evaluated (eval.*), a model as its own generation settings say.
--plugin FILE   --recipes DIR    as in opsd train; KEY=VALUE too: recipe=gsm8k gives a model that recipe's prompts
In a chat: an empty line asks nothing, /new forgets, Ctrl-C stops an answer, Ctrl-D or /quit ends.
"""

MOST = 10**9  # tokens; whatever a model allows is far below
BOUNDS: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("max-tokens", lambda value: 1 <= value <= MOST, f"a number from 1 to {MOST:,}"),
    ("top-k", lambda value: 0 <= value <= MOST, f"at least 0 (off), at most {MOST:,}"),
    ("temperature", lambda value: 0 <= value < math.inf, "at least 0, and finite"),
    ("top-p", lambda value: 0 < value <= 1, "above 0, at most 1"),
    ("seed", lambda value: 0 <= value < 2**63, "at least 0, below 2^63"),
)
"""Of each number, by the name of its flag: what is allowed, and that in words."""


def main(arguments: list[str]) -> int:
    """Run `opsd generate ...`."""
    flags = Flags("generate")
    for name in ("--recipes", "--step", "--file", "--system", "--solution", "--answer"):
        flags.add_argument(name)
    flags.add_argument("--as", dest="role", choices=("plain", "student", "teacher"))
    for name in ("--max-tokens", "--top-k", "--seed"):
        flags.add_argument(name, type=int, metavar="N")
    for name in ("--temperature", "--top-p"):
        flags.add_argument(name, type=float, metavar="X")
    flags.add_argument("--chat", action="store_true")
    flags.add_argument("--json", action="store_true")
    flags.add_argument("--accept-changed-plugin", action="store_true")
    given = flags.read(arguments)
    _check(given)
    settings = [word for word in given.words[1:] if _is_setting(word)]
    prompts = [word for word in given.words[1:] if not _is_setting(word)]
    if len(prompts) > 1:
        raise ConfigError(f"{len(prompts)} prompts: quote one, or give several with --file")
    config, of_run, names_prompts = _config(given, settings)
    role = given.role or ("student" if names_prompts and not given.chat else "plain")
    asked = _asked(given, prompts, role)
    if (given.solution or given.answer) and role != "teacher":
        raise ConfigError("--solution and --answer are shown to the teacher only: add --as teacher")
    from opsd_cli.api.talking import Talker, own_sampling

    talker = Talker(config, device=_device())
    try:
        sampling = _sampling(given, own_sampling(talker, of_run=of_run))
        if asked is None:
            return _chat(talker, sampling, role, given)
        if given.file is not None:
            return _answer_file(talker, asked, sampling, role, seed=given.seed or 0)
        return _answer_one(talker, asked[0], sampling, role, given)
    finally:
        talker.close()


def _check(given: Any) -> None:
    if not given.words or _is_setting(given.words[0]):
        raise ConfigError("name a model or a run first: opsd generate runs/NAME PROMPT (see `opsd generate --help`)")
    if given.chat and (given.file or given.json):
        raise ConfigError("--chat takes no --file and no --json: it is a conversation on the terminal")
    for name, is_allowed, allowed in BOUNDS:
        value = vars(given)[name.replace("-", "_")]
        if value is not None and not is_allowed(value):
            raise ConfigError(f"--{name} {value:g}: must be {allowed}")


def _is_setting(word: str) -> bool:
    """KEY=VALUE, with a key that settings may have: a prompt may hold an equals sign too."""
    key, found, _ = word.partition("=")
    return bool(found) and all(part.isidentifier() for part in key.lstrip("+~").split(".")) and " " not in key


def _config(given: Any, settings: Sequence[str]) -> tuple[Config, bool, bool]:
    """The config to load the model by; whether it is a run's; whether it says how a student is asked."""
    from opsd_cli.preflight import check

    folders = find_folders(given.recipes)
    target = find_target(
        given.words[0], folders, accept_changed_plugin=given.accept_changed_plugin, verb="generate", step=given.step
    )
    of_run = target.frozen is not None
    chosen = {word.split("=", 1)[0] for word in settings}
    names_prompts = of_run or not chosen.isdisjoint({"recipe", "dataset"})
    # Of a model alone no data are read, but a config has some.
    stand_in = [] if names_prompts else ["dataset=arithmetic", "prompts.max_tokens=1000000"]
    _, members = check([*target.words, *stand_in, *settings], folders, frozen=target.frozen)
    return members[0].config, of_run, names_prompts


def _asked(given: Any, prompts: Sequence[str], role: str) -> list[Asked] | None:
    """What is asked; None for a conversation."""
    if given.chat:
        if prompts or role == "teacher":
            raise ConfigError("--chat asks you for the words: give no prompt, and not --as teacher")
        return None
    from opsd_cli.api.talking import Asked, read_asked

    if given.file is not None:
        if prompts:
            raise ConfigError("a prompt and --file: give one of the two")
        return list(read_asked(typed_path(given.file), system=given.system or ""))
    if not prompts:
        if sys.stdin.isatty():
            if given.json:
                raise ConfigError("nothing is asked: give a prompt, --file FILE, or a prompt on standard input")
            return None
        prompts = [_piped()]
    if not prompts[0].strip():
        raise ConfigError("the prompt is empty")
    return [Asked(prompts[0], (), given.system or "", given.solution or "", given.answer)]


def _piped() -> str:
    """What is on standard input. Raises ConfigError where that is not text."""
    try:
        return sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not text in {error.encoding}: {error.reason}") from None


def _sampling(given: Any, own: SamplingSettings) -> SamplingSettings:
    typed = {
        "max_completion_tokens": given.max_tokens, "temperature": given.temperature, "top_p": given.top_p,
        "top_k": given.top_k,
    }  # fmt: skip
    return replace(own, **{name: value for name, value in typed.items() if value is not None})


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _shower() -> Callable[[str], None]:
    """Prints pieces of an answer as they come; what a terminal would obey is shown as what it is."""

    def show(piece: str) -> None:
        print(escape_controls(piece), end="", flush=True)

    return show


def _answer_one(talker: Talker, asked: Asked, sampling: SamplingSettings, role: Any, given: Any) -> int:
    ids = talker.prompt_ids(asked, role)
    if given.json:
        answer = talker.stream(ids, sampling, seed=given.seed or 0, show=lambda piece: None)
        print(_line(asked, answer))
        return ExitCode.DONE
    try:
        answer = talker.stream(ids, sampling, seed=given.seed or 0, show=_shower())
    except KeyboardInterrupt:
        print()
        raise
    print()
    _say_if_cut(answer)
    return ExitCode.DONE


def _say_if_cut(answer: Answer) -> None:
    if answer.finish_reason == "length":
        print(f"opsd: cut after {answer.tokens} tokens (--max-tokens)", file=sys.stderr)


def _line(asked: Asked, answer: Answer) -> str:
    from opsd_cli.safety.terminal import escape_json

    record = {"prompt": asked.question, "completion": answer.text, **asdict(answer)}
    del record["text"]
    return escape_json(json.dumps(record, ensure_ascii=False))


def _answer_file(talker: Talker, asked: Sequence[Asked], sampling: SamplingSettings, role: Any, *, seed: int) -> int:
    if not asked:
        raise DataError("the file holds no prompt")
    prompts = [talker.prompt_ids(one, role) for one in asked]
    shows = sys.stderr.isatty()

    def report(done: int) -> None:
        if shows:
            print(f"\r{done} of {len(asked)}", end="", file=sys.stderr, flush=True)

    before = 0
    for answers in talker.answer_all(prompts, sampling, seed=seed, report_done=report):
        for one, answer in zip(asked[before:], answers, strict=False):
            print(_line(one, answer), flush=True)
        before += len(answers)
    if shows:
        print(file=sys.stderr)
    return ExitCode.DONE


def _chat(talker: Talker, sampling: SamplingSettings, role: Any, given: Any) -> int:
    """A conversation. Ctrl-C ends an answer, and what was said of it stays said; at the prompt it ends the chat."""
    import contextlib

    from opsd_cli.api.talking import Asked

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - line editing for input()
    print("opsd: /new forgets, Ctrl-C stops an answer, Ctrl-D ends", file=sys.stderr)
    earlier: list[tuple[str, str]] = []
    turn = 0
    while True:
        try:
            said = input("\nyou> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return ExitCode.DONE
        if said in ("/quit", "/exit"):
            return ExitCode.DONE
        if said == "/new":
            earlier.clear()
            continue
        if not said:
            continue
        pieces: list[str] = []
        show = _shower()

        def keep(piece: str, pieces: list[str] = pieces, show: Callable[[str], None] = show) -> None:
            pieces.append(piece)
            show(piece)

        ids = talker.prompt_ids(Asked(said, tuple(earlier), given.system or ""), role)
        with contextlib.suppress(KeyboardInterrupt):
            _say_if_cut(talker.stream(ids, sampling, seed=(given.seed or 0) + turn, show=keep))
        print()
        earlier += [("user", said), ("assistant", "".join(pieces))]
        turn += 1
