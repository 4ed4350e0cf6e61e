"""open_clip's layout and transformers': the same numbers, the same function, and back."""

from __future__ import annotations

import pytest
import torch
from open_clip_tower import agree, as_saved, same_bits, tower, with_projection
from safetensors.torch import load_file, save_file

from fs_plugins import ModelError
from fs_plugins.hf.conversion import to_open_clip, to_transformers


def test_open_clips_weights_compute_the_same_in_transformers():
    ours, theirs = tower(), with_projection()
    assert not agree(ours, theirs, 16)
    theirs.load_state_dict(as_saved(to_transformers(ours.state_dict())))
    assert agree(ours, theirs, 16)


def test_transformers_weights_compute_the_same_in_open_clip():
    ours, theirs = tower(), with_projection()
    ours.load_state_dict(to_open_clip(theirs.state_dict()))
    assert agree(ours, theirs, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_either_conversion_undoes_the_other_bit_for_bit(dtype):
    state = tower().to(dtype).state_dict()
    assert same_bits(to_open_clip(to_transformers(state)), state)
    core = to_transformers(state)
    assert same_bits(to_transformers(to_open_clip(core)), core)
    assert "visual_projection.weight" in core
    del state["proj"], core["visual_projection.weight"]
    assert same_bits(to_transformers(state), core)
    assert same_bits(to_open_clip(core), state)


def test_the_encoder_is_found_inside_a_whole_model(clip):
    ours, theirs = tower(), clip.state_dict()
    whole = {f"visual.{name}": value for name, value in ours.state_dict().items()} | {"logit_scale": torch.ones(())}
    whole["transformer.resblocks.0.ln_1.weight"] = torch.ones(8)  # the text's
    assert same_bits(to_transformers(whole), to_transformers(ours.state_dict()))
    expected = to_open_clip({name: value for name, value in theirs.items() if name.startswith("vis")})
    assert same_bits(to_open_clip(theirs), expected)
    assert "proj" in expected
    ids = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    assert same_bits(to_open_clip(theirs | ids), expected)


def test_converted_weights_can_be_saved(tmp_path):
    converted = to_transformers(tower().state_dict())
    save_file(converted, tmp_path / "x.safetensors")
    assert same_bits(load_file(tmp_path / "x.safetensors"), converted)


def test_what_does_not_convert_is_named():
    state = tower().state_dict()
    for extra in ("transformer.resblocks.0.ls_1.gamma", "attn_pool.query", "transformer.resblocks.1.ln_1_weight"):
        with pytest.raises(ModelError, match=extra):
            to_transformers(state | {extra: torch.ones(4)})
    core = to_transformers(state)
    with pytest.raises(ModelError, match=r"head\.weight"):
        to_open_clip(core | {"head.weight": torch.ones(4)})
    del core["encoder.layers.1.self_attn.v_proj.bias"]
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_proj\.bias"):
        to_open_clip(core)
    with pytest.raises(ModelError, match=r"no CLIP vision encoder of open_clip.*stem\.weight"):
        to_transformers({"stem.weight": torch.ones(4)})
    with pytest.raises(ModelError, match=r"several vision encoders.*a\., b\."):
        to_transformers({f"{side}.{name}": value for side in "ab" for name, value in state.items()})
