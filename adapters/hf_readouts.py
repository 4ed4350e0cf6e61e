"""What the language side of Hugging Face models consumes out of a vision encoder's output.

Each function takes the model's configuration and the encoder's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fs_plugins.vision import Field, Readout

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


def beside(config: Any, vision: Any) -> tuple[Readout, ...]:
    """Unlimited-OCR: tokens of an encoder behind an encoder, each beside the first one's of the same place."""
    width = vision.encoder_config.hidden_size + vision.sam_config.downsample_channels[-1]
    return (Readout("last_hidden_state", (Field("last_hidden_state", 0),), width=width, tokens=None),)


def adapted(config: Any, vision: Any) -> tuple[Readout, ...]:
    """Molmo 2: what comes out of the layers that its adapter pools, the first of which is layer 0."""
    asked = [layer + 1 if layer >= 0 else layer for layer in config.adapter_config.vision_feature_layer]
    each = {layer % (vision.num_hidden_layers + 1): layer for layer in asked}
    return tuple(_layer(vision, layer, 0) for layer in each.values())


def dense(config: Any, vision: Any) -> tuple[Readout, ...]:
    """Nemotron's RADIO: tokens of patches, without those that sum up."""
    return (Readout("features", (Field("features", 1),), width=vision.hidden_size, tokens=None),)


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
    """Qwen, GLM and kin: tokens after the patch merger. Transformers 4 returns them bare, 5 as the pooler's output."""
    named = (getattr(vision, name, None) for name in ("out_hidden_size", "adapter_out_dim"))
    width = next(filter(None, named), None) or vision.hidden_size
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
