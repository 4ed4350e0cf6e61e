"""What needs no lmms_eval; the released one is met in integration/test_lmms.py."""

from __future__ import annotations

import importlib
import shutil
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import fs_plugins
from fs_plugins import SettingError
from fs_plugins.demo import assets, world
from fs_plugins.hf import lmms
from fs_plugins.hf.dialogue import dialogue, encode, prompt


@pytest.fixture(scope="module")
def loaded():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(assets.LLAVA).eval(), AutoProcessor.from_pretrained(assets.LLAVA)


@pytest.fixture
def model(loaded):
    yield loaded[0]
    if fs_plugins.status(loaded[0]).enabled:
        fs_plugins.disable(loaded[0])


@pytest.fixture
def processor(loaded):
    return loaded[1]


def told(model, **changes) -> dict[str, str]:
    """The arguments in full that these stand for, by name."""
    said = lmms.smooth(model, **changes)
    fs_plugins.disable(model)
    return dict(part.split("=") for part in said.split(","))


def turn(role: str, *parts: str | None) -> dict:
    """One message; None is an image."""
    return {
        "role": role,
        "content": [{"type": "text", "text": part} if part is not None else {"type": "image"} for part in parts],
    }


def test_the_entry_point_leads_to_the_manifest():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    module, name = project["entry-points"]["lmms_eval.models"]["fs_plugins"].split(":")
    assert getattr(importlib.import_module(module), name) is lmms.manifest


def test_arguments_left_out_are_told_in_full_and_are_what_serves(model):
    said = lmms.smooth(model)
    (vision,) = fs_plugins.status(model).vision
    assert said.startswith("psm=auto,sigma=0.25,n0=4,noise=antithetic,noise_scope=image,seed=0,pin=fs-")
    assert (vision.psm, vision.sigma, vision.n0) == ("demo-psm-llava", 0.25, 4)
    assert (vision.noise, vision.noise_scope) == ("antithetic", "image")


def test_what_is_told_is_accepted_and_told_again(model):
    # lmms-eval's parser makes these numbers of the text; the rest stays text.
    full = told(model, psm="None", sigma=0.3, n0=2.0, noise="iid", seed=-1.0)
    kinds = {"sigma": float, "n0": int, "seed": float}
    again = {name: kinds.get(name, str)(value) for name, value in full.items()}
    assert told(model, **again) == full
    assert full["n0"] == "2"
    assert full["seed"] == "-1"


def test_a_pin_is_one_smoothings_and_no_others(model):
    plain = {"psm": "none", "sigma": 0.25}
    changes = [{}, {"sigma": 0.5}, {"n0": 8}, {"seed": 1}, {"noise": "iid"}, {"noise_scope": "call"}, {"psm": "auto"}]
    pins = [told(model, **{**plain, **change})["pin"] for change in changes]
    assert len(set(pins)) == len(changes)
    assert told(model, **plain)["pin"] == pins[0]
    assert told(model)["pin"] == pins[-1], "auto's own sigma"
    with pytest.raises(ValueError, match="could not convert"):
        float(pins[0])  # lmms-eval would make a number of it


def test_another_psm_behind_the_same_arguments_is_refused_by_their_pin(model, tmp_path):
    folder = tmp_path / "psm"
    shutil.copytree(assets.PSM_LLAVA, folder)
    asked = {"psm": str(folder), "sigma": 0.25}
    before = told(model, **asked)["pin"]
    shutil.rmtree(folder)
    shutil.copytree(assets.PSM_NO_PURIFIER, folder)
    after = told(model, **asked)["pin"]
    assert after != before
    with pytest.raises(SettingError, match=f"{after} today, not for {before}"):
        lmms.smooth(model, **asked, pin=before)
    assert not fs_plugins.status(model).enabled


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"psm": True}, "psm=true is no PSM"),
        ({"psm": "nowhere"}, "No PSM folder at 'nowhere'"),
        ({"psm": "none"}, "needs a sigma"),
        ({"sigma": "loud"}, "sigma must be a number, got 'loud'"),
        ({"sigma": float("nan")}, "sigma must be a number"),
        ({"sigma": True}, "sigma must be a number"),
        ({"n0": 2.5}, "n0 must be a whole number, got 2.5"),
        ({"n0": 0}, "n0"),
        ({"seed": "none"}, "seed must be a whole number, got 'none'. The noise needs a seed"),
        ({"noise_scope": "picture"}, "noise_scope must be one of"),
    ],
)
def test_wrong_arguments_are_told_and_leave_the_model_alone(model, wrong, says):
    with pytest.raises(fs_plugins.FSPluginsError, match=says):
        lmms.smooth(model, **wrong)
    assert not fs_plugins.status(model).enabled


@pytest.mark.parametrize("templated", [True, False])
def test_one_image_and_one_question_are_asked_as_everywhere_else(processor, templated):
    asked = processor if templated else SimpleNamespace(image_token="<image>")
    assert prompt(asked, [turn("user", None, "Which shape?")]) == dialogue(asked, "Which shape?")


def test_without_a_chat_template_every_turn_and_image_is_in_the_prompt():
    plain = SimpleNamespace(chat_template=None, image_token="<image>")
    said = prompt(plain, [turn("user", None, None, "Same?"), turn("assistant", "No."), turn("user", "Sure?")])
    assert said == "USER: <image>\n<image>\nSame? ASSISTANT: No. USER: Sure? ASSISTANT:"


def test_a_processor_that_nobody_knows_how_to_ask_is_refused():
    with pytest.raises(SettingError, match="SimpleNamespace has no chat template"):
        prompt(SimpleNamespace(image_token="<img>"), [turn("user", None, "Which shape?")])


def test_a_batch_has_each_requests_own_tokens_on_the_right(processor):
    scenes = [world.scene("heldout", i).draw() for i in range(2)]
    questions = ["Which shape is in this image?", "Which shape?"]
    prompts = [prompt(processor, [turn("user", None, question)]) for question in questions]
    batch = encode(processor, prompts, [[scene] for scene in scenes])
    for i in range(2):
        alone = encode(processor, [dialogue(processor, questions[i])], [[scenes[i]]])
        length = alone["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][i, -length:], alone["input_ids"][0])
        assert batch["attention_mask"][i].sum() == length
        assert torch.equal(batch["pixel_values"][i], alone["pixel_values"][0])
    assert batch["attention_mask"][1, 0] == 0


def test_a_processor_is_shown_pictures_upright_and_in_eight_bits(processor):
    text = dialogue(processor, "Which shape?")
    grey = world.scene("heldout", 0).draw().convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    turned = deep.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[ExifTags.Base.Orientation] = 6
    clear = Image.new("LA", grey.size, (0, 0))
    expected = {"twin": grey.convert("RGB"), "white": Image.new("RGB", grey.size, "white")}
    pixels = {name: encode(processor, [text], [[image]])["pixel_values"] for name, image in expected.items()}
    for image, twin in ((grey, "twin"), (deep, "twin"), (turned, "twin"), (clear, "white")):
        assert torch.equal(encode(processor, [text], [[image]])["pixel_values"], pixels[twin])


def test_a_prompt_that_begins_with_the_beginning_gets_no_second_one(processor):
    begin = processor.tokenizer.bos_token_id
    for text in ("USER: Which shape? ASSISTANT:", "<s>USER: Which shape? ASSISTANT:"):
        inputs = encode(processor, [text], [[]])
        assert (inputs["input_ids"] == begin).sum() == 1
        assert "pixel_values" not in inputs


def test_generation_settings():
    greedy = {"max_new_tokens": 1024, "num_beams": 1, "do_sample": False} | dict.fromkeys(
        ("temperature", "top_p", "top_k")
    )
    assert lmms.generation({}) == greedy
    # What tasks of lmms-eval say: nulls, settings of other models, a top_p that means nothing at temperature 0.
    assert lmms.generation({"temperature": None, "num_beams": None, "image_aspect_ratio": "pad"}) == greedy
    assert lmms.generation({"temperature": 0, "top_p": 0.9, "do_sample": True, "until": ["\n"]}) == greedy
    assert lmms.generation({"temperature": 0.2, "top_p": 0.9, "max_new_tokens": 16, "repetition_penalty": 1.1}) == {
        "max_new_tokens": 16,
        "num_beams": 1,
        "do_sample": True,
        "temperature": 0.2,
        "top_p": 0.9,
        "top_k": None,
        "repetition_penalty": 1.1,
    }


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "a circle.\n\nB: yes"),
        ({"until": "\n\n"}, "a circle."),
        ({"until": ["B:", ".", ""]}, "a circle"),
        ({"until": []}, "a circle.\n\nB: yes"),
    ],
)
def test_answers_end_at_the_first_stop(settings, said):
    assert lmms.until(" a circle.\n\nB: yes ", settings) == said


def test_batches_hold_every_request_once_and_one_kind_of_settings_each():
    short, long = {"max_new_tokens": 4, "until": ["\n"]}, {"max_new_tokens": 64}
    settings = [short, long, long, dict(short), short, long]
    found = list(lmms.batches(settings, 2))
    assert sorted(place for places in found for place in places) == list(range(6))
    assert sorted(map(len, found)) == [1, 1, 2, 2]
    assert all(len({settings[place]["max_new_tokens"] for place in places}) == 1 for places in found)
