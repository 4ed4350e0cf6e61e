"""``certify_answers`` on the demo model: what it serves is what ``enable`` serves, and how it is misused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support import make_clip, make_llava

import fs_plugins
from fs_plugins import ModelError, SettingError
from fs_plugins.certificates import Question
from fs_plugins.demo import world
from fs_plugins.hf.chat import Chat
from fs_plugins.hf.load import load_chat
from fs_plugins.hf.replies import Replier
from fs_plugins.pictures import to_unit
from fs_plugins.readings import Compared, Exact, Letters, Pattern, Words, YesNo

SHAPES = [str(number) for number in range(len(world.CLASSES))]


@pytest.fixture(scope="module")
def demo():
    return load_chat("demo", device="cpu")


@pytest.fixture(scope="module")
def images():
    return torch.stack([to_unit(scene.draw()) for scene in world.scenes("heldout", 3)])


def test_it_says_what_the_model_says(demo, images):
    model, processor = demo
    asker = Replier(model, processor, max_new_tokens=20)
    for question in (world.CAPTION_PROMPT, world.CLASS_PROMPT, world.QUESTIONS["colour"]):
        said = asker.replies(asker.call.look(images), question, Exact())
        assert said == Chat(model, processor).say(images, [question] * 3, 20)


def test_no_more_is_said_than_is_needed(demo, images):
    model, processor = demo
    asker, passes = Replier(model, processor), []
    hook = model.model.language_model.register_forward_hook(lambda *given: passes.append(1))
    shown = asker.call.look(images)
    for reading, most in ((YesNo(), 2), (Letters(["red", "blue"]), 2), (Words(SHAPES), 2), (Compared(SHAPES[:9]), 1)):
        passes.clear()
        asker.replies(shown, world.CAPTION_PROMPT, reading)
        assert len(passes) <= most, reading
    passes.clear()
    whole = asker.replies(shown, world.CAPTION_PROMPT, Exact())
    assert len(passes) > 5
    hook.remove()
    begun = asker.replies(shown, world.CAPTION_PROMPT, YesNo())
    assert all(text.startswith(start) for text, start in zip(whole, begun, strict=True))


@pytest.mark.parametrize("choices", [SHAPES[:9], ["a small red star", "a large blue ring", "an empty background"]])
def test_the_likeliest_choice_is_that_of_the_models_own_probabilities(demo, images, choices):
    model, processor = demo
    asker = Replier(model, processor)
    question = world.CLASS_PROMPT if choices[0] == "0" else world.CAPTION_PROMPT
    found = asker.replies(asker.call.look(images), question, Compared(choices))
    pixels = asker.call.pixels.from_unit(images, torch.float32)
    for image, said in zip(pixels, found, strict=True):
        scores = []
        for choice in choices:
            inputs = dict(asker._encoded(question))
            tokens = processor.tokenizer(choice, add_special_tokens=False, return_tensors="pt")["input_ids"]
            inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            logits = model(**{**inputs, "pixel_values": image[None]}).logits[0, -tokens.shape[1] - 1 : -1]
            scores.append(logits.log_softmax(-1).gather(1, tokens[0][:, None]).sum().item())
        assert choices[scores.index(max(scores))] == said


def test_answers_are_certified_as_they_are_served(demo, images):
    model, processor = demo
    images = images[:2]
    options = {"classes": SHAPES, "n": 20, "alpha": 0.05, "n0": 2, "pilot": 4, "seed": 3}
    found = fs_plugins.certify_answers(model, processor, images, world.CLASS_PROMPT, **options)
    assert [one.predicted for one in found] == ["0", "1"]
    assert all(one.radius > 0.05 and one.n0 == 2 and one.psm == "demo-psm-llava" for one in found)
    assert found[0].prompt.startswith("USER: <image>")
    assert "at most 16 tokens" in found[0].generation
    again = fs_plugins.certify_answers(model, processor, images, world.CLASS_PROMPT, chunk_size=5, **options)
    assert [one.count for one in again] == [one.count for one in found]
    with fs_plugins.enable(model, n0=2, noise="iid", seed=0):
        served = [Chat(model, processor).say(images, [world.CLASS_PROMPT] * 2, 16) for _ in range(3)]
        same = fs_plugins.certify_answers(model, processor, images, world.CLASS_PROMPT, **options)
    assert served.count(["0", "1"]) >= 2
    assert same == found


def test_questions_may_have_readings_of_their_own(demo, images):
    model, processor = demo
    colours = Question(world.CAPTION_PROMPT, Pattern(r"a \w+ (\w+)"))
    found = fs_plugins.certify_answers(
        model, processor, images[:2], [world.CLASS_PROMPT, colours], classes=SHAPES, n=20, alpha=0.2, n0=1, pilot=4
    )
    assert [one.question for one in found] == [world.CLASS_PROMPT, colours.text] * 2
    scenes = world.scenes("heldout", 2)
    assert [one.predicted for one in found[1::2]] == [scene.colour for scene in scenes]


def test_sampled_words_are_a_part_of_the_serving_and_follow_the_seed(demo, images):
    model, processor = demo
    options = {"classes": SHAPES, "n": 20, "alpha": 0.2, "n0": 1, "pilot": 4, "seed": 5}
    options["generation"] = {"do_sample": True, "temperature": 3.0}
    before = torch.get_rng_state()
    first, second = (
        fs_plugins.certify_answers(model, processor, images[:1], world.CLASS_PROMPT, **options) for _ in range(2)
    )
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)
    assert "sampled words" in first[0].generation
    assert "seed 5" in first[0].generation


def mute(processor):
    """A processor without a chat template that writes images in a way of its own."""
    return SimpleNamespace(tokenizer=processor.tokenizer, image_token="[IMG]", image_processor=None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"classes": []}, "at least two classes, got 0"),
        ({"classes": ["a", "A."]}, "read alike"),
        ({"classes": ["a", "b"], "reading": Exact()}, "not both"),
        ({}, "How are answers to .* to be read"),
        ({"classes": SHAPES, "noise": "antithetic"}, "nothing can be promised"),
        ({"classes": SHAPES, "n": 5}, "servings can certify nothing"),
        ({"classes": SHAPES, "sigma": 0.0, "psm": None}, "sigma must be > 0"),
        ({"classes": SHAPES, "generation": {"do_sample": True}}, "give a seed"),
        ({"classes": SHAPES, "generation": {"num_return_sequences": 2}}, "num_return_sequences cannot be set"),
        ({"classes": SHAPES, "max_new_tokens": 0}, "max_new_tokens"),
        (
            {"classes": ["never", "ever"], "pilot": 4, "n0": 1},
            "No answer to .* was read as one of: never, ever; the model",
        ),
        ({"reading": Compared(["a", "a b"]), "pilot": 4}, "'a' is how 'a b' begins"),
    ],
)
def test_what_cannot_be_certified_is_said(demo, images, options, said):
    model, processor = demo
    with pytest.raises(SettingError, match=said):
        fs_plugins.certify_answers(model, processor, images[:1], world.CLASS_PROMPT, **options)


def test_a_model_that_cannot_be_asked_is_said(demo, images):
    model, processor = demo
    asked = {"images": images[:1], "questions": "what?", "classes": ["a", "b"]}
    with pytest.raises(ModelError, match="it generates no text"):
        fs_plugins.certify_answers(make_clip(), processor, psm=None, sigma=0.25, **asked)
    with pytest.raises(SettingError, match="no chat template"):
        fs_plugins.certify_answers(model, mute(processor), **asked)
    with pytest.raises(SettingError, match="A processor with a tokenizer was expected"):
        fs_plugins.certify_answers(model, object(), **asked)
    with pytest.raises(SettingError, match="must not hold <image>"):
        fs_plugins.certify_answers(model, processor, images[:1], "what is <image>?", classes=["a", "b"])
    training = make_llava()
    training.lm_head.train()
    with pytest.raises(ModelError, match="training mode, where its answers are random"):
        fs_plugins.certify_answers(training, processor, psm=None, sigma=0.25, **asked)
