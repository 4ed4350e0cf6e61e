"""The classifier that attack libraries take: the model's own logits, and the served ones of an enabled model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from support import knowing, make_classifier, make_clip, make_psm, randomise
from torch import nn
from torch.nn.functional import cross_entropy, normalize

import fs_plugins
from fs_plugins import ModelError, SettingError, zero_shot
from fs_plugins.attacks import Answer, attack
from fs_plugins.demo import assets
from fs_plugins.hf.load import load_model, load_processor

TEXTS = torch.tensor([[1, 5, 39, 0], [1, 7, 8, 39], [1, 9, 39, 0]])
PLAIN = {"psm": None, "sigma": 0.25}


def make_siglip():
    from transformers import SiglipConfig, SiglipModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 40, "max_position_embeddings": 4, "projection_size": 32}
    config = SiglipConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 4})
    return knowing(randomise(SiglipModel(config)))


@torch.no_grad()
def directions(model, texts=TEXTS):
    found = model.get_text_features(input_ids=texts.to(model.device))
    return normalize(getattr(found, "pooler_output", found), dim=-1)


@torch.no_grad()
def own_logits(model, images, texts=TEXTS):
    pixels = fs_plugins.vision_call(model).pixels.from_unit(images, model.dtype)
    return model(input_ids=texts, pixel_values=pixels).logits_per_image


@pytest.mark.parametrize("make", [make_clip, make_siglip])
def test_logits_are_the_models_own(make, images):
    model = make()
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
        if hasattr(model, "logit_bias"):
            model.logit_bias.fill_(-10.0)
    classifier = zero_shot(model, directions(model))
    torch.testing.assert_close(classifier(images), own_logits(model, images), rtol=1e-5, atol=1e-5)
    assert classifier.names == ()


def test_classes_are_embedded_by_their_names_and_the_models_own_tokenizer():
    model, processor = load_model("demo-clip"), load_processor("demo-clip")
    names, images = ["circle", "star", "square"], torch.rand(2, 3, *fs_plugins.vision_call(model).image_size)
    length = model.config.text_config.max_position_embeddings
    tokens = processor.tokenizer([f"a small white {name}" for name in names], padding="max_length", max_length=length)
    wanted = own_logits(model, images, torch.tensor(tokens["input_ids"]))
    by_folder, by_itself = {"tokenizer": str(assets.CLIP)}, {"tokenizer": processor.tokenizer}
    for given in ({}, by_folder, by_itself, {"processor": processor}):
        classifier = zero_shot(model, names, prompt="a small white {}", **given)
        torch.testing.assert_close(classifier(images), wanted, rtol=1e-4, atol=1e-4)
        assert classifier.names == tuple(names)


def test_an_image_classifier_has_its_own_head(images):
    model = make_classifier()
    half = fs_plugins.PixelSpace((0.5,) * 3, (0.5,) * 3)
    classifier = zero_shot(model, processor=half)
    assert torch.equal(classifier(images), model(half.from_unit(images, torch.float32)).logits)
    assert classifier.names == ("cat", "dog", "newt")


def test_a_linear_layer_scores_the_feature_as_it_is_and_is_not_moved(clip, images):
    call, head = fs_plugins.vision_call(clip), nn.Linear(24, 3, dtype=torch.float64)
    classifier = zero_shot(clip, head)
    assert torch.equal(classifier(images), head(call.embed(call.encode(images)).double()))
    assert all(own is not other for own, other in zip(head.parameters(), classifier.layers.parameters(), strict=True))


def test_a_scale_of_ones_own_stands_for_the_models(clip, images):
    cosines = own_logits(clip, images) / clip.logit_scale.exp()
    torch.testing.assert_close(
        zero_shot(clip, directions(clip), scale=100)(images), 100 * cosines, rtol=1e-4, atol=1e-4
    )


def test_a_model_without_a_scale_gives_cosines(images):
    from transformers import CLIPVisionModelWithProjection

    clip = make_clip()
    vision = CLIPVisionModelWithProjection(clip.config.vision_config).eval()
    vision.load_state_dict({name: value for name, value in clip.state_dict().items() if name in vision.state_dict()})
    cosines = own_logits(clip, images) / clip.logit_scale.exp()
    torch.testing.assert_close(zero_shot(knowing(vision), directions(clip))(images), cosines, rtol=1e-4, atol=1e-5)


def test_it_answers_what_certify_predictions_votes_by(clip, images):
    """With little noise, plain and served answer are the vote's, by directions, by names and by a layer."""
    rows = normalize(torch.randn(4, 24, generator=torch.Generator().manual_seed(5)), dim=-1)
    layer = nn.Linear(24, 4)
    for given in (rows, dict(zip("abcd", rows, strict=True)), layer):
        classifier = zero_shot(clip, given)
        found = fs_plugins.certify_predictions(clip, images, given, n=60, psm=None, sigma=0.001, seed=0)
        wanted = [certificate.predicted for certificate in found]
        assert all(certificate.votes == certificate.n for certificate in found)
        assert classifier(images).argmax(1).tolist() == wanted
        with fs_plugins.enable(clip, psm=None, sigma=0.001):
            assert classifier(images).argmax(1).tolist() == wanted
        if classifier.names:
            assert [certificate.label for certificate in found] == [classifier.names[i] for i in wanted]


def served(clip, images, rows, **settings):
    """The same by the pipeline alone, without hooks and without this class."""
    (smoother,) = fs_plugins.smoothers(clip, **settings)
    units = normalize(smoother.call.embed(smoother.smooth(images)), dim=-1)
    return clip.logit_scale.exp() * units @ rows.T


@pytest.mark.parametrize("with_psm", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_an_enabled_model_is_climbed_through_its_smoothing(clip, images, with_psm, before):
    psm = make_psm(fs_plugins.vision_call(clip)) if with_psm else None
    settings, rows = {"psm": psm, "sigma": 0.25, "seed": 3}, directions(clip)
    classifier, labels = None if before else zero_shot(clip, rows), torch.tensor([0, 1, 2])
    shown, reference = images.clone().requires_grad_(), images.clone().requires_grad_()
    with fs_plugins.enable(clip, **settings) as handle:
        classifier = classifier or zero_shot(clip, rows)
        logits = classifier(shown)
        cross_entropy(logits, labels).backward()
        assert handle.status().vision[0].calls == 1
    wanted = served(clip, reference, rows, **settings)
    cross_entropy(wanted, labels).backward()
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shown.grad, reference.grad, rtol=1e-3, atol=1e-7)
    assert shown.grad.abs().max() > 1e-5
    assert not torch.allclose(classifier(images), logits, atol=1e-3)  # disabled: the bare model


def test_the_gradient_is_the_slope_of_what_is_served(clip, images):
    classes = directions(clip).double()  # of single precision: transformers 4 cannot mask texts of a double one
    clip.double()
    classifier, labels = zero_shot(clip, classes), torch.tensor([0, 1, 2])
    shown = images.double().requires_grad_()
    along = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(x):
        with fs_plugins.enable(clip, **PLAIN, seed=3):
            return cross_entropy(classifier(x), labels)

    loss(shown).backward()
    step = 1e-5
    with torch.no_grad():
        slope = (loss(shown + step * along) - loss(shown - step * along)) / (2 * step)
    torch.testing.assert_close((shown.grad * along).sum(), slope, rtol=1e-5, atol=1e-9)


def test_noise_is_fresh_at_every_call_and_the_same_after_seeding_again(clip, images):
    classifier = zero_shot(clip, directions(clip))
    runs = []
    for _ in range(2):
        with fs_plugins.enable(clip, **PLAIN, seed=4):
            runs.append([classifier(images) for _ in range(2)])
    assert not torch.allclose(runs[0][0], runs[0][1], atol=1e-4)
    assert all(map(torch.equal, *runs))
    assert torch.equal(classifier(images), classifier(images))


def test_pixels_are_those_that_smoothing_was_enabled_with(clip, images):
    del clip.image_processor
    half = fs_plugins.PixelSpace((0.5,) * 3, (0.5,) * 3)
    with fs_plugins.enable(clip, psm=None, sigma=0, processor=half):
        found = zero_shot(clip, directions(clip))(images)
    assert torch.equal(found, zero_shot(clip, directions(clip), processor=half)(images))


def test_weights_get_no_gradient_and_keep_what_they_were_told(clip, images):
    clip.text_model.requires_grad_(False)
    told = {name: parameter.requires_grad for name, parameter in clip.named_parameters()}
    classifier = zero_shot(clip, nn.Linear(24, 3))
    shown = images.clone().requires_grad_()
    with fs_plugins.enable(clip, **PLAIN):
        classifier(shown).sum().backward()
        assert not classifier(images).requires_grad
    with pytest.raises(SettingError):
        zero_shot(clip, torch.eye(5))(images)
    assert shown.grad.any()
    assert {name: parameter.requires_grad for name, parameter in clip.named_parameters()} == told
    assert any(told.values())
    assert all(parameter.grad is None for parameter in classifier.parameters())


def test_it_stays_in_eval_mode_and_refuses_a_model_that_does_not(clip, images):
    classifier = zero_shot(clip, directions(clip))
    assert not classifier.train().training
    assert not any(module.training for module in classifier.modules())
    clip.train()
    with pytest.raises(ModelError, match="training mode"):
        classifier(images)
    with pytest.raises(ModelError, match="training mode"):
        zero_shot(clip, directions(clip))
    classifier.eval()
    assert classifier(images).shape == (3, 3)


def test_half_precision_is_the_models_and_logits_and_gradients_are_not(clip, images):
    wanted = zero_shot(clip, directions(clip))(images)
    classifier = zero_shot(clip.bfloat16(), directions(clip))
    shown = images.clone().requires_grad_()
    logits = classifier(shown)
    logits.sum().backward()
    assert (logits.dtype, shown.grad.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(logits, wanted, rtol=0.1, atol=0.1)


def test_copies_are_whole(clip, images):
    classifier = zero_shot(clip, directions(clip))
    twin = copy.deepcopy(classifier)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.zero_()
    assert twin.call.module is twin.model.vision_model
    assert not torch.allclose(twin(images), classifier(images))


def test_the_embedding_may_be_attacked_by_the_same_scores(clip, images):
    classifier = zero_shot(clip, directions(clip))
    labels = classifier(images).argmax(1)
    attacked = attack(clip, images, method=Answer(classifier.scores), eps=8 / 255, steps=3)
    assert cross_entropy(classifier(attacked), labels) > cross_entropy(classifier(images), labels)


def test_a_step_over_the_edge_is_looked_at(clip, images):
    """VMIFGSM of torchattacks and others look beside the picture before they clip it."""
    classifier = zero_shot(clip, directions(clip))
    torch.testing.assert_close(classifier(images - 0.2), own_logits(clip, images - 0.2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.rand(1, 3, 8, 8), r"must be \(B, 3, 16, 16\), at the resolution the encoder sees, got \(1, 3, 8, 8\)"),
        (torch.rand(3, 16, 16), r"must be \(B, 3, 16, 16\)"),
        (torch.rand(1, 16, 16, 3), "Channels come before height and width"),
        (torch.rand(1, 3, 16, 16) * 255, "Divide 0 to 255 by 255"),
        (torch.full((1, 3, 16, 16), 9, dtype=torch.uint8), "floating point"),
        (torch.full((1, 3, 16, 16), torch.nan), "no numbers"),
        (torch.rand(1, 3, 16, 16) * 4 - 2, "Undo the model's normalisation"),
        ("scene.png", "must be a tensor"),
    ],
)
def test_images_that_are_none_are_refused(clip, given, said):
    with pytest.raises(SettingError, match=said):
        zero_shot(clip, directions(clip))(given)


@pytest.mark.parametrize(
    ("classes", "options", "error", "said"),
    [
        (None, {}, ModelError, "no head of its own. Pass classes"),
        ("cat, dog", {}, SettingError, "two different names or more"),
        (["cat"], {}, SettingError, "two different names or more"),
        (["cat", "cat"], {}, SettingError, "two different names or more"),
        (["cat", 3], {}, SettingError, "A class must be text"),
        (["cat", "dog"], {}, SettingError, "Pass its tokenizer"),
        (["cat", "dog"], {"tokenizer": "no/where"}, ModelError, "tokenizer from 'no/where'"),
        (["cat", "dog"], {"prompt": "a photo"}, SettingError, "where the class goes"),
        (torch.eye(24)[:1], {}, SettingError, "K >= 2 classes"),
        (torch.zeros(2, 24), {}, SettingError, "equal or non-finite rows"),
        (np.eye(24), {"scale": 0}, SettingError, "scale must be positive"),
        (torch.eye(24), {"encoder": 1}, SettingError, "there is no 1"),
    ],
)
def test_classes_and_settings_that_are_none_are_refused(clip, classes, options, error, said):
    with pytest.raises(error, match=said):
        zero_shot(clip, classes, **options)


@pytest.mark.parametrize("classes", [torch.eye(5), nn.Linear(5, 2)])
def test_classes_for_another_feature_are_refused(clip, images, classes):
    with pytest.raises(SettingError, match="features of width 5, and this encoder's have 24"):
        zero_shot(clip, classes)(images)


def test_models_that_cannot_be_asked_are_refused(images):
    vit = make_classifier()
    half = fs_plugins.PixelSpace((0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ModelError, match=r"embeds texts.*fs_plugins\.zero_shot"):
        zero_shot(vit, ["cat", "dog"], processor=half)
    with pytest.raises(ModelError, match=r"torch\.nn\.Module, got VisionCall"):
        zero_shot(fs_plugins.vision_call(vit))
    with torch.inference_mode():
        packed = make_classifier()
    with pytest.raises(ModelError, match="no gradient can be recorded"):
        zero_shot(packed, processor=half)(images.requires_grad_())
