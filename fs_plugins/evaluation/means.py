"""With what an evaluation works: a folder, progress bars, memory, and its share of the pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fs_plugins.evaluation.datasets import Sample
from fs_plugins.evaluation.store import Store
from fs_plugins.smoothing import DEFAULT_CHUNK_SIZE

Track = Callable[[str, int], Callable[[int], None]]
"""(what, how many pictures) -> a function that is told how many more are done."""

S = TypeVar("S")


@dataclass(frozen=True)
class Means:
    """What an evaluation has at hand.

    Args:
        store: where everything is kept, and taken from.
        track: makes progress bars.
        batch_size, chunk_size: pictures at once, and rows (draws times pictures) of a smoothed encoder at once; they
            bound memory and change no result.
        share: this process's number and how many there are; they divide the pictures among them.
    """

    store: Store
    track: Track
    batch_size: int = 32
    chunk_size: int = DEFAULT_CHUNK_SIZE
    share: tuple[int, int] = (0, 1)

    def mine(self, samples: Sequence[Sample]) -> list[Sample]:
        """This process's part."""
        rank, size = self.share
        return [sample for i, sample in enumerate(samples) if i % size == rank]

    def batches(self, some: Sequence[S]) -> Iterator[list[S]]:
        for first in range(0, len(some), self.batch_size):
            yield list(some[first : first + self.batch_size])
