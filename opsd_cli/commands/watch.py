"""`opsd watch`: the screen of a run, from another terminal or after its end. Only reads the run folder."""

from __future__ import annotations

import time

from opsd_cli.commands.flags import Flags
from opsd_cli.settings.errors import ConfigError, ExitCode

HELP = """\
opsd watch runs/NAME     follow a run that is going on, or see how one ended

Ctrl-C stops watching, not the run. RUN is a run folder, or its name under ./runs.
"""

_POLL_SECONDS = 0.1


def main(arguments: list[str]) -> int:
    """Show a run until it ends; exit code 0 however it ended. Raises ConfigError if there is no such run."""
    from opsd_cli.run.folder import open_run_folder
    from opsd_cli.run.lock import running_process
    from opsd_cli.ui.display import open_display

    words = Flags("watch").read(arguments).words
    if len(words) != 1:
        raise ConfigError("name one run: opsd watch runs/NAME (see `opsd watch --help`)")
    folder = open_run_folder(words[0])
    display = open_display(folder.path, replay=True)
    try:
        while True:
            is_running = running_process(folder) is not None  # before poll, so that its last events are read
            display.poll()
            if not is_running:
                break
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        display.leave(f"no longer watching; {folder.name} goes on")
        return ExitCode.DONE
    ended = display.view.ended
    if ended is None:
        display.close(code=ExitCode.ENVIRONMENT, message=f"{folder.name} is not running and has not ended", tail=[])
    else:
        failed = ended["outcome"] == "failed"
        display.close(code=ended["exit_code"], message=ended["message"] if failed else "", tail=[])
    return ExitCode.DONE
