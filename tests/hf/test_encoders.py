"""Encoders of the registry without the model around them."""

from __future__ import annotations

import pytest
import torch
from open_clip_tower import close, with_projection
from safetensors.torch import load_file, save_file

import fs_plugins
from fs_plugins import RegistryError, SettingError
from fs_plugins.hf.encoders import load_encoder
from fs_plugins.identity import fingerprint
from fs_plugins.plugins import known_encoders


@pytest.mark.parametrize("name", ["demo-fare", "demo-tecoa"])
def test_an_encoder_of_the_registry_is_loaded_without_the_model_around_it(name):
    model = load_encoder(name)
    call = fs_plugins.vision_call(model)
    assert type(model).__name__ == "CLIPVisionModelWithProjection"
    assert call.embed(call.encode(torch.rand(1, 3, 64, 64))).shape == (1, 64)
    entry = known_encoders().entries[name]
    assert entry.has(fingerprint(call.module)), "the encoder's own weights"


def test_an_encoder_of_llavas_readout_comes_in_a_small_llava(known, tmp_path):
    source = with_projection()
    source.save_pretrained(tmp_path / "tower")
    readout = "hidden_states[-2][1:]"
    known(mine={"size": 16, "weights": f"{{source: folder, location: {tmp_path / 'tower'}}}", "readout": readout})
    model = load_encoder("mine")
    assert [r.name for r in fs_plugins.vision_call(model).readouts] == [readout]
    images = torch.rand(2, 3, 16, 16)
    call = fs_plugins.vision_call(model)
    with torch.no_grad():
        hidden = source(call.pixels.from_unit(images, torch.float32), output_hidden_states=True).hidden_states
        assert close(call.encode(images)[readout], hidden[-2][:, 1:])
    known(mine={"size": 16, "weights": f"{{source: folder, location: {tmp_path / 'tower'}}}", "mean": 0.5})
    pixels = fs_plugins.vision_call(load_encoder("mine")).pixels
    assert (pixels.mean[0], pixels.source, pixels.assumed) == (0.5, "the registry, mine", False)
    known(mine={"readout": "tokens"})
    with pytest.raises(SettingError, match="cannot be loaded without the model around it"):
        load_encoder("mine")
    with pytest.raises(SettingError, match="It has: mine"):
        load_encoder("yours")
    known(mine={"size": 16, "weights": f"{{source: folder, location: {tmp_path / 'tower'}}}", "print": [1.0] * 16})
    with pytest.raises(RegistryError, match="another fingerprint"):
        load_encoder("mine")
    (tmp_path / "bare").mkdir()
    bare = {
        key: value
        for key, value in load_file(tmp_path / "tower" / "model.safetensors").items()
        if "visual_projection" not in key
    }
    save_file(bare, tmp_path / "bare" / "model.safetensors")
    known(mine={"size": 16, "weights": f"{{source: folder, location: {tmp_path / 'bare'}}}"})
    assert type(load_encoder("mine")).__name__ == "CLIPVisionModel"


def test_a_folder_comes_before_an_encoder_of_the_registry_of_its_name(tmp_path, monkeypatch):
    from fs_plugins.hf.load import load_model

    assert type(load_model("demo-fare")).__name__ == "CLIPVisionModelWithProjection"
    with_projection(size=16).save_pretrained(tmp_path / "demo-fare")
    monkeypatch.chdir(tmp_path)
    assert load_model("demo-fare").config.hidden_size == 32
