"""Scenes of the embedded world as pictures to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fs_plugins.demo import world
from fs_plugins.pictures import fitted
from fs_plugins.training.data import ImageFolder


class Scenes(ImageFolder):
    """The world's first training scenes, drawn as they are asked for; no folder has them.

    Args:
        count: how many.
        size: (H, W) to fit and centre-crop to.
    """

    def __init__(self, count: int, size: tuple[int, int]) -> None:
        super().__init__("scenes", size, [Path("scenes", f"{i:06}") for i in range(count)])

    def read(self, path: Path, **fit: Any) -> Tensor:
        return fitted(world.scene("train", int(path.name)).draw(), self.size, **fit)

    def bytes(self, path: Path) -> int:
        return 0
