"""The photographs that everything on photographs is judged on: two hundred, each by its author under CC BY 2.0.

They are every fifth of the thousand of the NIPS 2017 competition on adversarial attacks, in the order of their names.
But for the older purifier ``photo``, nothing that ships was trained on them. The others can be read from the
competition's own folder.
"""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fs_plugins.errors import SettingError
from fs_plugins.files import text
from fs_plugins.pictures import pictures_below

FOLDER = Path(__file__).parent / "pictures"
CREDITS = FOLDER / "photographs.csv"
HELD_OUT = 5
"""One photograph in so many, in the order of their names and from the first on, is never trained on."""

_ALIKE = {134: "crane, a bird", 517: "crane, a machine"}
"""Classes of ImageNet whose every name another class has too."""


@dataclass(frozen=True)
class Photograph:
    """One of them.

    Args:
        name: as in the competition's list.
        label: number of its class, 0 to 999, in ImageNet's order.
        aim: number of the class that the competition's targeted attacks were to reach.
        author, source, licence: whose it is, the page it comes from, and the address of its licence.
        path: of the picture.
    """

    name: str
    label: int
    aim: int
    author: str
    source: str
    licence: str
    path: Path


@cache
def held_out() -> tuple[Photograph, ...]:
    """The two hundred, in the order of their names."""
    return tuple(
        Photograph(
            row["photograph"],
            int(row["label"]),
            int(row["aim"]),
            row["author"],
            row["source"],
            row["licence"],
            FOLDER / f"{row['photograph']}.jpg",
        )
        for row in csv.DictReader(text(CREDITS).splitlines())
    )


def of_competition(folder: Path) -> tuple[Photograph, ...]:
    """All photographs of the competition's folder, in the order of their names.

    Args:
        folder: has ``images.csv``, and the pictures below it.

    Raises:
        SettingError: it is not that folder, or lacks pictures.
    """
    listing, needed = folder / "images.csv", ("TrueLabel", "TargetClass", "Author", "OriginalLandingURL", "License")
    try:
        rows = {row.get("ImageId"): row for row in csv.DictReader(text(listing).splitlines())}
    except (OSError, ValueError, csv.Error) as error:
        raise SettingError(f"{listing}, the list of the NIPS 2017 competition, cannot be read: {error}.") from None
    there = {path.stem: path for path in reversed(pictures_below(folder))}
    if not rows or not rows.keys() <= there.keys():
        missing = sorted(map(str, rows.keys() - there.keys()))
        raise SettingError(
            f"{folder} has {len(rows) - len(missing)} of the {len(rows)} pictures that {listing} names"
            + (f"; the first that is missing is {missing[0]}." if missing else ".")
        )
    try:
        return tuple(_listed(rows[name], needed, there[name]) for name in sorted(there) if name in rows)
    except (KeyError, ValueError, TypeError) as error:
        raise SettingError(f"{listing} needs the columns ImageId, {', '.join(needed)}: {error}.") from None


def _listed(row: dict[str, str], needed: Sequence[str], path: Path) -> Photograph:
    label, aim, author, source, licence = (row[column] for column in needed)
    return Photograph(row["ImageId"], int(label) - 1, int(aim) - 1, spelled(author), source, licence, path)


def spelled(author: str) -> str:
    """An author's name; the competition's list has bytes beyond ASCII as ``\\303\\251``."""
    plain = re.sub(r"\\(\d{3})", lambda byte: chr(int(byte[1], 8)), author)
    return plain.encode("latin-1").decode() if plain != author else author


def trained_on() -> frozenset[str]:
    """Names of the photographs that something which ships was trained on, by the lists beside it."""
    listed = sorted(FOLDER.parents[1].glob("*/*/photographs.csv"))
    rows = (row for path in listed if path != CREDITS for row in csv.DictReader(text(path).splitlines()))
    return frozenset(row["photograph"] for row in rows)


@cache
def class_names() -> tuple[str, ...]:
    """A short name of each of ImageNet's thousand classes, no two alike, from the list that comes with timm.

    Raises:
        SettingError: timm is not installed.
    """
    from fs_plugins.photos.parts import timm

    known = timm().data.ImageNetInfo()
    whole = [_ALIKE.get(i) or known.index_to_description(i, detailed=False) for i in range(1000)]
    first = [name.partition(",")[0] for name in whole]
    return tuple(name if first.count(name) == 1 else long for name, long in zip(first, whole, strict=True))


def choices(
    photograph: str, label: int, others: Sequence[int] = (), count: int = 10, classes: int = 1000
) -> tuple[int, ...]:
    """``count`` different classes to choose from, in an order that follows from the photograph's name.

    Args:
        label: the right one.
        others: classes that must be among them too, such as an attack's.
        classes: how many there are.
    """
    lot = random.Random(photograph)
    chosen = list(dict.fromkeys((label, *others)))
    chosen += lot.sample([i for i in range(classes) if i not in chosen], count - len(chosen))
    lot.shuffle(chosen)
    return tuple(chosen)
