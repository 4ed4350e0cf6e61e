"""Kin of Qwen that hold patches in another order or shape: ERNIE, Kimi, PaddleOCR, HunYuan, Cosmos, Muse, VideoLLaMA 3.

Letters as in ``fs_plugins.layouts``; P is the side of a patch, F how many frames are in one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from fs_plugins.adapters.hf_layouts import PatchRows, is_still, sides
from torch import Tensor

from fs_plugins import PixelError
from fs_plugins.layouts import Group, Layout, Pack, alike, joined, shaped
from fs_plugins.outputs import map_tensors

QWEN = "CFHW"


@dataclass(frozen=True)
class Patches(PatchRows):
    """As ``PatchRows`` but for what is said here.

    Args:
        block: sides of images are multiples of so many patches; of ``merge`` if 0.
        inside: what goes before what in a patch: C, F, H (row of pixels) and W (column).
        maps: whether a patch is a small image, (C, P, P) or in the order of ``inside``, not flat.
        batched: whether the pixels (``"pixels"``), or the tokens that come out (``"tokens"``), are a batch of one.
    """

    block: int = 0
    inside: str = QWEN
    maps: bool = False
    batched: tuple[str, ...] = ()

    def check(self, pixels: Tensor, channels: int) -> str | None:
        wanted = self._shape(channels)
        if pixels.ndim == len(wanted) and all(
            want in (-1, got) for want, got in zip(wanted, pixels.shape, strict=True)
        ):
            return None
        return f"must be ({', '.join('patches' if side < 0 else str(side) for side in wanted)})"

    def groups(self, pixels: Tensor, others: Mapping[str, Any]) -> list[Group]:
        groups = super().groups(self._qwen(pixels), others)
        return [replace(group, pack=partial(self._packed, group.pack)) for group in groups]

    def still(self, pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        if self.block:
            sides(pixels, self.patch * self.block)
        rows, others = super().still(pixels)
        return self._own(rows), others

    def opened(self, output: Any, rows: int) -> Any:
        def change(one: Sequence[Tensor]) -> Tensor:
            tokens = one[0].squeeze(0) if "tokens" in self.batched else one[0]
            return tokens.reshape(rows, -1, *tokens.shape[1:]) if tokens.ndim > 1 else one[0]

        return map_tensors([output], change)

    def closed(self, outputs: Sequence[Any], units: Sequence[int], pixels: Tensor) -> Any:
        def change(parts: Sequence[Tensor]) -> Tensor:
            if parts[0].ndim < 3:
                return parts[0]
            tokens = joined(units, parts)
            return tokens.unsqueeze(0) if "tokens" in self.batched else tokens

        return map_tensors(outputs, change)

    def _shape(self, channels: int) -> tuple[int, ...]:
        """Of the pixel argument; -1 stands for the patches of all images."""
        sides = {"C": channels, "H": self.patch, "W": self.patch}
        one = tuple(sides[letter] for letter in self.inside if letter in sides)
        one = one if self.maps else (channels * self.frames * self.patch**2,)
        return (1, -1, *one) if "pixels" in self.batched else (-1, *one)

    def _qwen(self, pixels: Tensor) -> Tensor:
        """The pixel argument as Qwen would have its rows, but for the order of patches."""
        sides = {"C": self.channels, "F": self.frames, "H": self.patch, "W": self.patch}
        patches = pixels.reshape(-1, *(sides[letter] for letter in self.inside))
        return patches.permute(0, *(1 + self.inside.index(letter) for letter in QWEN)).flatten(1)

    def _packed(self, pack: Pack, pixels: Tensor, template: None = None) -> Tensor:
        return self._own(pack(pixels, template))

    def _own(self, rows: Tensor) -> Tensor:
        """The pixel argument of rows as Qwen's."""
        patches = rows.reshape(-1, self.channels, self.frames, self.patch, self.patch)
        patches = patches.permute(0, *(1 + QWEN.index(letter) for letter in self.inside))
        return patches.reshape(self._shape(self.channels))


@dataclass(frozen=True)
class MergedRows(PatchRows):
    """VideoLLaMA 3: ``merge_sizes`` says of each image or film how its patches are put into blocks."""

    sizes: str = "merge_sizes"

    def groups(self, pixels: Tensor, others: Mapping[str, Any]) -> list[Group]:
        grids = shaped(others, self.grid, (None, 3))
        merges = shaped(others, self.sizes, (len(grids),))
        counts = grids.prod(1).tolist()
        if sum(counts) != len(pixels):
            raise PixelError(f"{self.grid} speaks of {sum(counts)} patches, but {len(pixels)} came.")
        rows, groups = pixels.split(counts), []
        for merge, units in alike(merges.tolist()).items():
            at = list(units)
            alone = PatchRows(self.patch, merge, self.frames, self.channels, self.grid)
            for group in alone.groups(torch.cat([rows[unit] for unit in at]), {self.grid: grids[at]}):
                own = {**group.companions, self.sizes: merges[at][list(group.units)]}
                groups.append(replace(group, units=tuple(at[i] for i in group.units), companions=own))
        return groups

    def still(self, pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        rows, others = super().still(pixels)
        return rows, {**others, self.sizes: torch.full_like(others[self.grid][:, 0], self.merge)}


@dataclass(frozen=True)
class Cubes(Layout):
    """Inkling: (N, F, P, P, C) tiles of all images, each seen by itself; a still one is F equal frames."""

    patch: int
    frames: int
    channels: int = 3

    def check(self, pixels: Tensor, channels: int) -> str | None:
        wanted = (self.frames, self.patch, self.patch, channels)
        if pixels.ndim == 5 and tuple(pixels.shape[1:]) == wanted:
            return None
        return f"must be (tiles, {', '.join(map(str, wanted))})"

    def groups(self, pixels: Tensor, others: Mapping[str, Any]) -> list[Group]:
        frames = pixels.permute(0, 1, 4, 2, 3)
        groups = []
        for still, units in alike([is_still(one) for one in frames]).items():
            shown = frames[list(units)]
            groups.append(Group(units, shown[:, 0] if still else shown, {}, self._pack))
        return groups

    def still(self, pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        if tuple(pixels.shape[-2:]) != (self.patch, self.patch):
            height, width = pixels.shape[-2:]
            raise PixelError(f"This encoder sees tiles of {self.patch}x{self.patch}, got {height}x{width}.")
        return self._pack(pixels), {}

    def _pack(self, pixels: Tensor, template: None = None) -> Tensor:
        frames = pixels.unsqueeze(1).expand(-1, self.frames, -1, -1, -1) if pixels.ndim == 4 else pixels
        return frames.permute(0, 1, 3, 4, 2)


def _ernie(vision: Any, channels: int) -> Layout:
    return PatchRows(vision.patch_size, vision.spatial_merge_size, 1, channels)


def _kimi(vision: Any, channels: int) -> Layout:
    return Patches(vision.patch_size, 1, 1, channels, block=max(vision.merge_kernel_size), maps=True)


def _paddle(vision: Any, channels: int) -> Layout:
    return Patches(vision.patch_size, 1, 1, channels, block=vision.spatial_merge_size, maps=True, batched=("pixels",))


def _hunyuan(vision: Any, channels: int) -> Layout:
    return Patches(vision.patch_size, 1, 1, channels, block=vision.spatial_merge_size, batched=("tokens",))


def _cosmos(vision: Any, channels: int) -> Layout:
    return Patches(vision.patch_size, vision.spatial_merge_size, 1, channels, inside="HWCF")


def _muse(vision: Any, channels: int) -> Layout:
    frames = vision.patch_temporal
    return Patches(vision.patch_size, 1, frames, channels, block=vision.merge_size, inside="FCHW")


def _video_llama(vision: Any, channels: int) -> Layout:
    return MergedRows(vision.patch_size, 1, 1, channels)


def _lfm3(vision: Any, channels: int) -> Layout:
    return PatchRows(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size, channels)


def _inkling2(vision: Any, channels: int) -> Layout:
    side = vision.patch_size * vision.spatial_merge_size
    return Patches(side, 1, 1, channels, "image_grid_thw", inside="HWCF", maps=True)


def _inkling(vision: Any, channels: int) -> Layout:
    return Cubes(vision.patch_size, vision.temporal_patch_size, channels)


LAYOUTS: Mapping[str, tuple[Callable[[Any, int], Layout], str]] = {
    "ernie4_5_vl_moe_vision": (_ernie, "hidden_states"),
    "kimi_k25_vision": (_kimi, "pixel_values"),
    "paddleocr_vl_vision": (_paddle, "pixel_values"),
    "hunyuan_vl_vision": (_hunyuan, "pixel_values"),
    "hy_v4_vl_vision": (_hunyuan, "pixel_values"),
    "cosmos3_edge_vision": (_cosmos, "pixel_values"),
    "muse_glimmer_vision": (_muse, "pixel_values"),
    "muse_spark_vision": (_muse, "pixel_values"),
    "dots3_note_vision_encoder": (_ernie, "pixel_values"),
    "lfm3_vl_vision": (_lfm3, "pixel_values"),
    "video_llama_3_vision": (_video_llama, "pixel_values"),
    "inkling_vision": (_inkling, "pixel_values"),
    "inkling2_vision": (_inkling2, "pixel_values"),
}
"""By the vision configuration's model_type: the layout, and the name of the encoder's pixel argument."""
