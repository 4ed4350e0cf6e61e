"""Another vision encoder into a model of transformers: FARE and TeCoA weights into CLIP and LLaVA, in place.

The public robust encoders are state dicts of open_clip's ``VisionTransformer``. The CLIP vision encoder of transformers
computes the same function from the same numbers under other names (see ``conversion``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fs_plugins.errors import ModelError, SettingError
from fs_plugins.hf.conversion import POSITIONS, PROJECTION, Architecture, describe, some
from fs_plugins.hf.weights import EncoderSource, described, differences, find
from fs_plugins.patch import hooks_of
from fs_plugins.vision import is_a, unwrapped

# Models in which nothing but the encoder, the configuration and the processor knows the resolution.
_ANY_RESOLUTION = (
    "CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPVisionTransformer",
    "CLIPForImageClassification",
    "LlavaModel", "LlavaForConditionalGeneration", "VipLlavaModel", "VipLlavaForConditionalGeneration",
)  # fmt: skip


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
        model: CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection, LLaVA or another model of transformers with
            one CLIP vision encoder, also inside PEFT, torch.compile or DDP. Models that cut images into tiles
            (LLaVA-NeXT), and others that are not known to allow it, take encoders of their own resolution only.
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
    name, said, fetch = find(source, revision)
    _same_architecture(said, name, target.architecture)
    weights, beside = fetch()
    found = described(weights, name, said)
    _same_architecture(found | beside, name, target.architecture)
    changes = _changes(target, weights, name)
    old, tokens_before, tokens = target.architecture["image_size"], _tokens(target.architecture), _tokens(found)
    resized = tokens != tokens_before
    size = found["image_size"] if resized else old
    if resized:
        _resizable(target, name, size)
    settings = _processor_settings(processor, old, size) if processor is not None else []
    place = target.parameters[POSITIONS]
    positions = weights[POSITIONS].to(place.device, place.dtype, copy=True) if resized else None

    with torch.no_grad():
        for parameter, value in changes:
            parameter.copy_(value)
    if positions is not None:
        _resize(target, positions, size)
        _configure(model, size, tokens)
    for images, attribute, value in settings:
        setattr(images, attribute, value)
    done = EncoderSwap(
        source=name,
        encoder=target.name,
        size_before=old,
        size=size,
        tokens_before=tokens_before,
        tokens=tokens,
        projection=PROJECTION in weights and PROJECTION in target.parameters,
    )
    return replace(done, remaining=tuple(_remaining(done, target, with_processor=processor is not None)))


def _same_architecture(theirs: Architecture, name: str, ours: Architecture) -> None:
    """Refuse any difference but the resolution."""
    if apart := differences(theirs | {"image_size": ours["image_size"]}, ours):
        raise ModelError(
            f"{name} is another architecture than the model's vision encoder: "
            + "; ".join(f"{key} {their} against the model's {our}" for key, (their, our) in sorted(apart.items()))
            + ". Only weights of the same architecture can take its place (the resolution may differ)."
        )


def _tokens(architecture: Architecture) -> int:
    return (int(architecture["image_size"]) // int(architecture["patch_size"])) ** 2


@dataclass(frozen=True)
class _Target:
    """The model's vision encoder: ``core`` is the module that has the embeddings and the layers."""

    whole: Any
    core: Any
    name: str
    parameters: dict[str, nn.Parameter]
    architecture: Architecture


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
            f"swap_encoder changes the one CLIP vision encoder of a transformers model; {type(whole).__name__} {has}. "
            "open_clip's own towers take such weights by model.visual.load_state_dict(...); "
            "fs_plugins.hf.to_open_clip converts them."
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
    return _Target(whole, core, name, parameters, describe(parameters, f"The encoder of {type(whole).__name__}") | said)


def _writable(parameters: Mapping[str, nn.Parameter]) -> None:
    if any("lora_" in name for name in parameters):
        raise ModelError(
            "The vision encoder carries LoRA weights, which belong to the weights beneath them. Merge or unload them "
            "first."
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
                f"{name} of the vision encoder is {parameter.dtype} in a {type(parameter.data).__name__} (quantised, "
                "or sharded?), so it cannot be written. Keep the encoder out of the quantisation, or swap before it."
            )


def _changes(target: _Target, weights: Mapping[str, Tensor], name: str) -> list[tuple[nn.Parameter, Tensor]]:
    """Parameter, new value, checked in full; position embeddings of another number are left to ``_resize``."""
    ours, theirs = dict(target.parameters), dict(weights)
    if PROJECTION not in ours or PROJECTION not in theirs:
        ours.pop(PROJECTION, None)
        theirs.pop(PROJECTION, None)
    if missing := sorted(ours.keys() - theirs.keys()):
        raise ModelError(f"{name} lacks {some(missing)}, which the model's vision encoder needs.")
    if left := sorted(theirs.keys() - ours.keys()):
        raise ModelError(f"{name} has {some(left)}, for which the model's vision encoder has no place.")
    for key, value in theirs.items():
        parameter = ours[key]
        free = 1 if key == POSITIONS else 0
        if value.ndim != parameter.ndim or value.shape[free:] != parameter.shape[free:]:
            raise ModelError(
                f"{key} of {name} is {tuple(value.shape)}; the model's is {tuple(parameter.shape)}. Only weights of "
                "the same architecture can take its place."
            )
        if not value.is_floating_point() or value.is_meta:
            raise ModelError(
                f"{key} of {name} is {value.dtype} on {value.device}; weights must be floating point, and must be "
                "there."
            )
        if not value.to(parameter.dtype).isfinite().all():
            raise ModelError(f"{key} of {name} holds values that are not finite in the model's {parameter.dtype}.")
    return [(ours[key], value) for key, value in theirs.items() if value.shape == ours[key].shape]


def _resizable(target: _Target, name: str, size: int) -> None:
    """Refuse another resolution in a model that is not known to allow it."""
    if is_a(target.whole, "transformers", *_ANY_RESOLUTION):
        return
    old = target.architecture["image_size"]
    raise ModelError(
        f"{name} sees {size} pixels, {type(target.whole).__name__} has an encoder of {old}, and nobody knows what "
        f"else in it counts on that (LLaVA-NeXT cuts tiles of this size). Take an encoder of {old} pixels, or one "
        f"of {', '.join(_ANY_RESOLUTION)}."
    )


def _resize(target: _Target, positions: Tensor, size: int) -> None:
    embeddings = target.core.embeddings
    old = target.parameters[POSITIONS]
    embeddings.position_embedding.weight = nn.Parameter(positions, requires_grad=old.requires_grad)
    embeddings.position_embedding.num_embeddings = len(positions)
    embeddings.position_ids = torch.arange(len(positions), device=embeddings.position_ids.device).expand(1, -1)
    embeddings.num_patches, embeddings.num_positions = len(positions) - 1, len(positions)
    embeddings.image_size = size


def _configure(model: nn.Module, size: int, tokens: int) -> None:
    """Write the resolution into every configuration that a part of the model holds: some share one, some do not."""
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
                f"The processor's {name} is {value}, which does not go with the encoder's {old} pixels, so nobody "
                f"knows what it should be at {new}. Leave processor out and set it yourself."
            )
        sides = {side: length and new for side, length in sides.items()}
        settings.append((images, name, new if isinstance(value, int) else type(value)(**sides)))
    return settings


def _remaining(done: EncoderSwap, target: _Target, *, with_processor: bool) -> Iterator[str]:
    """What the caller still has to see to, in sentences."""
    if PROJECTION in target.parameters and not done.projection:
        yield "The source has no projection: the model's visual_projection is still that of its old encoder."
    if done.tokens == done.tokens_before:
        return
    if not with_processor:
        yield (
            f"Set size and crop_size of the model's image processor to {done.size}: the encoder refuses images of "
            f"{done.size_before}, and a prompt has {done.tokens} image tokens instead of {done.tokens_before}."
        )
    yield "The processor saved beside the checkpoint knows nothing of this: save the changed one with the model."
