"""What is shown to a model, and what it is asked."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from support import make_classifier

import fs_plugins
from fs_plugins import ModelError, kept
from fs_plugins.evaluation import Results
from fs_plugins.evaluation.plan import answers_key
from fs_plugins.evaluation.subjects import Headed, size_of
from fs_plugins.evaluation.suites import CLEAN, FS, NONE, SUITES, Condition, Suite
from fs_plugins.hf.chat import Chat
from fs_plugins.hf.subjects import loader
from fs_plugins.hf.zeroshot import ZeroShot


@pytest.fixture(scope="module")
def demo():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from fs_plugins.demo import assets

    return Chat(
        AutoModelForImageTextToText.from_pretrained(assets.LLAVA).eval(), AutoProcessor.from_pretrained(assets.LLAVA)
    )


def test_a_model_is_shown_exactly_the_pixels_that_were_attacked(demo):
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    seen = []
    listener = demo.call.module.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((args, kwargs)), with_kwargs=True
    )
    try:
        said = demo.say(pixels, ["Which shape is in this image?"] * 2, 3)
    finally:
        listener.remove()
    args, kwargs = seen[0]
    shown = args[0] if args else kwargs["pixel_values"]
    assert torch.allclose(demo.call.pixels.to_unit(shown), pixels, atol=1e-6)
    assert len(said) == 2


def test_models_that_cut_pictures_up_are_refused(demo):
    class Tiles:
        chat_template, image_token, tokenizer = None, "<image>", demo.processor.tokenizer

        def __call__(self, **kwargs):
            from transformers import BatchFeature

            return BatchFeature({"input_ids": torch.ones(1, 3).long(), "pixel_values": torch.zeros(1, 5, 3, 64, 64)})

    with pytest.raises(ModelError, match=r"processor makes \(1, 5, 3, 64, 64\) of 1 pictures, where \(1, 3"):
        Chat(demo.model, Tiles()).say(torch.rand(1, 3, 64, 64), ["?"], 2)


def test_zero_shot_takes_the_nearest_class_on_offer_and_is_smoothed(clip, data):
    names = ["blue", "red", "green"]
    directions = {
        name: torch.nn.functional.normalize(torch.randn(24, generator=torch.Generator().manual_seed(i)), dim=0)
        for i, name in enumerate(names)
    }
    subject = ZeroShot(clip, directions)
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    embedded = subject.call.embed(subject.call.encode(images))
    scores = embedded @ torch.stack(list(directions.values())).T
    wanted = [str(data.classes.index(names[i])) for i in scores.argmax(1)]
    assert subject.reply(None, images, data.samples[:4], data) == wanted
    few = [sample.model_copy(update={"choices": ("red", "blue")}) for sample in data.samples[:4]]
    assert subject.reply(None, images, few, data) == [str(int(row[0] > row[1])) for row in scores]
    with fs_plugins.enable(clip, psm=None, sigma=0.25) as handle:
        subject.reply(None, images, data.samples[:4], data)
        assert handle.status().vision[0].calls == 1


@pytest.fixture
def headed(clip):
    """Three colours by a random head on what CLIP embeds."""
    torch.manual_seed(2)
    head = torch.nn.Linear(24, 3)
    head.requires_grad_(False)
    return Headed(clip.requires_grad_(False), head, ["green", "blue", "red"])


def test_a_head_takes_the_likeliest_of_the_classes_on_offer(headed, data):
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    logits = headed.head(headed.call.embed(headed.call.encode(images)))
    names = [["green", "blue", "red"][i] for i in logits.argmax(1).tolist()]
    assert headed.reply(None, images, data.samples[:4], data) == [str(data.classes.index(name)) for name in names]
    few = [sample.model_copy(update={"choices": ("blue", "red")}) for sample in data.samples[:4]]
    assert headed.reply(None, images, few, data) == [str(int(row[2] > row[1])) for row in logits]
    by_name = replace(data, prompts=data.prompts.model_copy(update={"classification_answers": "name"}))
    assert headed.reply(None, images, data.samples[:4], by_name) == names


def test_a_head_that_does_not_know_a_class_is_refused(clip, data):
    subject = Headed(clip, torch.nn.Linear(24, 2), ["red", "blue"])
    with pytest.raises(ModelError, match="knows 2 classes, and 'green' is none"):
        subject.reply(None, torch.rand(1, 3, 16, 16), data.samples[:1], data)


def test_an_image_classifier_is_asked_through_its_own_head(data, tmp_path):
    names = {0: "green", 1: "blue", 2: "red"}
    model = make_classifier(id2label=names)
    model.save_pretrained(tmp_path / "classifier")
    saved = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 16, "width": 16}}
    (tmp_path / "classifier" / "preprocessor_config.json").write_text(json.dumps(saved), "utf-8")
    subject = loader(str(tmp_path / "classifier"), device="cpu")("", data)
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        likeliest = model(2 * images - 1).logits.argmax(1)
    wanted = [str(data.classes.index(names[i])) for i in likeliest.tolist()]
    assert subject.reply(None, images, data.samples[:4], data) == wanted


def test_what_a_head_is_told_of_is_what_is_served(headed, start):
    """Answers and cosines come from one serving each, and are those of the model as it is enabled."""
    suite = Suite("heads", "Heads", "classification", (NONE, FS), (Condition("attackvlm", 16),), twice=True)
    evaluation = replace(start(suite, sigma=0.5, psm="none"), load=lambda tower: headed)
    evaluation.run()
    data, store = evaluation.plan.dataset, evaluation.store
    served = store.rows(answers_key(FS, CLEAN))
    images = torch.stack([data.image(sample, (16, 16)) for sample in data.samples])
    with fs_plugins.enable(headed.model, psm=None, sigma=0.5, n0=2, seed=0, noise_scope="image"):
        said = headed.reply(None, images, data.samples, data)
    assert [served[sample.image, "classification"]["reply"] for sample in data.samples] == said
    assert all(0 < served[sample.image, "again"]["cosine"] < 1 for sample in data.samples)
    plain = store.rows(answers_key(NONE, suite.conditions[0]))
    moved = torch.stack([store.attacked("none/attackvlm-16", sample.image) for sample in data.samples])
    one, other = (headed.call.embed(headed.call.encode(some)) for some in (images, moved))
    found = [plain[sample.image, "features"]["cosine"] for sample in data.samples]
    assert found == pytest.approx(torch.cosine_similarity(one, other).tolist(), abs=1e-5)


def test_the_search_for_masked_gradients_attacks_the_answers_of_who_can_be_asked(headed, start):
    evaluation = replace(start(SUITES["masking"], psm="none", sigma=0.25), load=lambda tower: headed)
    evaluation.run()
    results = Results(evaluation.store.folder)
    [table] = results.tables()
    assert [row[0] for row in table.rows][6:] == [
        "answer: no attack",
        "answer: oblivious",
        "answer: gradient-free",
        "answer: adaptive, a quarter",
        "answer: adaptive",
        "answer: attack on features",
    ]
    assert "minus the log-likelihood" in table.note
    path = evaluation.store.masking_file(SUITES["masking"].conditions[0].eps)
    told = kept.read(path, "an evaluation")
    del told["answers"]
    for strength in told["attacks"]:
        del strength["turned"]
    kept.write(path, told)
    [earlier] = results.tables()
    assert earlier.rows == table.rows[:6], "a file from before answers were attacked is read"
    assert "log-likelihood" not in earlier.note


def test_who_cannot_be_asked_after_all_is_searched_by_features_alone(headed, start):
    class Mute(Headed):
        def answers(self, task, samples, dataset):
            raise ModelError("It cuts pictures into tiles.")

    mute = Mute(headed.model, headed.head, list(headed.numbers))
    evaluation = replace(start(SUITES["masking"], psm="none", sigma=0.25), load=lambda tower: mute)
    evaluation.run()
    results = Results(evaluation.store.folder)
    assert len(results.tables()[0].rows) == 6
    assert results.notes() == ["The search for masked gradients attacks no answers: It cuts pictures into tiles."]


def test_an_encoder_of_any_size_is_shown_what_its_preprocessing_makes(call):
    anything = replace(call, image_size=None)
    with pytest.raises(ModelError, match="any size"):
        size_of(anything)
    assert size_of(replace(anything, pixels=replace(call.pixels, size=(8, 8)))) == (8, 8)
