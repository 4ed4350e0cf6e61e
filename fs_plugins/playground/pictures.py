"""The pictures of the page: drawn, a photograph, or uploaded; and as the model's encoder sees them."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from PIL import Image
from torch import Tensor

from fs_plugins.demo import world
from fs_plugins.errors import SettingError
from fs_plugins.photos.photographs import Photograph, class_names, held_out
from fs_plugins.pictures import fitted, rgb, to_pil, to_unit
from fs_plugins.playground.state import AWAY, State

MOST_BYTES = 10 * 2**20
MOST_PIXELS = 20_000_000


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture as the encoder sees it: fitted, in 8 bits.

    Args:
        image: (C, H, W) in [0, 1], multiples of 1/255.
        about: what it is, in a sentence; a photograph's author with it.
    """

    image: Tensor
    about: str

    @cached_property
    def shown(self) -> Image.Image:
        return to_pil(self.image)


def rounded(image: Tensor) -> Tensor:
    """(C, H, W) in [0, 1] -> the nearest multiples of 1/255, which a PNG keeps.

    What is within so many whole 255ths of an 8-bit picture stays so.
    """
    return to_unit(to_pil(image)).to(image)


def photographs() -> dict[str, Photograph]:
    """By their names; none where fs-plugins[photos], whose models know what they show, is not installed."""
    return {one.name: one for one in held_out()} if find_spec("timm") is not None else {}


def named(photograph: Photograph) -> str:
    """What a photograph shows, for a list."""
    return f"{class_names()[photograph.label].capitalize()} ({photograph.name[:6]})"


def uploaded(path: Path) -> Image.Image:
    """What somebody sent, upright and in 8-bit RGB. It is looked at by its content; its name means nothing.

    Raises:
        SettingError: neither PNG nor JPEG, or too large.
    """
    if os.path.getsize(path) > MOST_BYTES:
        raise SettingError(f"This file is larger than {MOST_BYTES // 2**20} MB. Make the picture smaller.")
    try:
        return rgb(path, most=MOST_PIXELS)
    except SettingError as error:
        told = str(error).replace(str(path), "This file")  # whose folder is nobody's business
        raise SettingError(told) from None


def digest(image: Image.Image) -> str:
    """By which a link knows an uploaded picture again."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()[:16]


def picture(state: State, size: tuple[int, int], sent: Image.Image | None) -> Picture:
    """The picture that a state speaks of, at the encoder's size (H, W).

    Args:
        sent: what the visitor has uploaded.

    Raises:
        SettingError: there is no such photograph, or the picture has to be uploaded first.
    """
    if state.source == "scene":
        scene = world.drawn(state.shape, state.colour, state.size, state.side, state.background)
        return Picture(fitted(scene.draw(), size), f"Drawn: {scene.caption}.")
    if state.source == "photo":
        found = _photograph(state.photo)
        credit = f"{named(found)}, by {found.author}, {found.licence}, {found.source}"
        return Picture(fitted(rgb(found.path), size), credit)
    if sent is None or (state.upload and digest(sent) != state.upload):
        raise SettingError("This link speaks of an uploaded picture, which no link can carry. Upload it again.")
    return Picture(fitted(sent, size), "Uploaded. It is forgotten an hour after you have left.")


def aim(state: State, size: tuple[int, int]) -> Picture | None:
    """What an attack makes of the picture; None where it only moves away from it.

    Raises:
        SettingError: there is no such target.
    """
    if state.target == AWAY:
        return None
    if state.target in world.CLASSES:
        scene = replace(world.scene("target", state.background), shape=state.target)
        return Picture(fitted(scene.draw(), size), f"Aimed at: {scene.caption}.")
    return Picture(fitted(rgb(_photograph(state.target).path), size), f"Aimed at: {state.target}.")


def _photograph(name: str) -> Photograph:
    known = photographs()
    if name not in known:
        raise SettingError(
            f"There is no photograph {name[:40]!r} here. Those of fs-plugins[photos] are, where it is installed."
        )
    return known[name]
