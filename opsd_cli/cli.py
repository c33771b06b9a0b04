"""The `opsd` command: a table of sub-commands, and errors as one line with an exit code. Imports nothing slow; the
module of a sub-command is imported when it is called."""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from types import TracebackType

from opsd_cli import __version__
from opsd_cli.safety.secrets import redact
from opsd_cli.safety.terminal import escape_line
from opsd_cli.settings.errors import ExitCode, OpsdError
from opsd_cli.settings.plugin_files import plugin_faults
from opsd_cli.settings.registry import did_you_mean

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("opsd_cli.commands.train", "train a model, resume a run, run a sweep"),
    "eval": ("opsd_cli.commands.evaluate", "measure a model or a run on held-out problems"),
    "watch": ("opsd_cli.commands.watch", "the screen of a run, from another terminal or after its end"),
    "inspect": ("opsd_cli.commands.inspect", "both prompts, and a completion token by token"),
    "doctor": ("opsd_cli.commands.doctor", "the machine, and a recipe on its real model and data, before a run"),
    "probe": ("opsd_cli.commands.probe", "whether training is likely to help, measured before any of it"),
    "compare": ("opsd_cli.commands.compare", "arms over seeds, paired, and what may be claimed"),
    "runs": ("opsd_cli.commands.runs", "list the runs, show what differs between two"),
    "report": ("opsd_cli.commands.report", "what came of a run, of several, of a sweep; as text or as a page"),
    "recipes": ("opsd_cli.commands.recipes", "list the recipes, print one composed, copy one to edit"),
    "new": ("opsd_cli.commands.new", "write a part of your own to change: a divergence, a context, ..."),
}
"""name -> (module with HELP and main, one line of help)."""

MOST_LINES = 40  # of problems, on one terminal
OUTSIDE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE)
"""Errors of disks, permissions and limits; any other OSError is a bug."""

USAGE = """\
opsd: train a language model by on-policy self-distillation

  opsd train recipe=quickstart                 the whole method in a minute, on a CPU
  opsd train recipe=gsm8k                      Qwen3-1.7B on GSM8K, on one GPU
  opsd train recipe=gsm8k train.steps=50       any setting can be given as KEY=VALUE
  opsd train -m recipe=quickstart divergence=forward_kl,reverse_kl     a sweep
  opsd train --resume runs/NAME                continue a run
  opsd watch runs/NAME                         follow a run from another terminal
  opsd inspect recipe=gsm8k                    both prompts, and where student and teacher disagree
  opsd doctor recipe=gsm8k                     what is wrong with machine, data, prompts, model, before it costs hours
  opsd probe recipe=quickstart                 whether training is likely to help, and why not
  opsd runs                                    what has been run, with its accuracy before and after
  opsd report runs/NAME --html report.html     curves, intervals, rollouts token by token, on one page
  opsd eval runs/NAME eval.problems=500        measure the trained model

commands:
{commands}

`opsd COMMAND --help` says more about one. `opsd --version` prints the version.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code. A user's errors are one line each, unless OPSD_DEBUG=1."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        sys.excepthook = report_bug
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with plugin_faults():
            code = dispatch(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output is gone. The interpreter flushes once more at exit, which must not raise.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.DONE)
    except KeyboardInterrupt:
        return int(ExitCode.INTERRUPTED)
    except OSError as error:
        if error.errno not in OUTSIDE and "temporary directory" not in str(error):
            raise
        complain(f"operating system error: {error}; free disk space or choose another place (run.root=FOLDER, TMPDIR)")
        return int(ExitCode.ENVIRONMENT)
    except OpsdError as error:
        if os.environ.get("OPSD_DEBUG") == "1":
            raise
        lines = str(error).split("\n")
        for line in lines[:MOST_LINES]:
            complain(line)
        if len(lines) > MOST_LINES:
            complain(f"... and {len(lines) - MOST_LINES:,} more problems")
        return int(error.exit_code)
    return int(code)


def dispatch(arguments: list[str]) -> int:
    """Find the sub-command and run it."""
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:<{width}}  {about}" for name, (_, about) in COMMANDS.items()]
        print(USAGE.format(commands="\n".join(lines)), end="")
        return ExitCode.DONE
    name, *rest = arguments
    if name in ("-V", "--version", "version"):
        print(f"opsd {__version__}")
        return ExitCode.DONE
    if name == "help":
        return dispatch([*rest[:1], "--help"])
    if name not in COMMANDS:
        near = f"; did you mean 'opsd train {name}'?" if "=" in name else did_you_mean(name, COMMANDS)
        complain(f"unknown command '{name}'{near} (commands: {', '.join(COMMANDS)})")
        return ExitCode.CHANGE_SOMETHING
    command = importlib.import_module(COMMANDS[name][0])
    if not {"-h", "--help"}.isdisjoint(rest):
        print(command.HELP, end="")
        return ExitCode.DONE
    return int(command.main(rest))


def complain(line: str) -> None:
    """One line on standard error; it may quote untrusted text."""
    print(f"opsd: {redact(escape_line(line))}", file=sys.stderr)


def report_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As sys.excepthook: a bug is one line that names the file of its traceback."""
    lines = traceback.format_exception(kind, error, trace)
    if os.environ.get("OPSD_DEBUG") == "1":
        sys.stderr.writelines(lines)
        return
    with tempfile.NamedTemporaryFile("w", prefix="opsd-crash-", suffix=".txt", delete=False) as file:
        file.write(redact(f"opsd {__version__}, command: {sys.argv}\n{''.join(lines)}"))
    complain(f"this is a bug in opsd ({kind.__name__}: {' '.join(str(error).split())[:200]}); traceback: {file.name}")
