"""What goes with the models that ship, where an evaluation's settings name nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from fs_plugins.demo import assets

MODELS: Mapping[str, Path] = {"demo": assets.LLAVA, "demo-clip": assets.CLIP}
ROBUST: Mapping[str, str] = {"fare": "demo-fare", "tecoa": "demo-tecoa"}
"""Robust towers of both -> their weights' names in the registry."""


class Belongings(TypedDict, total=False):
    """Arguments of ``fs_plugins.evaluation.evaluate``."""

    robust: Mapping[str, str]
    mapper_only: Path


def belongings(model: str) -> Belongings:
    """Robust towers of a model that ships, and a mapper that was trained without a purifier; nothing for others."""
    if model not in MODELS:
        return {}
    if model != "demo":
        return {"robust": ROBUST}
    return {"robust": ROBUST, "mapper_only": assets.PSM_NO_PURIFIER}
