"""Photographs as a dataset on disk: each with its class, ten to choose from, a question, and one of another class that
attacks aim at."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from fs_plugins.errors import SettingError
from fs_plugins.evaluation.datasets import SAMPLES, SETTINGS, Sample
from fs_plugins.files import filling, replace, writing
from fs_plugins.photos.photographs import Photograph, choices
from fs_plugins.photos.prompts import PROMPTS, QUESTION, caption

OPTIONS = 4
"""Classes that a question offers."""


def aim(photographs: Sequence[Photograph], place: int) -> Photograph:
    """What an attack on the photograph at ``place`` aims at: that half the list further on, or the next one after it
    whose class is another.

    Raises:
        SettingError: all are of one class.
    """
    count, own = len(photographs), photographs[place]
    for step in range(count):
        other = photographs[(place + count // 2 + step) % count]
        if other.label != own.label:
            return other
    raise SettingError(f"All {count} photographs are of one class, so no attack can aim at another.")


def write(
    folder: str | os.PathLike[str], photographs: Sequence[Photograph], names: Sequence[str], count: int | None = None
) -> Path:
    """Write photographs, the first ``count`` of which are asked about; returns the folder.

    samples.jsonl comes last, so a folder that has it is whole: after an interruption, write again.

    Args:
        photographs: also those that are only aimed at.
        names: of all classes, by their numbers.
        count: all if None.

    Raises:
        SettingError: the folder holds another dataset, there are not so many photographs, or all are of one class.
    """
    root, count = Path(folder), len(photographs) if count is None else count
    if not 1 <= count <= len(photographs):
        raise SettingError(f"There are {len(photographs)} photographs; {count} of them were asked for.")
    told = {"name": "photographs", "classes": list(names), "prompts": PROMPTS.model_dump()}
    settings = json.dumps(told, indent=2).encode() + b"\n"
    kept = (root / SETTINGS).read_bytes() if (root / SETTINGS).exists() else None
    if kept not in (None, settings) or (kept is None and (root / SAMPLES).exists()):
        raise SettingError(f"{root} holds another dataset; choose a folder that is new or empty.")
    samples = [_sample(photographs, place, names) for place in range(count)]
    replace(root / SETTINGS, settings)
    needed = {name for sample in samples for name in (sample.image, sample.target)}
    with writing(root / "images"), filling(root / "images") as fresh:
        for one in photographs:
            if _path(one) in needed:
                (fresh / one.path.name).write_bytes(one.path.read_bytes())
    replace(root / SAMPLES, "".join(f"{sample.model_dump_json(exclude_defaults=True)}\n" for sample in samples))
    return root


def _path(one: Photograph) -> str:
    return f"images/{one.path.name}"


def _sample(photographs: Sequence[Photograph], place: int, names: Sequence[str]) -> Sample:
    one, other = photographs[place], aim(photographs, place)
    offered = choices(one.name, one.label, (other.label,), count=min(10, len(names)), classes=len(names))
    options = choices(f"question of {one.name}", one.label, (other.label,), min(OPTIONS, len(names)), len(names))
    return Sample(
        image=_path(one),
        target=_path(other),
        target_label=names[other.label],
        caption=caption(names[one.label]),
        label=names[one.label],
        choices=tuple(names[i] for i in offered),
        question=QUESTION,
        options=tuple(names[i] for i in options),
        answer=names[one.label],
    )
