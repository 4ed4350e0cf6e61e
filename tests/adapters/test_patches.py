"""Taking apart and packing the calls of Qwen's kin, against their processors' own rules written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from fs_plugins.adapters.hf_layouts import PatchRows
from fs_plugins.adapters.hf_patches import Cubes, MergedRows, Patches
from torch import Tensor

from fs_plugins import PixelError
from fs_plugins.layouts import Layout

SHAPES = ((8, 12), (4, 4), (8, 12), (12, 4))


def film(height: int, width: int, frames: int, seed: int = 0) -> Tensor:
    """(frames, 3, H, W), no two frames equal."""
    return torch.randn(frames, 3, height, width, generator=torch.Generator().manual_seed(seed))


# The processors' rules, as transformers writes them: (frames, C, H, W) with patches of 2 x 2 -> the patches.


def kimi(frames: Tensor) -> Tensor:
    t, c, height, width = frames.shape
    patches = frames.reshape(t, c, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(-1, c, 2, 2)


def paddle(frames: Tensor) -> Tensor:
    return kimi(frames)[None]


def hunyuan(frames: Tensor) -> Tensor:
    t, c, height, width = frames.shape
    patches = frames.reshape(t, c, height // 4, 2, 2, width // 4, 2, 2).permute(0, 2, 3, 5, 6, 1, 4, 7)
    return patches.reshape(-1, c * 4)


def cosmos(frames: Tensor) -> Tensor:
    t, c, height, width = frames.shape
    patches = frames.reshape(t, c, height // 4, 2, 2, width // 4, 2, 2).permute(0, 2, 5, 3, 6, 4, 7, 1)
    return patches.reshape(-1, 4 * c)


def muse(frames: Tensor) -> Tensor:
    count, c, height, width = frames.shape
    patches = frames.view(count // 2, 2, c, height // 2, 2, width // 2, 2).permute(0, 3, 5, 1, 2, 4, 6)
    return patches.reshape(-1, 2 * c * 4)


@dataclass(frozen=True)
class Kind:
    """A family: its layout, its processor's rule, how many frames are in a patch, where patches are counted."""

    layout: Layout
    rule: Callable[[Tensor], Tensor]
    frames: int = 1
    dim: int = 0

    def call(self, films: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        grids = [(len(one) // self.frames, one.shape[-2] // 2, one.shape[-1] // 2) for one in films]
        return torch.cat([self.rule(one) for one in films], self.dim), {"grid_thw": torch.tensor(grids)}


KINDS = {
    "Kimi": Kind(Patches(2, 1, 1, block=2, maps=True), kimi),
    "PaddleOCR": Kind(Patches(2, 1, 1, block=2, maps=True, batched=("pixels",)), paddle, dim=1),
    "HunYuan": Kind(Patches(2, 1, 1, block=2, batched=("tokens",)), hunyuan),
    "Cosmos": Kind(Patches(2, 2, 1, inside="HWCF"), cosmos),
    "Muse": Kind(Patches(2, 1, 2, block=2, inside="FCHW"), muse, frames=2),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def assert_shown_and_packed(layout: Layout, pixels: Tensor, others: dict[str, Tensor], films: list[Tensor]) -> None:
    """Every image is shown once, as it was, and the patches of a group are packed as they came."""
    found = {}
    for group in layout.groups(pixels, others):
        found |= dict(zip(group.units, group.pixels, strict=True))
        again = layout.groups(group.pack(group.pixels, group.template), dict(group.companions))
        assert torch.equal(torch.cat([one.pixels for one in again]), group.pixels)
    assert sorted(found) == list(range(len(films)))
    for unit, frames in enumerate(films):
        assert torch.equal(found[unit], frames if found[unit].ndim == 4 else frames[0])


@every_kind
@pytest.mark.parametrize("count", [1, 4])
def test_images_and_films_are_shown_as_they_were_and_packed_as_they_came(kind, count):
    films = [film(*shape, count * kind.frames, seed) for seed, shape in enumerate(SHAPES)]
    pixels, others = kind.call(films)
    assert kind.layout.check(pixels, 3) is None
    assert_shown_and_packed(kind.layout, pixels, others, films)
    (group,) = kind.layout.groups(*kind.call(films[:1]))
    assert torch.equal(group.pack(group.pixels, None), kind.call(films[:1])[0])


@every_kind
def test_still_images_are_packed_by_the_processors_rule(kind):
    images = [film(8, 12, 1, seed).repeat(kind.frames, 1, 1, 1) for seed in range(2)]
    pixels, others = kind.layout.still(torch.stack([one[0] for one in images]))
    wanted, grids = kind.call(images)
    assert torch.equal(pixels, wanted)
    assert torch.equal(others["grid_thw"], grids["grid_thw"])


@every_kind
def test_pixels_of_another_shape_and_images_of_broken_blocks_are_refused(kind):
    pixels, _ = kind.call([film(8, 12, kind.frames)])
    assert "patches" in kind.layout.check(pixels[..., :-1], 3)
    assert "patches" in kind.layout.check(pixels[None], 3)
    with pytest.raises(PixelError, match="multiples of 4, got 8x10"):
        kind.layout.still(torch.zeros(1, 3, 8, 10))


@pytest.mark.parametrize("name", ["Kimi", "HunYuan"])
def test_tokens_are_told_apart_by_image_and_put_together_again(name):
    """HunYuan's come as a batch of one, Kimi's with the patches of a block side by side."""
    layout, lead = KINDS[name].layout, (1,) if name == "HunYuan" else ()
    inner = () if name == "HunYuan" else (4,)
    tokens = torch.randn(*lead, 2 * 6, *inner, 5)
    opened = layout.opened({"pooler_output": tokens, "attentions": None}, 2)
    assert opened["pooler_output"].shape == (2, 6, *inner, 5)
    closed = layout.closed([opened], (0, 1), tokens)
    assert torch.equal(closed["pooler_output"], tokens)
    assert closed["attentions"] is None


def merged(films: list[Tensor], merges: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """VideoLlama3's processors: images in reading order (a merge of 1), films in blocks."""
    rows = [hunyuan(one) if merge == 1 else in_blocks(one) for one, merge in zip(films, merges, strict=True)]
    grids = torch.tensor([(len(one), one.shape[-2] // 2, one.shape[-1] // 2) for one in films])
    return torch.cat(rows), {"grid_thw": grids, "merge_sizes": torch.tensor(merges)}


def in_blocks(frames: Tensor) -> Tensor:
    t, c, height, width = frames.shape
    patches = frames.reshape(t, c, height // 4, 2, 2, width // 4, 2, 2).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return patches.reshape(-1, c * 4)


def test_each_image_is_merged_as_its_merge_size_says():
    films = [film(8, 12, 1, 0), film(8, 12, 1, 1), film(4, 4, 3, 2), film(8, 12, 1, 3)]
    pixels, others = merged(films, [1, 2, 2, 1])
    layout = MergedRows(2, 1, 1)
    assert_shown_and_packed(layout, pixels, others, films)
    said = {
        unit: int(m)
        for g in layout.groups(pixels, others)
        for unit, m in zip(g.units, g.companions["merge_sizes"], strict=True)
    }
    assert said == {0: 1, 1: 2, 2: 2, 3: 1}
    own, companions = layout.still(torch.stack([films[0][0], films[3][0]]))
    assert torch.equal(own, merged([films[0], films[3]], [1, 1])[0])
    assert companions["merge_sizes"].tolist() == [1, 1]


def test_grids_and_merge_sizes_that_do_not_fit_the_pixels_are_refused():
    pixels, others = merged([film(8, 12, 1)], [1])
    layout = MergedRows(2, 1, 1)
    with pytest.raises(PixelError, match="speaks of 24 patches, but 23 came"):
        layout.groups(pixels[1:], others)
    with pytest.raises(PixelError, match="merge_sizes must be"):
        layout.groups(pixels, {**others, "merge_sizes": torch.tensor([1, 1])})


def test_cubes_show_tiles_and_pack_them_with_their_channels_last():
    tiles = torch.randn(3, 2, 3, 4, 4)
    tiles[1, 1] = tiles[1, 0]
    pixels = tiles.permute(0, 1, 3, 4, 2)
    layout = Cubes(4, 2)
    assert layout.check(pixels, 3) is None
    assert "(tiles, 2, 4, 4, 3)" in layout.check(tiles, 3)
    films, still = layout.groups(pixels, {})
    assert (films.units, still.units) == ((0, 2), (1,))
    assert torch.equal(films.pixels, tiles[[0, 2]])
    assert torch.equal(still.pixels, tiles[1:2, 0])
    for group in (films, still):
        assert torch.equal(group.pack(group.pixels, None), pixels[list(group.units)])
    assert torch.equal(layout.still(tiles[1:2, 0])[0], pixels[1:2])
    with pytest.raises(PixelError, match="tiles of 4x4, got 4x8"):
        layout.still(torch.zeros(1, 3, 4, 8))


def test_a_layout_with_nothing_of_its_own_is_patch_rows():
    rows, kin = PatchRows(2, 2, 2), Patches(2, 2, 2)
    images = torch.randn(2, 3, 8, 12)
    assert torch.equal(kin.still(images)[0], rows.still(images)[0])
