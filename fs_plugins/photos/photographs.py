"""The photographs that everything on photographs is judged on: two hundred, each by its author under CC BY 2.0.

They are every fifth of the thousand of the NIPS 2017 competition on adversarial attacks, in the order of their names,
and nothing that ships was trained on them. With the folder of all thousand the same fifth is read from there.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fs_plugins.files import text

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
        name: as in the competition's list; the file is ``FOLDER / f"{name}.jpg"``.
        label: number of its class, 0 to 999, in ImageNet's order.
        aim: number of the class that the competition's targeted attacks were to reach.
        author, source, licence: whose it is, the page it comes from, and the address of its licence.
    """

    name: str
    label: int
    aim: int
    author: str
    source: str
    licence: str

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.jpg"


@cache
def held_out() -> tuple[Photograph, ...]:
    """The two hundred, in the order of their names."""
    rows = csv.DictReader(text(CREDITS).splitlines())
    return tuple(
        Photograph(
            row["photograph"], int(row["label"]), int(row["aim"]), row["author"], row["source"], row["licence"]
        )
        for row in rows
    )  # fmt: skip


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
