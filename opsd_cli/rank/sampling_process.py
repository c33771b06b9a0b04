"""`python -m opsd_cli.rank.sampling_process SOCKET PIPE`: a process beside the ranks, on a device of its own, that
draws completions with our own decoder or with vLLM from the weights that rank 0 sends (other side: `sampling.apart`).
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_cli.cpu.allocator import keep_freed_memory
from opsd_cli.engine.device import forbid_reduced_precision
from opsd_cli.engine.loading import Source, load_model
from opsd_cli.engine.process_group import alone
from opsd_cli.rank.recorder import quiet_libraries
from opsd_cli.safety.secrets import redact_output
from opsd_cli.sampling.apart import PATIENCE, source_of
from opsd_cli.sampling.batch_decoder import BatchLimits
from opsd_cli.sampling.choose_decoder import Completer
from opsd_cli.sampling.token_sampling import Completion, Draw, Draws
from opsd_cli.sampling.vllm_engine import Room, VllmEngine
from opsd_cli.sampling.weight_channel import Messages, WeightChannel, receive_weights
from opsd_cli.settings.config import SamplingSettings
from opsd_cli.settings.errors import ExitCode, OpsdError


class OwnDecoder:
    """Our own decoder over a model that is given new weights."""

    def __init__(self, source: Source, device: torch.device, about: Mapping[str, Any]) -> None:
        self._model = load_model(source, device=device)
        self._limits = BatchLimits(about["max_rows"], about["cache_tokens"])
        self._completer = Completer(self._model, alone(), end_ids=about["end_ids"], pad_id=about["pad_id"], warn=print)
        self.how = self._completer.choose_decoder()

    @torch.no_grad()
    def wake(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        # In place: a captured graph reads them at their addresses.
        own = dict(self._model.merged_weights())
        for name, tensor in weights:
            own.pop(name).copy_(tensor)
        assert not own, f"nothing was sent for {', '.join(own)}"

    def sleep(self) -> None:
        """Nothing: its device is its own."""

    def complete(
        self,
        draws: Sequence[Draw],
        *,
        sampling: SamplingSettings,
        end_ids: Sequence[int],
        should_stop: Callable[[], bool],
    ) -> list[Completion]:
        self._completer.end_ids = tuple(end_ids)
        return self._completer.complete(draws, sampling=sampling, limits=self._limits, should_stop=should_stop)


def build(about: Mapping[str, Any], device: torch.device) -> Draws:
    """What draws, as the sampler says."""
    source = source_of(about["source"])
    if about["draws_with"] == "static":
        return OwnDecoder(source, device, about)
    # vLLM joins the process group of a process, here one of its own.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    room = Room(about["max_rows"], about["max_positions"], about["memory_share"], about["cpu_cache_bytes"])
    return VllmEngine(source, device, room, group=alone(), graphs=about["graphs"], sleeps=False)


def serve(messages: Messages) -> None:
    """Do what rank 0 asks, until it is gone."""
    about = messages.receive()
    device = torch.device(about["device"], 0) if about["device"] == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        engine = build(about, device)
    except OpsdError as error:
        messages.send("refused", reason=str(error))
        return
    messages.send("ready", how=engine.how)
    messages.receive()
    channel = WeightChannel(Path(about["folder"]), device, place=about["place"], size=about["size"], patience=PATIENCE)
    while True:
        message = messages.receive()
        if message["kind"] == "weights":
            engine.wake(receive_weights(messages, channel, device))
            messages.send("loaded")
        elif message["kind"] == "draw":
            completions = engine.complete(
                [Draw(ids, seed) for ids, seed in message["draws"]],
                sampling=SamplingSettings(**message["sampling"]),
                end_ids=message["end_ids"],
                should_stop=messages.has_one,
            )
            messages.send("drawn", completions=[asdict(done) for done in completions])
        # Else a request to stop, which ended the completions above, or came when they were done.


def end_with(pipe: int) -> None:
    """End this process, whatever it does, when rank 0 is gone: the kernel closes that end of the pipe then."""

    def wait() -> None:
        os.read(pipe, 1)
        os._exit(int(ExitCode.ENVIRONMENT))

    threading.Thread(target=wait, daemon=True).start()


def main(argv: Sequence[str]) -> int:
    """Returns the exit code. Rank 0 is asked to stop, and waits for what is being drawn; signals to the group are not
    for this process."""
    control, pipe = map(int, argv)
    end_with(pipe)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    keep_freed_memory()
    redact_output()
    quiet_libraries()
    forbid_reduced_precision()
    try:
        serve(Messages(socket.socket(fileno=control)))
    except EOFError:
        pass
    except OpsdError as error:
        print(error, file=sys.stderr, flush=True)
        return int(error.exit_code)
    return int(ExitCode.DONE)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
