"""Patches whose every token is consumed: LFM2-VL's and Gemma 4's padded batches, MiniCPM-V's one long strip.

Padding is not shown to the encoder: the tokens that are averaged are then those of images, and no others. Shapes as
in ``fs_plugins.layouts``; P is the side of a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from fs_plugins.adapters.hf_layouts import Listed, Packed, PatchBatch, sides
from torch import Tensor
from torch.nn.functional import pad

from fs_plugins import PixelError
from fs_plugins.layouts import Group, Layout, alike, companion, shaped
from fs_plugins.outputs import map_tensors


@dataclass(frozen=True)
class PatchTokens(PatchBatch):
    """LFM2-VL: as SigLIP2, but for padding, whose tokens are zeros."""

    def groups(self, pixels: Tensor, others: Mapping[str, Any]) -> list[Group]:
        if (shape := companion(others, self.mask).shape[:2]) != pixels.shape[:2]:
            raise PixelError(f"{self.mask} speaks of {tuple(shape)} patches, but {tuple(pixels.shape[:2])} came.")
        return [self._trimmed(group) for group in super().groups(pixels, others)]

    def closed(self, outputs: Sequence[Any], units: Sequence[int], pixels: Tensor) -> Any:
        filled = [map_tensors([output], partial(_filled, pixels.shape[1])) for output in outputs]
        return super().closed(filled, units, pixels)

    def _trimmed(self, group: Group) -> Group:
        assert group.template is not None
        height, width = group.pixels.shape[-2:]
        count = (height // self.patch) * (width // self.patch)
        companions = {**group.companions, self.mask: group.companions[self.mask][:, :count]}
        return replace(group, companions=companions, template=group.template[:, :count])


@dataclass(frozen=True)
class PlacedPatches(PatchTokens):
    """Gemma 4: as LFM2-VL, but what comes with the patches is the place (x, y) of each; padding is at (-1, -1).

    Sides of images are multiples of ``block`` patches.
    """

    mask: str = "pixel_position_ids"
    block: int = 1

    def groups(self, pixels: Tensor, others: Mapping[str, Any]) -> list[Group]:
        places = shaped(others, self.mask, (*pixels.shape[:2], 2))
        shapes = places.amax(1).flip(-1) + 1
        if bool((shapes % self.block).any()):
            raise PixelError(
                f"{self.mask} must span multiples of {self.block} patches each way, got {shapes.tolist()}."
            )
        for (height, width), row in zip(shapes.tolist(), places, strict=True):
            read = pad(_grid(height, width, row.device), (0, 0, 0, len(row) - height * width), value=-1)
            if not torch.equal(read, row.long()):
                raise PixelError(f"{self.mask} must go through each image row by row, and then be -1 for padding.")
        return [_without_shapes(group) for group in super().groups(pixels, {**others, "spatial_shapes": shapes})]

    def still(self, pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        height, width = sides(pixels, self.patch * self.block)
        grid = _grid(height // self.patch, width // self.patch, pixels.device)
        return super().still(pixels)[0], {self.mask: grid.repeat(len(pixels), 1, 1)}


@dataclass(frozen=True)
class PooledPatches(Listed, PlacedPatches):
    """Gemma 4's encoder: padding is left out of what comes out, too."""


class Strips(Packed):
    """MiniCPM-V: (1, C, P, sum of h w P), the patches of all images side by side, with ``target_sizes``.

    Sides of images are multiples of ``block`` patches.
    """

    def __init__(self, patch: int, block: int, channels: int = 3) -> None:
        self.patch = patch
        self.block = block
        self.channels = channels

    def check(self, pixels: Tensor, channels: int) -> str | None:
        high = (channels, self.patch)
        if pixels.ndim != 4 or len(pixels) > 1 or pixels.shape[1:3] != high or pixels.shape[3] % self.patch:
            return f"must be (1, {channels}, {self.patch}, a multiple of {self.patch})"
        return None

    def groups(self, pixels: Tensor, others: Mapping[str, Any]) -> list[Group]:
        sizes = [(int(h), int(w)) for h, w in shaped(others, "target_sizes", (None, 2)).tolist()]
        lengths = [h * w * self.patch for h, w in sizes]
        if sum(lengths) != pixels.shape[-1]:
            raise PixelError(
                f"target_sizes speaks of {sum(lengths) // self.patch} patches, but {pixels.shape[-1] // self.patch} "
                "came."
            )
        strips = pixels[0].split(lengths, dim=-1)
        groups = []
        for size, units in alike(sizes).items():
            shown = torch.stack([self._image(strips[unit], *size) for unit in units])
            own = others["target_sizes"][list(units)]
            groups.append(Group(units, shown, {"target_sizes": own}, self._pack))
        return groups

    def still(self, pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        height, width = sides(pixels, self.patch * self.block)
        size = torch.tensor([[height // self.patch, width // self.patch]], dtype=torch.int32, device=pixels.device)
        return self._pack(pixels), {"target_sizes": size.repeat(len(pixels), 1)}

    def _image(self, strip: Tensor, h: int, w: int) -> Tensor:
        """(C, P, h w P) of one image -> (C, h P, w P)."""
        x = strip.view(self.channels, self.patch, h, w, self.patch).permute(0, 2, 1, 3, 4)
        return x.reshape(self.channels, h * self.patch, w * self.patch)

    def _pack(self, pixels: Tensor, template: None = None) -> Tensor:
        """(N, C, H, W) -> (1, C, P, N h w P)."""
        n, c, height, width = pixels.shape
        x = pixels.view(n, c, height // self.patch, self.patch, width)
        return x.permute(1, 3, 0, 2, 4).reshape(1, c, self.patch, -1)


def _filled(length: int, parts: Sequence[Tensor]) -> Tensor:
    """(B, L, D) tokens up to this length with zeros; other tensors as they are."""
    tokens = parts[0]
    return pad(tokens, (0, 0, 0, length - tokens.shape[1])) if tokens.ndim == 3 else tokens


def _grid(height: int, width: int, device: torch.device) -> Tensor:
    """(height * width, 2) places (x, y), row by row."""
    return torch.cartesian_prod(torch.arange(height, device=device), torch.arange(width, device=device)).flip(-1)


def _without_shapes(group: Group) -> Group:
    return replace(group, companions={name: row for name, row in group.companions.items() if name != "spatial_shapes"})


def _tokens(vision: Any, channels: int) -> Layout:
    return PatchTokens(vision.patch_size, channels)


def _pooled(vision: Any, channels: int) -> Layout:
    return PooledPatches(vision.patch_size, channels, block=vision.pooling_kernel_size)


def _placed(vision: Any, channels: int) -> Layout:
    return PlacedPatches(vision.model_patch_size, channels, mask="image_position_ids")


def _strips(vision: Any, channels: int) -> Layout:
    return Strips(vision.patch_size, 4, channels)


LAYOUTS: Mapping[str, tuple[Callable[[Any, int], Layout], str]] = {
    "siglip2_vision_model": (_tokens, "pixel_values"),
    "gemma4_vision": (_pooled, "pixel_values"),
    "gemma4_unified_vision": (_placed, "pixel_values"),
    "minicpmv4_6_vision": (_strips, "pixel_values"),
    "minicpmv4_7_vision": (_strips, "pixel_values"),
    "minicpm_ocr_vision": (_strips, "pixel_values"),
}
"""By the vision configuration's model_type: the layout, and the name of the encoder's pixel argument."""
