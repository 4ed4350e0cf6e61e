"""The photographs that the playground offers where what they show can be named."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("timm", exc_type=ImportError)

from fs_plugins import SettingError
from fs_plugins.photos.photographs import held_out
from fs_plugins.pictures import read
from fs_plugins.playground.pictures import aim, named, photographs, picture
from fs_plugins.playground.state import State

SIZE = (224, 224)


def test_a_photograph_is_shown_with_its_author_and_aimed_at():
    first, second = held_out()[:2]
    state = State(source="photo", photo=first.name, target=second.name)
    found, aimed = picture(state, SIZE, None), aim(state, SIZE)
    assert torch.equal(found.image, read(first.path, SIZE))
    assert torch.equal(aimed.image, read(second.path, SIZE))
    assert first.author in found.about
    assert first.licence in found.about


def test_all_are_offered_by_different_names():
    known = photographs()
    assert len({named(one) for one in known.values()}) == len(known) == 200


def test_no_other_file_is_a_photograph():
    with pytest.raises(SettingError, match="no photograph"):
        picture(State(source="photo", photo="../photographs"), SIZE, None)
