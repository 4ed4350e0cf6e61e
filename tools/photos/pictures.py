"""The held-out photographs that ship, and whose they are, from the competition's folder; and the others.

    python -m tools.photos.pictures PHOTOS --credits images.csv
    python -m tools.photos.pictures PHOTOS --credits images.csv --others FOLDER

Every fifth in the order of names, as JPEG of quality 90 at their own 299 x 299. With ``--others`` nothing of these is
written: the folder gets links to all others, for ``fs-plugins train``, and ``photographs.csv``, which says whose they
are and belongs beside what is trained on them.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from fs_plugins.files import replace, table
from fs_plugins.photos.photographs import CREDITS, FOLDER, HELD_OUT, spelled
from fs_plugins.pictures import pictures_below, rgb

QUALITY = 90


def others(photos: Path) -> list[Path]:
    """Those of a folder that are not held out, in the order of their names."""
    return [path for i, path in enumerate(pictures_below(photos)) if i % HELD_OUT]


def credits_of(names: Iterable[str], listed: Path) -> list[dict[str, str]]:
    """The competition's rows of these photographs."""
    with listed.open(newline="", encoding="utf-8") as file:
        rows = {row["ImageId"]: row for row in csv.DictReader(file)}
    return [{**rows[name], "Author": spelled(rows[name]["Author"])} for name in names]


def credit(photos: Path, listed: Path, folder: Path) -> None:
    """Write down whose photographs are not held out, into ``photographs.csv``."""
    rows = credits_of((path.stem for path in others(photos)), listed)
    named = [(row["ImageId"], row["Author"], row["OriginalLandingURL"]) for row in rows]
    replace(folder / CREDITS.name, table([("photograph", "author", "source"), *named]))


def ship(chosen: Sequence[Path], listed: Path) -> None:
    """Write the held-out photographs and their credits into the package."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    for path in chosen:
        rgb(path).save(FOLDER / f"{path.stem}.jpg", quality=QUALITY)
    columns = ("photograph", "label", "aim", "author", "source", "licence")
    rows = [
        (
            row["ImageId"],
            int(row["TrueLabel"]) - 1,
            int(row["TargetClass"]) - 1,
            row["Author"],
            row["OriginalLandingURL"],
            row["License"],
        )
        for row in credits_of((path.stem for path in chosen), listed)
    ]
    replace(CREDITS, table([columns, *rows]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--credits", type=Path, required=True, help="CSV of the competition")
    parser.add_argument("--others", type=Path, help="folder for links to all that are not held out")
    options = parser.parse_args()
    if options.others:
        options.others.mkdir(parents=True)
        for path in others(options.photos):
            (options.others / path.name).symlink_to(path.resolve())
        credit(options.photos, options.credits, options.others)
        return
    ship(pictures_below(options.photos)[::HELD_OUT], options.credits)


if __name__ == "__main__":
    main()
