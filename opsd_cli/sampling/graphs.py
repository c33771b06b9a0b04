"""Work that is launched again and again with the same shapes and addresses, captured in CUDA graphs: one launch instead
of hundreds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch

SMALL_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
BUCKET_STEP = 64  # beyond the last of them


def bucket_of(rows: int) -> int:
    """The number of rows that so many are computed with: there is one graph for each."""
    return next((size for size in SMALL_BUCKETS if size >= rows), -(-rows // BUCKET_STEP) * BUCKET_STEP)


class Branch:
    """A second stream, for small work that needs nothing of what follows on the current one: captured, it becomes a
    branch of the graph, and runs at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def fork(self) -> Iterator[None]:
        """What is launched inside follows what was launched on the current stream before."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What is launched on the current stream from now on follows what was launched in the branch. To be called
        before anything that the branch reads or makes is freed."""
        torch.cuda.current_stream().wait_stream(self._stream)


class Graphs:
    """Captured work by key; all share one pool of memory, since only one of them runs at a time. Work must leave its
    results in tensors that outlive it. Off a GPU, or where `enabled` is false, it is simply run."""

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.enabled = enabled and device.type == "cuda"
        if self.enabled:
            self._stream = torch.cuda.Stream(device)
        self.clear()

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """The first time `work` is run as it is, which compiles kernels and allocates what libraries keep; the second
        time it is captured; from then on it is replayed."""
        if not self.enabled:
            work()
        elif key in self._graphs:
            self._graphs[key].replay()
        elif key in self._tried:
            self._graphs[key] = self._capture(work)
            self._graphs[key].replay()
        else:
            self._tried.add(key)
            self._beside(work)

    def _capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        # Without torch.cuda.graph, which collects garbage and empties the allocator each time.
        graph = torch.cuda.CUDAGraph()

        def record() -> None:
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()

        self._beside(record)
        return graph

    def _beside(self, work: Callable[[], None]) -> None:
        """On a stream of its own, as a capture must be; libraries keep their workspaces by stream."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def clear(self) -> None:
        """Forget everything captured: addresses have changed, or its memory is needed."""
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._tried: set[Hashable] = set()
        if self.enabled:
            self._pool = torch.cuda.graph_pool_handle()
