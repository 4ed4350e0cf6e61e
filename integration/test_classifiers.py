"""Image classifiers of transformers and timm: what their heads see, what is certified, and how they are loaded."""

from __future__ import annotations

import json

import pytest
import torch
from frameworks import build_timm
from image_families import IMAGE_FAMILIES, MEAN, STD
from safetensors.torch import save_file

import fs_plugins
from fs_plugins.hf.load import load_model

timm = pytest.importorskip("timm")
CLASSIFIERS = [family for family in IMAGE_FAMILIES if "ForImageClassification" in family.name]


@pytest.mark.parametrize("family", CLASSIFIERS, ids=[family.name for family in CLASSIFIERS])
def test_scores_are_the_head_of_the_embedding(family):
    model = family.build()
    call = fs_plugins.vision_call(model)
    images = torch.rand(2, 3, *family.image_size)
    with torch.no_grad():
        scores = family.outcome(model, family.inputs(model, images)).double()
        embedded = call.embed(call.encode(images)).double()
    weight, bias = call.head.affine()
    assert torch.allclose(embedded @ weight.T + bias, scores, rtol=1e-4, atol=1e-5 * float(scores.abs().max()))
    assert len(call.head.labels) == len(weight)


def test_a_bare_timm_models_served_answer_is_certified_whole():
    """Its logits are the feature: the vote, and the average that is served."""
    net = build_timm("test_resnet", num_classes=5)
    found = fs_plugins.certify_predictions(net, torch.rand(1, 3, 64, 64), n=400, psm=None, sigma=0.05, seed=0)[0]
    assert found.label is None
    assert found.votes > 200
    assert found.vote_radius is not None
    assert found.feature_radius is not None


@pytest.mark.parametrize("classes", [5, 0])
def test_a_checkpoint_of_timms_is_loaded_with_its_head_if_it_has_one(tmp_path, classes):
    net = build_timm("test_resnet", num_classes=classes)
    record = {"mean": MEAN, "std": STD, "input_size": [3, 64, 64], "label_names": list("abcde")}
    config = {"architecture": "test_resnet", "num_classes": classes, "num_features": 96, "pretrained_cfg": record}
    if classes:
        config["label_names"] = list("abcde")
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    save_file(net.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load_model(str(tmp_path))
    call = fs_plugins.vision_call(model)
    assert (call.pixels.mean, call.pixels.std, call.image_size) == (MEAN, STD, (64, 64))
    images = torch.rand(2, 3, 64, 64)
    pixels = call.pixels.from_unit(images, torch.float32)
    with torch.no_grad():
        output = model(pixels)
        assert torch.allclose(output.logits if classes else output.pooler_output, net(pixels), atol=1e-4)
    assert (call.head and call.head.labels) == (tuple("abcde") if classes else None)
