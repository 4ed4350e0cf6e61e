"""Hugging Face LLaVA: the language side consumes hidden states of a CLIP tower."""

from __future__ import annotations

from fs_plugins.adapters.hf_clip import CLIP_MEAN, CLIP_STD, architecture, pixel_space
from torch import nn

from fs_plugins import hookimpl
from fs_plugins.vision import Field, Readout, VisionCall, is_a, unwrapped


@hookimpl
def fs_vision_call(model: nn.Module) -> VisionCall | None:
    """Claim a LLaVA with a CLIP tower: every consumed layer, without the class token where it is dropped."""
    llava = unwrapped(model)
    if not is_a(llava, "transformers", "LlavaForConditionalGeneration", "LlavaModel"):
        return None
    config, vision = llava.config, llava.config.vision_config
    if vision.model_type != "clip_vision_model":
        return None
    core = getattr(llava, "model", llava)
    layers = config.vision_feature_layer
    skip = 1 if config.vision_feature_select_strategy == "default" else 0
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1 - skip
    return VisionCall(
        module=core.vision_tower,
        pixels=pixel_space(llava, CLIP_MEAN, CLIP_STD, "CLIP"),
        readouts=tuple(
            Readout(
                f"hidden_states[{layer}]" + ("[1:]" if skip else ""),
                (Field("hidden_states", 2), layer),
                width=vision.hidden_size,
                tokens=tokens,
                skip=skip,
            )
            for layer in ([layers] if isinstance(layers, int) else layers)
        ),
        image_size=(vision.image_size, vision.image_size),
        architecture=architecture(vision),
        kwargs={"output_hidden_states": True},
    )
