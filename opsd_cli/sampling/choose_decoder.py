"""The choice of a decoder: the fastest whose logits are the model's own, tried on the model at hand. The fast forward
pass of the kind of device, else the model's own forward with its cache (on a GPU one that stays where it is, if it
can), else the same without a cache; a model on which none is right is refused. All ranks choose together, because
drawing is collective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from opsd_cli.engine import agreement
from opsd_cli.engine.device import free_bytes
from opsd_cli.engine.loading import causal_of
from opsd_cli.engine.process_group import Ranks
from opsd_cli.sampling.apart import Apart
from opsd_cli.sampling.batch_decoder import BatchLimits, HostLoop, Request, run_loop
from opsd_cli.sampling.decoder_trial import FAILURES, find_fault, one_line
from opsd_cli.sampling.device_loop import DeviceLoop, Tricks
from opsd_cli.sampling.hf_decoder import HFDecoder
from opsd_cli.sampling.llama_decoder import LlamaDecoder
from opsd_cli.sampling.llama_weights import FUSED_BYTES, supports
from opsd_cli.sampling.paged_decoder import PagedDecoder
from opsd_cli.sampling.samplers import Weights
from opsd_cli.sampling.static_decoder import StaticDecoder
from opsd_cli.sampling.token_sampling import Completion, Draw
from opsd_cli.sampling.whole_row_decoder import WholeRowDecoder
from opsd_cli.settings.config import SamplingSettings
from opsd_cli.settings.errors import DataError

IN_PLACE, IN_A_GRAPH = " over a cache that stays where it is", ", a token in one captured graph"
CHECKED_CALLS = frozenset(4**i for i in range(1, 20))
STEPS = 3  # tokens decoded one by one, after the rest of each row as its prompt
COPY_SHARE = 0.8  # of a GPU's free memory, up to which weights that are gathered anew each time are copied
FUSED_PART = 64  # one part in so many of a GPU's memory may be copies of weights that stay from call to call
KEEP_SHARE = 0.125  # of a GPU's memory, up to which a cache is kept between calls, and with it what was captured


class Completer:
    """Draws completions from weights that may change between calls.

    Every rank calls it equally often, as sampling and evaluation do, with as many draws as it has, or none. `warn` is
    called when the choice of the decoder changes during a run.
    """

    def __init__(
        self,
        weights: Weights,
        ranks: Ranks,
        *,
        end_ids: Sequence[int],
        pad_id: int | None,
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.weights, self.ranks, self.end_ids = weights, ranks, tuple(end_ids)
        self.pad_id = self.end_ids[0] if pad_id is None else pad_id
        self.apart: Apart | None = None
        self._warn = warn
        self._calls = 0
        self._refusal: str | None = None  # why not the fast pass; None: not decided yet
        self._keeps_cache = True  # where the fast pass is refused
        self._holds_cache = False  # and it is one that stays where it is
        self._held: StaticDecoder | None = None  # with its graphs, from call to call
        self._uncaptured = ""  # why no graph, once any rank has a reason
        self._kept: DeviceLoop | None = None  # with its graphs, from call to call

    def complete(
        self,
        draws: Sequence[Draw],
        *,
        sampling: SamplingSettings,
        limits: BatchLimits,
        should_stop: Callable[[], bool],
        report_done: Callable[[int], None] = lambda done: None,
    ) -> list[Completion]:
        """One completion per draw, in order. Ranks may bring different numbers of draws. `report_done` is called from
        time to time with how many of this rank's are finished."""
        request = Request(draws, sampling, frozenset(self.end_ids), limits)
        with self.weights.generating() as lm:
            loop = self.loop(lm)
            try:
                return run_loop(loop, request, should_stop=should_stop, report_done=report_done)
            finally:
                self._free_what_is_large(loop)

    def free(self) -> None:
        """Give the cache and what was captured back to training; the next call makes them again."""
        for kept in (self._kept, self._held):
            if kept is not None:
                kept.free()

    def close(self) -> None:
        """End the sampling processes, if there are any."""
        if self.apart is not None:
            self.apart.close()
            self.apart = None

    def choose_decoder(self) -> str:
        """Decide how completions are drawn, and say so for the plan of the run. Collective."""
        with self.weights.generating() as lm:
            refusal = self._choose(lm)
            if refusal:
                graph = "" if self.weights.gathers_layers else IN_A_GRAPH
                cache = IN_PLACE + graph if self._holds_cache else ""
                return f"drawn by the model's own forward pass{cache}: {refusal}"
            if causal_of(lm).device.type != "cuda":
                return "drawn by the fast forward pass"
            uncaptured = self._why_uncaptured(lm)
            how = f"uncaptured: {uncaptured}" if uncaptured else "a token in one captured graph"
            return f"drawn by the fast forward pass, {how}"

    def loop(self, lm: nn.Module) -> HostLoop | DeviceLoop:
        """What draws: around the fastest decoder that is right for these weights on every rank."""
        self._calls += 1
        before = self._refusal
        # Compared again at the calls 4, 16, 64 and so on: an adapter, for example, is zero at the first.
        if before is None or self._calls in CHECKED_CALLS:
            self._choose(lm)
        if before == "" and self._refusal:
            self._warn(f"from here on completions are drawn by the model's own forward pass: {self._refusal}")
        if self._refusal:
            self._kept = None  # with its cache and its graphs
            if self._holds_cache:
                return HostLoop(self._static_decoder(lm))
            own = HFDecoder(lm, pad_id=self.pad_id) if self._keeps_cache else WholeRowDecoder(lm)
            return HostLoop(own)
        return HostLoop(LlamaDecoder(lm)) if causal_of(lm).device.type == "cpu" else self._device_loop(lm)

    def _static_decoder(self, lm: nn.Module) -> StaticDecoder:
        """The one of the last call, if its graphs read these weights; else a new one."""
        if self._held is None or not self._held.reads(lm):
            if self._held is not None:
                self._held.free()  # before a new one takes memory
            self._held = StaticDecoder(lm, pad_id=self.pad_id, graphs=not self.weights.gathers_layers)
        return self._held

    def _device_loop(self, lm: nn.Module) -> DeviceLoop:
        """The one of the last call, if it can read these weights; else a new one."""
        captured = not self._why_uncaptured(lm)  # of all ranks, so it is asked whatever this one has kept
        if self._kept is not None and captured:
            if self._kept.decoder.weights.refresh(lm):
                return self._kept
            self._warn("the weights are no longer where a graph was captured that reads them; it is captured again")
        self._kept = None  # its memory is free before a new one takes some
        lent = self.weights.keeps_addresses or not captured
        device = causal_of(lm).device
        loop = DeviceLoop(PagedDecoder(lm, lent=lent, fused_bytes=fused_bytes(device)), Tricks(graphs=captured))
        if captured:
            self._kept = loop
        return loop

    def _why_uncaptured(self, lm: nn.Module) -> str:
        """A captured graph reads weights at addresses that stay. Where the engine gathers them anew for each call they
        are copied to such addresses, if there is room: on every rank, or on none, from then on."""
        if not (self.weights.keeps_addresses or self._uncaptured):
            self._uncaptured = self.ranks.refusal("" if self._kept is not None else self._no_room(lm))
        return self._uncaptured

    def _no_room(self, lm: nn.Module) -> str:
        """Why this rank cannot copy the weights."""
        needed = sum(parameter.numel() * parameter.element_size() for parameter in lm.parameters())
        device = causal_of(lm).device
        free = free_bytes(device) if device.type == "cuda" else 0
        if needed <= COPY_SHARE * free:
            return ""
        return (
            f"the weights are gathered anew for each call (zero=stage3), and a copy of {needed / 2**30:.1f} GiB that a "
            f"graph could read does not fit into {free / 2**30:.1f} GiB"
        )

    def _free_what_is_large(self, loop: HostLoop | DeviceLoop) -> None:
        """Between calls the memory belongs to training; capturing anew takes some tenths of a second."""
        if loop.decoder.device.type != "cuda":
            return
        kept = KEEP_SHARE * torch.cuda.get_device_properties(loop.decoder.device).total_memory
        if isinstance(loop, HostLoop):
            if isinstance(loop.decoder, StaticDecoder) and loop.decoder.bytes > kept:
                loop.decoder.free()
        elif loop.decoder.weights.copied_bytes > kept:
            self._kept = None
        elif loop.decoder.cache is not None and loop.decoder.cache.bytes > kept:
            loop.free()

    def _choose(self, lm: nn.Module) -> str:
        # Once refused it stays refused: a decoder that came back would change the numbers of a run once more.
        if not self._refusal:
            # Whether rows may move does not depend on the weights, so it is tried once.
            if why := self.weights.gathers_layers:
                self._refusal = f"its weights are gathered a layer at a time, for every token: {why}"
            else:
                self._refusal = self.ranks.refusal(why_not_fast(lm, moves_rows=self._refusal is None))
            if self._refusal:
                self._refusal += self._choose_slow(lm)
        return self._refusal

    def _choose_slow(self, lm: nn.Module) -> str:
        """Decide whether the model's own forward keeps a cache, and of which kind; why none. Raises DataError,
        on every rank, where it is wrong either way."""
        # On a CPU a token is not launches but arithmetic, which a cache of the full length makes more of. Where layers
        # are gathered for every token, few tokens are what counts: rows that enter beside others make them fewer.
        by_layer, on_cpu = bool(self.weights.gathers_layers), causal_of(lm).device.type == "cpu"
        if by_layer or (not on_cpu and self.weights.keeps_addresses):
            static = StaticDecoder(lm, pad_id=self.pad_id, graphs=not by_layer)
            why_not = self.ranks.refusal(find_fault(lm, static))
            static.free()
            self._holds_cache = not why_not
            if self._holds_cache:
                return ""
        fault = self.ranks.refusal(find_fault(lm, HFDecoder(lm, pad_id=self.pad_id)))
        self._keeps_cache = not fault
        if not fault:
            return ""
        if still := self.ranks.refusal(find_fault(lm, WholeRowDecoder(lm))):
            raise DataError(
                f"no completion can be drawn from this model (type {causal_of(lm).config.model_type}): {still}; use "
                "another model"
            )
        return f"; without a cache, every token by a pass over its whole row: {fault}"


def fused_bytes(device: torch.device) -> int:
    """How large copies of weights may be that stay from call to call."""
    if device.type != "cuda":
        return FUSED_BYTES
    return min(FUSED_BYTES, torch.cuda.get_device_properties(device).total_memory // FUSED_PART)


def why_not_fast(lm: nn.Module, *, moves_rows: bool) -> str:
    """Why completions are not drawn by the fast pass of the device, in words; empty where they are. Where it fails here
    (no compiler for a kernel, say) that is a reason too. `moves_rows`: try also what happens when rows come and go."""
    causal = causal_of(lm)
    if not supports(lm):
        return f"the fast pass does not know this architecture ({causal.config.model_type}, or this variant of it)"
    try:
        decoder = fast_decoder(lm)
        disagreement = find_disagreement(lm, decoder)
    except FAILURES as error:
        return f"the fast pass fails here ({one_line(error)})"
    fault = find_fault(lm, decoder) if moves_rows and not disagreement else ""
    return f"the fast pass fails its trial: {fault}" if fault else disagreement


def fast_decoder(lm: nn.Module) -> LlamaDecoder | PagedDecoder:
    """That of the device, as a run uses it."""
    device = causal_of(lm).device
    return LlamaDecoder(lm) if device.type == "cpu" else PagedDecoder(lm, fused_bytes=fused_bytes(device))


@torch.inference_mode()
def find_disagreement(lm: nn.Module, decoder: LlamaDecoder | PagedDecoder) -> str:
    """How the fast pass differs from the model, in words; empty where it gives the model's own logits.

    In bfloat16 the rounding of 28 layers is as large as what a wrong rotation in one of them changes. So each layer is
    also run alone, straight between the embedding and the head, where rounding is small and hides nothing.
    """
    causal = causal_of(lm)
    rows, layer_limit, last = agreement.probe_rows(causal), agreement.LAYER_LIMITS[causal.dtype], STEPS + 1
    model_NV = agreement.model_logits(lm, rows, last=last)
    median = agreement.deviation(fast_logits(decoder, rows), model_NV).median()
    padded_NV = agreement.model_logits(lm, rows, last=last, padded=True)
    limit = agreement.model_limit(agreement.deviation(padded_NV, model_NV).median(), causal.dtype)
    if not median <= limit:
        return f"the fast pass deviates from the model {agreement.describe(median, limit)}"
    fast_layers, fast_norm = decoder.layers, decoder.final_norm
    model_layers, model_norm = causal.model.layers, causal.model.norm
    by_layer = []
    for number, (fast_layer, model_layer) in enumerate(zip(fast_layers, model_layers, strict=True)):
        # One layer, and no final norm: it magnifies what rounding does to outlier dimensions.
        decoder.layers = [fast_layer]  # type: ignore[assignment]
        decoder.final_norm = nn.Identity()
        causal.model.layers, causal.model.norm = nn.ModuleList([model_layer]), nn.Identity()
        try:
            model_NV = agreement.model_logits(lm, rows, last=last)
        finally:
            causal.model.layers, causal.model.norm = model_layers, model_norm
        difference = agreement.overall(agreement.deviation(fast_logits(decoder, rows), model_NV))
        # One layer may round worse than the others, but only so much; most must stay within the plain limit.
        limit = agreement.WORST_LAYER_FACTOR * layer_limit
        if not difference <= limit:
            worst = agreement.describe(difference, limit)
            return f"the fast pass deviates from the model, in layer {number} alone, {worst}"
        by_layer.append(difference)
    decoder.layers, decoder.final_norm = fast_layers, fast_norm
    median = torch.stack(by_layer).median()
    if median <= layer_limit:
        return ""
    return f"the fast pass deviates from the model, in most layers, {agreement.describe(median, layer_limit)}"


def fast_logits(decoder: LlamaDecoder | PagedDecoder, rows: Sequence[Tensor]) -> Tensor:
    """Logits of the fast pass [N, V] at the last STEPS + 1 positions of each row."""
    prompts = [row[:-STEPS].tolist() for row in rows]
    longest = max(map(len, prompts))
    decoder.rows_within(BatchLimits(len(rows), cache_tokens=2**31), longest, STEPS, len(rows))
    # The first position comes from the prefill, the others from single steps: both ways through a layer are compared.
    logits = [decoder.admit(range(len(rows)), prompts)]
    logits += [decoder.step(torch.stack([row[place] for row in rows])) for place in range(-STEPS, 0)]
    for slot in range(len(rows)):
        decoder.release(slot)
    return torch.stack(logits, dim=1).flatten(0, 1)
