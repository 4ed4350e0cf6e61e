"""Work that tells how far it is, and can be stopped."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
Tell = Callable[[T], None]


class Stopped(Exception):  # noqa: N818  (no error: somebody wanted it)
    """Whoever waited does not want it any more."""


def live(work: Callable[[Tell[T]], R], stop: Event) -> Generator[T, None, R]:
    """Do work in a thread of its own; yield the latest that it told, and return its result.

    What was told while nobody looked is left out, but for the last. Once ``stop`` is set, or the generator is closed,
    ``tell`` raises ``Stopped`` inside the work; the thread has ended when this has.

    Raises:
        Exception: what the work raised.
    """
    news: SimpleQueue[T | None] = SimpleQueue()

    def tell(one: T) -> None:
        if stop.is_set():
            raise Stopped
        news.put(one)

    with ThreadPoolExecutor(1, "playground") as pool:
        done = pool.submit(work, tell)
        done.add_done_callback(lambda _: news.put(None))
        try:
            while (latest := news.get()) is not None:
                over = False
                while not news.empty() and not over:
                    later = news.get()
                    over = later is None
                    latest = latest if later is None else later
                yield latest
                if over:
                    break
            return done.result()
        finally:
            stop.set()
