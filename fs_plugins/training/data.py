"""Image folders as training data."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from fs_plugins.errors import SettingError

EXTENSIONS = (".png", ".jpg", ".jpeg")


def to_unit(image: Image.Image) -> Tensor:
    """A PIL image -> (3, H, W) fp32 in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


class ImageFolder(Dataset[Tensor]):
    """Every PNG and JPEG below a folder, cropped to the encoder's size.

    Args:
        folder: searched through all its subfolders, in sorted order.
        size: (H, W) to fit and centre-crop to.

    Raises:
        SettingError: no image found, or a file that is no image (named).
    """

    def __init__(self, folder: str | os.PathLike[str], size: tuple[int, int]) -> None:
        self.paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in EXTENSIONS)
        self.size = size
        if not self.paths:
            raise SettingError(f"No {', '.join(EXTENSIONS)} below {folder}.")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """(3, H, W) fp32 in [0, 1]."""
        return read(self.paths[index], self.size)


def fitted(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """A PIL image, fitted and centre-cropped to (H, W) -> (3, H, W) fp32 in [0, 1]."""
    height, width = size
    return to_unit(ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BICUBIC))


def read(path: Path, size: tuple[int, int]) -> Tensor:
    """A PNG or JPEG, fitted and centre-cropped to (H, W) -> (3, H, W) fp32 in [0, 1].

    Raises:
        SettingError: no such file, or no image.
    """
    try:
        with Image.open(path) as image:
            return fitted(image, size)
    except FileNotFoundError:
        raise SettingError(f"There is no file {path}.") from None
    except (UnidentifiedImageError, OSError) as error:
        raise SettingError(f"{path} is not a readable image: {error}") from None
