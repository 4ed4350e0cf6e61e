"""What a judge of captions is; the hooks speak of it, so it knows nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Judge(Protocol):
    """Says how alike two texts are."""

    @property
    def name(self) -> str:
        """For result files: all that can change a score, and no secret. Scores of different names do not compare."""

    def scores(self, pairs: Sequence[tuple[str, str]]) -> Iterator[float]:
        """One score in [0, 1] for each (said, reference), in order, each as soon as it is known.

        A caller that writes each down loses nothing finished when a later one fails.

        Raises:
            JudgeError: a pair got no score. All before it have been yielded.
        """
