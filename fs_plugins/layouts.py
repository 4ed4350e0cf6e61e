"""How a vision module's pixel argument holds images: a plain batch, tiles, a packed sequence, rows of patches.

A layout takes a call apart into groups of images of one shape, so that noise, purifier and encoder work on
image batches, and puts the encoder's outputs together again in the order of the call.

Shapes: B images of a group, N rows (draws times images), C channels, H x W pixels, P the side of a patch.
An image of several frames or tiles is (F, C, H, W), a single one (C, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fs_plugins.errors import ModelError, PixelError
from fs_plugins.outputs import map_tensors

Pack = Callable[[Tensor, Any], Tensor]


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

    def check(self, pixels: Tensor, channels: int) -> str | None:
        """What is wrong with the shape of the pixel argument, in words."""
        if pixels.ndim < 4 or pixels.shape[-3] != channels:
            return f"must be (images, {channels}, height, width)"
        return None

    def groups(self, pixels: Tensor, others: Mapping[str, Any]) -> list[Group]:
        """Take a call apart. ``others`` are the module's other arguments by name."""
        companions = {name: value for name, value in others.items() if _goes_with(value, pixels)}
        return [Group(tuple(range(len(pixels))), pixels, companions)]

    def still(self, pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """(N, C, H, W) still images -> the module's pixel argument, and the other arguments it needs with it."""
        return pixels, {}

    def opened(self, output: Any, rows: int) -> Any:
        """The module's output with one row per (draw, image) in front of every field."""
        return output

    def closed(self, outputs: Sequence[Any], units: Sequence[int], pixels: Tensor) -> Any:
        """Opened outputs of all groups -> one output as the module gives it, images in the call's order."""
        return outputs[0] if len(outputs) == 1 else map_tensors(outputs, partial(_in_order, units))


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
        _shaped(others, "aspect_ratio_ids", pixels.shape[:2])
        mask = _shaped(others, "aspect_ratio_mask", pixels.shape[:3]).flatten(0, 1).bool().cpu()
        kinds = _alike([tuple(row.tolist()) for row in mask])
        groups = []
        for kind, units in kinds.items():
            # An image that is padding altogether still has to have a shape.
            real = torch.tensor([i for i, is_real in enumerate(kind) if is_real] or [0])
            at = list(units)
            shown = template[at][:, real]
            groups.append(
                Group(
                    units,
                    shown[:, 0] if len(real) == 1 else shown,
                    {
                        name: _companion(others, name).flatten(0, 1)[at].unsqueeze(1)
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
        return _tiles(torch.tensor([0]), pixels, padding), {"aspect_ratio_ids": ids, "aspect_ratio_mask": mask}

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
        kinds = _alike([(int(height), int(width)) for height, width in sizes])
        groups = []
        for (height, width), units in kinds.items():
            at = list(units)
            part = pixels[at][..., :height, :width]
            own = torch.tensor([[height, width]] * len(at), device=pixels.device)
            groups.append(Group(units, part, {"image_sizes": own}))
        return groups

    def opened(self, output: Any, rows: int) -> Any:
        return map_tensors(
            [output], lambda one: one[0].reshape(rows, -1, one[0].shape[-1]) if one[0].ndim == 3 else one[0]
        )

    def closed(self, outputs: Sequence[Any], units: Sequence[int], pixels: Tensor) -> Any:
        return map_tensors(
            outputs, lambda parts: _joined(units, parts).unsqueeze(0) if parts[0].ndim == 3 else parts[0]
        )


@dataclass(frozen=True)
class PatchRows(Layout):
    """Qwen and GLM: (sum of t h w, C * frames * P * P) patches in blocks of merge x merge, with ``grid_thw``.

    Two equal frames of a temporal patch are a still image: it gets one noise, copied.
    """

    patch: int
    merge: int
    frames: int
    channels: int = 3
    grid: str = "grid_thw"
    derived: frozenset[str] = field(
        default=frozenset({"cu_seqlens", "max_seqlen", "position_ids", "interp_indices", "interp_weights"}), repr=False
    )

    def check(self, pixels: Tensor, channels: int) -> str | None:
        width = channels * self.frames * self.patch**2
        return None if pixels.ndim == 2 and pixels.shape[1] == width else f"must be (patches, {width})"

    def groups(self, pixels: Tensor, others: Mapping[str, Any]) -> list[Group]:
        grids = [tuple(row) for row in _shaped(others, self.grid, (None, 3)).tolist()]
        counts = [t * h * w for t, h, w in grids]
        if sum(counts) != len(pixels):
            raise PixelError(f"{self.grid} speaks of {sum(counts)} patches, but {len(pixels)} came.")
        if any(h % self.merge or w % self.merge for _, h, w in grids):
            raise PixelError(
                f"{self.grid} must have heights and widths that are multiples of {self.merge}, got {grids}."
            )
        images = [self._images(rows, grid) for rows, grid in zip(pixels.split(counts), grids, strict=True)]
        stills = [tuple(_is_still(pair) for pair in frames) for frames in images]
        groups = []
        for (grid, still), units in _alike(list(zip(grids, stills, strict=True))).items():
            kept = [
                torch.cat([pair[:1] if s else pair for pair, s in zip(images[u], still, strict=True)]) for u in units
            ]
            shown = torch.stack([frames[0] if len(frames) == 1 else frames for frames in kept])
            own = torch.tensor([grid] * len(units), device=pixels.device)
            groups.append(Group(units, shown, {self.grid: own}, partial(self._pack, still)))
        return groups

    def still(self, pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        height, width = pixels.shape[-2:]
        block = self.patch * self.merge
        if height % block or width % block:
            raise PixelError(f"Images for this encoder have sides that are multiples of {block}, got {height}x{width}.")
        grid = torch.tensor([[1, height // self.patch, width // self.patch]] * len(pixels), device=pixels.device)
        return self._pack((True,), pixels), {self.grid: grid}

    def opened(self, output: Any, rows: int) -> Any:
        return map_tensors(
            [output], lambda one: one[0].reshape(rows, -1, one[0].shape[-1]) if one[0].ndim == 2 else one[0]
        )

    def closed(self, outputs: Sequence[Any], units: Sequence[int], pixels: Tensor) -> Any:
        return map_tensors(outputs, lambda parts: _joined(units, parts) if parts[0].ndim == 3 else parts[0])

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
        shapes = [tuple(row) for row in _shaped(others, "spatial_shapes", (len(pixels), 2)).tolist()]
        if any(h * w > pixels.shape[1] for h, w in shapes):
            raise PixelError(f"spatial_shapes speaks of more patches than the {pixels.shape[1]} that came: {shapes}.")
        groups = []
        for (h, w), units in _alike(shapes).items():
            at, p = list(units), self.patch
            x = pixels[at][:, : h * w].view(len(at), h, w, p, p, self.channels)
            shown = x.permute(0, 5, 1, 3, 2, 4).reshape(len(at), self.channels, h * p, w * p)
            companions = {name: value[at] for name, value in others.items() if _goes_with(value, pixels)}
            groups.append(Group(units, shown, companions, self._pack, pixels[at]))
        return groups

    def still(self, pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        height, width = pixels.shape[-2:]
        if height % self.patch or width % self.patch:
            raise PixelError(
                f"Images for this encoder have sides that are multiples of {self.patch}, got {height}x{width}."
            )
        h, w = height // self.patch, width // self.patch
        mask = torch.ones(len(pixels), h * w, dtype=torch.long, device=pixels.device)
        shapes = torch.tensor([[h, w]] * len(pixels), device=pixels.device)
        template = pixels.new_empty(len(pixels), h * w, self.channels * self.patch**2)
        return self._pack(pixels, template), {self.mask: mask, "spatial_shapes": shapes}

    def _pack(self, pixels: Tensor, template: Tensor) -> Tensor:
        n, c, height, width = pixels.shape
        p = self.patch
        h, w = height // p, width // p
        rows = pixels.view(n, c, h, p, w, p).permute(0, 2, 4, 3, 5, 1).reshape(n, h * w, p * p * c)
        return torch.cat([rows, template[:, h * w :].to(rows.dtype)], dim=1)


def _alike(kinds: Sequence[Any]) -> dict[Any, tuple[int, ...]]:
    """Kind -> the images of that kind."""
    found: dict[Any, tuple[int, ...]] = {}
    for unit, kind in enumerate(kinds):
        found[kind] = (*found.get(kind, ()), unit)
    return found


def _goes_with(value: Any, pixels: Tensor) -> bool:
    """Whether an argument has a row for each image and is not the pixels themselves."""
    return isinstance(value, Tensor) and value is not pixels and value.ndim > 0 and len(value) == len(pixels)


def _companion(others: Mapping[str, Any], name: str) -> Tensor:
    value = others.get(name)
    if not isinstance(value, Tensor):
        raise ModelError(f"The vision module was called without {name}, which says how its pixels make up images.")
    return value


def _shaped(others: Mapping[str, Any], name: str, shape: Sequence[int | None]) -> Tensor:
    value = _companion(others, name)
    if value.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, value.shape, strict=True)):
        wanted = ", ".join("any" if side is None else str(side) for side in shape)
        raise PixelError(f"{name} must be ({wanted}) to go with these pixels, got shape {tuple(value.shape)}.")
    return value


def _is_still(frames: Tensor) -> bool:
    return bool((frames[1:] == frames[:1]).all())


def _tiles(real: Tensor, pixels: Tensor, template: Tensor) -> Tensor:
    """(N, C, H, W) or (N, F, C, H, W) real tiles into (N, 1, T, C, H, W)."""
    frames = pixels.unsqueeze(1) if pixels.ndim == 4 else pixels
    return template.to(frames.dtype).index_copy(1, real.to(frames.device), frames).unsqueeze(1)


def _rows(units: Sequence[int], parts: Sequence[Tensor]) -> list[Tensor]:
    """The rows of all parts in the call's order."""
    rows = [row for part in parts for row in part.unbind(0)]
    return [rows[i] for i in sorted(range(len(rows)), key=lambda i: units[i])]


def _in_order(units: Sequence[int], parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(_rows(units, parts)) if list(units) != sorted(units) else torch.cat(list(parts))


def _joined(units: Sequence[int], parts: Sequence[Tensor]) -> Tensor:
    """(B, L, D) parts, L their own -> all tokens in the call's order, (sum of L, D)."""
    return torch.cat(_rows(units, parts))
