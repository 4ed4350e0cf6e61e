"""The original LLaVA (PyPI ``llava-torch``): a Hugging Face CLIP encoder inside its CLIPVisionTower."""

from __future__ import annotations

from typing import Any

from fs_plugins.adapters.hf import CLIP, architecture, image_size
from torch import nn

from fs_plugins import ModelError, hookimpl
from fs_plugins.vision import Field, PixelSpace, Readout, VisionCall, is_a, unwrapped


@hookimpl
def fs_packages() -> tuple[str, ...]:
    return ("llava-torch", "transformers")


@hookimpl
def fs_vision_call(model: nn.Module) -> VisionCall | None:
    """LlavaLlama, LlavaMpt and LlavaMistral of the package llava: the selected layer, without class token for "patch".

    Its tower's ``forward`` is decorated with ``no_grad``, so the tower is the gradient scope.

    Raises:
        ModelError: the vision tower has not been loaded yet.
    """
    llava = unwrapped(model)
    if not is_a(llava, "llava", "LlavaMetaForCausalLM", "LlavaMetaModel"):
        return None
    tower: Any = llava.get_vision_tower()
    if not tower.is_loaded:
        raise ModelError("This LLaVA's vision tower is not loaded. Call model.get_vision_tower().load_model() first.")
    encoder = tower.vision_tower
    vision = encoder.config
    skip = 1 if tower.select_feature == "patch" else 0
    layer = tower.select_layer
    return VisionCall(
        module=encoder,
        pixels=_pixel_space(tower),
        readouts=(
            Readout(
                f"hidden_states[{layer}]" + ("[1:]" if skip else ""),
                (Field("hidden_states", 2), layer),
                width=vision.hidden_size,
                tokens=(vision.image_size // vision.patch_size) ** 2 + 1 - skip,
                skip=skip,
            ),
        ),
        image_size=image_size(vision),
        architecture=architecture(vision),
        kwargs={"output_hidden_states": True},
        inputs=("images",),
        grad_scope=tower,
    )


def _pixel_space(tower: Any) -> PixelSpace:
    if getattr(tower, "image_processor", None) is not None:
        return PixelSpace.from_processor(tower.image_processor, source="LLaVA's own image_processor")
    mean, std = CLIP
    return PixelSpace(mean, std, source="the default of CLIP (the tower has no image_processor)", assumed=True)
