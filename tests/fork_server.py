"""Run by support: a process that has imported what a rank imports, and forks whatever process is asked for over its
socket. A rank then starts in a tenth of a second and not in six; all else about it is as if it had started alone.

A request is one packet of JSON on a connection of its own: arguments of python, environment, working folder, file for
the output. The answers are two packets, the process's id and, once it has ended, its exit code (negative: a signal).
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from pathlib import Path

import deepspeed  # noqa: F401
import peft  # noqa: F401
import torch
import transformers  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.qwen3 import modeling_qwen3  # noqa: F401

import opsd_cli.rank.entry
import opsd_cli.rank.run  # noqa: F401
from opsd_cli.launch.process_groups import dies_with_parent

MOST_BYTES = 2**20  # of a request


def serve(address: Path) -> None:
    """Until the standard input closes, which it does when the tests end, however they end."""
    assert torch.get_num_threads() == 1, "a fork would leave the other threads behind"
    get_checkpoint_conversion_mapping("qwen3")  # kept by transformers: it compiles a thousand patterns
    gc.freeze()  # what is imported: to look through it takes each process half a second, several times
    atexit.register(gc.unfreeze)  # or libraries report it as leaked
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, selectors.DefaultSelector() as ready:
        listener.bind(str(address))
        listener.listen()
        ready.register(listener, selectors.EVENT_READ)
        ready.register(sys.stdin, selectors.EVENT_READ)
        print("ready", flush=True)
        while all(key.fileobj is listener for key, _ in ready.select()):
            connection, _ = listener.accept()
            prepare = dies_with_parent()
            if os.fork() == 0:
                prepare()
                listener.close()
                keep(connection)
                return
            connection.close()
            while reaped():
                pass
        while reaped():
            pass


def reaped() -> bool:
    """Whether a keeper had ended and is now reaped."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0] > 0
    except ChildProcessError:
        return False


def keep(connection: socket.socket) -> None:
    """In a process of its own: fork the one that is asked for, and say how it ends."""
    with connection:
        request = json.loads(connection.recv(MOST_BYTES))
        prepare = dies_with_parent()
        child = os.fork()
        if child == 0:
            prepare()
            connection.close()
            become(**request)
            return
        connection.sendall(b"%d" % child)
        with selectors.DefaultSelector() as ready:
            ready.register(os.pidfd_open(child), selectors.EVENT_READ)
            ready.register(connection, selectors.EVENT_READ)  # that it ends: whoever asked is gone
            (key, _), *_ = ready.select()
        if key.fileobj is connection:
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(b"%d" % code)
    os._exit(0)


def become(arguments: list[str], environ: dict[str, str], folder: str, output: str) -> None:
    """What `python ARGUMENTS` would be in this environment; ends as that would, through the interpreter's own end."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    sys.path[:0] = [path for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    null, log = os.open(os.devnull, os.O_RDONLY), os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number, stream in enumerate((null, log, log)):
        os.dup2(stream, number)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
