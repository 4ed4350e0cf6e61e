"""Hugging Face models whose language side looks at images: one declaration a family.

``FAMILIES`` says by class name where each family's encoder is and what is consumed out of its output. To add a
family, add a line; if it consumes something new, a function beside ``layers``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

from fs_plugins.adapters import hf_padded, hf_patches, timm
from fs_plugins.adapters.hf import PACKAGES, architecture, channels_of, find, image_size, kind, pixel_space
from fs_plugins.adapters.hf_layouts import Packed, PatchBatch, PatchRows, Tiles
from fs_plugins.adapters.hf_patches import Cubes
from torch import nn

from fs_plugins import hookimpl
from fs_plugins.layouts import Layout
from fs_plugins.vision import Field, Readout, VisionCall, is_a, unwrapped

Consumed = Callable[[Any, Any], tuple[Readout, ...]]


def layers(config: Any, vision: Any, *, strategy: str | None = None) -> tuple[Readout, ...]:
    """LLaVA and its kin: hidden states of the layers asked for, without the class token by "default".

    ``strategy`` is for families whose code settles it and whose configuration does not say.
    """
    asked = next(
        value
        for name in ("vision_feature_layer", "vision_feature_layers")
        if (value := getattr(config, name, None)) is not None
    )
    skip = 1 if (strategy or config.vision_feature_select_strategy) == "default" else 0
    return tuple(_layer(vision, layer, skip) for layer in ([asked] if isinstance(asked, int) else asked))


def scattered(config: Any, vision: Any) -> tuple[Readout, ...]:
    """Granite 4 Vision: hidden states of the layers whose features go into layers of the language model."""
    skip = 1 if config.vision_feature_select_strategy == "default" else 0
    asked = [layer for layer, _ in config.deepstack_layer_map] + [config.spatial_vision_layer]
    each = {layer % (vision.num_hidden_layers + 1): layer for layer in asked}
    return tuple(_layer(vision, layer, skip) for layer in each.values())


def last(config: Any, vision: Any, *, times: int = 1) -> tuple[Readout, ...]:
    """The encoder's last hidden state, with its class token if it has one; ``times`` as wide as its layers."""
    outermost = getattr(vision, "encoder_config", vision)  # DeepSeek-OCR 2 has an encoder behind an encoder
    projected = (getattr(vision, name, None) for name in ("projector_output_dim", "vision_output_dim"))
    width = next((width for width in projected if width), outermost.hidden_size * times)
    return (Readout("last_hidden_state", (Field("last_hidden_state", 0),), width=width, tokens=None),)


def mapped(config: Any, vision: Any) -> tuple[Readout, ...]:
    """FastVLM, Gemma 3n, GOT-OCR and Florence: the last map that a tower makes, whose places are the tokens."""
    widths = (getattr(vision, name, None) for name in ("output_channels", "embed_dim", "hidden_size"))
    width = next(width for width in widths if width)
    width = width if isinstance(width, int) else width[-1]  # each stage's
    name = "last_hidden_state"
    return (Readout(name, (Field(name, 0),), width=width, tokens=None, channels_first=True),)


def sam(config: Any, vision: Any) -> tuple[Readout, ...]:
    """DeepSeek-VL's tower for fine detail: its last map, and the tokens of its first layer that looks everywhere."""
    layer = vision.global_attn_indexes[0] + 1
    name = f"hidden_states[{layer}]"
    inner = Readout(name, (Field("hidden_states", 1), layer), width=vision.hidden_size, tokens=None)
    return (*mapped(config, vision), inner)


def visual_words(config: Any, vision: Any) -> tuple[Readout, ...]:
    """Ovis: each token's weights over a table of embeddings. Transformers 4 returns them bare."""
    width = vision.vocab_size - vision.num_visual_indicator_tokens
    return (Readout("pooler_output", (Field("pooler_output", _bare(0, 1)),), width=width, tokens=None),)


def perceived(config: Any, vision: Any) -> tuple[Readout, ...]:
    """PerceptionLM: the tokens of a timm transformer, without its class token if it has one."""
    skip = 1 if config.vision_use_cls_token else 0
    name, width = "last_hidden_state" + ("[1:]" if skip else ""), vision.model_args["embed_dim"]
    return (Readout(name, (Field("last_hidden_state", 0),), width=width, tokens=None, skip=skip),)


def internvl(config: Any, vision: Any) -> tuple[Readout, ...]:
    """InternVL: the normalised last hidden state for layer -1, else that layer; no class token by "default"."""
    if config.vision_feature_layer != -1:
        return layers(config, vision)
    skip = 1 if config.vision_feature_select_strategy == "default" else 0
    name = "last_hidden_state" + ("[1:]" if skip else "")
    return (Readout(name, (Field("last_hidden_state", 0),), width=vision.hidden_size, tokens=None, skip=skip),)


def merged(config: Any, vision: Any) -> tuple[Readout, ...]:
    """Qwen and GLM: tokens after the patch merger. Transformers 4 returns them bare, 5 as the pooler's output."""
    width = getattr(vision, "out_hidden_size", None) or vision.hidden_size
    return (Readout("pooler_output", (Field("pooler_output", _bare(0, 1)),), width=width, tokens=None),)


def folded(config: Any, vision: Any) -> tuple[Readout, ...]:
    """Muse: the last hidden state, the tokens of a block of patches side by side."""
    return last(config, vision, times=vision.merge_size**2)


def projected(config: Any, vision: Any) -> tuple[Readout, ...]:
    """Tokens that the encoder itself brings to the width of the language model."""
    named = (getattr(vision, name, None) for name in ("text_hidden_size", "decoder_hidden_size"))
    width = next(filter(None, named), None) or config.text_config.hidden_size
    return (Readout("pooler_output", (Field("pooler_output", 1),), width=width, tokens=None),)


def deepstack(config: Any, vision: Any) -> tuple[Readout, ...]:
    """Qwen3-VL: the merged tokens, and those of the layers that go deep into the language model."""
    return merged(config, vision) + tuple(
        Readout(
            f"deepstack_features[{i}]",
            (Field("deepstack_features", _bare(1, 4)), i),
            width=vision.out_hidden_size,
            tokens=None,
        )
        for i in range(len(vision.deepstack_visual_indexes))
    )


@dataclass(frozen=True)
class Family:
    """A family: the beginnings of its class names, and tower -> (what is consumed, the model's pixel arguments)."""

    models: tuple[str, ...]
    towers: Mapping[str, tuple[Consumed, tuple[str, ...]]]
    endings: tuple[str, ...] = ("ForConditionalGeneration", "Model")


_IMAGES = ("pixel_values",)
_BOTH = ("pixel_values", "pixel_values_videos")

FAMILIES = (
    Family(("Llava", "LlavaNext", "AyaVision"), {"vision_tower": (layers, _IMAGES)}),
    Family(("Granite4Vision",), {"vision_tower": (scattered, _IMAGES)}),
    Family(("VipLlava",), {"vision_tower": (partial(layers, strategy="default"), _IMAGES)}),
    Family(("Mistral3", "Aria"), {"vision_tower": (partial(layers, strategy="full"), _IMAGES)}),
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
    Family(("Gemma4", "MiniCPMV4_6"), {"vision_tower": (last, _BOTH)}),
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
    Family(("Ernie4_5_VLMoe",), {"vision_tower": (last, _BOTH)}),
    Family(("PaddleOCRVL", "Cosmos3Edge"), {"visual": (last, _BOTH)}),
    Family(("Kimi_K25",), {"vision_tower": (merged, _BOTH)}),
    Family(("HunYuanVL", "Inkling"), {"vision_tower": (projected, _IMAGES)}),
    Family(("VideoLlama3",), {"vision_model": (last, _BOTH)}),
    Family(("MuseGlimmer",), {"vision_tower": (folded, _BOTH)}),
    Family(("Step3p7",), {"vision_model": (partial(last, times=4), _IMAGES)}),
    Family(("CohereCompass",), {"visual": (deepstack, _BOTH)}),
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
    any_size = in_patches or vision.model_type.startswith(("idefics2", "step3", "deepseek_ocr2"))
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
    layouts = {**hf_patches.LAYOUTS, **hf_padded.LAYOUTS}
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


def _layer(vision: Any, layer: int, skip: int) -> Readout:
    return Readout(
        f"hidden_states[{layer}]" + ("[1:]" if skip else ""),
        (Field("hidden_states", 2 if _is_pooled(vision) else 1), layer),
        width=vision.hidden_size,
        tokens=_tokens(vision, skip),
        skip=skip,
    )


def _is_pooled(vision: Any) -> bool:
    """Whether the tower's output has a pooled vector before its hidden states; plain tuples leave out what is None."""
    bare = ("pixtral", "idefics3_vision", "internvl_vision", "qianfan_ocr_vision")
    return vision.model_type not in bare and getattr(vision, "vision_use_head", True)


def _tokens(vision: Any, skip: int) -> int | None:
    """L of a fixed-size CLIP or SigLIP tower, as consumed."""
    if vision.model_type not in ("clip_vision_model", "siglip_vision_model"):
        return None
    class_token = 1 if vision.model_type == "clip_vision_model" else 0
    return (vision.image_size // vision.patch_size) ** 2 + class_token - skip


def _bare(before: int, since: int) -> int:
    """A field's position in plain outputs: transformers 4 (``before``) or 5 (``since``)."""
    import transformers

    return before if transformers.__version__.startswith("4.") else since
