"""What the Hugging Face adapters share: preprocessing constants, where they come from, an encoder's description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fs_plugins.adapters.hf_checkpoint import Saved, processors
from torch import nn

from fs_plugins import SettingError
from fs_plugins.layouts import Layout
from fs_plugins.vision import PixelSpace, is_a

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]

CLIP: Normalisation = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF: Normalisation = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
UNIT: Normalisation = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
FORMULAE: Normalisation = ((0.7931,) * 3, (0.1738,) * 3)

# The image processor's own constants, by the vision configuration's model_type.
DEFAULTS: dict[str, Normalisation] = {
    "clip_vision_model": CLIP,
    "siglip_vision_model": HALF,
    "siglip2_vision_model": HALF,
    "blip_vision_model": CLIP,
    "blip_2_vision_model": CLIP,
    "instructblip_vision_model": CLIP,
    "instructblipvideo_vision_model": CLIP,
    "git_vision_model": CLIP,
    "kosmos_2_vision_model": CLIP,
    "got_ocr2": CLIP,
    "got_ocr2_vision": CLIP,
    "pp_chart2table": CLIP,
    "pp_chart2table_vision": CLIP,
    "ovis2": CLIP,
    "ovis2_vision": CLIP,
    "pixtral": CLIP,
    "idefics_vision": CLIP,
    "idefics2": HALF,
    "idefics2_vision": HALF,
    "idefics3_vision": HALF,
    "smolvlm_vision": HALF,
    "internvl_vision": IMAGENET,
    "intern_vit_6b": IMAGENET,
    "qwen2_vl": CLIP,
    "qwen2_vl_vision": CLIP,
    "qwen2_5_vl": CLIP,
    "qwen2_5_vl_vision": CLIP,
    "qwen3_vl": HALF,
    "qwen3_vl_vision": HALF,
    "qwen3_vl_moe": HALF,
    "qwen3_vl_moe_vision": HALF,
    "qwen3_5": HALF,
    "qwen3_5_vision": HALF,
    "qwen3_5_moe_vision": HALF,
    "qwen4_exp_vision": HALF,
    "qwen2_5_omni_vision_encoder": CLIP,
    "qwen3_omni_moe_vision_encoder": HALF,
    "exaone4_5_vision": CLIP,
    "cohere_compass_vision": CLIP,
    "deepseek_ocr2_vision": HALF,
    "unlimited_ocr_vision": HALF,
    "pp_formulanet": FORMULAE,
    "pp_formulanet_vision": FORMULAE,
    "gemma4_vision": UNIT,
    "gemma4_unified_vision": UNIT,
    "minicpmv4_6_vision": HALF,
    "minicpmv4_7_vision": HALF,
    "minicpm_ocr_vision": HALF,
    "glm4v": CLIP,
    "glm4v_vision": CLIP,
    "glm4v_moe": CLIP,
    "glm4v_moe_vision": CLIP,
    "glm_ocr_vision": CLIP,
    "glm5_next_vision": CLIP,
    "ernie4_5_vl_moe_vision": CLIP,
    "kimi_k25_vision": HALF,
    "paddleocr_vl_vision": CLIP,
    "hunyuan_vl_vision": CLIP,
    "hy_v4_vl_vision": CLIP,
    "cosmos3_edge_vision": HALF,
    "muse_glimmer_vision": HALF,
    "muse_spark_vision": HALF,
    "molmo2_vision": HALF,
    "granite_docling_vision": CLIP,
    "radio": CLIP,
    "video_llama_3_vision": HALF,
    "inkling_vision": CLIP,
    "inkling2_vision": HALF,
    "step3p5_vision": CLIP,
    "mllama_vision_model": CLIP,
    "llama4_vision_model": HALF,
    "vit": HALF,
    "dinov2": IMAGENET,
    "dinov2_with_registers": IMAGENET,
    "dinov3_vit": IMAGENET,
    "dinov3_convnext": IMAGENET,
}


def pixel_space(
    model: Any,
    vision: Any,
    *,
    argument: str = "pixel_values",
    layout: Layout | None = None,
    net: Any = None,
    prefix: str = "",
) -> PixelSpace:
    """Mean, std and size from the model's ``image_processor``, else from the processor saved beside its checkpoint.

    Failing these from timm's record in the configuration, as ``TimmWrapper`` models have it; failing that too the
    usual ones are assumed, if there are any: the family's, or those of the architecture of ``net``, the timm model in
    the encoder. Looks on this machine only: ``enable`` never reaches for the network.

    Args:
        prefix: how the processor calls what is meant for this encoder, where a model has another (``PixelSpace``).
    """
    layout, channels = layout or Layout(), channels_of(vision)
    unknown = PixelSpace((0.5,) * channels, (0.5,) * channels, argument, "", layout=layout, prefix=prefix)
    carried = getattr(model, "image_processor", None)
    beside = [] if carried is not None else processors(model.config)
    try:
        if carried is not None:
            source = getattr(carried, "source", "the model's own image_processor")
            found = PixelSpace.from_processor(carried, source=source, channels=channels, prefix=prefix)
        else:
            told = _agreed(beside, channels, prefix) or _recorded(vision, channels)
            found = told or _usual(kind(model, vision), vision, beside, net)
    except SettingError:  # it does not rescale, say: then nobody knows, and a default would be a guess
        return unknown
    if len(found.mean) != channels:
        return unknown
    return replace(found, argument=argument, layout=layout, prefix=prefix)


def kind(model: Any, vision: Any) -> str:
    """What a vision configuration is called; one without a name of its own goes by the whole model's."""
    return str(vision.model_type or model.config.model_type)


def channels_of(vision: Any) -> int:
    """How many channels an encoder's images have, which a vision configuration writes in several ways."""
    said = [getattr(vision, name, None) for name in ("num_channels", "in_channels", "in_chans")]
    said += [(getattr(vision, "model_args", None) or {}).get("in_chans")]  # timm's own argument
    return next((count for count in said if isinstance(count, int)), 3)


def _agreed(beside: Sequence[tuple[Path, Saved | None]], channels: int, prefix: str) -> PixelSpace | None:
    """What the processors of all places that the model can have come from say, if all do, and the same."""
    spaces = [
        saved
        and PixelSpace.from_processor(
            SimpleNamespace(**saved), source=f"the image processor of {place}", channels=channels, prefix=prefix
        )
        for place, saved in beside
    ]
    first, *others = spaces or [None]
    if not first or any(not one or (one.mean, one.std) != (first.mean, first.std) for one in others):
        return None
    return replace(first, size=first.size if all(one.size == first.size for one in others if one) else None)


def _recorded(vision: Any, channels: int) -> PixelSpace | None:
    """What a configuration keeps of timm's record of its weights."""
    record = getattr(vision, "pretrained_cfg", None)
    if not isinstance(record, Mapping) or not {"mean", "std"} <= set(record):
        return None
    source = "timm's record in the configuration (pretrained_cfg)"
    return PixelSpace.from_processor(SimpleNamespace(data_config=record), source=source, channels=channels)


def _usual(kind: str, vision: Any, beside: Sequence[tuple[Path, Saved | None]], net: Any) -> PixelSpace:
    mean, std = DEFAULTS.get(kind, HALF)
    why = "no processor found beside the checkpoint"
    if any(saved for _, saved in beside):
        why = f"it can have come from {' or '.join(str(place) for place, _ in beside)}, whose processors differ"
    source = f"the default of {kind} ({why})" if kind in DEFAULTS else ""
    if net is not None:  # weights of one architecture differ in it, so this is not known
        mean, std = net.pretrained_cfg["mean"], net.pretrained_cfg["std"]
        source = f"timm's default of {vision.architecture} (no record in the configuration; {why})"
    return PixelSpace(mean, std, source=source, assumed=bool(source))


def image_size(vision: Any, space: PixelSpace | None = None) -> tuple[int, int] | None:
    """(H, W) by the processor, else by the vision configuration, which writes it as a number, a list, or not at all.

    CLIP's encoder refuses any size but its configuration's, which changes with its weights; a processor may be behind.
    """
    if space and space.size and vision.model_type != "clip_vision_model":
        return space.size
    size = getattr(vision, "image_size", None)
    if isinstance(size, int):
        return (size, size)
    return (int(size[0]), int(size[1])) if size else None


PACKAGES = ("transformers", "accelerate", "peft", "bitsandbytes")
"""What is installed where models of transformers run."""

CLIP_VISION: dict[str, type[int] | type[str]] = {
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "patch_size": int,
    "image_size": int,
    "hidden_act": str,
}
"""What the family clip_vision says of itself; others say as much of this as their configuration has."""


def architecture(vision: Any, kind: str | None = None) -> dict[str, int | str]:
    """A vision configuration in the registry's words, as far as it has them; ``kind`` is what it is called."""
    kind = kind or vision.model_type
    words: dict[str, int | str] = {"family": "clip_vision" if kind == "clip_vision_model" else kind}
    for name in CLIP_VISION:
        value = getattr(vision, name, None)
        if isinstance(value, int | str):
            words[name] = value
        elif isinstance(value, list | tuple):
            words[name] = "x".join(map(str, value))
    return words


def find(model: nn.Module, families: tuple[Any, ...]) -> Any:
    """The declared family that this model is one of, by class name, or None."""
    for family in families:
        if is_a(model, "transformers", *(name + ending for name in family.models for ending in family.endings)):
            return family
    return None
