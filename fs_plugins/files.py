"""Files that survive a kill at any moment, and settings that two runs must share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any


def atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that, whenever the machine stops, either the old or the new one is there, whole."""
    fresh = path.with_name(f".{path.name}")
    with fresh.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    if os.name == "posix":  # elsewhere folders cannot be flushed
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def whole_lines(path: Path) -> list[str]:
    """A file's lines; what follows the last line break was never finished."""
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()


def changed(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between two runs' settings, in words."""
    before, now = flat(found), flat(wanted)
    return [
        f"{name} was {before.get(name)} and is {now.get(name)} now"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings -> dotted names, as JSON would give them back."""
    told: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(settings)).items():
        told |= flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value}
    return told
