"""Hugging Face image encoders that are compared with text or used alone: CLIP, SigLIP, SigLIP2, BLIP."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from fs_plugins.adapters.hf import CLIP_VISION, PACKAGES, architecture, find, image_size, pixel_space
from fs_plugins.adapters.hf_layouts import PatchBatch
from torch import nn

from fs_plugins import hookimpl
from fs_plugins.layouts import Layout
from fs_plugins.vision import Field, FlattenedTokens, LinearEmbedding, Readout, VisionCall, unwrapped


@dataclass(frozen=True)
class Encoder:
    """A family: its classes, where the encoder is in them, and the bias-free projection after it, if any."""

    models: tuple[str, ...]
    module: str | None = "vision_model"
    projection: str | None = None
    patches: bool = False
    endings: tuple[str, ...] = ("",)


ENCODERS = (
    Encoder(("CLIPModel", "CLIPVisionModelWithProjection", "BlipModel"), projection="visual_projection"),
    Encoder(("SiglipModel",)),
    Encoder(("Siglip2Model",), patches=True),
    Encoder(("CLIPVisionModel", "SiglipVisionModel"), module=None),
    Encoder(("Siglip2VisionModel",), module=None, patches=True),
)


@hookimpl
def fs_packages() -> tuple[str, ...]:
    return PACKAGES


@hookimpl
def fs_encoder_families() -> dict[str, dict[str, type[int] | type[str]]]:
    return {"clip_vision": CLIP_VISION}


@hookimpl
def fs_vision_call(model: nn.Module) -> VisionCall | None:
    """Image encoders of transformers, by class (CLIP, SigLIP, SigLIP2, BLIP): the pooled output, and its projection."""
    whole = unwrapped(model)
    family = find(whole, ENCODERS)
    if family is None:
        return None
    module = getattr(whole, family.module) if family.module else whole
    config = getattr(whole.config, "vision_config", whole.config)
    pooled = getattr(config, "vision_use_head", True)
    name, tokens = ("pooler_output", 0) if pooled else ("last_hidden_state", None)
    projection = getattr(whole, family.projection) if family.projection else None
    space = pixel_space(whole, config, layout=_patches(module, config) if family.patches else Layout())
    embed: Any = FlattenedTokens() if projection is None else LinearEmbedding(name, projection)
    return VisionCall(
        module=module,
        pixels=space,
        readouts=(Readout(name, (Field(name, int(pooled)),), width=config.hidden_size, tokens=tokens),),
        image_size=None if family.patches else image_size(config, space),
        architecture=architecture(config),
        embed=embed,
    )


def _patches(module: Any, config: Any) -> PatchBatch:
    """SigLIP2's mask is called attention_mask inside Siglip2Model on transformers 4."""
    known = inspect.signature(module.forward).parameters
    mask = "pixel_attention_mask" if "pixel_attention_mask" in known else "attention_mask"
    return PatchBatch(config.patch_size, config.num_channels, mask)
