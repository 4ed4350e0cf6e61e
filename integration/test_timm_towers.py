"""Models of timm inside transformers: where their pixels' mean, std and size come from, and whose weights they have."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from frameworks import OWN_MEAN, OWN_STD, normalised, randomise, wrapped
from torch import nn

import fs_plugins
from fs_plugins import FSPluginsWarning, SettingError
from fs_plugins.identity import fingerprint, same_encoder

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers", "5.0")
NET = "test_efficientnet"


def vlm(**vision: Any) -> nn.Module:
    """A FastVLM with a small timm tower and a smaller language model."""
    text = {"model_type": "qwen2", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}  # fmt: skip
    tower = {**wrapped(NET, 64, model_type="timm_wrapper", hidden_size=256), **vision}
    config = transformers.FastVlmConfig(text_config=text, vision_config=tower, image_token_index=30)
    return randomise(transformers.FastVlmForConditionalGeneration(config))


def test_a_record_in_the_configuration_is_known_and_outlives_saving(tmp_path):
    vlm().save_pretrained(tmp_path)
    found = fs_plugins.vision_call(transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval())
    assert (found.pixels.mean, found.pixels.std, found.image_size) == (OWN_MEAN, OWN_STD, (64, 64))
    assert not found.pixels.assumed


def test_a_processor_beside_the_checkpoint_goes_before_the_record(tmp_path):
    vlm().save_pretrained(tmp_path)
    saved = {"image_mean": [0.1] * 3, "image_std": [0.2] * 3, "size": {"height": 32, "width": 96}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(saved), "utf-8")
    found = fs_plugins.vision_call(transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval())
    assert (found.pixels.mean, found.pixels.std, found.image_size) == ((0.1,) * 3, (0.2,) * 3, (32, 96))


@pytest.mark.parametrize("record", [None, {}, {"mean": [0.5] * 3}, {"mean": ["x"] * 3, "std": [0.5] * 3}, [1]])
def test_without_a_whole_record_nothing_is_proved(record):
    model = vlm(pretrained_cfg=record)
    pixels = fs_plugins.vision_call(model).pixels
    if pixels.source:  # else enable asks for a processor
        assert pixels.assumed
        assert f"timm's default of {NET}" in pixels.source
        assert pixels.mean == tuple(timm.create_model(NET).pretrained_cfg["mean"])
        with pytest.warns(FSPluginsWarning, match="assumed"):
            fs_plugins.enable(model, psm=None, sigma=0.25).disable()
    with pytest.raises(SettingError, match="processor="):
        fs_plugins.certify(model, torch.rand(1, 3, 64, 64), psm=None, sigma=0.25, n=100)


def test_timms_own_processor_in_transformers_is_one():
    processor = transformers.TimmWrapperImageProcessor(wrapped(NET, 48)["pretrained_cfg"], NET)
    for given in (processor, SimpleNamespace(image_processor=processor)):
        space = fs_plugins.PixelSpace.from_processor(given)
        assert (space.mean, space.std, space.size) == (OWN_MEAN, OWN_STD, (48, 48))
    grey = processor(torch.full((3, 48, 48), 0.3))["pixel_values"]
    assert torch.allclose(space.to_unit(grey), torch.tensor(0.3), atol=1e-5)


def test_a_tower_sees_what_the_bare_net_sees_and_has_its_fingerprint():
    model = vlm()
    call = fs_plugins.vision_call(model)
    bare = timm.create_model(NET, num_classes=0, global_pool="").eval()
    bare.load_state_dict(call.module.timm_model.state_dict())
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        tokens = bare(normalised(images, OWN_MEAN, OWN_STD)).flatten(2).transpose(1, 2)
        assert torch.allclose(call.encode(images)["last_hidden_state"], tokens, atol=1e-5)
    assert same_encoder(fingerprint(call.module), fingerprint(bare))
    assert call.architecture == fs_plugins.vision_call(bare).architecture
