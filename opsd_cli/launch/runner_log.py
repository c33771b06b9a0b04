"""What DeepSpeed's runner and ssh say while a run is on several machines: which machine could not be reached or was
lost, in ssh's words, and failures that a machine could tell in no other way."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from opsd_cli.launch.far_ranks import MARK
from opsd_cli.run.rank_errors import RankError
from opsd_cli.safety.terminal import escape_line
from opsd_cli.settings.errors import ExitCode

_LONGEST = 300  # characters of ssh's words that are shown
_BLOCK = 2**20
# pdsh puts `HOST: ` before each line of a host, and says so when its ssh fails; 255 is ssh's own, not the command's.
_PDSH = re.compile(r"pdsh@[^:]+: (\S+): ssh exited with exit code 255")
_SSH = re.compile(
    r"(ssh: .+|.*Permission denied.*|Host key verification failed\.?"
    r"|.*[Cc]onnection (?:to .+ )?(?:closed|reset|refused).*"
    r"|Timeout, server .+ not responding.*|kex_exchange_identification: .+|Load key .+)"
)
# mpirun's words for a machine whose connection is gone.
_DAEMON = re.compile(r"Remote daemon: .* on node (\S+)")
_TO_CHANGE = re.compile(r"Could not resolve|Name or service not known|Host key verification|Permission denied|Load key")


class RunnerLog:
    """Reads the log of the runner as it grows, from where this attempt begins."""

    def __init__(self, path: Path, hosts: Sequence[str]) -> None:
        self._path, self._hosts = path, hosts
        self._at = path.stat().st_size if path.exists() else 0
        self._half = b""
        self._by_ssh: dict[str, str] = {}  # host, or "": what ssh said last
        self.error: RankError | None = None  # the first failure

    def look(self) -> None:
        """Take in what is new."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._at)
                new = file.read(_BLOCK)
        except OSError:
            return
        self._at += len(new)
        *lines, self._half = (self._half + new).split(b"\n")
        for line in lines:
            found = self._failure(line.decode("utf-8", "replace"))
            if found and (self.error is None or (self.error.is_consequence and not found.is_consequence)):
                self.error = found

    def of_ssh(self) -> RankError | None:
        """What ssh said without pdsh, as under mpirun; asked once the runner has ended."""
        words = self._by_ssh.get("")
        if words is None:
            return None
        host = next((host for host in self._hosts if re.search(rf"\b{re.escape(host)}\b", words)), None)
        return self._of_host(host, words)

    def _failure(self, line: str) -> RankError | None:
        _, mark, text = line.partition(MARK)
        if mark:
            try:
                told = json.loads(text)
                message = escape_line(str(told["message"]))
                return RankError(int(told["rank"]), message, int(told["exit_code"]), told["is_consequence"] is True)
            except (ValueError, KeyError, TypeError):
                return None
        if found := _PDSH.match(line):
            host = found[1]
            return self._of_host(host, self._by_ssh.get(host, "ssh ended with exit code 255"))
        if found := _DAEMON.search(line):
            self._by_ssh[""] = f"mpirun has lost the connection to {escape_line(found[1])[:_LONGEST]}"
        host, _, words = line.partition(": ")
        if host not in self._hosts:
            host, words = "", line
        if _SSH.match(words):
            self._by_ssh[host] = escape_line(words.strip())[:_LONGEST]
        return None

    def _of_host(self, host: str | None, words: str) -> RankError:
        code = ExitCode.CHANGE_SOMETHING if _TO_CHANGE.search(words) else ExitCode.ENVIRONMENT
        rank = self._hosts.index(host) if host in self._hosts else 0
        said = words if words.startswith(("ssh", "mpirun")) else f"ssh: {words}"
        return RankError(rank, f"{said} (launcher.hostfile; try `ssh {host or 'HOST'} true`)", code)
