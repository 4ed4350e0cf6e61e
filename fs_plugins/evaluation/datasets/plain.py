"""Any folder with pictures in it."""

from __future__ import annotations

from pathlib import Path

from fs_plugins.evaluation.datasets.dataset import Dataset
from fs_plugins.evaluation.datasets.reader import sample_of
from fs_plugins.files import real
from fs_plugins.pictures import pictures_below


def read(root: Path, aside: Path | None = None) -> Dataset | None:
    """Every picture below the root, but for those in the folder ``aside``, also by a link; None if there is none."""
    found = pictures_below(root)
    if aside is not None and not real(root).is_relative_to(apart := real(aside)):
        within = {place for place in {path.parent for path in found} if real(place).is_relative_to(apart)}
        found = [path for path in found if path.parent not in within]
    return Dataset(real(root).name, root, tuple(sample_of(root, path) for path in found)) if found else None
