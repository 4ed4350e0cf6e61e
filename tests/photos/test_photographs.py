"""The photographs that ship: every one is there, has its author, and is held out by a rule."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fs_plugins import SettingError
from fs_plugins.photos.photographs import CREDITS, FOLDER, choices, held_out, of_competition, trained_on


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


def test_what_was_trained_on_is_read_from_the_lists_beside_it():
    """The purifier ``photo`` is older than this list, and has seen three of four; ``photo-light`` none."""
    held = {one.name for one in held_out()}
    assert len(trained_on() & held) == 150
    assert len(trained_on() - held) == 800
    listed = (FOLDER.parents[1] / "psm" / "photo-light" / "photographs.csv").read_text("utf-8").splitlines()[1:]
    light = {line.partition(",")[0] for line in listed}
    assert len(light) == 800
    assert not light & held


@pytest.fixture
def competition(tmp_path):
    """Three of them, as the competition's folder has them."""
    rows = [("ImageId", "TrueLabel", "TargetClass", "Author", "OriginalLandingURL", "License")]
    (tmp_path / "images").mkdir()
    for i, one in enumerate(reversed(held_out()[:3])):
        shutil.copy(one.path, tmp_path / "images" / one.path.name)
        rows.append((one.name, one.label + 1, one.aim + 1, f"Ren\\303\\251 {i}", one.source, one.licence))
    with (tmp_path / "images.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return tmp_path


def test_the_competitions_own_folder_says_the_same(competition):
    found = of_competition(competition)
    assert [
        replace(one, path=two.path, author=two.author) for one, two in zip(found, held_out(), strict=False)
    ] == list(held_out()[:3])
    assert [one.author for one in found] == ["René 2", "René 1", "René 0"]
    assert all(one.path.parent == competition / "images" for one in found)


def test_a_folder_that_is_not_the_competitions_is_refused_in_words(competition, tmp_path):
    with pytest.raises(SettingError, match=r"images\.csv, the list of the NIPS 2017 competition, cannot be read"):
        of_competition(tmp_path / "images")
    (competition / "images" / held_out()[1].path.name).unlink()
    with pytest.raises(SettingError, match=f"2 of the 3 pictures .* missing is {held_out()[1].name}"):
        of_competition(competition)
    (competition / "images.csv").write_text(f"ImageId,TrueLabel\n{held_out()[0].name},1\n", encoding="utf-8")
    with pytest.raises(SettingError, match="needs the columns"):
        of_competition(competition)


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
