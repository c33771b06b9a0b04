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
from opsd_cli.commands import COMMANDS
from opsd_cli.safety.secrets import redact
from opsd_cli.safety.terminal import escape_line
from opsd_cli.settings.errors import ExitCode, OpsdError
from opsd_cli.settings.plugin_files import plugin_faults
from opsd_cli.settings.registry import did_you_mean

MOST_LINES = 40  # of problems, on one terminal
PLACE = "choose another place (run.root=FOLDER, TMPDIR)"
OUTSIDE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), f"free disk space or {PLACE}"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), f"ask for the permission, or {PLACE}"),
    errno.EIO: f"look at the disk, or {PLACE}",
    errno.EMFILE: "allow more open files (ulimit -n)",
}
"""Errors of disks, permissions and limits, with what to do; any other OSError is a bug."""

USAGE = """\
opsd: train a language model by on-policy self-distillation

  opsd train recipe=quickstart                 the whole method in a minute, on a CPU
  opsd train recipe=gsm8k                      Qwen3-1.7B on GSM8K, on one GPU
  opsd train recipe=gsm8k train.steps=50       any setting can be given as KEY=VALUE
  opsd train -m recipe=quickstart divergence=forward_kl,reverse_kl     a sweep
  opsd train --resume runs/NAME                continue a run
  opsd watch runs/NAME                         follow a run from another terminal
  opsd plan recipe=gsm8k --device h100         whether it fits, how long it takes, what to change
  opsd inspect recipe=gsm8k                    both prompts, and where student and teacher disagree
  opsd runs                                    what has been run, with its accuracy before and after
  opsd report runs/NAME --html report.html     curves, intervals, rollouts token by token, on one page
  opsd eval runs/NAME eval.problems=500        measure the trained model
  opsd generate runs/NAME --chat               talk to it
  opsd export runs/NAME OUT                    its weights as a Hugging Face folder, also of a stopped run

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
        advice = OUTSIDE.get(error.errno or 0)
        if advice is None and "temporary directory" not in str(error):
            raise
        complain(f"operating system error: {error}; {advice or PLACE}")
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
