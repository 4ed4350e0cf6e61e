"""Encoders that take or give rows which nobody says the images of: Molmo's patches, Granite's tokens, RADIO's both.

Letters as in ``fs_plugins.layouts``; P is the side of a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from fs_plugins.adapters.hf_layouts import PatchRows, is_still
from torch import Tensor

from fs_plugins import PixelError
from fs_plugins.layouts import Group, Layout, alike, in_order, joined, shaped
from fs_plugins.outputs import map_tensors


@dataclass(frozen=True)
class WholePatches(Layout):
    """Molmo 2: (B, h w, P * P * C), all patches of tiles of one size, in reading order."""

    patch: int
    size: tuple[int, int]
    channels: int = 3

    def check(self, pixels: Tensor, channels: int) -> str | None:
        wanted = (self.size[0] * self.size[1], channels * self.patch**2)
        if pixels.ndim == 3 and tuple(pixels.shape[1:]) == wanted:
            return None
        return f"must be (images, {wanted[0]}, {wanted[1]})"

    def groups(self, pixels: Tensor, others: Mapping[str, Any]) -> list[Group]:
        (h, w), p = self.size, self.patch
        x = pixels.reshape(-1, h, w, p, p, self.channels).permute(0, 5, 1, 3, 2, 4)
        images = x.reshape(-1, self.channels, h * p, w * p)
        return [Group(tuple(range(len(images))), images, {}, self._pack)]

    def still(self, pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        wanted = tuple(side * self.patch for side in self.size)
        if tuple(pixels.shape[-2:]) != wanted:
            raise PixelError(
                f"This encoder sees tiles of {wanted[0]}x{wanted[1]}, got {pixels.shape[-2]}x{pixels.shape[-1]}."
            )
        return self._pack(pixels), {}

    def _pack(self, pixels: Tensor, template: None = None) -> Tensor:
        (h, w), p = self.size, self.patch
        x = pixels.reshape(-1, self.channels, h, p, w, p).permute(0, 2, 4, 3, 5, 1)
        return x.reshape(-1, h * w, p * p * self.channels)


class TokensBelow(Layout):
    """Granite Docling: a plain batch of tiles goes in, and tokens of all tiles below each other come out."""

    def opened(self, output: Any, rows: int) -> Any:
        # In four dimensions they are told from what comes out by tiles.
        return map_tensors(
            [output], lambda one: one[0].reshape(rows, 1, -1, one[0].shape[-1]) if one[0].ndim == 2 else one[0]
        )

    def closed(self, outputs: Sequence[Any], units: Sequence[int], pixels: Tensor) -> Any:
        def change(parts: Sequence[Tensor]) -> Tensor:
            whole = in_order(units, parts)
            return whole.flatten(0, 2) if whole.ndim == 4 else whole

        return map_tensors(outputs, change)


@dataclass(frozen=True)
class RowsOrTubelets(PatchRows):
    """RADIO: images as (sum of h w, C * P * P) patches, with ``image_grid_hw``; films as (N, frames * C, H, W).

    A film's row of equal frames is a still image, which gets one noise, copied.
    """

    grid: str = "image_grid_hw"

    def check(self, pixels: Tensor, channels: int) -> str | None:
        if pixels.ndim == 4 and pixels.shape[1] in (channels, channels * self.frames):
            return None
        width = channels * self.patch**2
        if pixels.ndim == 2 and pixels.shape[1] == width:
            return None
        return f"must be (patches, {width}), or (rows, {channels * self.frames}, height, width) of a film"

    def groups(self, pixels: Tensor, others: Mapping[str, Any]) -> list[Group]:
        if pixels.ndim == 4:
            return self._tubelets(pixels.unflatten(1, (-1, self.channels)))
        sizes = shaped(others, self.grid, (None, 2))
        films = torch.cat([torch.ones_like(sizes[:, :1]), sizes], dim=1)
        groups = self._images_alone.groups(pixels, {self.grid: films})
        return [replace(group, companions={self.grid: sizes[list(group.units)]}) for group in groups]

    def still(self, pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        rows, others = self._images_alone.still(pixels)
        return rows, {self.grid: others[self.grid][:, 1:]}

    def opened(self, output: Any, rows: int) -> Any:
        features = output["features"] if isinstance(output, Mapping) else output[1]
        if features.ndim == 3:  # of a film
            return output

        def change(one: Sequence[Tensor]) -> Tensor:
            if one[0].ndim == 3:  # hidden states, in a batch of one
                return one[0].reshape(rows, 1, -1, one[0].shape[-1])
            return one[0].reshape(rows, -1, one[0].shape[-1])

        return map_tensors([output], change)

    def closed(self, outputs: Sequence[Any], units: Sequence[int], pixels: Tensor) -> Any:
        if pixels.ndim == 4:
            return Layout.closed(self, outputs, units, pixels)

        def change(parts: Sequence[Tensor]) -> Tensor:
            if parts[0].ndim == 4:
                return joined(units, [part.squeeze(1) for part in parts]).unsqueeze(0)
            return joined(units, parts)

        return map_tensors(outputs, change)

    @property
    def _images_alone(self) -> PatchRows:
        return PatchRows(self.patch, self.merge, 1, self.channels, self.grid)

    def _tubelets(self, frames: Tensor) -> list[Group]:
        groups = []
        for still, units in alike([is_still(one) for one in frames]).items():
            shown = frames[list(units)]
            groups.append(Group(units, shown[:, 0] if still else shown, {}, partial(_stacked, frames.shape[1])))
        return groups


def _stacked(count: int, pixels: Tensor, template: None = None) -> Tensor:
    """(N, C, H, W), or (N, F, C, H, W) distinct frames -> (N, F C, H, W)."""
    frames = pixels.unsqueeze(1).expand(-1, count, -1, -1, -1) if pixels.ndim == 4 else pixels
    return frames.flatten(1, 2)


def _molmo(vision: Any, channels: int) -> Layout:
    height, width = vision.image_size
    return WholePatches(vision.patch_size, (height // vision.patch_size, width // vision.patch_size), channels)


def _docling(vision: Any, channels: int) -> Layout:
    return TokensBelow()


def _radio(vision: Any, channels: int) -> Layout:
    return RowsOrTubelets(vision.patch_size, 1, vision.video_temporal_patch_size or 1, channels)


LAYOUTS: Mapping[str, tuple[Callable[[Any, int], Layout], str]] = {
    "molmo2_vision": (_molmo, "pixel_values"),
    "granite_docling_vision": (_docling, "pixel_values"),
    "radio": (_radio, "pixel_values"),
}
"""By the vision configuration's model_type: the layout, and the name of the encoder's pixel argument."""
