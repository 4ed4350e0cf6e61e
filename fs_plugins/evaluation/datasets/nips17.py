"""The NIPS 2017 competition on adversarial attacks."""

from __future__ import annotations

import csv
from pathlib import Path

from fs_plugins.errors import SettingError
from fs_plugins.evaluation.datasets.dataset import Dataset
from fs_plugins.evaluation.datasets.reader import Reader, sample_of
from fs_plugins.pictures import pictures_below


def read(root: Path) -> Dataset:
    """The competition's labels are numbers of ImageNet's thousand classes, too many to ask for: captioning only."""
    listing = root / "images.csv"
    try:
        with listing.open(encoding="utf-8-sig", newline="") as file:
            names = [row.get("ImageId") for row in csv.DictReader(file)]
    except (csv.Error, UnicodeDecodeError) as error:
        raise SettingError(f"{listing} is no CSV file: {error}.") from None
    if not all(names):
        raise SettingError(
            f"{listing} needs a column ImageId with a name in every row, as in the NIPS 2017 competition."
        )
    there = {path.stem: path for path in reversed(pictures_below(root / "images"))}
    if missing := [name for name in names if name not in there]:
        raise SettingError(
            f"{len(missing)} of the {len(names)} pictures of {listing} are not in {root / 'images'}, the first "
            f"{missing[0]}.png. Put them there, or take their rows out."
        )
    return Dataset("NIPS 2017", root, tuple(sample_of(root, there[name]) for name in names if name))


NIPS17 = Reader(("images.csv",), read)
