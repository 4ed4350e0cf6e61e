"""What was smoothed, from the processes that smooth to the one that answers ``/metrics``.

Each worker keeps its numbers in a small file of its own; whoever is asked adds them up. The folder of these files is
made by vLLM's first process, whose environment the others inherit.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fs_plugins.hooks import hookimpl
from fs_plugins.patch import SmoothingEvent

FOLDER = "FS_PLUGINS_COUNTS"
"""Environment variable: where the numbers are; set by us."""
NUMBERS = {
    "smoothed_images": "Images whose features were smoothed.",
    "draws": "Noisy draws that were encoded for them.",
    "smoothing_seconds": "Time spent in vision calls that were smoothed.",
    "non_finite_draws": "Draws left out of an average because they were not finite.",
}
_MADE: list[tempfile.TemporaryDirectory[str]] = []
"""Gone when its process is."""


def prepare() -> None:
    """Make the folder, in the first process."""
    if FOLDER not in os.environ:
        _MADE.append(tempfile.TemporaryDirectory(prefix="fs-plugins-"))
        os.environ[FOLDER] = _MADE[0].name


class Tally:
    """A plugin that writes down what this process smooths."""

    def __init__(self) -> None:
        path = Path(os.environ[FOLDER]) / f"{os.getpid()}"
        self._kept = np.memmap(path, dtype=np.float64, mode="w+", shape=(len(NUMBERS),))

    @hookimpl
    def fs_after_smoothing(self, event: SmoothingEvent) -> None:
        """Add one vision call."""
        self._kept += (event.images, event.images * event.n0, event.seconds, event.non_finite)


def totals() -> dict[str, float]:
    """The numbers of all processes together, by their names in ``NUMBERS``."""
    kept = [np.fromfile(path, dtype=np.float64) for path in Path(os.environ[FOLDER]).iterdir()]
    whole = sum((one for one in kept if len(one) == len(NUMBERS)), np.zeros(len(NUMBERS)))
    return dict(zip(NUMBERS, whole.tolist(), strict=True))


class Collector:
    """What prometheus_client asks at every scrape."""

    def collect(self) -> Iterator[Any]:
        """A counter for each of ``NUMBERS``."""
        from prometheus_client.core import CounterMetricFamily

        for name, value in totals().items():
            yield CounterMetricFamily(f"fs_plugins_{name}", NUMBERS[name], value=value)


def show(module: Any) -> None:
    """Have ``vllm.v1.metrics.prometheus``'s registry show the numbers, whichever one it hands out."""
    original: Callable[[], Any] = module.get_prometheus_registry
    shown: list[Any] = []

    def registry() -> Any:
        found = original()
        if not any(one is found for one in shown):
            found.register(Collector())
            shown.append(found)
        return found

    module.get_prometheus_registry = registry
    instrumentator = sys.modules.get("vllm.entrypoints.serve.instrumentator.metrics")
    if instrumentator is not None:  # it has the function by name already
        instrumentator.get_prometheus_registry = registry  # type: ignore[attr-defined]
