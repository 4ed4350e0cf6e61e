"""Another vision encoder into a model of transformers: FARE and TeCoA weights into CLIP and LLaVA, in place.

The public robust encoders are state dicts of open_clip's ``VisionTransformer``. The CLIP vision encoder of transformers
computes the same function from the same numbers under other names, so the conversion is exact in both directions.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from fs_plugins.api import vision_call
from fs_plugins.errors import ModelError, RegistryError, SettingError
from fs_plugins.identity import fingerprint
from fs_plugins.patch import hooks_of
from fs_plugins.plugins import known_encoders
from fs_plugins.sources import offline
from fs_plugins.vision import is_a, unwrapped

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
_PATCHES, _CLASS = _OUTSIDE["conv1.weight"], _OUTSIDE["class_embedding"]
_POSITIONS = _OUTSIDE["positional_embedding"]
_INSIDE = "encoder.layers.0.mlp.fc1.weight"
_PROJECTION = "visual_projection.weight"

_FILES = {
    "open_clip": ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    "transformers": ("model.safetensors", "pytorch_model.bin"),
}
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")

# Models in which nothing but the encoder, the configuration and the processor knows the resolution.
_ANY_RESOLUTION = (
    "CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPVisionTransformer", "CLIPForImageClassification",
    "LlavaModel", "LlavaForConditionalGeneration", "VipLlavaModel", "VipLlavaForConditionalGeneration",
)  # fmt: skip

EncoderSource = str | os.PathLike[str] | Mapping[str, Tensor]
_Weights = tuple[dict[str, Tensor], dict[str, Any]]
"""In transformers' layout, and what a config.json beside them says."""
_Architecture = dict[str, Any]
"""In the registry's words, as far as somebody says them."""


@dataclass(frozen=True)
class EncoderSwap:
    """What ``swap_encoder`` did.

    Args:
        source: the registry's name, the path or the hub id of the weights.
        encoder: the vision encoder's name inside the model; empty if it is the model.
        size_before, size: side in pixels of the images it takes.
        tokens_before, tokens: patches it makes of an image, without its class token.
        projection: whether the model's ``visual_projection`` was exchanged as well.
        remaining: what the caller still has to see to, in sentences.
    """

    source: str
    encoder: str
    size_before: int
    size: int
    tokens_before: int
    tokens: int
    projection: bool
    remaining: tuple[str, ...] = ()

    def __str__(self) -> str:
        changed = f"{self.size_before} -> {self.size} pixels, {self.tokens_before} -> {self.tokens} tokens"
        kept = f"{self.size} pixels, {self.tokens} tokens, as before"
        sizes = kept if self.size == self.size_before else changed
        return "\n".join(
            (f"{self.encoder or 'the model'} has the weights of {self.source} ({sizes}).", *self.remaining)
        )


def swap_encoder(
    model: nn.Module, source: EncoderSource, *, processor: Any = None, revision: str | None = None
) -> EncoderSwap:
    """Put another encoder's weights into the model's CLIP vision encoder, also where it sees another resolution.

    Changed: the encoder's weights (each keeps its dtype, its device and its ``requires_grad``), ``visual_projection``
    if the model and the source have one, and where the resolution differs the position embeddings (a new parameter: an
    optimizer or DistributedDataParallel made before must be made again), ``image_size`` in every configuration of the
    encoder, and LLaVA's ``image_seq_length``. The projector, the language model and CLIP's text side stay. LLaVA-1.5
    with ``"fare4"`` goes from 336 pixels and 576 tokens to 224 and 256.

    A processor that goes with a resolution must change with it: give it as ``processor``, or set the ``size`` and
    ``crop_size`` of its image processor. Its mean, std, ``patch_size`` and ``num_additional_image_tokens`` stay.

    A state dict says nothing of the activation, the number of attention heads and the norms' epsilon: the model's own
    are used. OpenAI's encoders, and FARE and TeCoA after them, have ``quick_gelu``, many others ``gelu``. Where
    the registry or a ``config.json`` beside the weights says activation and heads, they are compared.

    Args:
        model: CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection, LLaVA or another model of transformers with one
            CLIP vision encoder, also inside PEFT, torch.compile or DDP. Models that cut images into tiles (LLaVA-NeXT),
            and others that are not known to allow it, take encoders of their own resolution only.
        source: a name in the registry (``"fare4-clip"``, or its beginning: ``"fare4"``), a ``.safetensors`` or ``.pt``
            file or a folder with one, a hub id, or a state dict; in the layout of open_clip or of transformers,
            alone or as a part of a whole CLIP or LLaVA.
        processor: the model's processor or image processor, changed with the model.
        revision: of a hub repository.

    Returns:
        what was done, and what the caller still has to see to.

    Raises:
        ModelError: the model is smoothed, has no CLIP vision encoder or several, or one whose weights cannot be
            written (offloaded, sharded, quantised, with LoRA), or the source's architecture is another, or the
            source is damaged, holds pickled objects (nothing in it is run), or holds no encoder.
        SettingError: no such source, or a processor that does not go with the model's resolution.
        RegistryError: the hub did not give the weights, or they are not what the registry says.
        Model and processor are untouched unless everything is in order.
    """
    target = _target(model)
    name, said, fetch = _find(source, revision)
    _same_architecture(said, name, target.architecture)
    weights, beside = fetch()
    found = _described(weights, name, said)
    _same_architecture(found | beside, name, target.architecture)
    changes = _changes(target, weights, name)
    old, tokens_before, tokens = target.architecture["image_size"], _tokens(target.architecture), _tokens(found)
    resized = tokens != tokens_before
    size = found["image_size"] if resized else old
    if resized and not is_a(target.whole, "transformers", *_ANY_RESOLUTION):
        raise ModelError(
            f"{name} sees {size} pixels, {type(target.whole).__name__} has an encoder of {old}, and nobody knows what else in "
            f"it counts on that (LLaVA-NeXT cuts tiles of this size). Take an encoder of {old} pixels, or one of "
            f"{', '.join(_ANY_RESOLUTION)}."
        )
    settings = _processor_settings(processor, old, size) if processor is not None else []
    place = target.parameters[_POSITIONS]
    positions = weights[_POSITIONS].to(place.device, place.dtype, copy=True) if resized else None

    with torch.no_grad():
        for parameter, value in changes:
            parameter.copy_(value)
    if positions is not None:
        _resize(target, positions, size)
        _configure(model, size, tokens)
    for images, attribute, value in settings:
        setattr(images, attribute, value)
    projection = _PROJECTION in weights and _PROJECTION in target.parameters
    remaining = []
    if _PROJECTION in target.parameters and not projection:
        remaining.append(
            "The source has no projection: the model's visual_projection is still that of its old encoder."
        )
    if resized and processor is None:
        remaining.append(
            f"Set size and crop_size of the model's image processor to {size}: the encoder refuses images of {old}, and a prompt "
            f"has {tokens} image tokens instead of {tokens_before}."
        )
    if resized:
        remaining.append(
            "The processor saved beside the checkpoint knows nothing of this: save the changed one with the model."
        )
    return EncoderSwap(
        source=name,
        encoder=target.name,
        size_before=old,
        size=size,
        tokens_before=tokens_before,
        tokens=tokens,
        projection=projection,
        remaining=tuple(remaining),
    )


def load_encoder(name: str) -> nn.Module:
    """A CLIP vision encoder of the registry, in the smallest model that consumes what its PSMs are for, in eval mode.

    That is ``CLIPVisionModelWithProjection``, or ``CLIPVisionModel`` where there is no projection, for a pooled readout; for
    LLaVA's, a LLaVA whose language side is tiny and random. It is for training and certifying, without the rest of the
    large model.

    Args:
        name: of the registry; of several readouts the pooled one is taken.

    Raises:
        SettingError: no such encoder, or one whose readouts neither of these models consumes.
        ModelError, RegistryError: as for ``swap_encoder``.
    """
    import transformers

    known = known_encoders()
    if name not in known.entries:
        raise SettingError(f"{name!r} is no encoder of the registry. It has: {', '.join(known.entries)}.")
    entry, readouts = known.entries[name], [psm.readout for psm in known.psms(name)]
    pooled, llava = "pooler_output" in readouts, "hidden_states[-2][1:]" in readouts
    if entry.architecture.family != "clip_vision" or not (pooled or llava):
        raise SettingError(
            f"{name!r} ({entry.architecture.family}, {', '.join(readouts)}) cannot be loaded without the model around it. Load "
            "that, and give it to fs_plugins.training.train_psm (docs/how-to/train-a-psm.md)."
        )
    _, said, fetch = _find(name, None)
    weights, _ = fetch()
    _described(weights, name, said)
    width = len(weights[_PROJECTION]) if _PROJECTION in weights else 0
    tower = transformers.CLIPVisionConfig(**{**said, "projection_dim": width})
    model: nn.Module
    if pooled:
        kind = transformers.CLIPVisionModelWithProjection if width else transformers.CLIPVisionModel
        model = kind(tower)
    else:
        tiny: dict[str, Any] = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 16)
        words = transformers.LlamaConfig(**tiny, num_hidden_layers=1, num_attention_heads=1)
        facts = transformers.LlavaConfig(vision_config=tower, text_config=words, image_token_index=15)
        model = transformers.LlavaForConditionalGeneration(facts)
    swap_encoder(model, weights)
    call = vision_call(model)
    if entry.verified and not entry.has(fingerprint(call.module)):
        raise RegistryError(f"The weights of {name} have another fingerprint than the registry says.")
    pixels = call.pixels
    if (pixels.mean, pixels.std) != (entry.preprocessing.mean, entry.preprocessing.std):
        raise SettingError(
            f"{name!r} has mean {entry.preprocessing.mean} and std {entry.preprocessing.std}, {type(model).__name__} has "
            f"{pixels.mean} and {pixels.std}. Load the model around it."
        )
    return model.eval()


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
            found[_PROJECTION] = value.T.contiguous()
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
            f"Transformers' CLIP vision encoder has no place for {_some(unknown)}; only open_clip's plain VisionTransformer "
            "(class token, no layer scale, no attentional pooling) converts."
        )
    return found


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP vision encoder of transformers -> open_clip's ``VisionTransformer`` names and shapes: ``to_transformers`` back.

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
        if name == _PROJECTION:
            found["proj"] = value.T.contiguous()
        elif name in outside:
            found[outside[name]] = value
        elif layer and layer[2] in in_a_layer:
            found[f"transformer.resblocks.{layer[1]}.{in_a_layer[layer[2]]}.{layer[3]}"] = value
        elif layer and re.fullmatch(r"self_attn\.[qkv]_proj", layer[2]):
            rows = [own.get(f"encoder.layers.{layer[1]}.self_attn.{letter}_proj.{layer[3]}") for letter in "qkv"]
            if any(part is None for part in rows):
                unknown.append(name)
            elif layer[2] == "self_attn.q_proj":
                found[f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"] = torch.cat(rows)  # type: ignore[arg-type]
        else:
            unknown.append(name)
    if unknown:
        raise ModelError(
            f"open_clip's VisionTransformer has no place for {_some(unknown)} (and needs queries, keys and values together)."
        )
    return found


def _part(state: Mapping[str, Tensor], patches: str, class_token: str, layout: str) -> dict[str, Tensor]:
    """The vision encoder's part of a state dict, without its prefix."""
    prefix = _prefix(state, patches, class_token)
    if prefix is None:
        raise ModelError(
            f"There is no CLIP vision encoder of {layout} in these weights: they begin with {_some(list(state))}."
        )
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _transformers_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same in transformers' layout, where the projection is beside the encoder."""
    own = _part(state, _PATCHES, _CLASS, "transformers")
    own.pop("embeddings.position_ids", None)  # transformers before 4.31 saved it
    projection = (_prefix(state, _PATCHES, _CLASS) or "").removesuffix("vision_model.") + _PROJECTION
    return own | ({_PROJECTION: state[projection]} if projection in state else {})


def _prefix(state: Mapping[str, Tensor], patches: str, class_token: str) -> str | None:
    ends = [name.removesuffix(patches) for name in state if name.endswith(patches)]
    found = [end for end in ends if end[-1:] in ("", ".") and end + class_token in state]
    if len(found) > 1:
        raise ModelError(f"There are several vision encoders in these weights: {', '.join(found)}. Give one of them.")
    return found[0] if found else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "nothing"


def _describe(weights: Mapping[str, Tensor], name: str) -> _Architecture:
    """What weights in transformers' layout say of their encoder; ``image_size`` is the smallest with as many patches."""
    patches, inside, positions = (weights.get(key) for key in (_PATCHES, _INSIDE, _POSITIONS))
    if (
        patches is None
        or inside is None
        or positions is None
        or (patches.ndim, inside.ndim, positions.ndim) != (4, 2, 2)
        or patches.shape[2] != patches.shape[3]
        or math.isqrt(max(0, len(positions) - 1)) ** 2 != len(positions) - 1
    ):
        raise ModelError(
            f"{name} is no whole CLIP vision encoder of square images and patches: it needs {_PATCHES}, {_POSITIONS} and "
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


def _differences(one: _Architecture, other: _Architecture) -> dict[str, tuple[int | str, int | str]]:
    return {key: (one[key], other[key]) for key in one.keys() & other.keys() if one[key] != other[key]}


def _same_architecture(theirs: _Architecture, name: str, ours: _Architecture) -> None:
    """Refuse any difference but the resolution."""
    if differences := _differences(theirs | {"image_size": ours["image_size"]}, ours):
        raise ModelError(
            f"{name} is another architecture than the model's vision encoder: "
            + "; ".join(f"{key} {their} against the model's {our}" for key, (their, our) in sorted(differences.items()))
            + ". Only weights of the same architecture can take its place (the resolution may differ)."
        )


def _tokens(architecture: _Architecture) -> int:
    return (int(architecture["image_size"]) // int(architecture["patch_size"])) ** 2


@dataclass(frozen=True)
class _Target:
    """The model's vision encoder: ``core`` is the module that has the embeddings and the layers."""

    whole: Any
    core: Any
    name: str
    parameters: dict[str, nn.Parameter]
    architecture: _Architecture


def _target(model: nn.Module) -> _Target:
    """The one CLIP vision encoder of the model, if its weights can be written."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"swap_encoder takes a torch.nn.Module, got {type(model).__name__}.")
    if hooks_of(model)[0]:
        raise ModelError(
            "Smoothing is enabled on this model, with a PSM and a resolution for the encoder that it has now. Call "
            "fs_plugins.disable(model), swap, and enable again."
        )
    whole = unwrapped(model)
    cores = {
        name: module
        for name, module in whole.named_modules()
        if is_a(module, "transformers", "CLIPVisionModel", "CLIPVisionTransformer") and hasattr(module, "embeddings")
    }
    if len(cores) != 1:
        has = f"has {len(cores)} ({', '.join(cores)})" if cores else "has none"
        raise ModelError(
            f"swap_encoder changes the one CLIP vision encoder of a transformers model; {type(whole).__name__} {has}. open_clip's "
            "own towers take such weights by model.visual.load_state_dict(...); fs_plugins.hf.towers.to_open_clip converts them."
        )
    (name, core), *_ = cores.items()
    parameters = dict(core.named_parameters())
    for owner in whole.modules():
        projection = getattr(owner, "visual_projection", None)
        if getattr(owner, "vision_model", None) is core and isinstance(projection, nn.Module):
            parameters |= {f"visual_projection.{key}": value for key, value in projection.named_parameters()}
    _writable(parameters)
    config = core.config
    said = {
        "image_size": core.embeddings.image_size,
        "num_attention_heads": config.num_attention_heads,
        "hidden_act": config.hidden_act,
    }
    return _Target(
        whole, core, name, parameters, _describe(parameters, f"The encoder of {type(whole).__name__}") | said
    )


def _writable(parameters: Mapping[str, nn.Parameter]) -> None:
    if any("lora_" in name for name in parameters):
        raise ModelError(
            "The vision encoder carries LoRA weights, which belong to the weights beneath them. Merge or unload them first."
        )
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise ModelError(
                f"{name} of the vision encoder is on the meta device (offloaded?), so it cannot be written. Load the "
                "model without offloading, swap, and dispatch it then."
            )
        plain = parameter.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        if not plain or type(parameter.data) is not Tensor:
            raise ModelError(
                f"{name} of the vision encoder is {parameter.dtype} in a {type(parameter.data).__name__} (quantised, or sharded?), "
                "so it cannot be written. Keep the encoder out of the quantisation, or swap before it."
            )


def _changes(target: _Target, weights: Mapping[str, Tensor], name: str) -> list[tuple[nn.Parameter, Tensor]]:
    """Parameter, new value, checked in full; position embeddings of another number are left to ``_resize``."""
    ours, theirs = dict(target.parameters), dict(weights)
    if _PROJECTION not in ours or _PROJECTION not in theirs:
        ours.pop(_PROJECTION, None)
        theirs.pop(_PROJECTION, None)
    if missing := sorted(ours.keys() - theirs.keys()):
        raise ModelError(f"{name} lacks {_some(missing)}, which the model's vision encoder needs.")
    if left := sorted(theirs.keys() - ours.keys()):
        raise ModelError(f"{name} has {_some(left)}, for which the model's vision encoder has no place.")
    for key, value in theirs.items():
        parameter = ours[key]
        free = 1 if key == _POSITIONS else 0
        if value.ndim != parameter.ndim or value.shape[free:] != parameter.shape[free:]:
            raise ModelError(
                f"{key} of {name} is {tuple(value.shape)}; the model's is {tuple(parameter.shape)}. Only weights of the "
                "same architecture can take its place."
            )
        if not value.is_floating_point() or value.is_meta:
            raise ModelError(
                f"{key} of {name} is {value.dtype} on {value.device}; weights must be floating point, and must be there."
            )
        if not value.to(parameter.dtype).isfinite().all():
            raise ModelError(f"{key} of {name} holds values that are not finite in the model's {parameter.dtype}.")
    return [(ours[key], value) for key, value in theirs.items() if value.shape == ours[key].shape]


def _resize(target: _Target, positions: Tensor, size: int) -> None:
    embeddings = target.core.embeddings
    old = target.parameters[_POSITIONS]
    embeddings.position_embedding.weight = nn.Parameter(positions, requires_grad=old.requires_grad)
    embeddings.position_embedding.num_embeddings = len(positions)
    embeddings.position_ids = torch.arange(len(positions), device=embeddings.position_ids.device).expand(1, -1)
    embeddings.num_patches, embeddings.num_positions = len(positions) - 1, len(positions)
    embeddings.image_size = size


def _configure(model: nn.Module, size: int, tokens: int) -> None:
    """Write the resolution into every configuration that a part of the model holds; some share one, some have copies."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for part in (config, getattr(config, "vision_config", None)):
            if part is None:
                continue
            if getattr(part, "model_type", None) == "clip_vision_model":
                part.image_size = size
            if hasattr(part, "image_seq_length"):
                whole = getattr(part, "vision_feature_select_strategy", "default") == "full"
                part.image_seq_length = tokens + (1 if whole else 0)


def _processor_settings(processor: Any, old: int, new: int) -> list[tuple[Any, str, Any]]:
    """(image processor, attribute, new value) for the attributes that say a size."""
    images = getattr(processor, "image_processor", None) or processor
    given = {name: value for name in ("size", "crop_size") if (value := getattr(images, name, None)) is not None}
    if not given:
        raise SettingError(f"{type(processor).__name__} has no size and no crop_size. Pass the model's own processor.")
    settings = []
    for name, value in given.items():
        sides = {"": value} if isinstance(value, int) else dict(vars(value) if is_dataclass(value) else value)
        if not {side for side in sides.values() if side is not None} <= {old, new}:
            raise SettingError(
                f"The processor's {name} is {value}, which does not go with the encoder's {old} pixels, so nobody knows what "
                f"it should be at {new}. Leave processor out and set it yourself."
            )
        sides = {side: length and new for side, length in sides.items()}
        settings.append((images, name, new if isinstance(value, int) else type(value)(**sides)))
    return settings


def _described(weights: dict[str, Tensor], name: str, said: _Architecture) -> _Architecture:
    """The architecture of some weights, which must be the one that the registry says."""
    found = _describe(weights, name)
    if differences := _differences(said, found):
        wrong = "; ".join(f"{key} {is_} instead of {stated}" for key, (stated, is_) in sorted(differences.items()))
        raise RegistryError(f"The weights of {name} are not what the registry says: {wrong}.")
    return found


def _find(source: EncoderSource, revision: str | None) -> tuple[str, _Architecture, Callable[[], _Weights]]:
    """A source's name, what the registry says of it, and how to get its weights."""
    if isinstance(source, Mapping):
        name, state = "the state dict given", source
        return name, {}, lambda: (_converted(state, name), {})
    known = known_encoders()
    text = os.fspath(source)
    short = [name for name in known.entries if name.startswith(f"{text}-")]
    if isinstance(source, str) and text in known.entries:
        name = text
    elif (path := Path(text)).exists():
        return text, {}, lambda: _read(path, text)
    elif len(short) == 1:
        name = short[0]
    elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text) and path.suffix not in _SUFFIXES:
        return text, {}, lambda: _read(_download(text, [*_FILES], revision), text)
    else:
        what = (
            f"is the beginning of {', '.join(short)}" if short else "is no file or folder, and no hub id (owner/name)"
        )
        raise SettingError(
            f"{text!r} {what}. Give a path, a hub id or a name of the registry: {', '.join(known.entries)}."
        )
    entry = known.entries[name]
    said = entry.architecture.model_dump(exclude={"family"})
    location, layout = entry.weights.location, entry.weights.format
    if entry.weights.source != "hub":
        folder = known.place(name, location)
        return name, said, lambda: _read(folder, name)
    return name, said, lambda: _read(_download(location, [layout], revision), name)


def _download(repository: str, layouts: list[str], revision: str | None) -> Path:
    """The weights' file in a hub repository: safetensors if it has them, else a torch file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    names = sorted((name for layout in layouts for name in _FILES[layout]), key=lambda name: name.endswith(".bin"))
    failure: Exception | None = None
    fetch = partial(hf_hub_download, repository, revision=revision, local_files_only=offline() is not None)
    try:
        for name in names:
            try:
                path = Path(fetch(name))
            except LocalEntryNotFoundError as error:  # a file that is not in the cache, and no connection
                failure = error
            except EntryNotFoundError:
                pass
            else:
                if name in _FILES["transformers"]:
                    with suppress(EntryNotFoundError):
                        fetch("config.json")
                return path
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        failure = error
    if failure is None:
        raise RegistryError(f"The hub repository {repository} has none of {', '.join(names)}.")
    raise RegistryError(
        f"The hub did not give the weights of {repository} ({type(failure).__name__}). Offline? Download "
        f"{names[0]} or {names[-1]} from there elsewhere, and pass its path."
    ) from failure


def _read(path: Path, name: str) -> _Weights:
    """Weights of a file or of a folder's one file, in transformers' layout, and what config.json in the folder says."""
    if path.is_dir():
        names = [file for files in _FILES.values() for file in files]
        file = next((path / file for file in names if (path / file).is_file()), None)
        if file is None:
            raise SettingError(f"The folder {path} has none of {', '.join(names)}. Pass the path of the file itself.")
    else:
        file = path
    beside = _configured(file.with_name("config.json")) if file.name in _FILES["transformers"] else {}
    return _converted(_load(file), name), beside


def _load(file: Path) -> Mapping[str, Tensor]:
    """Tensors out of a file; nothing that a pickle asks for is run."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded: Any = load_file(file)
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can make a parser raise anything
        why = (
            "it is damaged, or holds pickled Python objects instead of tensors alone"
            if isinstance(error, UnpicklingError)
            else f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'empty'}"
        )
        raise ModelError(
            f"{file} cannot be read as weights ({why}); nothing in it was run. It must be safetensors, or a state dict "
            "written by torch.save. Fetch it again from a source that you trust."
        ) from error
    inner = loaded.get("state_dict") if isinstance(loaded, Mapping) else None
    return inner if isinstance(inner, Mapping) else loaded


def _converted(state: Any, name: str) -> dict[str, Tensor]:
    """A state dict of either layout -> transformers' layout."""
    if not isinstance(state, Mapping):
        raise ModelError(f"{name} holds a {type(state).__name__} instead of a state dict (names -> tensors).")
    tensors = {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if _prefix(tensors, _PATCHES, _CLASS) is not None:
        return _transformers_part(tensors)
    if _prefix(tensors, "conv1.weight", "class_embedding") is not None:
        return to_transformers(tensors)
    raise ModelError(
        f"There is no CLIP vision encoder in {name}, neither in open_clip's layout nor in transformers': it begins with "
        f"{_some(list(tensors))}."
    )


def _configured(file: Path) -> _Architecture:
    """What a model's config.json says that its weights do not."""
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text())
        vision = config.get("vision_config", config)
        return {key: vision[key] for key in ("num_attention_heads", "hidden_act") if key in vision}
    except (ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"{file} is no model configuration: {error}") from None
