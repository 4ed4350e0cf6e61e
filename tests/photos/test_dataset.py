"""Photographs as a dataset: each aims at another of another class, by a rule."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fs_plugins.errors import SettingError
from fs_plugins.evaluation.datasets import open_dataset
from fs_plugins.evaluation.tasks import TASKS
from fs_plugins.photos.dataset import aim, write
from fs_plugins.photos.photographs import held_out

NAMES = [f"thing {i}" for i in range(12)]


@pytest.fixture
def photographs():
    """Of four classes, the first three of one."""
    return [replace(one, label=max(0, i - 2)) for i, one in enumerate(held_out()[:6])]


def test_attacks_aim_half_the_list_away_and_at_another_class():
    shown = held_out()
    found = [aim(shown, place) for place in range(len(shown))]
    assert all(one.label != other.label for one, other in zip(shown, found, strict=True))
    plain = [other == shown[(place + 100) % 200] for place, other in enumerate(found)]
    assert sum(plain) >= 195  # the others' classes are the same there


def test_where_that_is_of_the_same_class_the_next_one_is_taken(photographs):
    assert [photographs.index(aim(photographs, place)) for place in range(6)] == [3, 4, 5, 0, 1, 2]
    alike = [replace(one, label=1 if i in (0, 3) else 2) for i, one in enumerate(photographs)]
    assert aim(alike, 0) == alike[4]
    with pytest.raises(SettingError, match="All 6 photographs are of one class"):
        aim([replace(one, label=1) for one in photographs], 0)


def test_what_is_written_says_all_that_is_asked(photographs, tmp_path):
    data = open_dataset(write(tmp_path / "d", photographs, NAMES, 2))
    first, second = data.samples
    assert data.classes == tuple(NAMES)
    assert (first.label, data.wanted(first), first.image) == (
        "thing 0",
        "thing 1",
        f"images/{photographs[0].path.name}",
    )
    assert second.target == f"images/{photographs[4].path.name}"
    assert len(set(first.choices)) == 10
    assert {"thing 0", "thing 1"} <= set(first.choices)
    assert {"thing 0", "thing 1"} <= set(first.options)
    assert first.answer == "thing 0"
    assert first.caption == "A photo of a thing 0."
    assert data.tasks == tuple(TASKS)
    assert sorted(path.name for path in (tmp_path / "d/images").iterdir()) == sorted(
        photographs[i].path.name for i in (0, 1, 3, 4)
    )


def test_it_is_written_again_and_never_over_another(photographs, tmp_path):
    one = open_dataset(write(tmp_path / "d", photographs, NAMES)).digest
    assert open_dataset(write(tmp_path / "d", photographs, NAMES)).digest == one
    with pytest.raises(SettingError, match="another dataset"):
        write(tmp_path / "d", photographs, NAMES[::-1])
    with pytest.raises(SettingError, match="There are 6 photographs; 7"):
        write(tmp_path / "e", photographs, NAMES, 7)
