"""Pictures on disk and in memory, as (3, H, W) tensors in [0, 1]."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fs_plugins.errors import SettingError

EXTENSIONS = (".png", ".jpg", ".jpeg")


def pictures_below(folder: Path, *, visible: bool = False) -> list[Path]:
    """Every PNG and JPEG below a folder and all its subfolders, by their names' ends; sorted.

    Args:
        visible: leave out what is hidden (of editors, of macOS) or in a hidden folder, and what is no file.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not visible:
        return found
    shown = (path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    return [path for path in shown if path.is_file()]


def to_unit(image: Image.Image) -> Tensor:
    """A PIL image -> (3, H, W) fp32 in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def fitted(image: Image.Image, size: tuple[int, int], **fit: Any) -> Tensor:
    """A PIL image, fitted and centre-cropped to (H, W) -> (3, H, W) fp32 in [0, 1].

    ``fit``: ``bleed`` and ``centering`` of PIL's ``ImageOps.fit``.
    """
    height, width = size
    return to_unit(ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BICUBIC, **fit))


def read(path: Path, size: tuple[int, int], **fit: Any) -> Tensor:
    """A PNG or JPEG, fitted and centre-cropped to (H, W) -> (3, H, W) fp32 in [0, 1].

    Raises:
        SettingError: no such file, or no image.
    """
    with _opened(path) as image:
        return fitted(image, size, **fit)


def rgb(path: Path) -> Image.Image:
    """A PNG or JPEG as it is, in RGB.

    Raises:
        SettingError: no such file, or no image.
    """
    with _opened(path) as image:
        return image.convert("RGB")


def check(path: Path) -> None:
    """Decode a PNG or JPEG to its end: a header may be fine where the pixels are cut off.

    Raises:
        SettingError: no such file, or no image, or not the whole of one.
    """
    with _opened(path) as image:
        image.load()


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise SettingError(f"There is no file {path}.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SettingError(f"{path} is not a readable image: {error}") from None
