"""Random crops."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import rand

from fs_plugins.attacks import Crop
from fs_plugins.attacks.victim import Stream
from fs_plugins.noise import keyed


@given(st.integers(4, 40), st.integers(4, 40), st.integers(0, 200))
def test_crops_lie_in_the_picture_and_obey_their_law(height, width, seed):
    crop = Crop()
    top, left, h, w = crop.box((height, width), keyed(seed))
    assert top >= 0
    assert left >= 0
    assert top + h <= height
    assert left + w <= width
    assert h >= 1
    assert w >= 1
    if height == width > 20:
        assert 0.5 - 3 / height <= h * w / (height * width) <= 0.9 + 3 / height
        assert 3 / 4 - 4 / height <= w / h <= 4 / 3 + 4 / height


def test_crops_are_cut_and_enlarged():
    image = rand(1, 3, 10, 10)
    top, left, h, w = Crop().box((10, 10), keyed(5, "a"))
    cut = Crop()(image, Stream((5,), ("a",)))
    expected = torch.nn.functional.interpolate(image[..., top : top + h, left : left + w], (10, 10), mode="bilinear")
    assert torch.equal(cut, expected)
    assert (h, w) != (10, 10)
