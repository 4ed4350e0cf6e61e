"""How a vision module's pixel argument holds images; a plain batch here, what families do otherwise beside their
adapter.

A layout takes a call apart into groups of images of one shape, so that noise, purifier and encoder work on
image batches, and puts the encoder's outputs together again in the order of the call.

Shapes: B images of a group, N rows (draws times images), C channels, H x W pixels.
An image of several frames or tiles is (F, C, H, W), a single one (C, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fs_plugins.errors import ModelError, PixelError
from fs_plugins.outputs import map_tensors

Pack = Callable[[Tensor, Any], Any]


@dataclass(frozen=True)
class Group:
    """The images of one shape in a vision call.

    Args:
        units: which images of the call they are.
        pixels: (B, C, H, W) or (B, F, C, H, W), normalised.
        companions: the module's other arguments that speak of these images, one row each.
        pack: (N, ...) pixels and N rows of the template -> the module's pixel argument.
        template: the pixel argument's own rows of these images, where they hold padding as well.
    """

    units: tuple[int, ...]
    pixels: Tensor
    companions: Mapping[str, Tensor]
    pack: Pack = lambda pixels, template: pixels
    template: Tensor | None = None


class Layout:
    """A plain batch, (B, C, H, W) or with frames or tiles before C: every row is an image."""

    derived: frozenset[str] = frozenset()
    """Arguments that the module derives from the others if they are missing; dropped, since rows change."""
    listed = False
    """Whether the argument is a list of (C, H, W) images, each of a size of its own."""

    def check(self, pixels: Tensor, channels: int) -> str | None:
        """What is wrong with the shape of the pixel argument, or of one in a list of them, in words."""
        if pixels.ndim < 4 or pixels.shape[-3] != channels:
            return f"must be (images, {channels}, height, width)"
        return None

    def groups(self, pixels: Tensor, others: Mapping[str, Any]) -> list[Group]:
        """Take a call apart. ``others`` are the module's other arguments by name."""
        companions = {name: value for name, value in others.items() if goes_with(value, pixels)}
        return [Group(tuple(range(len(pixels))), pixels, companions)]

    def still(self, pixels: Tensor) -> tuple[Any, dict[str, Any]]:
        """(N, C, H, W) still images -> the module's pixel argument, and the other arguments it needs with it."""
        return pixels, {}

    def taken(self, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """A pass's arguments by name, in the form in which the module takes them."""
        return arguments

    def opened(self, output: Any, rows: int) -> Any:
        """The module's output with one row per (draw, image) in front of every field."""
        return output

    def closed(self, outputs: Sequence[Any], units: Sequence[int], pixels: Tensor) -> Any:
        """Opened outputs of all groups -> one output as the module gives it, images in the call's order."""
        return outputs[0] if len(outputs) == 1 else map_tensors(outputs, partial(in_order, units))


def alike(kinds: Sequence[Any]) -> dict[Any, tuple[int, ...]]:
    """Kind -> the images of that kind."""
    found: dict[Any, tuple[int, ...]] = {}
    for unit, kind in enumerate(kinds):
        found[kind] = (*found.get(kind, ()), unit)
    return found


def goes_with(value: Any, pixels: Tensor) -> bool:
    """Whether an argument has a row for each image and is not the pixels themselves."""
    return isinstance(value, Tensor) and value is not pixels and value.ndim > 0 and len(value) == len(pixels)


def companion(others: Mapping[str, Any], name: str) -> Tensor:
    """Another argument of the call, which has to be there.

    Raises:
        ModelError: it is not.
    """
    value = others.get(name)
    if not isinstance(value, Tensor):
        raise ModelError(f"The vision module was called without {name}, which says how its pixels make up images.")
    return value


def shaped(others: Mapping[str, Any], name: str, shape: Sequence[int | None]) -> Tensor:
    """The same, of this shape; None stands for any length.

    Raises:
        ModelError: it is not there.
        PixelError: it has another shape.
    """
    value = companion(others, name)
    if value.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, value.shape, strict=True)):
        wanted = ", ".join("any" if side is None else str(side) for side in shape)
        raise PixelError(f"{name} must be ({wanted}) to go with these pixels, got shape {tuple(value.shape)}.")
    return value


def _rows(units: Sequence[int], parts: Sequence[Tensor]) -> list[Tensor]:
    """The rows of all parts in the call's order."""
    rows = [row for part in parts for row in part.unbind(0)]
    return [rows[i] for i in sorted(range(len(rows)), key=lambda i: units[i])]


def in_order(units: Sequence[int], parts: Sequence[Tensor]) -> Tensor:
    """(B, ...) parts of one row shape -> all rows in the call's order."""
    return torch.stack(_rows(units, parts)) if list(units) != sorted(units) else torch.cat(list(parts))


def joined(units: Sequence[int], parts: Sequence[Tensor]) -> Tensor:
    """(B, L, D) parts, L their own -> all tokens in the call's order, (sum of L, D)."""
    return torch.cat(_rows(units, parts))
