"""Encoders that take or give rows of which nobody says the images, against their processors' own rules written out."""

from __future__ import annotations

import pytest
import torch
from fs_plugins.adapters.hf_flat import RowsOrTubelets, TokensBelow, WholePatches
from fs_plugins.adapters.hf_patches import Patches
from torch import Tensor

from fs_plugins import PixelError

SIZES = ((8, 12), (4, 4), (8, 12), (12, 4))
RADIO = RowsOrTubelets(2, 1, 2)
MOLMO = WholePatches(2, (2, 3))
INKLING = Patches(4, 1, 1, grid="image_grid_thw", inside="HWCF", maps=True)


def image(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed))


def channels_last(one: Tensor, patch: int) -> Tensor:
    """Molmo and Inkling: (C, H, W) -> (h w, P, P, C), patches in reading order."""
    _, height, width = one.shape
    cut = one.reshape(3, height // patch, patch, width // patch, patch).permute(1, 3, 2, 4, 0)
    return cut.flatten(0, 1)


def packed(images: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Nemotron: (sum of h w, C * 2 * 2), and (h, w) of each."""
    rows = [
        one.reshape(3, one.shape[1] // 2, 2, one.shape[2] // 2, 2).permute(1, 3, 0, 2, 4).reshape(-1, 12)
        for one in images
    ]
    grids = torch.tensor([(one.shape[1] // 2, one.shape[2] // 2) for one in images])
    return torch.cat(rows), {"image_grid_hw": grids}


def test_radio_shows_images_of_all_sizes_and_packs_them_as_they_came():
    images = [image(*size, seed) for seed, size in enumerate(SIZES)]
    pixels, others = packed(images)
    assert RADIO.check(pixels, 3) is None
    groups = RADIO.groups(pixels, others)
    assert [group.units for group in groups] == [(0, 2), (1,), (3,)]
    for group in groups:
        own = [images[unit] for unit in group.units]
        wanted, grids = packed(own)
        assert torch.equal(group.pixels, torch.stack(own))
        assert torch.equal(group.pack(group.pixels, None), wanted)
        assert torch.equal(group.companions["image_grid_hw"], grids["image_grid_hw"])
    still, said = RADIO.still(torch.stack([images[0], images[2]]))
    assert torch.equal(still, packed([images[0], images[2]])[0])
    assert said["image_grid_hw"].tolist() == [[4, 6], [4, 6]]


def test_radio_shows_films_and_one_frame_of_still_rows():
    film = torch.stack([torch.cat([image(4, 4, 2 * row), image(4, 4, 2 * row + 1)]) for row in range(3)])
    film[1, 3:] = film[1, :3]
    assert RADIO.check(film, 3) is None
    moving, still = RADIO.groups(film, {"image_grid_hw": None})
    assert (moving.units, still.units) == ((0, 2), (1,))
    assert torch.equal(moving.pixels[1], torch.stack([film[2, :3], film[2, 3:]]))
    assert torch.equal(still.pixels, film[1:2, :3])
    for group in (moving, still):
        assert torch.equal(group.pack(group.pixels, None), film[list(group.units)])


def test_what_radio_gives_is_told_apart_by_image_and_put_together_again():
    """Two images of six patches, each with a token before them, and the layers' states in a batch of one."""
    given = {
        "summary": torch.randn(2, 5),
        "features": torch.randn(2 * 6, 5),
        "last_hidden_state": torch.randn(2 * 7, 5),
        "hidden_states": (torch.randn(1, 2 * 7, 5),),
    }
    opened = RADIO.opened(given, 2)
    assert opened["features"].shape == (2, 6, 5)
    assert opened["hidden_states"][0].shape == (2, 1, 7, 5)
    closed = RADIO.closed([opened], (0, 1), torch.zeros(12, 12))
    for name in ("summary", "features", "last_hidden_state"):
        assert torch.equal(closed[name], given[name])
    assert torch.equal(closed["hidden_states"][0], given["hidden_states"][0])


def test_what_radio_gives_of_films_has_a_row_for_each_already():
    given = {"summary": torch.randn(3, 5), "features": torch.randn(3, 6, 5)}
    film = torch.zeros(3, 6, 4, 4)
    parts = [
        {name: value[[0, 2]] for name, value in given.items()},
        {name: value[1:2] for name, value in given.items()},
    ]
    closed = RADIO.closed([RADIO.opened(part, len(part["features"])) for part in parts], (0, 2, 1), film)
    assert all(torch.equal(closed[name], given[name]) for name in given)


def test_radio_refuses_what_it_cannot_read():
    pixels, others = packed([image(8, 12)])
    assert "(patches, 12)" in RADIO.check(pixels[:, 1:], 3)
    assert "(rows, 6, height, width) of a film" in RADIO.check(torch.zeros(1, 4, 8, 8), 3)
    with pytest.raises(PixelError, match="image_grid_hw speaks of 24 patches, but 23 came"):
        RADIO.groups(pixels[1:], others)


def test_molmo_shows_tiles_and_packs_them_with_their_channels_last():
    tiles = [image(4, 6, seed) for seed in range(3)]
    pixels = torch.stack([channels_last(tile, 2).flatten(1) for tile in tiles])
    assert MOLMO.check(pixels, 3) is None
    assert "(images, 6, 12)" in MOLMO.check(pixels[:, 1:], 3)
    (group,) = MOLMO.groups(pixels, {})
    assert torch.equal(group.pixels, torch.stack(tiles))
    assert torch.equal(group.pack(group.pixels, None), pixels)
    assert torch.equal(MOLMO.still(torch.stack(tiles))[0], pixels)
    with pytest.raises(PixelError, match="tiles of 4x6, got 6x4"):
        MOLMO.still(torch.zeros(1, 3, 6, 4))


def test_inkling_2_shows_images_of_small_images():
    images = [image(*size, seed) for seed, size in enumerate(SIZES)]
    pixels = torch.cat([channels_last(one, 4) for one in images])
    grids = torch.tensor([(1, one.shape[1] // 4, one.shape[2] // 4) for one in images])
    assert INKLING.check(pixels, 3) is None
    assert "(patches, 4, 4, 3)" in INKLING.check(pixels[:, 1:], 3)
    for group in INKLING.groups(pixels, {"image_grid_thw": grids}):
        assert torch.equal(group.pixels, torch.stack([images[unit] for unit in group.units]))
        own = torch.cat([channels_last(images[unit], 4) for unit in group.units])
        assert torch.equal(group.pack(group.pixels, None), own)


def test_tokens_below_each_other_are_told_apart_by_tile_and_put_together_again():
    given = {"last_hidden_state": torch.randn(3, 16, 8), "deepstack_features": [torch.randn(3 * 4, 5)]}
    opened = TokensBelow().opened(given, 3)
    assert opened["deepstack_features"][0].shape == (3, 1, 4, 5)
    parts = [
        {
            "last_hidden_state": opened["last_hidden_state"][at],
            "deepstack_features": [opened["deepstack_features"][0][at]],
        }
        for at in (slice(0, 2), slice(2, 3))
    ]
    closed = TokensBelow().closed(parts, (0, 1, 2), torch.zeros(3, 3, 8, 8))
    assert torch.equal(closed["last_hidden_state"], given["last_hidden_state"])
    assert torch.equal(closed["deepstack_features"][0], given["deepstack_features"][0])
