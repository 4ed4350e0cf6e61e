"""Hugging Face CLIP: CLIPModel, CLIPVisionModelWithProjection (zero-shot) and CLIPVisionModel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn

from fs_plugins import hookimpl
from fs_plugins.vision import Field, FlattenedTokens, LinearEmbedding, PixelSpace, Readout, VisionCall, is_a, unwrapped

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_POOLED = "pooler_output"


@hookimpl
def fs_vision_call(model: nn.Module) -> VisionCall | None:
    """Claim a CLIP model: the tower's pooled output, embedded by the visual projection where there is one."""
    clip = unwrapped(model)
    if is_a(clip, "transformers", "CLIPModel", "CLIPVisionModelWithProjection"):
        embed: Any = LinearEmbedding(_POOLED, clip.visual_projection)
        module = clip.vision_model
    elif is_a(clip, "transformers", "CLIPVisionModel"):
        module, embed = clip, FlattenedTokens()
    else:
        return None
    config = getattr(clip.config, "vision_config", clip.config)
    return VisionCall(
        module=module,
        pixels=pixel_space(clip, CLIP_MEAN, CLIP_STD, "CLIP"),
        readouts=(Readout(_POOLED, (Field(_POOLED, 1),), width=config.hidden_size),),
        image_size=(config.image_size, config.image_size),
        architecture=architecture(config),
        embed=embed,
    )


def pixel_space(model: Any, mean: tuple[float, ...], std: tuple[float, ...], family: str) -> PixelSpace:
    """Mean and std from the processor saved beside the checkpoint, else the family's own.

    Looks on this machine only: ``enable`` never reaches for the network.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    checkpoint = getattr(model.config, "_name_or_path", "")
    if checkpoint:
        try:
            saved, _ = ImageProcessingMixin.get_image_processor_dict(checkpoint, local_files_only=True)
            return PixelSpace.from_processor(SimpleNamespace(**saved), source=f"the image processor of {checkpoint}")
        except (OSError, ValueError):
            pass
    return PixelSpace(mean, std, source=f"the default of {family} (no processor found beside the checkpoint)")


def architecture(vision_config: Any) -> dict[str, int | str]:
    """A CLIP vision configuration in the registry's words."""
    numbers = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "patch_size",
        "image_size",
    )
    return {
        "family": "clip_vision",
        **{name: getattr(vision_config, name) for name in numbers},
        "hidden_act": vision_config.hidden_act,
    }
