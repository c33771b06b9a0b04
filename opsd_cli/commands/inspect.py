"""`opsd inspect`: what the two roles are shown and where they disagree, before training or after it: both prompts side
by side, and a completion token by token."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from opsd_cli.commands.evaluate import find_target, frozen_of
from opsd_cli.commands.flags import Flags, device_of, quote, step_word
from opsd_cli.settings.errors import ConfigError, ExitCode, OutsideError, display_path
from opsd_cli.settings.paths import typed_path
from opsd_cli.settings.recipe_files import RecipeFolders, find_folders

if TYPE_CHECKING:
    from opsd_cli.api import Rollout, RolloutView, Session
    from opsd_cli.settings.config import Config

HELP = """\
opsd inspect recipe=quickstart                     both prompts of a problem, a completion, where the roles disagree
opsd inspect recipe=gsm8k --html look.html         the same as a page: every token with what either role expected
opsd inspect runs/NAME                             the model that a run has exported, against the teacher it had
opsd inspect runs/NAME --step 40                   a checkpoint of a run that is stopped or going on; also last, best
opsd inspect recipe=quickstart context=answer_only --problems 3
opsd inspect recipe=quickstart --problem train-01578
opsd inspect recipe=quickstart --against context=shuffled       a second teacher for the same completions
opsd inspect recipe=quickstart --json              everything, for programs

A run that had plug-ins needs them again: --plugin FILE, as often as it had.
Settings are those of `opsd train`; nothing is trained or written. The completions are drawn as in training.
--recipes DIR   a folder of your own recipes, searched first; ./recipes is always searched
"""

Saved = tuple[Path, int | Literal["last", "best"]]
"""A run's folder, and which checkpoint of it."""

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
    flags.add_argument("--step", metavar="N")
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
    if given.step is None:
        saved = None
        words, frozen = _words(given.words, folders, accept_changed_plugin=given.accept_changed_plugin)
    else:
        saved, words, frozen = _saved(given)
    first = _config(words, folders, frozen)
    second = _config([*words, *given.against], folders, frozen) if given.against else None
    rollouts, views = _look(first, saved, problem=given.problem, count=given.problems)
    looked = [[view] for view in views]
    if second is not None:  # the first model is gone by now
        for beside, other in zip(looked, _look_again(second, saved, rollouts), strict=True):
            beside.append(other)
    _show(given, looked, title=" ".join(["opsd inspect", *given.words, *(["--step", given.step] if saved else [])]))
    return ExitCode.DONE


def _saved(given: Any) -> tuple[Saved, list[str], dict[str, Any]]:
    """The checkpoint that --step names, and the settings of its run, in which the student's weights are replaced."""
    from opsd_cli.run.folder import open_run_folder

    if not given.words or "=" in given.words[0]:
        raise ConfigError("--step is of a run: opsd inspect runs/NAME --step last")
    run = open_run_folder(given.words[0])
    for word in given.words[1:]:
        if word.split("=", 1)[0].partition(".")[0] in ("model", "lora", "recipe"):
            raise ConfigError(f"'{word}': the model is the run's, with the weights of its checkpoint")
    which = step_word(given.step)
    return (
        (run.path, which),
        list(given.words[1:]),
        frozen_of(run.path, accept_changed_plugin=given.accept_changed_plugin, verb="inspect"),
    )


def _words(
    words: Sequence[str], folders: RecipeFolders, *, accept_changed_plugin: bool
) -> tuple[list[str], dict[str, Any] | None]:
    """The settings that the words stand for; of a run its own, with its model as the student."""
    if not words:
        raise ConfigError("name a recipe or a run: opsd inspect recipe=quickstart (see `opsd inspect --help`)")
    if "=" in words[0]:
        return list(words), None
    target = find_target(words[0], folders, accept_changed_plugin=accept_changed_plugin, verb="inspect")
    own = [*target.words]
    if target.frozen and target.frozen["teacher"].get("name") == "initial":
        # The weights before training are no longer in this model: they are loaded beside it.
        own += ["teacher=external", f"teacher.path={quote(str(target.frozen['model']['path']))}"]
    typed = {word.split("=", 1)[0] for word in words[1:]}
    teacher = target.frozen["teacher"].get("name") if target.frozen and "teacher" not in typed else None
    if teacher in ("ema", "sync"):
        print(f"opsd: an exported model does not hold the weights of teacher={teacher}: the student's own stand in for "
              f"them; a checkpoint holds them: --step last", file=sys.stderr)  # fmt: skip
    kept = [word for word in own if typed.isdisjoint({key := word.split("=", 1)[0], key.partition(".")[0]})]
    return [*kept, *words[1:]], target.frozen


def _config(words: Sequence[str], folders: RecipeFolders, frozen: dict[str, Any] | None) -> Config:
    from opsd_cli.preflight import check

    _, members = check([*words, *ONLY_TRAINING], folders, frozen=frozen)
    return members[0].config


def _look(
    config: Config, saved: Saved | None, *, problem: str | None, count: int
) -> tuple[list[Rollout], list[RolloutView]]:
    """Completions of the problems asked for, and each of them under the teacher."""
    from opsd_cli import api

    with api.Session(config, device=device_of(config)) as session:
        _load(session, saved)
        chosen = _problems(session, problem, count)
        pairs = session.render(chosen)
        if not pairs:
            raise ConfigError("none of these problems fits prompts.max_tokens; raise it, or give another --problem")
        rollouts = [rollout for rollout in session.sample(pairs) if rollout.completion_ids]
        return rollouts, session.inspect(rollouts)


def _look_again(config: Config, saved: Saved | None, rollouts: Sequence[Rollout]) -> list[RolloutView]:
    """The same completions under another teacher."""
    from opsd_cli import api

    with api.Session(config, device=device_of(config)) as session:
        _load(session, saved)
        return session.inspect(session.with_prompts(rollouts))


def _load(session: Session, saved: Saved | None) -> None:
    if saved is not None:
        run, which = saved
        step = session.load_checkpoint(run, which)
        print(f"opsd: the weights of {display_path(run)} after step {step}", file=sys.stderr)


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
