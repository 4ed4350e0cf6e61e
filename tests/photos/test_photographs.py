"""The photographs that ship: every one is there, has its author, and is held out by a rule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fs_plugins.photos.photographs import CREDITS, FOLDER, choices, held_out


def test_each_photograph_has_author_source_and_licence():
    shown = held_out()
    assert len(shown) == 200
    assert sorted(one.path for one in shown) == sorted(FOLDER.glob("*.jpg"))
    for one in shown:
        assert one.author
        assert "flickr.com/" in one.source
        assert one.licence == "https://creativecommons.org/licenses/by/2.0/"
        assert 0 <= one.label < 1000
        assert 0 <= one.aim < 1000
        assert one.aim != one.label


def test_they_are_small_enough_to_ship():
    assert sum(one.path.stat().st_size for one in held_out()) + CREDITS.stat().st_size < 8e6


def test_they_are_whole():
    for one in held_out():
        with Image.open(one.path) as picture:
            assert picture.convert("RGB").size == (299, 299)


@given(st.text(), st.integers(0, 999), st.lists(st.integers(0, 999), max_size=4), st.integers(6, 20))
def test_choices_hold_the_right_class_and_follow_from_the_name(name, label, others, count):
    chosen = choices(name, label, others, count)
    assert len(set(chosen)) == len(chosen) == count
    assert {label, *others} <= set(chosen)
    assert chosen == choices(name, label, others, count)


def test_the_right_class_stands_anywhere_among_them():
    places = [choices(one.name, one.label, (one.aim,)).index(one.label) for one in held_out()]
    assert set(places) == set(range(10))
    with pytest.raises(ValueError, match="negative"):
        choices("a", 1, (2, 3, 4), count=3)
