"""Asking chat models: one question without and with smoothing."""

from __future__ import annotations

import pytest

import fs_plugins
from fs_plugins.demo import world
from fs_plugins.hf import compare, load_chat
from fs_plugins.hf.chat import ask


@pytest.fixture
def scene():
    return world.scene("heldout", 1).draw()


def test_compare_answers_without_and_with_smoothing_and_leaves_the_model_as_it_was(scene):
    model, processor = load_chat("demo")
    before = ask(model, processor, [scene], [world.CAPTION_PROMPT])
    told = compare(model, processor, scene, world.CAPTION_PROMPT, n0=2, seed=1)
    assert [told.without.text] == before == ["a large green square on the left"]
    assert told.smoothed.text.startswith("a ")
    assert min(told.without.seconds, told.smoothed.seconds) > 0
    (vision,) = told.status.vision
    assert (vision.n0, vision.calls) == (2, 1)
    assert not fs_plugins.status(model).enabled
    assert ask(model, processor, [scene], [world.CAPTION_PROMPT]) == before


def test_compare_of_one_seed_is_repeatable_and_takes_plain_smoothing(scene):
    model, processor = load_chat("demo")
    given = {"psm": None, "sigma": 0.25, "seed": 3, "max_new_tokens": 8}
    first, again = (compare(model, processor, scene, world.CAPTION_PROMPT, **given) for _ in range(2))
    assert first.smoothed.text == again.smoothed.text
    assert first.status.vision[0].psm is None
