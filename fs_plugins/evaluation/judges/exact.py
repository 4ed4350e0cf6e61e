"""For answers that leave no choice of words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class ExactMatch:
    """1 if the texts are equal up to case, whitespace and a full stop at the end, else 0."""

    name = "exact"

    def scores(self, pairs: Sequence[tuple[str, str]]) -> Iterator[float]:
        """See ``Judge.scores``; never fails."""
        for said, reference in pairs:
            yield float(_plain(said) == _plain(reference))


def _plain(text: str) -> str:
    return " ".join(text.split()).removesuffix(".").rstrip().casefold()
