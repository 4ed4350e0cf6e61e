"""What a language model says, with gradients to what its encoder shows."""

from __future__ import annotations

import pytest
import torch
from support import make_clip

import fs_plugins
from fs_plugins import ModelError, SettingError
from fs_plugins.answers import Answers
from fs_plugins.attacks import Answer, attack
from fs_plugins.demo import world
from fs_plugins.hf.chat import Chat
from fs_plugins.hf.load import load_chat
from fs_plugins.hf.speech import Speech, asked
from fs_plugins.pictures import to_unit
from fs_plugins.training.settings import Settings

SCENES = world.scenes("heldout", 4)


@pytest.fixture(scope="module")
def demo():
    return load_chat("demo", device="cpu")


@pytest.fixture(scope="module")
def images():
    return torch.stack([to_unit(scene.draw()) for scene in SCENES])


def test_it_answers_as_the_model_does_each_image_its_own_question(demo, images):
    model, processor = demo
    questions = [world.CLASS_PROMPT, world.QUESTIONS["colour"], world.CAPTION_PROMPT, world.QUESTIONS["side"]]
    speech = Speech(model, processor, dict(enumerate(questions)).__getitem__)
    assert isinstance(speech, Answers)
    given = speech.given(speech.call.look(images), range(4))
    said = [
        processor.tokenizer.decode(words[counted]) for words, counted in zip(given.words, given.counted, strict=True)
    ]
    wanted = Chat(model, processor).say(images, questions, 16)
    assert [one.removesuffix("</s>").strip() for one in said] == wanted
    assert wanted[2] == SCENES[2].caption


def test_likelihoods_are_those_of_the_models_own_forward(demo, images):
    """Without padding in the way: each image alone, its reply behind its prompt."""
    model, processor = demo
    questions = [world.CLASS_PROMPT, world.CAPTION_PROMPT]
    speech = Speech(model, processor, dict(enumerate(questions)).__getitem__)
    given = speech.given(speech.call.look(images[:2]), range(2))
    found = speech.spoken(speech.call.look(images[:2]), given).likelihood()
    for place, image in enumerate(images[:2]):
        alone = speech.given(speech.call.look(image[None]), [place])
        ids = torch.cat([alone.inputs["input_ids"], alone.words], 1)
        pixels = speech.call.pixels.from_unit(image[None], torch.float32)
        logits = model(input_ids=ids, pixel_values=pixels).logits[0, -alone.words.shape[1] - 1 : -1]
        torch.testing.assert_close(found[place], logits.log_softmax(-1).gather(1, alone.words[0][:, None]).sum())
    assert (found > -0.5).all()


def test_the_answer_of_another_picture_is_unlikely_and_attacks_reach_it(demo, images):
    model, processor = demo
    speech = Speech(model, processor, world.CLASS_PROMPT)
    shown, others = images[:2], images[2:]
    given = speech.given(speech.call.look(others), range(2))
    own, foreign = (speech.spoken(speech.call.look(some), given).likelihood() for some in (others, shown))
    assert (own > foreign + 3).all()
    attacked = attack(model, shown, others, method=Answer(speech), eps=16 / 255, steps=12)
    assert Chat(model, processor).say(attacked, [world.CLASS_PROMPT] * 2, 4) == ["2", "3"]


def test_an_attack_through_smoothing_makes_the_served_answer_unlikely(demo, images):
    model, processor = demo
    speech = Speech(model, processor, world.CLASS_PROMPT)
    with fs_plugins.enable(model, n0=1, seed=0, noise_scope="image"):
        attacked = attack(model, images, method=Answer(speech), eps=16 / 255, steps=12)
        said = Chat(model, processor).say(attacked, [world.CLASS_PROMPT] * 4, 4)
        clean = Chat(model, processor).say(images, [world.CLASS_PROMPT] * 4, 4)
    right = [str(scene.label) for scene in SCENES]
    assert sum(map(str.__eq__, clean, right)) > sum(map(str.__eq__, said, right))


def test_what_training_asks(demo):
    model = demo[0]
    call = fs_plugins.vision_call(model)
    found = asked(model, call, Settings(ask="Which shape is it? | What is the colour of the shape?"))
    assert [str(one) for one in found] == ["Which shape is it?", "What is the colour of the shape?"]
    assert found[0].modules == (model,)
    with pytest.raises(SettingError, match="empty question"):
        asked(model, call, Settings(ask="Which? |"))
    clip = make_clip()
    with pytest.raises(ModelError, match="use --classes"):
        asked(clip, fs_plugins.vision_call(clip), Settings(ask="Which?"))


def test_classes_of_an_image_and_text_encoder_are_its_zero_shot_ones(images):
    from fs_plugins.hf.load import load_model

    model = load_model("demo-clip")
    call = fs_plugins.vision_call(model)
    prompt, names = "a large green {} on the left", ["circle", "square", "triangle", "star"]
    (found,) = asked(model, call, Settings(model="demo-clip", classes=", ".join(names), prompt=prompt))
    wanted = fs_plugins.zero_shot(model, names, prompt=prompt)(images)
    given = found.given(call.look(images), range(4))
    assert torch.equal(given, wanted.argmax(-1))
    torch.testing.assert_close(found.spoken(call.look(images), given).likelihood(), wanted.log_softmax(-1).amax(-1))
    assert str(found) == ", ".join(names)
    assert found.modules
