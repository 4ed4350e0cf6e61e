"""Any folder with pictures in it."""

from __future__ import annotations

from pathlib import Path

from fs_plugins.evaluation.datasets.dataset import Dataset
from fs_plugins.evaluation.datasets.reader import sample_of
from fs_plugins.pictures import pictures_below


def read(root: Path, aside: Path | None = None) -> Dataset | None:
    """Every picture below the root, but for those in the folder ``aside``, also by a link; None if there is none."""
    found = pictures_below(root)
    if aside is not None and not root.resolve().is_relative_to(apart := aside.resolve()):
        within = {place for place in {path.parent for path in found} if place.resolve().is_relative_to(apart)}
        found = [path for path in found if path.parent not in within]
    return Dataset(root.resolve().name, root, tuple(sample_of(root, path) for path in found)) if found else None
