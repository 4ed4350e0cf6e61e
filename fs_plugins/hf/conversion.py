"""The CLIP vision encoder's weights in two layouts, open_clip's and transformers': exact both ways."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fs_plugins.errors import ModelError

Architecture = dict[str, Any]
"""In the registry's words, as far as somebody says them."""

# open_clip's names -> those of transformers' CLIP vision encoder.
_OUTSIDE = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
_IN_A_LAYER = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OPEN_CLIP_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(attn\.in_proj(?=_)|.+(?=\.))[._](weight|bias)")
_TRANSFORMERS_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
PATCHES, CLASS_TOKEN = _OUTSIDE["conv1.weight"], _OUTSIDE["class_embedding"]
POSITIONS = _OUTSIDE["positional_embedding"]
_INSIDE = "encoder.layers.0.mlp.fc1.weight"
PROJECTION = "visual_projection.weight"


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's ``VisionTransformer`` state dict -> the names and shapes of transformers' CLIP vision encoder.

    Takes the encoder's own state dict, or a whole model's, of which the encoder's part (``visual.``) is used. ``proj``
    (width, E) becomes ``visual_projection.weight`` (E, width). Bit for bit the same numbers, ``to_open_clip`` is the
    exact inverse. No tensor is copied but the transposed projection; the others share memory with ``state``.

    Raises:
        ModelError: no such encoder in it, several, or parts that transformers' CLIP does not have.
    """
    found: dict[str, Tensor] = {}
    unknown = []
    for name, value in _part(state, "conv1.weight", "class_embedding", "open_clip").items():
        layer = _OPEN_CLIP_LAYER.fullmatch(name)
        if name == "proj":
            found[PROJECTION] = value.T.contiguous()
        elif name in _OUTSIDE:
            found[_OUTSIDE[name]] = value
        elif layer and layer[2] == "attn.in_proj" and len(value) % 3 == 0:
            for letter, rows in zip("qkv", value.chunk(3), strict=True):
                found[f"encoder.layers.{layer[1]}.self_attn.{letter}_proj.{layer[3]}"] = rows
        elif layer and layer[2] in _IN_A_LAYER:
            found[f"encoder.layers.{layer[1]}.{_IN_A_LAYER[layer[2]]}.{layer[3]}"] = value
        else:
            unknown.append(name)
    if unknown:
        raise ModelError(
            f"Transformers' CLIP vision encoder has no place for {some(unknown)}; only open_clip's plain "
            "VisionTransformer (class token, no layer scale, no attentional pooling) converts."
        )
    return found


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP vision encoder of transformers -> open_clip's ``VisionTransformer`` names and shapes: ``to_transformers``
    back.

    Takes the encoder's own state dict or a whole CLIPModel's or LLaVA's. Without ``visual_projection`` the result has
    no ``proj``, which open_clip's own models need.

    Raises:
        ModelError: no such encoder in it, several, or parts that open_clip's VisionTransformer does not have.
    """
    own = _transformers_part(state)
    outside = {theirs: ours for ours, theirs in _OUTSIDE.items()}
    in_a_layer = {theirs: ours for ours, theirs in _IN_A_LAYER.items()}
    found: dict[str, Tensor] = {}
    unknown = []
    for name, value in own.items():
        layer = _TRANSFORMERS_LAYER.fullmatch(name)
        if name == PROJECTION:
            found["proj"] = value.T.contiguous()
        elif name in outside:
            found[outside[name]] = value
        elif layer and layer[2] in in_a_layer:
            found[f"transformer.resblocks.{layer[1]}.{in_a_layer[layer[2]]}.{layer[3]}"] = value
        elif layer and re.fullmatch(r"self_attn\.[qkv]_proj", layer[2]):
            names = [f"encoder.layers.{layer[1]}.self_attn.{letter}_proj.{layer[3]}" for letter in "qkv"]
            if not own.keys() >= set(names):
                unknown.append(name)
            elif layer[2] == "self_attn.q_proj":
                whole = torch.cat([own[part] for part in names])
                found[f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"] = whole
        else:
            unknown.append(name)
    if unknown:
        raise ModelError(
            f"open_clip's VisionTransformer has no place for {some(unknown)} (and needs queries, keys and values "
            "together)."
        )
    return found


def _part(state: Mapping[str, Tensor], patches: str, class_token: str, layout: str) -> dict[str, Tensor]:
    """The vision encoder's part of a state dict, without its prefix."""
    prefix = _prefix(state, patches, class_token)
    if prefix is None:
        raise ModelError(
            f"There is no CLIP vision encoder of {layout} in these weights: they begin with {some(list(state))}."
        )
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _transformers_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same in transformers' layout, where the projection is beside the encoder."""
    own = _part(state, PATCHES, CLASS_TOKEN, "transformers")
    own.pop("embeddings.position_ids", None)  # transformers before 4.31 saved it
    projection = (_prefix(state, PATCHES, CLASS_TOKEN) or "").removesuffix("vision_model.") + PROJECTION
    return own | ({PROJECTION: state[projection]} if projection in state else {})


def _prefix(state: Mapping[str, Tensor], patches: str, class_token: str) -> str | None:
    ends = [name.removesuffix(patches) for name in state if name.endswith(patches)]
    found = [end for end in ends if end[-1:] in ("", ".") and end + class_token in state]
    if len(found) > 1:
        raise ModelError(f"There are several vision encoders in these weights: {', '.join(found)}. Give one of them.")
    return found[0] if found else None


def some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "nothing"


def describe(weights: Mapping[str, Tensor], name: str) -> Architecture:
    """What weights in transformers' layout say of their encoder; ``image_size`` is the least with so many patches."""
    patches, inside, positions = (weights.get(key) for key in (PATCHES, _INSIDE, POSITIONS))
    if (
        patches is None
        or inside is None
        or positions is None
        or (patches.ndim, inside.ndim, positions.ndim) != (4, 2, 2)
        or patches.shape[2] != patches.shape[3]
        or math.isqrt(max(0, len(positions) - 1)) ** 2 != len(positions) - 1
    ):
        raise ModelError(
            f"{name} is no whole CLIP vision encoder of square images and patches: it needs {PATCHES}, {POSITIONS} and "
            f"{_INSIDE} in their shapes."
        )
    return {
        "hidden_size": len(patches),
        "intermediate_size": len(inside),
        "num_hidden_layers": len({match[1] for key in weights if (match := _TRANSFORMERS_LAYER.fullmatch(key))}),
        "num_channels": patches.shape[1],
        "patch_size": patches.shape[3],
        "image_size": math.isqrt(len(positions) - 1) * patches.shape[3],
    }


def converted(state: Any, name: str) -> dict[str, Tensor]:
    """A state dict of either layout -> transformers' layout."""
    if not isinstance(state, Mapping):
        raise ModelError(f"{name} holds a {type(state).__name__} instead of a state dict (names -> tensors).")
    tensors = {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if _prefix(tensors, PATCHES, CLASS_TOKEN) is not None:
        return _transformers_part(tensors)
    if _prefix(tensors, "conv1.weight", "class_embedding") is not None:
        return to_transformers(tensors)
    raise ModelError(
        f"There is no CLIP vision encoder in {name}, neither in open_clip's layout nor in transformers': it begins "
        f"with {some(list(tensors))}."
    )
