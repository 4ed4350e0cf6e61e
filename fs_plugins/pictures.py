"""Pictures on disk and in memory, as (3, H, W) tensors in [0, 1].

Everything that looks at a picture looks at it through here: PNG and JPEG files by their content, whatever their names
say, and PIL images of every mode, as ``to_rgb`` shows them. What verbs are given as pictures they take by ``named`` or
``batch``.
"""

from __future__ import annotations

import base64
import io
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from PIL.JpegImagePlugin import jpeg_factory
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from fs_plugins.errors import SettingError

EXTENSIONS = (".png", ".jpg", ".jpeg")


def pictures_below(folder: Path) -> list[Path]:
    """Every PNG and JPEG below a folder and all its subfolders, by their names' ends; sorted.

    Linked folders count, each folder once and by its own name before a link's, so that a link upwards ends. What is
    hidden (of editors, of macOS) or in a hidden folder does not count, nor what is no file. Links to nothing do: who
    reads them is told.

    Raises:
        SettingError: a folder that cannot be listed.
    """
    found: list[Path] = []
    seen: set[str] = set()
    linked = [os.fspath(folder)]
    for top in linked:
        for place, folders, names in os.walk(top, onerror=_unlisted):
            folders[:] = [] if (here := os.path.realpath(place)) in seen else sorted(filter(_shown, folders))
            if here not in seen:
                seen.add(here)
                linked += [path for name in folders if os.path.islink(path := os.path.join(place, name))]
                found += [Path(place, name) for name in names if _shown(name) and _is_picture(place, name)]
    return sorted(found)


def _unlisted(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise SettingError(f"The folder {error.filename} cannot be listed: {error.strerror}.") from None


def _shown(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _is_picture(place: str, name: str) -> bool:
    path = os.path.join(place, name)
    return name.lower().endswith(EXTENSIONS) and (os.path.isfile(path) or os.path.islink(path))


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode, upright and in 8-bit RGB, as a viewer shows it on a white page.

    Its EXIF orientation is applied; EXIF that cannot be read turns nothing. What is transparent shows white behind it.
    16-bit grey is scaled, so that 65535 is white. Numbers of the modes I and F are Pillow's: 0 is black, 255 is white.

    Raises:
        SettingError: no pixels, a damaged file behind it, or I and F with numbers that are not of 0 to 255, or that may
            as well be of 0 to 1.
    """
    if 0 in image.size:
        raise SettingError(f"A picture of {image.width} x {image.height} pixels shows nothing.")
    try:
        image.load()
    except _FAULTS as error:  # an image is read when it is first looked at
        raise SettingError(f"A picture cannot be read: {error}.") from None
    image = _eight_bits(_upright(image))
    if image.mode == "La":
        image = image.convert("LA")
    if not image.has_transparency_data:
        found = image.convert("RGB")
    else:
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        found = page.convert("RGB")
    found.info = {}  # with an orientation left in it the next reader would turn it again
    return found


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it also writes the EXIF anew, which fails for tags that nobody asked about.
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # there is no end to the ways in which EXIF is broken
        turn = None
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """L, or LA where a key colour is transparent, of more than eight bits of grey; others as they are."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values, scale = np.asarray(image).astype(np.float32), 1
    if image.mode.startswith("I;16") or image.format == "PNG":  # until Pillow 11 a 16-bit PNG was of the mode I
        scale = 257
    elif not (values >= 0).all() or not (values <= 255).all():
        raise SettingError(
            f"A picture of the mode {image.mode} has numbers from {values.min():g} to {values.max():g}; expected 0 "
            "(black) to 255 (white), as Pillow has them. Scale them, and convert the picture to L."
        )
    elif image.mode == "F" and 0 < values.max() <= 1:
        raise SettingError(
            "A picture of the mode F has no number above 1: is 1 white, or 255, as Pillow has it? Scale it to 0 to 255 "
            "and convert it to L."
        )
    found = Image.fromarray(np.rint(values / scale).astype(np.uint8))
    if (key := image.info.get("transparency")) is not None:
        found.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return found


def to_unit(image: Image.Image) -> Tensor:
    """A PIL image -> (3, H, W) fp32 in [0, 1]; see ``to_rgb``."""
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1).float() / 255


def fitted(image: Image.Image, size: tuple[int, int], **fit: Any) -> Tensor:
    """A PIL image, fitted and centre-cropped to (H, W) -> (3, H, W) fp32 in [0, 1]; see ``to_rgb``.

    ``fit``: ``bleed`` and ``centering`` of PIL's ``ImageOps.fit``.
    """
    height, width = size
    return to_unit(ImageOps.fit(to_rgb(image), (width, height), Image.Resampling.BICUBIC, **fit))


def read(path: Path, size: tuple[int, int], **fit: Any) -> Tensor:
    """A PNG or JPEG, fitted and centre-cropped to (H, W) -> (3, H, W) fp32 in [0, 1].

    Raises:
        SettingError: see ``rgb``.
    """
    with _opened(path) as image:
        return fitted(image, size, **fit)


def rgb(path: Path, *, most: int | None = None) -> Image.Image:
    """A PNG or JPEG as ``to_rgb`` shows it.

    Args:
        most: pixels that it may have; refused before any is decoded.

    Raises:
        SettingError: no such file, none that is a whole PNG or JPEG, or one of more pixels than ``most`` or than twice
            ``PIL.Image.MAX_IMAGE_PIXELS``, where Pillow draws the line (179 million).
    """
    with _opened(path, most) as image:
        return to_rgb(image)


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W), clipped to [0, 1] -> a PIL image in 8-bit RGB, rounded."""
    eight = (image.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return Image.fromarray(eight.permute(1, 2, 0).numpy())


def png(image: Image.Image) -> bytes:
    """A PNG file of a picture."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def address(data: bytes, kind: str = "image/png") -> str:
    """A data: address that holds a file whole."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def through_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """What is left of an RGB picture of 8 bits that was written as a JPEG, by Pillow, and read again."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def check(path: Path) -> None:
    """Decode a PNG or JPEG to its end: a header may be fine where the pixels are cut off.

    Raises:
        SettingError: see ``rgb``.
    """
    with _opened(path):
        pass


_FAULTS = (OSError, ValueError, SyntaxError, EOFError, struct.error)
"""What Pillow raises for pictures that are damaged."""
_OPENERS = {b"\x89PNG\r\n\x1a\n": PngImageFile, b"\xff\xd8\xff": jpeg_factory}


@contextmanager
def _opened(path: Path, most: int | None = None) -> Iterator[Image.Image]:
    """Not by ``Image.open``: that warns of pictures from half the limit on, before anyone can look at their size."""
    if not os.path.isfile(path):  # to open a pipe would wait for who writes into it
        if os.path.exists(path):
            raise SettingError(f"{path} is a folder, a pipe or a device; expected a PNG or JPEG file.")
        raise SettingError(f"There is no file {path}.")
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            file.seek(0)
            opener = next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), None)
            if opener is None:
                raise ValueError("its content is neither PNG nor JPEG, whatever it is called. Convert it.")
            with opener(file) as image:
                if most is not None and image.width * image.height > most:
                    raise ValueError(f"it has {image.width} x {image.height} pixels, and {most:,} is the limit here.")
                limit = Image.MAX_IMAGE_PIXELS
                if limit is not None and image.width * image.height > 2 * limit:
                    raise ValueError(
                        f"it has {image.width} x {image.height} pixels, and {2 * limit} is the limit. Make it smaller, "
                        "or set PIL.Image.MAX_IMAGE_PIXELS to half of what you allow."
                    )
                stored = image.tile[0][3] if image.tile else None
                if stored in ("L;2", "L;4") and "transparency" in image.info:
                    # Pillow spreads such grey over 8 bits, but leaves the key colour as it was.
                    image.info["transparency"] *= 85 if stored == "L;2" else 17
                image.load()
                yield image
    except _FAULTS as error:
        raise SettingError(f"{path} is not a readable image: {error}") from None


Picture = Tensor | np.ndarray | Image.Image
"""A picture as a program holds it: floats (C, H, W) in [0, 1], or a PIL image of any mode."""


def held(what: str, picture: Picture) -> Tensor:
    """What a program holds as a picture, or as a batch of some, as a tensor; a tensor is itself.

    Raises:
        SettingError: it is neither tensor, array nor PIL image, or see ``to_rgb``.
    """
    if isinstance(picture, Image.Image):
        return to_unit(picture)
    if isinstance(picture, np.ndarray) and picture.dtype.kind in "fiu":
        exact = np.float64 if picture.dtype.kind == "f" and picture.dtype.itemsize > 8 else picture.dtype
        return torch.from_numpy(picture.astype(np.dtype(exact).newbyteorder("="), order="C"))
    if isinstance(picture, Tensor):
        return picture
    kind = f"an array of {picture.dtype}" if isinstance(picture, np.ndarray) else f"a {type(picture).__name__}"
    raise SettingError(
        f"{what} must be a tensor or a numpy array, floating point in [0, 1], or a PIL image; got {kind}. Files are "
        "opened with PIL.Image.open."
    )


def check_unit(what: str, picture: Tensor) -> None:
    """Refuse what is not in [0, 1], and guess why.

    Raises:
        SettingError: another type or range.
    """
    expected = f"{what} must be in pixel units, floating point in [0, 1] before mean/std normalisation, got"
    if not picture.is_floating_point():
        kind = str(picture.dtype).removeprefix("torch.")
        raise SettingError(f"{expected} {kind}. Divide 0 to 255 by 255, or give PIL images, which know their range.")
    low, high = map(float, picture.detach().aminmax()) if picture.numel() else (0.0, 0.0)
    if not 0 <= low <= high <= 1:
        advice = "Undo the model's normalisation first"
        if not math.isfinite(low + high):
            advice = "There are values that are no numbers, or infinite"
        elif low >= 0 and high > 4:
            advice = "Divide 0 to 255 by 255"
        raise SettingError(f"{expected} {low:.3g} to {high:.3g}. {advice}.")


def channels_first(shape: Sequence[int]) -> str:
    """Advice for who gave (..., H, W, C); empty for other shapes."""
    wrong = len(shape) > 2 and shape[-1] in (1, 3, 4) and shape[-3] not in (1, 3, 4)
    return " Channels come before height and width: permute them." if wrong else ""


def named(pictures: Picture | Iterable[Picture] | Mapping[str, Picture]) -> dict[str, Tensor]:
    """Pictures by their names, or by their places, as tensors, each of its own size. A PIL image is one picture.

    Raises:
        SettingError: see ``held``.
    """
    if isinstance(pictures, Mapping):
        return {str(name): held(f"Image {name}", picture) for name, picture in pictures.items()}
    return {str(i): held(f"Image {i}", picture) for i, picture in enumerate(_several("images", pictures))}


def batch(what: str, pictures: Picture | Iterable[Picture], channels: int = 3) -> Tensor:
    """Pictures of one size -> (B, C, H, W) in [0, 1]; a tensor of them is itself. A PIL image is one picture.

    Raises:
        SettingError: no such pictures, of several sizes, or out of range; see ``held`` and ``check_unit``.
    """
    if isinstance(pictures, Tensor | np.ndarray):
        found = held(what, pictures)
    else:
        several = [held(what, picture) for picture in _several(what, pictures)]
        shapes = sorted({tuple(picture.shape) for picture in several})
        if len(shapes) != 1:
            told = ", ".join(map(str, shapes[:5])) or "none"
            raise SettingError(f"{what} must be pictures of one size, got {told}. Resize them, or give one at a time.")
        found = torch.stack(several)
    if found.ndim != 4 or found.shape[1] != channels:
        advice = channels_first(found.shape)
        raise SettingError(f"{what} must be (B, {channels}, H, W), got {tuple(found.shape)}.{advice}")
    check_unit(what, found)
    return found


def _several(what: str, pictures: Picture | Iterable[Picture]) -> Iterable[Picture]:
    if isinstance(pictures, Image.Image):
        return [pictures]
    if isinstance(pictures, str | bytes | Mapping) or not isinstance(pictures, Iterable):
        return [held(what, pictures)]  # type: ignore[arg-type]  # which says what was expected
    return pictures
