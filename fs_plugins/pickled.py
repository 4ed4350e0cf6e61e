"""Objects that hold locks or thread-local state and must still deep-copy and pickle with their model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Pickled:
    """Thread-bound attributes, named in ``_fresh``, are left out of copies and made anew."""

    _fresh: tuple[tuple[str, Callable[[], Any]], ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        fresh = {name for name, _ in self._fresh}
        return {name: value for name, value in self.__dict__.items() if name not in fresh}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name, make in self._fresh:
            setattr(self, name, make())
