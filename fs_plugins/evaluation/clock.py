"""How long a run took in all its parts, whatever stopped the earlier ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import monotonic

from fs_plugins.errors import SettingError
from fs_plugins.evaluation.means import Track
from fs_plugins.kept import read, write

FILE = "seconds.json"
_EVERY = 5.0
"""Seconds between two writes."""


class Clock:
    """Runs from when it is made, on from where an earlier part's was last written down; nothing is written before work
    is done.

    Args:
        folder: of the run's rows, which this process has locked.

    Raises:
        SettingError: what an earlier part wrote down is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._began = self._written = monotonic()
        self._before = _earlier(self._path) if self._path.exists() else 0.0

    @property
    def seconds(self) -> float:
        """Of all parts so far."""
        return self._before + monotonic() - self._began

    def write(self) -> None:
        """Keep it for a later part."""
        self._written = monotonic()
        write(self._path, {"seconds": self.seconds})

    def on(self, track: Track) -> Track:
        """The same progress bars, whose advances are times to write it down."""

        def watched(what: str, count: int) -> Callable[[int], None]:
            advance = track(what, count)

            def advanced(done: int) -> None:
                advance(done)
                if monotonic() - self._written >= _EVERY:
                    self.write()

            return advanced

        return watched


def _earlier(path: Path) -> float:
    advice = "Delete it and run again: the seconds of the parts so far are then not counted."
    found = read(path, "an evaluation", advice).get("seconds")
    if not isinstance(found, float) or not 0 <= found < float("inf"):
        raise SettingError(f"{path} is not what an evaluation wrote: it says no seconds. {advice}")
    return found
