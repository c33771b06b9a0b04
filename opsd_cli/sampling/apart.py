"""Sampling processes on devices of their own (`sampler.placement=separate`): rank 0 starts them, hands them the
weights, asks them for the completions of all ranks and shares these out. With `sampler.lag=1` they draw the next step's
completions while the ranks train on this one's.

A process ends with rank 0, whatever ends that: it reads a pipe that the kernel closes then.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opsd_cli.engine.loading import Source
from opsd_cli.engine.process_group import Ranks
from opsd_cli.sampling.sampling_child import SamplingChild, card_beside
from opsd_cli.sampling.token_sampling import Completion, Draw
from opsd_cli.sampling.weight_channel import SENDER, WeightChannel, send_weights
from opsd_cli.settings.config import SamplingSettings
from opsd_cli.settings.errors import ConfigError, OutsideError

POLL_SECONDS = 0.1
PATIENCE = timedelta(days=7)  # of a broadcast; that the other side is alive is seen elsewhere
PLACE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}  # each is alone


@dataclass(frozen=True)
class Drawn:
    """The completions of a step: of this rank, on rank 0 and after a resume of all, since others may want them then."""

    step: int
    lag: int  # steps between the weights that drew them and those that learn from them
    by_seed: dict[int, Completion]  # of the draw

    def of(self, draws: Sequence[Draw]) -> list[Completion]:
        return [self.by_seed[draw.seed] for draw in draws]


class Apart:
    """Sampling processes beside the ranks. Every method is collective. It can draw nothing before it was given weights.

    `about` says what draws and how much at once (`rank.sampling_process` reads it).
    """

    def __init__(
        self, about: Mapping[str, Any], *, processes: int, ranks: Ranks, source: Source, device: torch.device
    ) -> None:
        """Raises ConfigError, on every rank, where the processes cannot draw."""
        self._ranks = ranks
        self._processes: list[SamplingChild] = []
        self._asked: int | None = None  # step whose completions are being drawn
        self._lag = 0  # of these
        self._drawn: Drawn | None = None  # the newest that were taken
        self.how, problem = "", ""
        if ranks.rank == 0:
            try:
                self._start({**about, "source": json_of(source), "device": device.type}, processes, device)
                self.how = self._processes[0].how
            except (ConfigError, OutsideError) as error:
                problem = str(error)
                self.close()
        self.how, problem = ranks.from_first((self.how, problem))
        if problem:
            raise ConfigError(problem)

    def _start(self, about: Mapping[str, Any], count: int, device: torch.device) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="opsd-sampling-")
        for number in range(count):
            environ = dict(os.environ) | PLACE
            if device.type == "cuda":
                environ["CUDA_VISIBLE_DEVICES"] = card_beside(os.environ, self._ranks.world_size + number)
            self._processes.append(SamplingChild(number, environ))
        folder, size = Path(self._folder.name), count + 1
        for process in self._processes:
            process.messages.send("build", **about, folder=str(folder), place=process.number + 1, size=size)
        for process in self._processes:
            process.how = self._reply(process, "ready")["how"]
        for process in self._processes:
            process.messages.send("meet")
        self._channel = WeightChannel(folder, device, place=SENDER, size=size, patience=PATIENCE)

    # Weights and completions --------------------------------------------------------------------------------------

    def wake(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Draw from `weights` from here on: every parameter by the name it has in the checkpoint, an adapter merged."""
        assert self._asked is None, "completions are being drawn"
        if self._ranks.rank > 0:
            for _ in weights:  # sharded ones are gathered by all ranks
                pass
            return
        peers = [process.messages for process in self._processes]
        try:
            for peer in peers:
                peer.send("weights")
            send_weights(weights, self._channel, peers)
        except (EOFError, RuntimeError) as error:  # gloo's and NCCL's are RuntimeError
            if gone := next((process for process in self._processes if process.has_ended()), None):
                raise OutsideError(gone.obituary()) from error
            raise
        for process in self._processes:
            self._reply(process, "loaded")

    def sleep(self) -> None:
        """Nothing: its devices are its own."""

    def complete(
        self,
        draws: Sequence[Draw],
        *,
        sampling: SamplingSettings,
        end_ids: Sequence[int],
        should_stop: Callable[[], bool],
    ) -> list[Completion]:
        """One completion per draw of this rank, in order. After a request to stop they may be cut or empty."""
        assert self._asked is None, "other completions are being drawn"
        self._ask(draws, sampling, end_ids)
        completions = self._take(should_stop, gives_up=True)
        assert completions is not None, "it does not leave without them"
        return completions

    def draw(
        self,
        step: int,
        draws: Sequence[Draw],
        following: Sequence[Draw] | None,
        *,
        weights: Callable[[], Iterable[tuple[str, Tensor]]],
        sampling: SamplingSettings,
        end_ids: Sequence[int],
        should_stop: Callable[[], bool],
    ) -> tuple[list[Completion], int] | None:
        """This rank's completions of step `step`, and how many steps old the weights are that drew them: what was asked
        for in the step before, or in the first step new ones. Then the current weights begin with those of
        the following step. None after a request to stop; what is being drawn goes on."""
        is_new = not (self._asked == step or (self._drawn is not None and self._drawn.step == step))
        if is_new:
            self.wake(weights())
            self._ask(draws, sampling, end_ids)
            self._asked, self._lag = step, 0
        if not self._await(step, should_stop):
            return None
        assert self._drawn is not None, "it has arrived"
        if following is not None:
            if not is_new:
                self.wake(weights())
            self._ask(following, sampling, end_ids)
            self._asked, self._lag = step + 1, 1
        return self._drawn.of(draws), self._drawn.lag

    # What a checkpoint keeps --------------------------------------------------------------------------------------

    def settle(self, beat: Callable[[], object] = lambda: None) -> None:
        """Wait for what is being drawn ahead, which is kept for its step; `beat` is called again and again."""

        def goes_on() -> bool:
            beat()
            return False

        if self._asked is not None:
            self._await(self._asked, goes_on)

    def kept(self, step: int, waiting: Callable[[], None], beat: Callable[[], object] = lambda: None) -> str:
        """The completions that step `step` learns from, as text for the checkpoint before it: the weights that drew
        them will be gone. On rank 0; empty where none were drawn ahead. Waits for those that are being drawn, and says
        so."""
        if self._asked == step:
            waiting()
            self.settle(beat)
        drawn = self._drawn
        if drawn is None or drawn.step != step or self._ranks.rank > 0:
            return ""
        completions = [[seed, asdict(done)] for seed, done in drawn.by_seed.items()]
        return json.dumps({"step": drawn.step, "lag": drawn.lag, "completions": completions})

    def restore(self, text: str) -> None:
        """What `kept` returned."""
        stored = json.loads(text)
        by_seed = {seed: completion_of(done) for seed, done in stored["completions"]}
        self._drawn = Drawn(stored["step"], stored["lag"], by_seed)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.end()
        self._processes = []

    # Rank 0's side ------------------------------------------------------------------------------------------------

    def _ask(self, draws: Sequence[Draw], sampling: SamplingSettings, end_ids: Sequence[int]) -> None:
        """Have the completions of all ranks drawn."""
        self._seeds = [draw.seed for draw in draws]
        asked = self._ranks.to_first([(list(draw.prompt_ids), draw.seed) for draw in draws])
        flat, count = [draw for one in asked for draw in one], len(self._processes)
        self._asked_by_rank = [[seed for _, seed in one] for one in asked]
        # In pieces that follow each other: the rollouts of a problem share its prefill.
        for process in self._processes:
            piece = flat[len(flat) * process.number // count : len(flat) * (process.number + 1) // count]
            process.send("draw", draws=piece, sampling=asdict(sampling), end_ids=list(end_ids))

    def _await(self, step: int, should_stop: Callable[[], bool]) -> bool:
        """Have the completions of step `step` in `_drawn`. False after a request to stop."""
        if self._asked == step:
            if self._take(should_stop, gives_up=False) is None:
                return False
            self._asked, self._drawn = None, Drawn(step, self._lag, self._arrived)
        return True

    def _take(self, should_stop: Callable[[], bool], *, gives_up: bool) -> list[Completion] | None:
        """The completions that this rank has asked for; by seed, on rank 0 with those of the others, they are in
        `_arrived`. After a request to stop: cut where it `gives_up` on them, else None."""
        shares: list[list[Completion] | None] = []
        collected = self._collect(should_stop, gives_up=gives_up) if self._ranks.rank == 0 else None
        if collected is not None:
            each = iter(collected)
            shares = [[next(each) for _ in seeds] for seeds in self._asked_by_rank]
        own: list[Completion] | None = self._ranks.hand_out(shares or [None] * self._ranks.world_size)
        if own is None:
            return None
        self._arrived = dict(zip(self._seeds, own, strict=True))
        if collected is not None:
            self._arrived = dict(zip((seed for one in self._asked_by_rank for seed in one), collected, strict=True))
        return own

    def _collect(self, should_stop: Callable[[], bool], *, gives_up: bool) -> list[Completion] | None:
        told = False

        def tick() -> None:
            nonlocal told
            if not told and should_stop():
                told = True
                if not gives_up:
                    raise _Interrupted
                for process in self._processes:
                    process.send("stop")

        try:
            # Every reply before any is read, so that one that is interrupted leaves all of them where they are.
            for process in self._processes:
                self._wait(process, tick)
        except _Interrupted:
            return None
        replies = [self._reply(process, "drawn")["completions"] for process in self._processes]
        return [completion_of(one) for reply in replies for one in reply]

    def _wait(self, process: SamplingChild, tick: Callable[[], None]) -> None:
        tick()
        while not process.messages.has_one(POLL_SECONDS):
            tick()

    def _reply(self, process: SamplingChild, kind: str) -> dict[str, Any]:
        """The next message of a process, which is of that kind. Raises ConfigError with what it refuses, OutsideError
        where it is gone."""
        try:
            message = process.messages.receive()
        except EOFError:
            raise OutsideError(process.obituary()) from None
        if message["kind"] == "refused":
            raise ConfigError(message["reason"])
        assert message["kind"] == kind, message["kind"]
        return message


class _Interrupted(Exception):
    """A request to stop, while completions are drawn that the next attempt wants."""


def json_of(value: Any) -> str:
    """A dataclass as JSON; dtypes by name. Numbers are read back as they were."""
    return json.dumps(asdict(value), default=lambda one: str(one).removeprefix("torch."))


def source_of(text: str) -> Source:
    """The inverse of `json_of` for a Source."""
    stored = json.loads(text)
    return Source(**{**stored, "dtype": getattr(torch, stored["dtype"])})


def completion_of(stored: Mapping[str, Any]) -> Completion:
    """The inverse of `asdict` for a Completion, through JSON."""
    return Completion(tuple(stored["ids"]), stored["finish_reason"], tuple(stored["logprobs"]))
