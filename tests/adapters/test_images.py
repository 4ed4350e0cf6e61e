"""Image classifiers and bare image models of transformers: what their heads see, and where their pixels come from."""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from support import randomise

import fs_plugins
from fs_plugins import PixelSpace, SettingError

MEAN, STD = (0.45, 0.5, 0.4), (0.25, 0.3, 0.2)
LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VIT = {**LAYERS, "image_size": 16, "patch_size": 4}
STAGES = {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1]}
PYRAMID = {**STAGES, "image_size": 64, "num_attention_heads": [1, 2, 2, 4], "sr_ratios": [4, 2, 1, 1],
           "mlp_ratios": [2, 2, 2, 2]}  # fmt: skip
LEVIT = {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1],
         "key_dim": [8, 8, 8]}  # fmt: skip
# Class, configuration, the side of its images, and the width of what its head sees.
CLASSIFIERS = [
    ("ViTForImageClassification", VIT, 16, 32),
    ("DeiTForImageClassificationWithTeacher", VIT, 16, 64),
    ("Dinov2WithRegistersForImageClassification", {**VIT, "mlp_ratio": 2, "num_register_tokens": 3}, 16, 64),
    ("IJepaForImageClassification", VIT, 16, 32),
    ("BeitForImageClassification", VIT, 16, 32),
    ("ConvNextForImageClassification", {**STAGES, "image_size": 32}, 32, 24),
    ("ResNetForImageClassification", {**STAGES, "embedding_size": 8}, 32, 24),
    ("PvtV2ForImageClassification", PYRAMID, 64, 24),
    ("LevitForImageClassificationWithTeacher", LEVIT, 64, 32),
]
each = pytest.mark.parametrize(("name", "config", "side", "width"), CLASSIFIERS, ids=[row[0] for row in CLASSIFIERS])
NAMES = {0: "cat", 1: "dog", 2: "newt"}


def make(name: str, *, knowing: bool = True, **config):
    import transformers

    kind = getattr(transformers, name)
    model = randomise(kind(kind.config_class(**deepcopy({"id2label": NAMES, **config}))))
    if knowing:
        model.image_processor = SimpleNamespace(image_mean=MEAN, image_std=STD)
    return model


@each
def test_the_embedding_is_what_the_head_sees_of_the_images(name, config, side, width):
    model = make(name, **config)
    call = fs_plugins.vision_call(model)
    assert call.head.width == width
    assert call.head.labels == ("cat", "dog", "newt")
    images = torch.rand(2, 3, side, side)
    with torch.no_grad():
        scores = model((images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)).logits
        embedded = call.embed(call.encode(images)).double()
    weight, bias = call.head.affine()
    assert embedded.shape == (2, width)
    assert torch.allclose(embedded @ weight.T + bias, scores.double(), rtol=1e-4, atol=1e-4 * float(scores.abs().max()))


@each
def test_a_classifier_answers_by_the_smoothed_feature(name, config, side, width):
    model = make(name, **config)
    pixels = fs_plugins.vision_call(model).pixels.from_unit(torch.rand(2, 3, side, side), torch.float32)
    with torch.no_grad():
        plain = model(pixels).logits
        with fs_plugins.enable(model, psm=None, sigma=0.25, n0=3) as handle:
            assert not torch.equal(model(pixels).logits, plain)
            assert [(v.calls, v.images, v.draws) for v in handle.status().vision] == [(1, 2, 6)]
        assert torch.equal(model(pixels).logits, plain)


def test_a_bare_model_is_read_where_users_read_it_and_has_no_head():
    call = fs_plugins.vision_call(make("ViTModel", **VIT))
    assert [readout.name for readout in call.readouts] == ["last_hidden_state", "pooler_output"]
    assert call.head is None
    import transformers

    poolless = transformers.ViTModel(transformers.ViTConfig(**VIT), add_pooling_layer=False).eval()
    assert [readout.name for readout in fs_plugins.vision_call(poolless).readouts] == ["last_hidden_state"]
    features = call.encode(torch.rand(2, 3, 16, 16))
    assert torch.equal(call.embed(features), features["last_hidden_state"][:, 0])


@pytest.mark.parametrize(
    ("name", "config", "norm"),
    [
        ("ViTModel", VIT, ((0.5,) * 3, (0.5,) * 3)),
        ("Dinov2Model", {**VIT, "mlp_ratio": 2}, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
        ("DeiTModel", VIT, None),
        ("ResNetForImageClassification", {**STAGES, "embedding_size": 8}, None),
    ],
)
def test_colours_are_assumed_where_checkpoints_agree_and_asked_for_where_they_do_not(name, config, norm):
    model = make(name, knowing=False, **config)
    pixels = fs_plugins.vision_call(model).pixels
    if norm is not None:
        assert (pixels.mean, pixels.std, pixels.assumed) == (*norm, True)
        return
    with pytest.raises(SettingError, match="processor="):
        fs_plugins.enable(model, psm=None, sigma=0.25)
    with fs_plugins.enable(model, psm=None, sigma=0.25, processor=PixelSpace(MEAN, STD)) as handle:
        assert handle.smoothers[0].call.pixels.mean == MEAN


def test_a_classifier_without_classes_has_no_head():
    assert fs_plugins.vision_call(make("ViTForImageClassification", **VIT, id2label={})).head is None
