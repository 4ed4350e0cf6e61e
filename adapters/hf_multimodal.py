"""Hugging Face models whose language side looks at images: one declaration a family.

``FAMILIES`` says by class name where each family's encoder is and what is consumed out of its output. To add a
family, add a line; if it consumes something new, a function in ``hf_readouts``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

from fs_plugins.adapters import hf_flat, hf_padded, hf_patches, timm
from fs_plugins.adapters.hf import PACKAGES, architecture, channels_of, find, image_size, kind, pixel_space
from fs_plugins.adapters.hf_layouts import Packed, PatchBatch, PatchRows, Tiles
from fs_plugins.adapters.hf_patches import Cubes
from fs_plugins.adapters.hf_readouts import (
    Consumed,
    adapted,
    beside,
    deepstack,
    dense,
    folded,
    internvl,
    last,
    layers,
    mapped,
    merged,
    perceived,
    projected,
    sam,
    scattered,
    visual_words,
)
from torch import nn

from fs_plugins import hookimpl
from fs_plugins.layouts import Layout
from fs_plugins.vision import Field, VisionCall, is_a, unwrapped


@dataclass(frozen=True)
class Family:
    """A family: the beginnings of its class names, and tower -> (what is consumed, the model's pixel arguments)."""

    models: tuple[str, ...]
    towers: Mapping[str, tuple[Consumed, tuple[str, ...]]]
    endings: tuple[str, ...] = ("ForConditionalGeneration", "Model")


_ANY_SIZE = ("idefics2", "step3", "deepseek_ocr2", "unlimited_ocr")
"""How the model types of encoders begin that take whole images of any size."""

_IMAGES = ("pixel_values",)
_BOTH = ("pixel_values", "pixel_values_videos")

FAMILIES = (
    Family(("Llava", "LlavaNext", "AyaVision"), {"vision_tower": (layers, _IMAGES)}),
    Family(("Granite4Vision",), {"vision_tower": (scattered, _IMAGES)}),
    Family(("VipLlava",), {"vision_tower": (partial(layers, strategy="default"), _IMAGES)}),
    Family(("Mistral3", "MistralLarge4", "Aria"), {"vision_tower": (partial(layers, strategy="full"), _IMAGES)}),
    Family(("LlavaOnevision", "LlavaNextVideo"), {"vision_tower": (layers, _BOTH)}),
    Family(
        ("VideoLlava",),
        {
            "image_tower": (layers, ("pixel_values_images",)),
            "video_tower": (partial(layers, strategy="full"), ("pixel_values_videos",)),
        },
    ),
    Family(("Blip2", "InstructBlip", "InstructBlipVideo"), {"vision_model": (last, _IMAGES)}),
    Family(
        ("Blip", "Blip2"),
        {"vision_model": (last, _IMAGES)},
        endings=("ForConditionalGeneration", "ForQuestionAnswering", "ForImageTextRetrieval"),
    ),
    Family(("PaliGemma", "Gemma3", "Cohere2Vision", "Lfm2Vl"), {"vision_tower": (last, _IMAGES)}),
    Family(("Gemma4", "MiniCPMV4_6", "MiniCPMV4_7", "MiniCPMOcr"), {"vision_tower": (last, _BOTH)}),
    Family(("DiffusionGemma",), {"encoder.vision_tower": (last, _IMAGES)}, endings=("ForBlockDiffusion", "Model")),
    Family(("DiffusionGemmaEncoder",), {"vision_tower": (last, _IMAGES)}, endings=("Model",)),
    Family(
        ("T5Gemma2",),
        {"encoder.vision_tower": (last, _IMAGES)},
        endings=("ForConditionalGeneration", "Model", "ForSequenceClassification", "ForTokenClassification"),
    ),
    Family(("T5Gemma2",), {"vision_tower": (last, _IMAGES)}, endings=("Encoder",)),
    Family(("Gemma4Unified",), {"embed_vision": (projected, _BOTH)}),
    Family(("PI0",), {"vlm.vision_tower": (last, _IMAGES)}),
    Family(("PPFormulaNet",), {"encoder": (projected, _IMAGES)}),
    Family(("VisionEncoderDecoder",), {"encoder": (last, _IMAGES)}, endings=("Model",)),
    Family(("DeepseekOcr2",), {"vision_tower": (last, ("pixel_values", "pixel_values_local"))}),
    Family(("UnlimitedOcr",), {"vision_tower": (beside, ("pixel_values", "pixel_values_local"))}),
    Family(("Idefics2", "Idefics3", "SmolVLM", "Mllama"), {"vision_model": (last, _IMAGES)}),
    Family(("Llama4", "DeepseekVL", "Janus", "Kosmos2"), {"vision_model": (last, _IMAGES)}),
    Family(
        ("DeepseekVLHybrid",),
        {"vision_model": (last, _IMAGES), "high_res_vision_model": (sam, ("high_res_pixel_values",))},
    ),
    Family(("Idefics",), {"vision_model": (last, _IMAGES)}, endings=("ForVisionText2Text", "Model")),
    Family(("Git",), {"image_encoder": (last, _IMAGES)}, endings=("ForCausalLM", "Model")),
    Family(("LightOnOcr",), {"vision_encoder": (last, _IMAGES)}),
    Family(("Ovis2",), {"vision_tower": (visual_words, _IMAGES)}),
    Family(("FastVlm", "Gemma3n", "GotOcr2", "Florence2"), {"vision_tower": (mapped, _IMAGES)}),
    Family(("PerceptionLM",), {"vision_tower": (perceived, _BOTH)}),
    Family(("InternVL", "QianfanOCR"), {"vision_tower": (internvl, _IMAGES)}),
    Family(("Qwen2VL", "Qwen2_5_VL", "Qwen2_5OmniThinker", "Exaone4_5_"), {"visual": (merged, _BOTH)}),
    Family(("Qwen3_5", "Qwen3_5Moe", "Qwen4Exp"), {"visual": (merged, _BOTH)}),
    Family(("Glm4v", "Glm4vMoe", "Glm46V", "GlmOcr", "Glm5Next"), {"visual": (merged, _BOTH)}),
    Family(("Qwen3VL", "Qwen3VLMoe", "Qwen3OmniMoeThinker", "Cosmos3Omni"), {"visual": (deepstack, _BOTH)}),
    Family(("Ernie4_5_VLMoe", "Lfm3Vl"), {"vision_tower": (last, _BOTH)}),
    Family(("PaddleOCRVL", "Cosmos3Edge"), {"visual": (last, _BOTH)}),
    Family(("Kimi_K25", "Dots3Note"), {"vision_tower": (merged, _BOTH)}),
    Family(("HyperCLOVAXVisionV2",), {"vision_model": (merged, _BOTH)}),
    Family(("HunYuanVL", "Inkling", "Inkling2", "Inkling2Loop"), {"vision_tower": (projected, _IMAGES)}),
    Family(("HYV4VL",), {"vision_tower": (projected, _BOTH)}),
    Family(("VideoLlama3",), {"vision_model": (last, _BOTH)}),
    Family(("MuseGlimmer", "MuseSpark"), {"vision_tower": (folded, _BOTH)}),
    Family(("Step3p7",), {"vision_model": (partial(last, times=4), _IMAGES)}),
    Family(("CohereCompass",), {"visual": (deepstack, _BOTH)}),
    Family(("GraniteDocling",), {"vision_model": (deepstack, _IMAGES)}),
    Family(("Molmo2",), {"vision_tower": (adapted, _BOTH)}),
    Family(("NemotronH_Omni_Reasoning_V3",), {"vision_model": (dense, _BOTH)}, endings=("",)),
)

OMNI = ("Qwen2_5OmniForConditionalGeneration", "Qwen3OmniMoeForConditionalGeneration")
"""Models that also speak aloud; what sees in them is their thinker."""

_CODES = "images become discrete codes, and an average of codes is no code"
_STANDARDISED = (
    "its processor takes each picture's own mean from it and divides it by its own deviation, so nobody who sees the "
    "pixels knows how strong a noise is in the picture"
)
_MINGLED = "its vision encoder lets all images of a call look at one another, so noisy copies of an image would too"

REFUSED: Mapping[str, str] = {
    "FuyuForCausalLM": "it has no vision encoder: one linear layer takes patches of pixels into the language model",
    **dict.fromkeys(
        ("Kosmos2_5ForConditionalGeneration", "Kosmos2_5Model", "Pix2StructForConditionalGeneration"), _STANDARDISED
    ),
    **dict.fromkeys(("MiniMaxM3SparseForConditionalGeneration", "MiniMaxM3VLModel"), _MINGLED),
    **dict.fromkeys(("ChameleonForConditionalGeneration", "ChameleonModel"), _CODES),
    **dict.fromkeys(("Emu3ForConditionalGeneration", "Emu3Model"), _CODES),
    **dict.fromkeys(("Apertus1p5ForConditionalGeneration", "Apertus1p5Model"), _CODES),
    **dict.fromkeys(
        ("UdopForConditionalGeneration", "UdopModel", "UdopEncoderModel"),
        "it has no vision encoder: one linear layer makes patches of a page into tokens, which the language encoder "
        "reads together with the words that lie on them",
    ),
    **dict.fromkeys(("EvollaForProteinText2Text", "EvollaModel"), "it reads proteins, and looks at no images"),
    **dict.fromkeys(("Mistral4ForCausalLM", "Mistral4Model"), "it reads text, and looks at no images"),
}
"""Class name -> why there is no encoder to smooth, or none that could be."""


@hookimpl
def fs_packages() -> tuple[str, ...]:
    return PACKAGES


@hookimpl
def fs_unclaimed(model: nn.Module) -> str | None:
    return refusal(unwrapped(model))


def refusal(whole: Any) -> str | None:
    """Why models of this class cannot be smoothed, for those that cannot."""
    why = next((why for name, why in REFUSED.items() if is_a(whole, "transformers", name)), None)
    return why and f"{type(whole).__name__} cannot be smoothed: {why}."


@hookimpl
def fs_vision_call(model: nn.Module) -> list[VisionCall] | None:
    """Language models of transformers that look at images, by class (see FAMILIES): one call for each vision tower."""
    whole = unwrapped(model)
    seeing = whole.thinker if is_a(whole, "transformers", *OMNI) else whole
    family = find(seeing, FAMILIES)
    if family is None:
        return None
    towers = {name: tower for name in family.towers if (tower := _tower(seeing, name)) is not None}
    return [_call(whole, seeing.config, tower, *family.towers[name]) for name, tower in towers.items()] or None


def _call(whole: Any, config: Any, module: nn.Module, consumed: Consumed, inputs: tuple[str, ...]) -> VisionCall:
    vision: Any = getattr(module, "config", None) or config.vision_config
    net = getattr(module, "timm_model", None)
    layout, argument = layout_of(vision)
    prefix = inputs[0].removesuffix(_IMAGES[0]) if inputs[0].endswith(_IMAGES[0]) else ""
    space = pixel_space(whole, vision, argument=argument, layout=layout, net=net, prefix=prefix)
    readouts = consumed(config, vision)
    fixed = timm.image_size(net) if net is not None else None
    if isinstance(layout, Cubes):
        fixed = (layout.patch, layout.patch)
    in_patches = isinstance(layout, Packed | PatchBatch | PatchRows)
    any_size = in_patches or vision.model_type.startswith(_ANY_SIZE)
    deep = any(isinstance(step, Field) and step.name == "hidden_states" for r in readouts for step in r.path)
    return VisionCall(
        module=module,
        pixels=space,
        readouts=readouts,
        image_size=None if any_size else fixed or image_size(vision, space),
        architecture=architecture(vision, kind(whole, vision)) if net is None else timm.architecture(net),
        kwargs=_asked(config, deep),
        inputs=inputs,
    )


def _asked(config: Any, deep: bool) -> dict[str, Any]:
    """What the encoder is to be called with, where the model itself does not say."""
    asked: dict[str, Any] = {"output_hidden_states": True} if deep else {}
    if getattr(config, "downsample_mode", None) == "4x":  # MiniCPM-V
        asked["use_vit_merger"] = False
    return asked


def _tower(whole: Any, name: str) -> nn.Module | None:
    """``model.model.<name>``, or ``model.<name>`` on a core model and on older classes; Git's model is ``git``.

    A name may be a path.
    """
    core = getattr(whole, "model", None) or getattr(whole, whole.base_model_prefix, None)
    found = (reduce(lambda module, step: getattr(module, step, None), name.split("."), root) for root in (core, whole))
    return next((tower for tower in found if tower is not None), None)


def layout_of(vision: Any) -> tuple[Layout, str]:
    """How a vision configuration's encoder takes pixels, and the argument's name."""
    layouts = {**hf_patches.LAYOUTS, **hf_padded.LAYOUTS, **hf_flat.LAYOUTS}
    if vision.model_type in layouts:
        layout, argument = layouts[vision.model_type]
        return layout(vision, channels_of(vision)), argument
    if hasattr(vision, "temporal_patch_size"):
        rows = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size, channels_of(vision))
        return PatchRows(*rows), "hidden_states"
    if vision.model_type == "pixtral":
        return Packed(), "pixel_values"
    if vision.model_type == "mllama_vision_model":
        return Tiles(vision.max_num_tiles), "pixel_values"
    if vision.model_type == "florence_vision":
        return Layout(), "hidden_states"
    return Layout(), "pixel_values"
