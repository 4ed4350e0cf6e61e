"""Any folder with pictures in it."""

from __future__ import annotations

from pathlib import Path

from fs_plugins.evaluation.datasets.dataset import Dataset
from fs_plugins.evaluation.datasets.reader import sample_of
from fs_plugins.pictures import pictures_below


def read(root: Path, aside: Path | None = None) -> Dataset | None:
    """Every picture below the root, but for those in the folder ``aside``; None if there is none."""
    found = pictures_below(root)
    if aside is not None and root.resolve() in aside.resolve().parents:
        inside = aside.resolve().relative_to(root.resolve())
        found = [path for path in found if not path.is_relative_to(root / inside)]
    return Dataset(root.resolve().name, root, tuple(sample_of(root, path) for path in found)) if found else None
