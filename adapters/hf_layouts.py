"""How families of transformers hold images: Mllama's tiles, Pixtral's packed sequence, rows and batches of patches.

Shapes as in ``fs_plugins.layouts``; P is the side of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fs_plugins import PixelError
from fs_plugins.layouts import Group, Layout, alike, companion, goes_with, joined, shaped
from fs_plugins.outputs import map_tensors


class Tiles(Layout):
    """Mllama: (b, n, T, C, H, W), an image being up to T tiles; padding tiles, by the mask, stay as they are."""

    def __init__(self, tiles: int) -> None:
        self.tiles = tiles

    def check(self, pixels: Tensor, channels: int) -> str | None:
        if pixels.ndim != 6 or pixels.shape[3] != channels:
            return f"must be (conversations, images, tiles, {channels}, height, width)"
        return None

    def groups(self, pixels: Tensor, others: Mapping[str, Any]) -> list[Group]:
        template = pixels.flatten(0, 1)
        shaped(others, "aspect_ratio_ids", pixels.shape[:2])
        mask = shaped(others, "aspect_ratio_mask", pixels.shape[:3]).flatten(0, 1).bool().cpu()
        kinds = alike([tuple(row.tolist()) for row in mask])
        groups = []
        for kind, units in kinds.items():
            # An image that is padding altogether still has to have a shape.
            real = torch.tensor(
                [i for i, is_real in enumerate(kind) if is_real] or [0], dtype=torch.long, device=pixels.device
            )
            at = list(units)
            shown = template[at][:, real]
            groups.append(
                Group(
                    units,
                    shown[:, 0] if len(real) == 1 else shown,
                    {
                        name: companion(others, name).flatten(0, 1)[at].unsqueeze(1)
                        for name in ("aspect_ratio_ids", "aspect_ratio_mask")
                    },
                    partial(_tiles, real),
                    template[at],
                )
            )
        return groups

    def still(self, pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        padding = pixels.new_zeros(len(pixels), self.tiles, *pixels.shape[1:])
        mask = torch.zeros(len(pixels), 1, self.tiles, dtype=torch.long, device=pixels.device)
        mask[..., 0] = 1
        ids = torch.ones(len(pixels), 1, dtype=torch.long, device=pixels.device)
        return _tiles(torch.tensor([0], dtype=torch.long, device=pixels.device), pixels, padding), {
            "aspect_ratio_ids": ids,
            "aspect_ratio_mask": mask,
        }

    def closed(self, outputs: Sequence[Any], units: Sequence[int], pixels: Tensor) -> Any:
        whole = super().closed(outputs, units, pixels)
        count = pixels.shape[:2]
        return map_tensors(
            [whole], lambda one: one[0].reshape(*count, *one[0].shape[2:]) if one[0].ndim == 5 else one[0]
        )


class Packed(Layout):
    """Pixtral: (B, C, H, W) padded to the largest image, with ``image_sizes``; one sequence of all tokens comes out."""

    def groups(self, pixels: Tensor, others: Mapping[str, Any]) -> list[Group]:
        sizes = others.get("image_sizes")
        if sizes is None:
            sizes = [tuple(pixels.shape[-2:])] * len(pixels)
        if len(sizes) != len(pixels):
            raise PixelError(f"image_sizes speaks of {len(sizes)} images, but {len(pixels)} came.")
        kinds = alike([(int(height), int(width)) for height, width in sizes])
        groups = []
        for (height, width), units in kinds.items():
            at = list(units)
            part = pixels[at][..., :height, :width]
            own = torch.tensor([[height, width]] * len(at), dtype=torch.long, device=pixels.device)
            groups.append(Group(units, part, {"image_sizes": own}))
        return groups

    def opened(self, output: Any, rows: int) -> Any:
        return map_tensors(
            [output], lambda one: one[0].reshape(rows, -1, one[0].shape[-1]) if one[0].ndim == 3 else one[0]
        )

    def closed(self, outputs: Sequence[Any], units: Sequence[int], pixels: Tensor) -> Any:
        return map_tensors(outputs, lambda parts: joined(units, parts).unsqueeze(0) if parts[0].ndim == 3 else parts[0])


OF_GRIDS = frozenset(
    {
        *("cu_seqlens", "max_seqlen", "cu_window_seqlens", "max_window_seqlen", "position_ids"),
        *("interp_indices", "interp_weights", "bilinear_indices", "bilinear_weights"),
        *("window_index", "frame_index", "temporal_merge_index", "pixel_shuffle_index"),
    }
)
"""What encoders derive from ``grid_thw`` where they are not given it, as for an exported graph."""


class Listed(Layout):
    """Tokens of all images come out below each other, (sum of L, D)."""

    def opened(self, output: Any, rows: int) -> Any:
        return map_tensors(
            [output], lambda one: one[0].reshape(rows, -1, one[0].shape[-1]) if one[0].ndim == 2 else one[0]
        )

    def closed(self, outputs: Sequence[Any], units: Sequence[int], pixels: Tensor) -> Any:
        return map_tensors(outputs, lambda parts: joined(units, parts) if parts[0].ndim == 3 else parts[0])


@dataclass(frozen=True)
class PatchRows(Listed):
    """Qwen and GLM: (sum of t h w, C * frames * P * P) patches in blocks of merge x merge, with ``grid_thw``.

    Two equal frames of a temporal patch are a still image: it gets one noise, copied.
    """

    patch: int
    merge: int
    frames: int
    channels: int = 3
    grid: str = "grid_thw"
    derived: frozenset[str] = field(default=OF_GRIDS, repr=False)

    def check(self, pixels: Tensor, channels: int) -> str | None:
        width = channels * self.frames * self.patch**2
        return None if pixels.ndim == 2 and pixels.shape[1] == width else f"must be (patches, {width})"

    def groups(self, pixels: Tensor, others: Mapping[str, Any]) -> list[Group]:
        grids = [tuple(row) for row in shaped(others, self.grid, (None, 3)).tolist()]
        counts = [t * h * w for t, h, w in grids]
        if sum(counts) != len(pixels):
            raise PixelError(f"{self.grid} speaks of {sum(counts)} patches, but {len(pixels)} came.")
        if any(h % self.merge or w % self.merge for _, h, w in grids):
            raise PixelError(
                f"{self.grid} must have heights and widths that are multiples of {self.merge}, got {grids}."
            )
        images = [self._images(rows, grid) for rows, grid in zip(pixels.split(counts), grids, strict=True)]
        stills = [tuple(is_still(pair) for pair in frames) for frames in images]
        groups = []
        for (grid, still), units in alike(list(zip(grids, stills, strict=True))).items():
            kept = [
                torch.cat([pair[:1] if s else pair for pair, s in zip(images[u], still, strict=True)]) for u in units
            ]
            shown = torch.stack([frames[0] if len(frames) == 1 else frames for frames in kept])
            own = torch.tensor([grid] * len(units), dtype=torch.long, device=pixels.device)
            groups.append(Group(units, shown, {self.grid: own}, partial(self._pack, still)))
        return groups

    def still(self, pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        height, width = sides(pixels, self.patch * self.merge)
        grid = torch.tensor(
            [[1, height // self.patch, width // self.patch]] * len(pixels), dtype=torch.long, device=pixels.device
        )
        return self._pack((True,), pixels), {self.grid: grid}

    def _images(self, rows: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """(t h w, C f P P) rows of one image -> (t, frames, C, h P, w P)."""
        (t, h, w), m, p = grid, self.merge, self.patch
        x = rows.view(t, h // m, w // m, m, m, self.channels, self.frames, p, p)
        return x.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(t, self.frames, self.channels, h * p, w * p)

    def _pack(self, still: tuple[bool, ...], pixels: Tensor, template: None = None) -> Tensor:
        """(N, C, H, W) or (N, F, C, H, W) distinct frames -> (N t h w, C f P P) rows."""
        frames = pixels.unsqueeze(1) if pixels.ndim == 4 else pixels
        whole, at = [], 0
        for same in still:
            step = 1 if same else self.frames
            pair = frames[:, at : at + step]
            whole.append(pair.expand(-1, self.frames, -1, -1, -1) if same else pair)
            at += step
        x = torch.stack(whole, dim=1)
        n, t, f, c, height, width = x.shape
        m, p = self.merge, self.patch
        h, w = height // p, width // p
        x = x.view(n, t, f, c, h // m, m, p, w // m, m, p)
        return x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(n * t * h * w, c * f * p * p)


@dataclass(frozen=True)
class PatchBatch(Layout):
    """SigLIP2 (NaFlex): (B, L, P * P * C) patches with ``spatial_shapes`` and a mask; padding rows stay as they are."""

    patch: int
    channels: int = 3
    mask: str = "pixel_attention_mask"

    def check(self, pixels: Tensor, channels: int) -> str | None:
        width = channels * self.patch**2
        return None if pixels.ndim == 3 and pixels.shape[2] == width else f"must be (images, patches, {width})"

    def groups(self, pixels: Tensor, others: Mapping[str, Any]) -> list[Group]:
        shapes = [tuple(row) for row in shaped(others, "spatial_shapes", (len(pixels), 2)).tolist()]
        if any(h * w > pixels.shape[1] for h, w in shapes):
            raise PixelError(f"spatial_shapes speaks of more patches than the {pixels.shape[1]} that came: {shapes}.")
        groups = []
        for (h, w), units in alike(shapes).items():
            at, p = list(units), self.patch
            x = pixels[at][:, : h * w].view(len(at), h, w, p, p, self.channels)
            shown = x.permute(0, 5, 1, 3, 2, 4).reshape(len(at), self.channels, h * p, w * p)
            companions = {name: value[at] for name, value in others.items() if goes_with(value, pixels)}
            groups.append(Group(units, shown, companions, self._pack, pixels[at]))
        return groups

    def still(self, pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        height, width = sides(pixels, self.patch)
        h, w = height // self.patch, width // self.patch
        mask = torch.ones(len(pixels), h * w, dtype=torch.long, device=pixels.device)
        shapes = torch.tensor([[h, w]] * len(pixels), dtype=torch.long, device=pixels.device)
        template = pixels.new_empty(len(pixels), h * w, self.channels * self.patch**2)
        return self._pack(pixels, template), {self.mask: mask, "spatial_shapes": shapes}

    def _pack(self, pixels: Tensor, template: Tensor) -> Tensor:
        n, c, height, width = pixels.shape
        p = self.patch
        h, w = height // p, width // p
        rows = pixels.view(n, c, h, p, w, p).permute(0, 2, 4, 3, 5, 1).reshape(n, h * w, p * p * c)
        return torch.cat([rows, template[:, h * w :].to(rows.dtype)], dim=1)


def sides(pixels: Tensor, block: int) -> tuple[int, int]:
    """The sides of (..., H, W) still images, which an encoder takes in blocks.

    Raises:
        PixelError: they are no multiples of a block's.
    """
    height, width = pixels.shape[-2:]
    if height % block or width % block:
        raise PixelError(f"Images for this encoder have sides that are multiples of {block}, got {height}x{width}.")
    return height, width


def is_still(frames: Tensor) -> bool:
    """Whether all (F, ...) frames are equal."""
    return bool((frames[1:] == frames[:1]).all())


def _tiles(real: Tensor, pixels: Tensor, template: Tensor) -> Tensor:
    """(N, C, H, W) or (N, F, C, H, W) real tiles into (N, 1, T, C, H, W)."""
    frames = pixels.unsqueeze(1) if pixels.ndim == 4 else pixels
    return template.to(frames.dtype).index_copy(1, real.to(frames.device), frames).unsqueeze(1)
