"""Who is served next: one at a time, in the order in which they came, and nobody twice over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, Event

from fs_plugins.errors import SettingError
from fs_plugins.playground.live import Stopped

TICK = 0.25
"""Seconds after which somebody who waits looks whether they still want to."""


class Line:
    """A queue of people.

    Args:
        most: that may be in it, the one being served among them.
        each: how often one person may be.
    """

    def __init__(self, most: int = 16, each: int = 2) -> None:
        self.most, self.each = most, each
        self._people: list[tuple[object, str]] = []
        self._moved = Condition()

    def __len__(self) -> int:
        return len(self._people)

    @contextmanager
    def place(self, person: str) -> Iterator[Place]:
        """A place in the line, left at the end whatever happens.

        Raises:
            SettingError: the line is full, or this person has places enough.
        """
        mark = object()
        with self._moved:
            if sum(other == person for _, other in self._people) >= self.each:
                raise SettingError(
                    f"You have {self.each} runs waiting or under way, which is the limit. Wait for one, or stop it."
                )
            if len(self._people) >= self.most:
                raise SettingError(f"{self.most} runs are waiting, which is the limit. Try again in a minute.")
            self._people.append((mark, person))
        try:
            yield Place(self, mark)
        finally:
            with self._moved:
                self._people.remove((mark, person))
                self._moved.notify_all()

    def ahead(self, mark: object) -> int:
        """How many are served before the one with this mark."""
        return next(i for i, (other, _) in enumerate(self._people) if other is mark)


class Place:
    """One place of a ``Line``."""

    def __init__(self, line: Line, mark: object) -> None:
        self._line, self._mark = line, mark

    def waiting(self, stop: Event) -> Iterator[int]:
        """How many are ahead, whenever that changes, until nobody is.

        Raises:
            Stopped: ``stop`` was set before.
        """
        told = None
        while True:
            with self._line._moved:
                ahead = self._line.ahead(self._mark)
                if ahead and ahead == told:
                    self._line._moved.wait(TICK)
                    ahead = self._line.ahead(self._mark)
            if stop.is_set():
                raise Stopped
            if not ahead:
                return
            if ahead != told:
                told = ahead
                yield ahead
