"""`opsd inspect`: what the two roles are shown and where they disagree, before training or after it: both prompts side
by side, and a completion token by token."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from opsd_cli.commands.evaluate import find_target
from opsd_cli.commands.flags import Flags, device_of, quote
from opsd_cli.settings.errors import ConfigError, ExitCode, OutsideError, display_path
from opsd_cli.settings.paths import typed_path
from opsd_cli.settings.recipe_files import RecipeFolders, find_folders

if TYPE_CHECKING:
    from opsd_cli.api import RolloutView, Session
    from opsd_cli.settings.config import Config

HELP = """\
opsd inspect recipe=quickstart                     both prompts of a problem, a completion, where the roles disagree
opsd inspect recipe=gsm8k --html look.html         the same as a page: every token with what either role expected
opsd inspect runs/NAME                             the model that a run has exported, against the teacher it had
opsd inspect recipe=quickstart context=answer_only --problems 3
opsd inspect recipe=quickstart --problem train-01578
opsd inspect recipe=quickstart --against context=shuffled       a second teacher for the same completions
opsd inspect recipe=quickstart --json              everything, for programs

A run that had plug-ins needs them again: --plugin FILE, as often as it had.
Settings are those of `opsd train`; nothing is trained or written. The completions are drawn as in training.
--recipes DIR   a folder of your own recipes, searched first; ./recipes is always searched
"""

MOST_PROBLEMS = 20
# Nothing is measured, so nothing held out is read.
ONLY_TRAINING = ("eval.problems=0",)


def main(arguments: list[str]) -> int:
    """Run `opsd inspect ...`. Raises what `opsd train` would refuse."""
    flags = Flags("inspect")
    flags.add_argument("--recipes", metavar="DIR")
    flags.add_argument("--problems", type=int, metavar="N")
    flags.add_argument("--problem", metavar="ID")
    flags.add_argument("--against", action="append", default=[], metavar="KEY=VALUE")
    flags.add_argument("--html", metavar="FILE")
    flags.add_argument("--json", action="store_true")
    flags.add_argument("--accept-changed-plugin", action="store_true")
    given = flags.read(arguments)
    if given.problem is not None and given.problems is not None:
        raise ConfigError("--problem names one problem and --problems counts them; give one of the two")
    given.problems = 1 if given.problems is None else given.problems
    if not 1 <= given.problems <= MOST_PROBLEMS:
        raise ConfigError(f"--problems {given.problems}: 1 to {MOST_PROBLEMS} can be looked at")
    folders = find_folders(given.recipes)
    words, frozen = _words(given.words, folders, accept_changed_plugin=given.accept_changed_plugin)
    first = _config(words, folders, frozen)
    second = _config([*words, *given.against], folders, frozen) if given.against else None
    looked = _look(first, second, problem=given.problem, count=given.problems)
    _show(given, looked, title=" ".join(["opsd inspect", *given.words]))
    return ExitCode.DONE


def _words(
    words: Sequence[str], folders: RecipeFolders, *, accept_changed_plugin: bool
) -> tuple[list[str], dict[str, Any] | None]:
    """The settings that the words stand for; of a run its own, with its model as the student."""
    if not words:
        raise ConfigError("name a recipe or a run: opsd inspect recipe=quickstart (see `opsd inspect --help`)")
    if "=" in words[0]:
        return list(words), None
    target = find_target(words[0], folders, accept_changed_plugin=accept_changed_plugin, verb="inspect")
    own = [*target.words, "lora=none"]
    if target.frozen and target.frozen["teacher"].get("name") == "initial":
        # The weights before training are no longer in this model: they are loaded beside it.
        own += ["teacher=external", f"teacher.path={quote(str(target.frozen['model']['path']))}"]
    typed = {word.split("=", 1)[0] for word in words[1:]}
    kept = [word for word in own if typed.isdisjoint({key := word.split("=", 1)[0], key.partition(".")[0]})]
    return [*kept, *words[1:]], target.frozen


def _config(words: Sequence[str], folders: RecipeFolders, frozen: dict[str, Any] | None) -> Config:
    from opsd_cli.preflight import check

    _, members = check([*words, *ONLY_TRAINING], folders, frozen=frozen)
    return members[0].config


def _look(first: Config, second: Config | None, *, problem: str | None, count: int) -> list[list[RolloutView]]:
    """Each rollout under the first teacher and, if there is one, under the second: the same completion for both."""
    from opsd_cli import api

    with api.Session(first, device=device_of(first)) as session:
        chosen = _problems(session, problem, count)
        pairs = session.render(chosen)
        if not pairs:
            raise ConfigError("none of these problems fits prompts.max_tokens; raise it, or give another --problem")
        rollouts = [rollout for rollout in session.sample(pairs) if rollout.completion_ids]
        looked = [[view] for view in session.inspect(rollouts)]
    if second is not None:
        with api.Session(second, device=device_of(second)) as session:
            for views, other in zip(looked, session.inspect(session.with_prompts(rollouts)), strict=True):
                views.append(other)
    return looked


def _problems(session: Session, problem: str | None, count: int) -> Sequence[Any]:
    if problem is None:
        return session.problems[:count]
    from opsd_cli.settings.registry import did_you_mean

    found = [one for one in session.problems if one.id == problem]
    if not found:
        ids = [one.id for one in session.problems]
        raise ConfigError(f"--problem {problem}: no training problem has that id{did_you_mean(problem, ids)}")
    return found


def _show(given: Any, looked: list[list[RolloutView]], *, title: str) -> None:
    if given.html is not None:
        from opsd_cli.ui.pages import inspect_page

        file = typed_path(given.html)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            against = " ".join(given.against)
            file.write_text(inspect_page(looked, title=title, against=against), encoding="utf-8")
        except OSError as error:
            raise OutsideError(f"cannot write {file}: {error.strerror}; give another file to --html") from None
        print(display_path(file.absolute()), file=sys.stderr)
    if given.json:
        print(json.dumps([[asdict(view) for view in views] for views in looked], indent=1, ensure_ascii=False))
    elif given.html is None:
        from opsd_cli.ui.inspect_text import print_rollouts

        print_rollouts(looked, against=" ".join(given.against))
