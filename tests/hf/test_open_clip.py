"""The real open_clip's models."""

from __future__ import annotations

import pytest
import torch
from open_clip_tower import close, norms_around_one, pixels, same_bits, tower, with_projection
from torch import nn

from fs_plugins import ModelError, SettingError, zero_shot
from fs_plugins.hf.conversion import to_open_clip, to_transformers
from fs_plugins.hf.towers import swap_encoder


@pytest.fixture(scope="module")
def open_clip():
    return pytest.importorskip("open_clip", exc_type=ImportError)


def open_clip_model(open_clip, *, quick: bool) -> nn.Module:
    vision = {"image_size": 24, "layers": 3, "width": 32, "patch_size": 4, "head_width": 8, "mlp_ratio": 1.5}
    text = {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 4, "layers": 1}
    return norms_around_one(open_clip.CLIP(24, vision, text, quick_gelu=quick), seed=5)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_a_real_open_clip_model_gives_its_encoder(open_clip, tmp_path, act):
    source = open_clip_model(open_clip, quick=act == "quick_gelu")
    torch.save(source.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    torch.save(source.visual.state_dict(), tmp_path / "visual.pt")
    for path in (tmp_path, tmp_path / "visual.pt"):
        projecting = with_projection(hidden_act=act)
        assert swap_encoder(projecting, path).tokens == 36
        with torch.no_grad():
            assert close(source.encode_image(pixels(24)), projecting(pixels(24)).image_embeds)


def test_a_real_open_clip_model_takes_the_encoder_back(open_clip):
    theirs, source = with_projection(image_size=24), open_clip_model(open_clip, quick=True)
    source.visual.load_state_dict(to_open_clip(theirs.state_dict()))
    with torch.no_grad():
        assert close(source.encode_image(pixels(24)), theirs(pixels(24)).image_embeds)
    state = source.visual.state_dict()
    assert same_bits(to_open_clip(to_transformers(source.state_dict())), state)


@pytest.mark.parametrize("bias", [None, -2.0])
def test_zero_shot_logits_are_the_models_own(open_clip, bias):
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 1}
    vision = {"image_size": 24, "layers": 2, "width": 32, "patch_size": 4, "head_width": 8}
    model = norms_around_one(open_clip.CLIP(24, vision, text, init_logit_bias=bias), seed=5).eval()
    model.visual.preprocess_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "size": (24, 24)}
    tokenizer, images = open_clip.SimpleTokenizer(), torch.rand(2, 3, 24, 24)
    with torch.no_grad():
        wanted, _ = model.get_logits((images - 0.5) / 0.25, tokenizer(["a photo of a cat", "a photo of a dog"]))
    torch.testing.assert_close(zero_shot(model, ["cat", "dog"], tokenizer=tokenizer)(images), wanted)
    with pytest.raises(SettingError, match=r"open_clip\.get_tokenizer"):
        zero_shot(model, ["cat", "dog"])


def test_open_clips_own_models_are_told_their_way(open_clip):
    with pytest.raises(ModelError, match=r"CLIP has none.*model\.visual\.load_state_dict"):
        swap_encoder(open_clip_model(open_clip, quick=True), tower().state_dict())
