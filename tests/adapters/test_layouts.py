"""Taking vision calls apart and packing them again, against the processors' own rules written out."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from fs_plugins.adapters.hf_layouts import Packed, PatchBatch, PatchRows, Tiles
from fs_plugins.adapters.hf_padded import PatchTokens, PooledPatches, Strips
from hypothesis import given, settings
from hypothesis import strategies as st
from support import MEAN, STD, randomise
from torch import Tensor, nn

import fs_plugins
from fs_plugins import FeatureSmoother, Field, ModelError, PixelError, PixelSpace, Readout, VisionCall, hooks
from fs_plugins.layouts import Layout
from fs_plugins.patch import SmoothingHook
from fs_plugins.smoothing import Tally

SIGMA = 0.25
WIDTH = 6


def pictures(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Images in [0, 1], normalised, one of each shape."""
    generator = torch.Generator().manual_seed(seed)
    return [normalised(torch.rand(shape, generator=generator)) for shape in shapes]


def normalised(images: Tensor) -> Tensor:
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


# The processors' rules, as transformers writes them.


def qwen_still(image: Tensor, patch: int, merge: int, temporal: int) -> tuple[Tensor, list[int]]:
    """Qwen2VLImageProcessor.patchify: (C, H, W) -> (h w, C * temporal * P * P), [1, h, w]."""
    channels, height, width = image.shape
    h, w = height // patch, width // patch
    patches = image.reshape(1, channels, h // merge, merge, patch, w // merge, merge, patch)
    patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7)
    rows = patches.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, temporal, -1, -1)
    return rows.reshape(h * w, channels * temporal * patch * patch), [1, h, w]


def qwen_film(film: Tensor, patch: int, merge: int, temporal: int) -> tuple[Tensor, list[int]]:
    """Qwen2VLVideoProcessor.patchify: (frames, C, H, W) -> (t h w, C * temporal * P * P), [t, h, w]."""
    count, channels, height, width = film.shape
    t, h, w = count // temporal, height // patch, width // patch
    patches = film.view(1, t, temporal, channels, h // merge, merge, patch, w // merge, merge, patch)
    patches = patches.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    return patches.reshape(t * h * w, channels * temporal * patch * patch), [t, h, w]


def siglip2(image: Tensor, patch: int, longest: int) -> tuple[Tensor, Tensor, list[int]]:
    """convert_image_to_patches and pad_along_first_dim: (C, H, W) -> rows, mask, [h, w]."""
    channels, height, width = image.shape
    h, w = height // patch, width // patch
    patched = image.reshape(channels, h, patch, w, patch).permute(1, 3, 2, 4, 0)
    patched = patched.reshape(h * w, -1)
    mask = torch.ones(longest, dtype=torch.int32)
    mask[h * w :] = 0
    return F.pad(patched, (0, 0, 0, longest - h * w)), mask, [h, w]


def mllama(images: list[list[Tensor]], tiles: int) -> dict[str, Tensor]:
    """pad_batches_and_tiles and build_aspect_ratio_mask: images of (tiles, C, H, W) -> the encoder's arguments."""
    most = max(map(len, images))
    pixels = torch.zeros(len(images), most, tiles, *images[0][0].shape[1:])
    mask = torch.zeros(len(images), most, tiles, dtype=torch.long)
    ids = torch.zeros(len(images), most, dtype=torch.long)
    mask[:, :, 0] = 1
    for i, row in enumerate(images):
        for j, image in enumerate(row):
            pixels[i, j, : len(image)] = image
            mask[i, j, : len(image)] = 1
            ids[i, j] = len(image)
    return {"pixel_values": pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}


def pixtral(images: list[Tensor]) -> dict[str, Tensor]:
    """_pad_for_batching: zeros below and to the right, up to the largest side."""
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    padded = [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
    return {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor([image.shape[1:] for image in images])}


def minicpm(images: list[Tensor], patch: int) -> dict[str, Tensor]:
    """reshape_by_patch: (C, H, W) -> (C, P, h w P), all of them side by side."""
    strips = []
    for image in images:
        patches = F.unfold(image.unsqueeze(0), (patch, patch), stride=(patch, patch))
        patches = patches.reshape(len(image), patch, patch, -1).permute(0, 1, 3, 2)
        strips.append(patches.reshape(len(image), patch, -1))
    grids = [[side // patch for side in image.shape[1:]] for image in images]
    return {"pixel_values": torch.cat(strips, dim=-1).unsqueeze(0), "target_sizes": torch.tensor(grids).int()}


def gemma4(images: list[Tensor], patch: int, longest: int) -> dict[str, Tensor]:
    """SigLIP2's rows, and a meshgrid of columns and rows, with -1 where the padding is."""
    rows, grids = [], []
    for image in images:
        row, _, (h, w) = siglip2(image, patch, longest)
        grid = torch.stack(torch.meshgrid(torch.arange(w), torch.arange(h), indexing="xy"), dim=-1).reshape(-1, 2)
        rows.append(row)
        grids.append(F.pad(grid, (0, 0, 0, longest - h * w), value=-1))
    return {"pixel_values": torch.stack(rows), "pixel_position_ids": torch.stack(grids)}


# Encoders with a layout each. A token depends on its patch, its whole image and the image's companions,
# nothing else: mixing up images, orders or companions shows.


class Encoder(nn.Module):
    def __init__(self, inside: int) -> None:
        super().__init__()
        self.map = nn.Linear(inside, WIDTH)
        randomise(self, 0.3)
        self.seen: list[dict[str, Tensor]] = []

    def tokens(self, rows: Tensor, companion: float = 1.0) -> Tensor:
        """(L, inside) patches of one image -> (L, WIDTH)."""
        own = torch.tanh(self.map(rows))
        return companion * (own + own.mean(0))


class PlainEncoder(Encoder):
    """(B, C, H, W) or (B, frames, C, H, W)."""

    def __init__(self) -> None:
        super().__init__(3 * 4)

    def forward(self, pixel_values, scale=None):
        self.seen.append({"pixel_values": pixel_values, "scale": scale})
        scales = torch.ones(len(pixel_values)) if scale is None else scale
        tokens = [self.tokens(image.reshape(-1, 12), float(s)) for image, s in zip(pixel_values, scales, strict=True)]
        return {"tokens": torch.stack(tokens), "scale": scales.view(-1, 1)}


class TilesEncoder(Encoder):
    def __init__(self) -> None:
        super().__init__(3 * 4)

    def forward(self, pixel_values, aspect_ratio_ids, aspect_ratio_mask):
        self.seen.append({"pixel_values": pixel_values, "mask": aspect_ratio_mask, "ids": aspect_ratio_ids})
        b, n, tiles = pixel_values.shape[:3]
        images = zip(
            pixel_values.flatten(0, 1), aspect_ratio_mask.flatten(0, 1), aspect_ratio_ids.flatten(), strict=True
        )
        tokens = [self.tokens((x * mask.view(-1, 1, 1, 1)).reshape(-1, 12), 1.0 + ids) for x, mask, ids in images]
        return {"tokens": torch.stack(tokens).view(b, n, tiles, -1, WIDTH)}


class PackedEncoder(Encoder):
    def __init__(self) -> None:
        super().__init__(3 * 4)

    def forward(self, pixel_values, image_sizes=None):
        self.seen.append({"pixel_values": pixel_values, "image_sizes": image_sizes})
        sizes = [pixel_values.shape[-2:]] * len(pixel_values) if image_sizes is None else image_sizes.tolist()
        crops = [image[:, :h, :w] for image, (h, w) in zip(pixel_values, sizes, strict=True)]
        return (torch.cat([self.tokens(crop.reshape(-1, 12)) for crop in crops]).unsqueeze(0),)


class RowsEncoder(Encoder):
    """Tokens are means of 2 x 2 patches, as a patch merger makes them."""

    def __init__(self) -> None:
        super().__init__(3 * 2 * 2 * 2)

    def forward(self, hidden_states, grid_thw, cu_seqlens=None, **kwargs):
        self.seen.append({"hidden_states": hidden_states, "grid_thw": grid_thw, "cu_seqlens": cu_seqlens, **kwargs})
        images = hidden_states.split(grid_thw.prod(1).tolist())
        rows = [self.tokens(x, 1 + 0.1 * float(h)) for x, (_, h, _) in zip(images, grid_thw, strict=True)]
        return {"tokens": torch.cat(rows).view(-1, 4, WIDTH).mean(1), "rows": torch.cat(rows)}


class BatchEncoder(Encoder):
    def __init__(self) -> None:
        super().__init__(2 * 2 * 3)

    def forward(self, pixel_values, pixel_attention_mask, spatial_shapes):
        self.seen.append({"pixel_values": pixel_values, "mask": pixel_attention_mask, "spatial_shapes": spatial_shapes})
        tokens = [
            self.tokens(rows * mask.view(-1, 1), 1 + 0.1 * float(h))
            for rows, mask, (h, _) in zip(pixel_values, pixel_attention_mask, spatial_shapes, strict=True)
        ]
        return {"tokens": torch.stack(tokens)}


class TokensEncoder(Encoder):
    """Padding is seen by nobody, and its tokens are zeros."""

    def __init__(self) -> None:
        super().__init__(2 * 2 * 3)

    def forward(self, pixel_values, pixel_attention_mask, spatial_shapes):
        self.seen.append({"pixel_values": pixel_values, "mask": pixel_attention_mask, "spatial_shapes": spatial_shapes})
        tokens = [
            self.tokens(rows[mask.bool()], 1 + 0.1 * float(h))
            for rows, mask, (h, _) in zip(pixel_values, pixel_attention_mask, spatial_shapes, strict=True)
        ]
        longest = pixel_values.shape[1]
        return {"tokens": torch.stack([F.pad(part, (0, 0, 0, longest - len(part))) for part in tokens])}


class PooledEncoder(Encoder):
    """Tokens are means of 2 x 2 patches, those of all images below each other."""

    def __init__(self) -> None:
        super().__init__(2 * 2 * 3)

    def forward(self, pixel_values, pixel_position_ids):
        self.seen.append({"pixel_values": pixel_values, "places": pixel_position_ids})
        pooled = []
        for rows, places in zip(pixel_values, pixel_position_ids, strict=True):
            real = (places >= 0).all(-1)
            width, height = (places[real].amax(0) + 1).tolist()
            tokens = self.tokens(rows[real], 1 + 0.1 * height)
            pooled.append(tokens.view(height // 2, 2, width // 2, 2, WIDTH).mean((1, 3)).view(-1, WIDTH))
        return {"tokens": torch.cat(pooled)}


class StripsEncoder(Encoder):
    def __init__(self) -> None:
        super().__init__(3 * 2 * 2)

    def forward(self, pixel_values, target_sizes):
        self.seen.append({"pixel_values": pixel_values, "target_sizes": target_sizes})
        rows = pixel_values[0].view(3, 2, -1, 2).permute(2, 0, 1, 3).reshape(-1, 12)
        images = rows.split(target_sizes.prod(1).tolist())
        tokens = [self.tokens(x, 1 + 0.1 * float(h)) for x, (h, _) in zip(images, target_sizes, strict=True)]
        return {"tokens": torch.cat(tokens).unsqueeze(0)}


def of_rows(images: list[Tensor]) -> dict[str, Tensor]:
    packed = [(qwen_still if image.ndim == 3 else qwen_film)(image, 2, 2, 2) for image in images]
    return {
        "hidden_states": torch.cat([rows for rows, _ in packed]),
        "grid_thw": torch.tensor([grid for _, grid in packed]),
    }


def of_batch(images: list[Tensor], longest: int = 12) -> dict[str, Tensor]:
    rows, masks, shapes = zip(*[siglip2(image, 2, longest) for image in images], strict=True)
    return {
        "pixel_values": torch.stack(rows),
        "pixel_attention_mask": torch.stack(masks),
        "spatial_shapes": torch.tensor(shapes),
    }


def of_pooled(images: list[Tensor], longest: int = 20) -> dict[str, Tensor]:
    return gemma4(images, 2, longest)


def of_strips(images: list[Tensor]) -> dict[str, Tensor]:
    return minicpm(images, 2)


def of_tiles(images: list[Tensor]) -> dict[str, Tensor]:
    """Conversations of one image; a single tile may be given as (C, H, W)."""
    return mllama([[image if image.ndim == 4 else image.unsqueeze(0)] for image in images], 3)


def of_plain(images: list[Tensor]) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack(images), "scale": torch.stack([image.abs().mean() for image in images])}


@dataclass(frozen=True)
class Kind:
    """A layout, an encoder of it, and pictures with the rule that makes a call of them."""

    layout: Layout
    encoder: type[Encoder]
    arguments: Callable[[list[Tensor]], dict[str, Tensor]]
    shapes: tuple[tuple[int, ...], ...]
    argument: str = "pixel_values"

    def images(self, seed: int = 0) -> list[Tensor]:
        return pictures(*self.shapes, seed=seed)

    def call(self, encoder: nn.Module) -> VisionCall:
        return VisionCall(
            module=encoder,
            pixels=PixelSpace(MEAN, STD, self.argument, layout=self.layout),
            readouts=(Readout("tokens", (Field("tokens", 0),), width=WIDTH, tokens=None),),
            image_size=None,
            architecture={"family": "toy"},
        )


# Shapes come mixed and in an order that no group keeps.
KINDS = {
    "plain": Kind(Layout(), PlainEncoder, of_plain, ((3, 4, 6),) * 4),
    "frames": Kind(Layout(), PlainEncoder, of_plain, ((2, 3, 4, 6),) * 3),
    "tiles": Kind(Tiles(3), TilesEncoder, of_tiles, ((2, 3, 4, 4), (3, 4, 4), (2, 3, 4, 4), (3, 3, 4, 4), (3, 4, 4))),
    "packed": Kind(Packed(), PackedEncoder, pixtral, ((3, 4, 6), (3, 6, 4), (3, 4, 6), (3, 8, 8))),
    "rows": Kind(
        PatchRows(2, 2, 2),
        RowsEncoder,
        of_rows,
        ((3, 4, 8), (3, 8, 4), (3, 4, 8), (4, 3, 4, 4), (3, 4, 4), (4, 3, 4, 4)),
        "hidden_states",
    ),
    "batch": Kind(PatchBatch(2), BatchEncoder, of_batch, ((3, 4, 6), (3, 6, 4), (3, 4, 6), (3, 4, 4))),
    "tokens": Kind(PatchTokens(2), TokensEncoder, of_batch, ((3, 4, 6), (3, 6, 4), (3, 4, 6), (3, 4, 4))),
    "pooled": Kind(
        PooledPatches(2, block=2), PooledEncoder, of_pooled, ((3, 4, 8), (3, 8, 4), (3, 4, 8), (3, 4, 4), (3, 8, 8))
    ),
    "strips": Kind(Strips(2, 2), StripsEncoder, of_strips, ((3, 4, 6), (3, 6, 4), (3, 4, 6), (3, 4, 4))),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture
def manager():
    """A manager of this test's own, in which an adapter claims the encoders above."""
    hooks.plugin_manager.cache_clear()
    manager = hooks.plugin_manager()
    kinds = {kind.encoder: kind for kind in KINDS.values()}

    def fs_vision_call(model):
        return kinds[type(model)].call(model) if type(model) in kinds else None

    plugin = types.ModuleType("plugin")
    plugin.fs_vision_call = fs_plugins.hookimpl(fs_vision_call)
    hooks.register(manager, plugin, "toy")
    yield manager
    hooks.plugin_manager.cache_clear()


def fields(output) -> dict[str, Tensor]:
    return output if isinstance(output, dict) else {"tokens": output[0]}


def parts(kind: Kind, output, images: list[Tensor]) -> list[Tensor]:
    """The tokens of each image of a call, (L, WIDTH)."""
    tokens = fields(output)["tokens"]
    if isinstance(kind.layout, Packed | PatchRows | PooledPatches):
        frames = [len(image) // 2 if image.ndim == 4 else 1 for image in images]
        merged = 16 if isinstance(kind.layout, PatchRows | PooledPatches) else 4  # pixels of a token
        counts = [t * image.shape[-2] * image.shape[-1] // merged for t, image in zip(frames, images, strict=True)]
        return list(tokens.view(-1, WIDTH).split(counts))
    return [row.reshape(-1, WIDTH) for row in tokens]


# Taking apart and packing.


def repacked(layout: Layout, argument: str, arguments: dict[str, Tensor]) -> list[tuple[tuple[int, ...], Tensor]]:
    return [
        (group.units, group.pack(group.pixels, group.template))
        for group in layout.groups(arguments[argument], arguments)
    ]


def assert_each_image_once(layout: Layout, argument: str, arguments: dict[str, Tensor], count: int) -> None:
    units = [unit for group in layout.groups(arguments[argument], arguments) for unit in group.units]
    assert sorted(units) == list(range(count))


@st.composite
def films(draw):
    """(patch, merge, temporal, films): films of (frames, C, H, W), with temporal patches that stand still or move."""
    patch, merge, temporal = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    side = st.integers(1, 3).map(lambda blocks: blocks * merge * patch)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    found = []
    for height, width, moves in draw(
        st.lists(st.tuples(side, side, st.lists(st.booleans(), min_size=1, max_size=3)), min_size=1, max_size=4)
    ):
        pairs = [
            torch.randn(temporal if moving else 1, 3, height, width, generator=generator).expand(temporal, -1, -1, -1)
            for moving in moves
        ]
        found.append(torch.cat(pairs))
    return patch, merge, temporal, found


@settings(max_examples=60)
@given(films())
def test_patch_rows_give_back_the_frames_that_were_patchified_and_pack_them_bit_for_bit(drawn):
    patch, merge, temporal, found = drawn
    packed = [qwen_film(film, patch, merge, temporal) for film in found]
    arguments = {
        "hidden_states": torch.cat([rows for rows, _ in packed]),
        "grid_thw": torch.tensor([grid for _, grid in packed]),
    }
    layout = PatchRows(patch, merge, temporal)
    assert_each_image_once(layout, "hidden_states", arguments, len(found))
    for group in layout.groups(arguments["hidden_states"], arguments):
        rows = group.pack(group.pixels, group.template)
        assert torch.equal(rows, torch.cat([packed[unit][0] for unit in group.units]))
        assert group.companions["grid_thw"].tolist() == [packed[unit][1] for unit in group.units]
        for unit, shown in zip(group.units, group.pixels, strict=True):
            pairs = found[unit].split(temporal)
            distinct = torch.cat([pair[:1] if (pair == pair[:1]).all() else pair for pair in pairs])
            assert torch.equal(shown if shown.ndim == 4 else shown.unsqueeze(0), distinct)


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3))
def test_patch_rows_see_one_picture_in_a_still_image(patch, merge, temporal, high, wide):
    """The image processor's own rule, which copies the frame."""
    (image,) = pictures((3, high * merge * patch, wide * merge * patch))
    rows, grid = qwen_still(image, patch, merge, temporal)
    layout = PatchRows(patch, merge, temporal)
    (group,) = layout.groups(rows, {"grid_thw": torch.tensor([grid])})
    assert torch.equal(group.pixels, image.unsqueeze(0))
    packed, others = layout.still(image.unsqueeze(0))
    assert torch.equal(packed, rows)
    assert others["grid_thw"].tolist() == [grid]


@settings(max_examples=60)
@given(st.integers(1, 3), st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=5), st.data())
def test_patch_batches_give_back_the_images_that_were_patchified_and_pack_them_bit_for_bit(patch, shapes, data):
    images = pictures(*[(3, h * patch, w * patch) for h, w in shapes])
    longest = max(h * w for h, w in shapes) + data.draw(st.integers(0, 3))
    packed = [siglip2(image, patch, longest) for image in images]
    pixels = torch.stack([rows for rows, _, _ in packed])
    # Padding is the processor's business: whatever it holds comes back.
    padding = torch.stack([mask for _, mask, _ in packed]) == 0
    pixels[padding] = torch.randn(int(padding.sum()), pixels.shape[2])
    arguments = {
        "pixel_values": pixels,
        "pixel_attention_mask": torch.stack([mask for _, mask, _ in packed]),
        "spatial_shapes": torch.tensor(shapes),
    }
    layout = PatchBatch(patch)
    assert_each_image_once(layout, "pixel_values", arguments, len(images))
    for group in layout.groups(pixels, arguments):
        at = list(group.units)
        assert torch.equal(group.pixels, torch.stack([images[unit] for unit in at]))
        assert torch.equal(group.pack(group.pixels, group.template), pixels[at])
        for name in ("pixel_attention_mask", "spatial_shapes"):
            assert torch.equal(group.companions[name], arguments[name][at])
    alone, others = layout.still(images[0].unsqueeze(0))
    assert torch.equal(alone[0], packed[0][0][: shapes[0][0] * shapes[0][1]])
    assert others["spatial_shapes"].tolist() == [list(shapes[0])]
    assert others["pixel_attention_mask"].bool().all()


@settings(max_examples=60)
@given(st.integers(1, 4), st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3))
def test_tiles_give_back_the_real_ones_and_pack_all_bit_for_bit(tiles, counts):
    counts = [[min(count, tiles) for count in row] for row in counts]
    images = [[pictures((count, 3, 2, 3), seed=10 * i + j)[0] for j, count in enumerate(row)]
              for i, row in enumerate(counts)]  # fmt: skip
    arguments = mllama(images, tiles)
    pixels, mask = arguments["pixel_values"], arguments["aspect_ratio_mask"]
    pixels[mask == 0] = torch.randn(int((mask == 0).sum()), 3, 2, 3)
    layout, (b, n) = Tiles(tiles), pixels.shape[:2]
    assert_each_image_once(layout, "pixel_values", arguments, b * n)
    for group in layout.groups(pixels, arguments):
        at = list(group.units)
        assert torch.equal(group.pack(group.pixels, group.template), pixels.flatten(0, 1)[at].unsqueeze(1))
        assert torch.equal(group.companions["aspect_ratio_ids"].flatten(), arguments["aspect_ratio_ids"].flatten()[at])
        assert torch.equal(group.companions["aspect_ratio_mask"].squeeze(1), mask.flatten(0, 1)[at])
        for unit, shown in zip(at, group.pixels, strict=True):
            i, j = divmod(unit, n)
            real = images[i][j] if j < len(images[i]) else torch.zeros(1, 3, 2, 3)
            assert torch.equal(shown if shown.ndim == 4 else shown.unsqueeze(0), real)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=5))
def test_packed_images_are_cropped_to_their_sizes(sizes):
    images = pictures(*[(3, *size) for size in sizes])
    arguments = pixtral(images)
    arguments["pixel_values"][arguments["pixel_values"] == 0] = 1000.0
    layout = Packed()
    assert_each_image_once(layout, "pixel_values", arguments, len(images))
    for group in layout.groups(arguments["pixel_values"], arguments):
        wanted = torch.stack([images[unit] for unit in group.units])
        assert torch.equal(group.pack(group.pixels, group.template), wanted)
        assert group.companions["image_sizes"].tolist() == [list(sizes[unit]) for unit in group.units]


@given(st.integers(1, 4), st.integers(0, 2), st.integers(1, 4), st.integers(1, 4))
def test_a_plain_batch_is_one_group_as_it_is(batch, frames, height, width):
    shape = (batch, *[2] * frames, 3, height, width)
    pixels, scale = torch.randn(shape), torch.arange(float(batch))
    (group,) = Layout().groups(pixels, {"scale": scale, "flag": True, "single": torch.zeros(batch + 1), "none": None})
    assert group.units == tuple(range(batch))
    assert torch.equal(group.pack(group.pixels, group.template), pixels)
    assert {name: value.tolist() for name, value in group.companions.items()} == {"scale": scale.tolist()}


# What the encoder is shown.


def passes(kind: Kind, arguments: dict[str, Tensor], **settings) -> list[dict[str, Tensor]]:
    """What the encoder is run on, by argument, and the group's units under "units"."""
    encoder = kind.encoder()
    given = {"psm": None, "sigma": SIGMA, "n0": 2, "noise": "iid", "seed": 0, "chunk_size": 1000, **settings}
    smoother = FeatureSmoother(kind.call(encoder), **given)
    groups = kind.layout.groups(arguments[kind.argument], arguments)
    steps = smoother.passes(groups, torch.float32, Tally())
    found, step = [], next(steps)
    while True:
        own = step.arguments(kind.argument)
        found.append({**own, "units": step.group.units[step.images], "draws": step.draws})
        try:
            step = steps.send(encoder(**own))
        except StopIteration:
            return found


def test_the_copies_of_a_still_frame_get_one_noise_and_distinct_frames_their_own():
    kind = KINDS["rows"]
    still, moving = pictures((3, 16, 16), (2, 3, 16, 16))
    half = torch.cat([moving, still.expand(2, -1, -1, -1)])  # moves, then stands still
    films = [still, half]
    clean = {0: of_rows([still])["hidden_states"], 1: of_rows([half])["hidden_states"]}
    scale = torch.tensor(STD).view(1, 3, 1, 1, 1)
    for step in passes(kind, of_rows(films)):
        (unit,) = step["units"]
        rows = step["hidden_states"].view(step["draws"], *clean[unit].shape)
        # In a patch the order is channel, frame, row, column.
        noise = (rows - clean[unit]).unflatten(-1, (3, 2, 2, 2)) * scale
        assert abs(float(noise.std()) - SIGMA) < 0.05 * SIGMA
        assert not torch.equal(noise[0], noise[1])
        moves = noise[:, :64] if unit else noise[:, :0]
        stands = rows[:, 64 if unit else 0 :].unflatten(-1, (3, 2, 2, 2))
        assert torch.equal(stands[:, :, :, 0], stands[:, :, :, 1])
        if unit:
            first, second = moves[:, :, :, 0].flatten(), moves[:, :, :, 1].flatten()
            assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.1


def test_noise_reaches_no_padding_row():
    kind = KINDS["batch"]
    images = kind.images()
    arguments = of_batch(images)
    padding = arguments["pixel_attention_mask"] == 0
    arguments["pixel_values"][padding] = 7.0
    seen = set()
    for step in passes(kind, arguments):
        for row, unit in enumerate(step["units"] * step["draws"]):
            rows = step["pixel_values"][row]
            assert (rows[padding[unit]] == 7.0).all()
            assert (rows[~padding[unit]] != arguments["pixel_values"][unit][~padding[unit]]).all()
            seen.add(unit)
    assert seen == set(range(len(images)))
    assert padding.any()


@pytest.mark.parametrize("name", ["tokens", "pooled"])
def test_padding_is_not_shown_where_every_token_is_consumed(manager, name):
    kind, encoder = KINDS[name], KINDS[name].encoder()
    run(kind, kind.images(), encoder, n0=2)
    sizes = [height * width // 4 for _, height, width in kind.shapes]
    shown = [seen["pixel_values"] for seen in encoder.seen]
    assert sum(rows.shape[0] * rows.shape[1] for rows in shown) == 2 * sum(sizes)


def test_noise_reaches_no_padding_tile():
    kind = KINDS["tiles"]
    arguments = of_tiles(kind.images())
    mask = arguments["aspect_ratio_mask"].bool().squeeze(1)
    arguments["pixel_values"][~mask.unsqueeze(1)] = 7.0
    for step in passes(kind, arguments):
        for row, unit in enumerate(step["units"] * step["draws"]):
            tiles = step["pixel_values"][row, 0]
            assert (tiles[~mask[unit]] == 7.0).all()
            assert (tiles[mask[unit]] != arguments["pixel_values"][unit, 0][mask[unit]]).all()
    assert not mask.all()


def test_what_lies_beside_a_packed_image_is_not_shown():
    kind = KINDS["packed"]
    images = kind.images()
    arguments = pixtral(images)
    space = kind.call(kind.encoder()).pixels
    for step in passes(kind, arguments):
        assert step["image_sizes"].tolist() == [list(step["pixel_values"].shape[-2:])] * len(step["pixel_values"])
        shown = space.to_unit(step["pixel_values"])
        clean = space.to_unit(torch.stack([images[unit] for unit in step["units"] * step["draws"]]))
        assert 0.8 * SIGMA < float((shown - clean).std()) < 1.2 * SIGMA


def test_tiles_and_frames_of_one_image_get_noise_of_their_own():
    for name in ("tiles", "frames"):
        kind = KINDS[name]
        (image,) = pictures((2, 3, 4, 4))
        image = image[:1].repeat(2, 1, 1, 1)
        arguments = kind.arguments([image])
        for step in passes(kind, arguments):
            first, second = step["pixel_values"].flatten(0, -5)[0][:2]
            assert not torch.isclose(first, second).any()


# What comes out.


def run(kind: Kind, images: list[Tensor], encoder: nn.Module | None = None, **settings):
    encoder = encoder or kind.encoder()
    given = {"psm": None, "sigma": SIGMA, "seed": 1, "noise_scope": "image", **settings}
    with fs_plugins.enable(encoder, **given) as handle, torch.no_grad():
        output = encoder(**kind.arguments(images))
        (seen,) = handle.status().vision
    return output, seen


@every_kind
def test_hardly_any_noise_hardly_changes_anything_in_any_field(manager, kind):
    images = kind.images()
    with torch.no_grad():
        before = fields(kind.encoder()(**kind.arguments(images)))
    for chunk_size in (1, 3, 100):
        after = fields(run(kind, images, sigma=1e-6, n0=3, chunk_size=chunk_size)[0])
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert after[name].shape == value.shape
            assert torch.allclose(after[name], value, atol=1e-4), name


@every_kind
def test_images_come_back_in_the_calls_order_as_each_does_alone(manager, kind):
    images = kind.images()
    together, seen = run(kind, images, n0=3)
    assert (seen.calls, seen.images, seen.draws) == (1, len(images), 3 * len(images))
    plain = parts(kind, run(kind, images, sigma=0)[0], images)
    for image, part, quiet in zip(images, parts(kind, together, images), plain, strict=True):
        alone, one = run(kind, [image], n0=3)
        assert (one.calls, one.images, one.draws) == (1, 1, 3)
        (wanted,) = parts(kind, alone, [image])
        assert torch.allclose(part, wanted, atol=1e-5)
        assert not torch.allclose(part, quiet, atol=1e-3), "the noise changes nothing"


@every_kind
def test_another_order_in_is_the_same_order_out(manager, kind):
    images = kind.images()
    order = list(range(len(images)))[::-1]
    forward = parts(kind, run(kind, images)[0], images)
    backward = parts(kind, run(kind, [images[i] for i in order])[0], [images[i] for i in order])
    for i, part in zip(order, backward, strict=True):
        assert torch.allclose(part, forward[i], atol=1e-5)


@every_kind
def test_chunks_bound_the_rows_of_a_forward_and_never_change_a_result(manager, kind):
    images = kind.images()
    whole = fields(run(kind, images, n0=3)[0])
    for chunk_size in (1, 2, 4):
        encoder = kind.encoder()
        after = fields(run(kind, images, encoder, n0=3, chunk_size=chunk_size)[0])
        for name, value in whole.items():
            assert torch.allclose(after[name], value, atol=1e-5), name
        rows = [len(seen.get("grid_thw", seen.get("target_sizes", seen[kind.argument]))) for seen in encoder.seen]
        assert max(rows) <= chunk_size
        assert sum(rows) == 3 * len(images)


@every_kind
def test_mixed_calls_do_not_depend_on_who_else_is_in_them(manager, kind):
    """Fresh draws, but seeded: the first image's share of the noise does not depend on the others."""
    images = kind.images()
    first = parts(kind, run(kind, images, noise_scope="call")[0], images)[0]
    fewer = parts(kind, run(kind, images[:2], noise_scope="call")[0], images[:2])[0]
    assert torch.allclose(first, fewer, atol=1e-5)


def test_several_images_of_several_conversations_keep_their_places(manager):
    kind = KINDS["tiles"]
    rows = [pictures((1, 3, 4, 4), (2, 3, 4, 4), seed=1), pictures((2, 3, 4, 4), seed=2)]
    encoder = kind.encoder()
    with torch.no_grad():
        before = encoder(**mllama(rows, 3))["tokens"]
        with fs_plugins.enable(encoder, psm=None, sigma=1e-6, n0=2) as handle:
            after = encoder(**mllama(rows, 3))["tokens"]
            assert handle.status().vision[0].images == 4, "the place without an image counts"
    assert after.shape == before.shape == (2, 2, 3, 4, WIDTH)
    assert torch.allclose(after, before, atol=1e-4)


def test_arguments_that_follow_from_the_others_are_dropped(manager):
    kind = KINDS["rows"]
    images = kind.images()
    given = {"cu_seqlens": torch.arange(4), "max_seqlen": 9, "position_ids": torch.zeros(2), "return_dict": True}
    encoder = kind.encoder()
    with fs_plugins.enable(encoder, psm=None, sigma=SIGMA), torch.no_grad():
        encoder(**kind.arguments(images), **given)
    assert len(encoder.seen) > 1
    for seen in encoder.seen:
        assert seen["cu_seqlens"] is None
        assert set(seen) == {"hidden_states", "grid_thw", "cu_seqlens", "return_dict"}
        assert seen["grid_thw"].prod(1).sum() == len(seen["hidden_states"])
    with fs_plugins.enable(encoder, psm=None, sigma=0), torch.no_grad():
        encoder(**kind.arguments(images), **given)
    assert torch.equal(encoder.seen[-1]["cu_seqlens"], torch.arange(4)), "an untouched call keeps them"


def test_positional_arguments_stay_positional(manager):
    kind = KINDS["rows"]
    images = kind.images()
    encoder = kind.encoder()
    with fs_plugins.enable(encoder, psm=None, sigma=SIGMA, seed=1) as handle, torch.no_grad():
        one = encoder(*kind.arguments(images).values())["tokens"]
        assert handle.status().vision[0].images == len(images)
    with fs_plugins.enable(encoder, psm=None, sigma=SIGMA, seed=1), torch.no_grad():
        assert torch.equal(encoder(**kind.arguments(images))["tokens"], one)


STILLS = {
    "plain": lambda images: {"pixel_values": torch.stack(images)},
    "tiles": of_tiles,
    "packed": pixtral,
    "rows": of_rows,
    "batch": lambda images: of_batch(images, longest=8),
    "tokens": lambda images: of_batch(images, longest=8),
    "pooled": lambda images: of_pooled(images, longest=8),
    "strips": of_strips,
}


@pytest.mark.parametrize("name", STILLS)
def test_encode_packs_still_images_by_the_processors_rule(name):
    kind, stills = KINDS[name], pictures((3, 4, 8), (3, 4, 8))
    encoder = kind.encoder()
    call = kind.call(encoder)
    with torch.no_grad():
        wanted = parts(kind, encoder(**STILLS[name](stills)), stills)
        features = call.encode(call.pixels.to_unit(torch.stack(stills)))["tokens"]
    assert torch.allclose(features.view(2, -1, WIDTH), torch.stack(wanted), atol=1e-5)


# What is refused.


def without(name: str):
    return lambda given: {key: value for key, value in given.items() if key != name}


def changed(name: str, change: Callable[[Tensor], Tensor]):
    return lambda given: {**given, name: change(given[name])}


WRONG = [
    ("plain", changed("pixel_values", lambda x: x[0]), PixelError, r"must be \(images, 3, height, width\)"),
    ("plain", changed("pixel_values", lambda x: x[:, :2]), PixelError, r"got shape \(4, 2, 4, 6\)"),
    ("packed", changed("pixel_values", lambda x: x[0]), PixelError, r"must be \(images, 3, height, width\)"),
    ("tiles", changed("pixel_values", lambda x: x[0]), PixelError, r"\(conversations, images, tiles, 3, height, wid"),
    ("tiles", changed("pixel_values", lambda x: x[:, :, :, :2]), PixelError, "must be"),
    ("tiles", without("aspect_ratio_mask"), ModelError, "without aspect_ratio_mask"),
    ("tiles", without("aspect_ratio_ids"), ModelError, "without aspect_ratio_ids"),
    ("rows", changed("hidden_states", lambda x: x[:, 1:]), PixelError, r"must be \(patches, 24\), got shape"),
    ("rows", changed("hidden_states", lambda x: x.unsqueeze(0)), PixelError, r"must be \(patches, 24\)"),
    ("rows", changed("hidden_states", lambda x: x.long()), PixelError, "floating point"),
    ("rows", changed("hidden_states", lambda x: x[1:]), PixelError, r"grid_thw speaks of \d+ patches, but \d+ came"),
    ("rows", changed("grid_thw", lambda x: x[1:]), PixelError, r"grid_thw speaks of \d+ patches"),
    ("rows", without("grid_thw"), ModelError, "without grid_thw"),
    ("batch", changed("pixel_values", lambda x: x[0]), PixelError, r"must be \(images, patches, 12\)"),
    ("batch", changed("pixel_values", lambda x: x[..., 1:]), PixelError, r"must be \(images, patches, 12\)"),
    ("batch", without("spatial_shapes"), ModelError, "without spatial_shapes"),
    ("tokens", without("pixel_attention_mask"), ModelError, "without pixel_attention_mask"),
    ("pooled", without("pixel_position_ids"), ModelError, "without pixel_position_ids"),
    ("pooled", changed("pixel_position_ids", lambda x: x.flip(1)), PixelError, "row by row"),
    ("pooled", changed("pixel_position_ids", lambda x: x.flip(2)), PixelError, "row by row"),
    ("strips", without("target_sizes"), ModelError, "without target_sizes"),
    ("strips", changed("target_sizes", lambda x: x[1:]), PixelError, r"target_sizes speaks of \d+ patches, but"),
    ("strips", changed("pixel_values", lambda x: x[..., 1:]), PixelError, r"\(1, 3, 2, a multiple of 2\)"),
]


@pytest.mark.parametrize(
    ("name", "spoil", "error", "message"), WRONG, ids=lambda value: value if isinstance(value, str) else ""
)
def test_calls_that_make_no_sense_are_refused_and_the_next_is_fine(manager, name, spoil, error, message):
    kind = KINDS[name]
    images = kind.images()
    encoder = kind.encoder()
    hooked = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in encoder.modules()]
    with torch.no_grad():
        before = fields(encoder(**kind.arguments(images)))
        calls = len(encoder.seen)
        with fs_plugins.enable(encoder, psm=None, sigma=SIGMA) as handle:
            with pytest.raises(error, match=message):
                encoder(**spoil(kind.arguments(images)))
            assert len(encoder.seen) == calls, "the encoder ran on it"
            assert handle.status().vision[0].calls == 0
            encoder(**kind.arguments(images))
            assert handle.status().vision[0].calls == 1
        after = fields(encoder(**kind.arguments(images)))
    assert all(torch.equal(after[field], before[field]) for field in before)
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in encoder.modules()] == hooked


INCONSISTENT = [
    ("rows", lambda given: {"hidden_states": given["hidden_states"][:6], "grid_thw": torch.tensor([[1, 3, 2]])}),
    ("rows", changed("grid_thw", lambda x: x[0])),
    ("batch", changed("spatial_shapes", lambda x: x * 5)),
    ("batch", changed("spatial_shapes", lambda x: x[:2])),
    ("batch", changed("spatial_shapes", lambda x: x.repeat(2, 1))),
    ("tokens", changed("pixel_attention_mask", lambda x: x[:, 1:])),
    ("tokens", changed("pixel_attention_mask", lambda x: x[:2])),
    ("pooled", changed("pixel_position_ids", lambda x: x[:, :-1])),
    ("pooled", changed("pixel_position_ids", lambda x: x[..., 0])),
    ("pooled", changed("pixel_position_ids", lambda x: x.clamp(max=0))),
    ("strips", changed("target_sizes", lambda x: x[0])),
    ("packed", changed("image_sizes", lambda x: x[:2])),
    ("packed", changed("image_sizes", lambda x: x.repeat(2, 1))),
    ("tiles", changed("aspect_ratio_mask", lambda x: x[:2])),
    ("tiles", changed("aspect_ratio_mask", lambda x: torch.cat([x, x], dim=2))),
    ("tiles", changed("aspect_ratio_ids", lambda x: x[:2])),
]


@pytest.mark.parametrize(("name", "spoil"), INCONSISTENT, ids=lambda value: value if isinstance(value, str) else "")
def test_companions_that_do_not_fit_the_pixels_are_refused_in_words(manager, name, spoil):
    kind = KINDS[name]
    encoder = kind.encoder()
    arguments = spoil(kind.arguments(kind.images()))
    with fs_plugins.enable(encoder, psm=None, sigma=SIGMA), torch.no_grad(), pytest.raises((PixelError, ModelError)):
        encoder(**arguments)


@pytest.mark.parametrize(("name", "block"), [("rows", 4), ("batch", 2), ("pooled", 4), ("strips", 4)])
def test_still_images_that_are_not_made_of_whole_patches_are_refused(name, block):
    kind = KINDS[name]
    for shape in ((1, 3, 9, 8), (1, 3, 8, 9)):
        with pytest.raises(PixelError, match=f"multiples of {block}, got {shape[2]}x{shape[3]}"):
            kind.call(kind.encoder()).encode(torch.rand(shape))


@every_kind
def test_an_empty_call_is_let_through_and_nothing_is_drawn(manager, kind):
    arguments = {name: value[:0] for name, value in kind.arguments(kind.images()).items()}
    encoder = Empty()
    hook = SmoothingHook(FeatureSmoother(kind.call(encoder), psm=None, sigma=SIGMA), "toy", None)
    hook.attach()
    assert encoder(**arguments) == "nothing"
    assert (hook.calls, hook.images, hook.draws) == (1, 0, 0)


class Empty(nn.Module):
    def forward(self, pixel_values=None, hidden_states=None, **kwargs):
        return "nothing"
