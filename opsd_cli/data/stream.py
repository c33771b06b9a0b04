"""Which problems a run trains on, step by step: shuffled epochs of all problems, without those whose prompts do not
fit. Only the problems that a run comes to are rendered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from opsd_cli.data.problems import PromptPair
from opsd_cli.data.seeds import epoch_order

Render = Callable[[Sequence[int]], Sequence[PromptPair | None]]
"""The prompts of some problems by their positions, in order; None for one that does not fit."""


class PromptStream:
    """The prompts of a run, in the order in which its steps take them. What stands at a place depends on the problems
    and the seed alone: more steps are the same stream, longer."""

    def __init__(self, length: int, render: Render, *, seed: int, places: int) -> None:
        """Of `length` problems, render those of the first `places` places, and no more. `render` raises where too many
        do not fit; at least one must."""
        self._length, self._render, self._seed = length, render, seed
        self._prompts: dict[int, PromptPair | None] = {}
        self._walk = self._fitting()
        self._at: list[int] = []
        # The problems of the first places, all in one call; those that stand in for what does not fit come after them.
        self._render_all(self._first(places))
        self._extend(min(places, length))  # beyond an epoch nothing is left to render

    @property
    def rendered(self) -> list[PromptPair]:
        """The prompts that were rendered and fit, in the order of their problems."""
        return [pair for _, pair in sorted(self._prompts.items()) if pair is not None]

    def at(self, places: range) -> list[PromptPair]:
        """The prompts at these places."""
        self._extend(places.stop)
        pairs = [self._prompts[self._at[place]] for place in places]
        return [pair for pair in pairs if pair is not None]

    def prompt_at(self, place: int) -> PromptPair:
        """The prompts at this place."""
        (pair,) = self.at(range(place, place + 1))
        return pair

    def _first(self, places: int) -> list[int]:
        epochs = -(-places // self._length)
        if epochs > 1:
            return list(range(self._length))
        return sorted(epoch_order(self._length, seed=self._seed, epoch=0)[:places])

    def _extend(self, places: int) -> None:
        while len(self._at) < places:
            self._at.append(next(self._walk))

    def _fitting(self) -> Iterator[int]:
        """Positions of problems that fit, epoch after epoch."""
        epoch = 0
        while True:
            for position in epoch_order(self._length, seed=self._seed, epoch=epoch):
                if position not in self._prompts:
                    self._render_all([position])
                if self._prompts[position] is not None:
                    yield position
            epoch += 1

    def _render_all(self, positions: Sequence[int]) -> None:
        self._prompts |= zip(positions, self._render(positions), strict=True)


def stream_of(prompts: Sequence[PromptPair], *, seed: int) -> PromptStream:
    """A stream of prompts that are rendered already."""
    return PromptStream(len(prompts), lambda positions: [prompts[i] for i in positions], seed=seed, places=len(prompts))
