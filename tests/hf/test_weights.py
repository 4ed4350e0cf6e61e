"""Where another encoder's weights come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from open_clip_tower import agree, as_saved, close, language_sees, on_disk, pixels, tower, transformers, with_projection
from safetensors.torch import save_file

from fs_plugins import ModelError, RegistryError
from fs_plugins.demo import assets
from fs_plugins.hf.conversion import to_transformers
from fs_plugins.hf.towers import swap_encoder


@pytest.mark.parametrize("layout", ["open_clip", "transformers"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "visual.", "module."])
def test_files_of_either_layout_are_read(tmp_path, layout, suffix, prefix):
    ours = tower(size=8)
    state = ours.state_dict() if layout == "open_clip" else as_saved(to_transformers(ours.state_dict()))
    state = {f"{prefix}{name}": value for name, value in state.items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(state if not prefix else {"epoch": 3, "state_dict": state}, path)
    else:
        save_file(state, path)
    projecting = with_projection()
    done = swap_encoder(projecting, path)
    assert (done.source, done.projection) == (str(path), True)
    assert agree(ours, projecting, 8)


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_folders_are_read(tmp_path, name):
    ours = tower(size=8)
    save = save_file if name.endswith("safetensors") else torch.save
    save({f"visual.{key}": value for key, value in ours.state_dict().items()}, tmp_path / name)
    projecting = with_projection()
    swap_encoder(projecting, tmp_path)
    assert agree(ours, projecting, 8)


def test_a_saved_model_is_a_source(llava, tmp_path):
    source = with_projection(image_size=8)
    source.save_pretrained(tmp_path)
    done = swap_encoder(llava, tmp_path)
    assert (done.size, done.tokens) == (8, 4)
    with torch.no_grad():
        expected = source(pixels(8), output_hidden_states=True).hidden_states[-2][:, 1:]
    assert close(language_sees(llava, 8), expected)


@pytest.mark.parametrize("asked", ["small-fare", "small"])
@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_registry_names_and_their_beginnings_are_fetched_from_the_hub(known, hub, tmp_path, asked, name):
    known(small_fare={}, other={})
    ours = tower(size=8)
    whole = {f"visual.{key}": value for key, value in ours.state_dict().items()}
    hub.files["someone/robust", name] = on_disk(tmp_path, name, whole)
    projecting = with_projection()
    assert swap_encoder(projecting, asked, revision="v1").source == "small-fare"
    assert agree(ours, projecting, 8)
    assert hub.asked[-1] == ("someone/robust", name, "v1")
    assert hub.asked[0] == ("someone/robust", "open_clip_model.safetensors", "v1")


def test_weights_in_a_format_that_nobody_here_reads_are_refused_before_anything_is_fetched(known, hub, llava):
    known(small_fare={"weights": "{source: hub, location: someone/robust, format: jax}"})
    with pytest.raises(RegistryError, match="small-fare are in the format 'jax'; open_clip and transformers are read"):
        swap_encoder(llava, "small-fare")
    assert not hub.asked


def test_hub_ids_are_fetched_and_their_activation_compared(hub, tmp_path):
    ours = tower(size=8)
    state = as_saved(to_transformers(ours.state_dict()))
    hub.files["someone/clip", "model.safetensors"] = on_disk(tmp_path, "model.safetensors", state)
    projecting = with_projection()
    assert swap_encoder(projecting, "someone/clip").source == "someone/clip"
    assert agree(ours, projecting, 8)
    assert ("someone/clip", "config.json", None) in hub.asked
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"hidden_act": "gelu"}}), "utf-8")
    hub.files["someone/clip", "config.json"] = tmp_path / "config.json"
    with pytest.raises(ModelError, match="hidden_act gelu against the model's quick_gelu"):
        swap_encoder(projecting, "someone/clip")
    with pytest.raises(RegistryError, match=r"someone/empty has none of open_clip_model\.safetensors"):
        swap_encoder(projecting, "someone/empty")


def test_offline_is_said_with_a_way_out(known, monkeypatch):
    # conftest sets HF_HUB_OFFLINE; nothing is in the cache under this name.
    known(small_fare={})
    with pytest.raises(RegistryError, match=r"someone/robust.*Offline\?.*open_clip_pytorch_model\.bin.*pass its path"):
        swap_encoder(with_projection(), "small-fare")


def test_the_registry_must_be_right_about_its_weights(known, hub, tmp_path):
    known(small_fare={"size": 16})
    hub.files["someone/robust", "open_clip_pytorch_model.bin"] = on_disk(tmp_path, "x.bin", tower(size=8).state_dict())
    with pytest.raises(RegistryError, match="image_size 8 instead of 16"):
        swap_encoder(with_projection(), "small-fare")


def test_an_unfit_entry_is_refused_before_anything_is_fetched(known, hub):
    known(small_fare={"act": "gelu"})
    with pytest.raises(ModelError, match="hidden_act gelu against the model's quick_gelu"):
        swap_encoder(with_projection(), "small-fare")
    assert not hub.asked


def test_the_shipped_registry_knows_fare_by_its_short_name(hub, llava):
    for name in ("fare4", "tecoa2", "fare4-clip"):
        with pytest.raises(ModelError, match=rf"^{name[:5]}.*num_hidden_layers 24 against the model's 3"):
            swap_encoder(llava, name)
    assert not hub.asked
    model = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig.from_pretrained(assets.CLIP, image_size=32)
    ).eval()
    done = swap_encoder(model, "demo-clip")
    assert (done.source, done.size_before, done.size, done.projection) == ("demo-clip", 32, 64, True)
    reference = transformers.CLIPModel.from_pretrained(assets.CLIP).eval()
    with torch.no_grad():
        expected = reference.visual_projection(reference.vision_model(pixels(64)).pooler_output)
        assert torch.equal(model(pixels(64)).image_embeds, expected)


def test_a_file_beside_is_no_registry_name_and_the_other_way_round(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    on_disk(tmp_path, "fare4.pt", tower(size=8).state_dict())
    (tmp_path / "fare4").write_bytes((tmp_path / "fare4.pt").read_bytes())
    assert swap_encoder(with_projection(), "fare4").size == 8
    (tmp_path / "fare4").rename("fare4-clip")
    with pytest.raises(ModelError, match="num_hidden_layers 24"):
        swap_encoder(with_projection(), "fare4-clip")
    assert swap_encoder(with_projection(), Path("fare4-clip")).size == 8
