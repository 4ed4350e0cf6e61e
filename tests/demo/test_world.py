from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fs_plugins import SettingError
from fs_plugins.demo import text, world

INDEX = st.integers(0, 100_000)
SPLIT = st.sampled_from(["train", "heldout", "target"])


@settings(deadline=None, max_examples=30)
@given(SPLIT, INDEX)
def test_a_scene_is_a_pure_function_of_its_number(split, index):
    one, other = world.scene(split, index), world.scene(split, index)
    assert one == other
    assert np.array_equal(one.draw(), other.draw())
    assert one.question() == other.question()
    assert one.draw().size == (64, 64)


@given(INDEX)
def test_the_eleventh_shape_is_the_target_and_never_held_out(index):
    assert world.scene("target", index).shape == world.TARGET_SHAPE
    assert world.scene("heldout", index).shape != world.TARGET_SHAPE


def test_training_has_all_eleven_shapes_and_empty_scenes_and_evaluation_is_balanced():
    assert {s.shape for s in world.scenes("train", 300)} == {*world.CLASSES, None}
    held = [s.shape for s in world.scenes("heldout", 220)]
    assert all(held.count(shape) == 20 for shape in (*world.SHAPES, None))


@given(SPLIT, INDEX, st.sampled_from([None, *world.ATTRIBUTES]))
def test_every_answer_is_exact(split, index, about):
    scene = world.scene(split, index)
    question = scene.question(about)
    offered = question.prompt.split("Output one: ")[1].rstrip(".").split(", ")
    truth = getattr(scene, question.about) if scene.shape else None
    assert question.answer in offered
    if question.answer == world.NONE:
        assert truth not in offered
    else:
        assert question.answer == truth
    assert offered[-1] == world.NONE
    assert len(set(offered)) == len(offered)


@settings(deadline=None, max_examples=40)
@given(INDEX)
def test_the_drawn_shape_has_the_colour_size_and_side_it_claims(index):
    scene = world.scene("heldout", index)
    if scene.shape is None:
        return
    mask = world._mask(scene) > 0.99
    pixels = np.array(scene.draw(), dtype=float)[mask]
    distances = {name: np.abs(pixels.mean(0) - rgb).sum() for name, rgb in world.COLOURS.items()}
    assert min(distances, key=distances.get) == scene.colour
    assert world.PLACES[scene.side][0] <= scene.centre[0] <= world.PLACES[scene.side][1]
    assert world.SIZES[scene.size][0] <= scene.radius <= world.SIZES[scene.size][1]


def test_held_out_pictures_do_not_occur_in_training():
    train = {np.asarray(s.draw()).tobytes() for s in world.scenes("train", 300)}
    assert not train & {np.asarray(s.draw()).tobytes() for s in world.scenes("heldout", 100)}


@settings(deadline=None)
@given(SPLIT, INDEX)
def test_the_tokenizer_knows_every_word_and_gives_captions_back(split, index):
    tokenizer = text.build_tokenizer(append_eos=False)
    scene = world.scene(split, index)
    for sentence in (scene.caption, scene.question().prompt, world.CLASS_PROMPT, world.CAPTION_PROMPT):
        assert text.UNK not in tokenizer.encode(text.prompt(sentence)).tokens
    assert tokenizer.decode(tokenizer.encode(scene.caption).ids) == scene.caption


def test_the_class_question_lists_the_classes_in_order():
    for i, name in enumerate(world.CLASSES):
        assert f"{i}. {name}" in world.CLASS_PROMPT
    assert world.scene("target", 0).label == 10


@pytest.mark.parametrize("words", ["a photo of a cat", ""])
def test_unknown_words_are_no_error(words):
    assert text.build_tokenizer(append_eos=True).encode(words).ids[-1] == text.SPECIAL.index(text.EOS)


def test_a_drawn_scene_has_what_was_asked_for_before_a_held_out_background():
    scene = world.drawn("ring", "blue", "small", "left", 7)
    assert scene.caption == "a small blue ring on the left"
    assert scene.split == "heldout"
    other = world.drawn("star", "blue", "small", "left", 7)
    corner = (slice(0, 8), slice(56, 64))
    assert np.array_equal(np.array(scene.draw())[corner], np.array(other.draw())[corner])
    assert not np.array_equal(np.array(scene.draw()), np.array(other.draw()))


@pytest.mark.parametrize("wrong", [("cube", "red", "small", "left"), ("star", "red", "huge", "left")])
def test_what_the_world_lacks_is_not_drawn(wrong):
    with pytest.raises(SettingError, match=r"There are: "):
        world.drawn(*wrong)
