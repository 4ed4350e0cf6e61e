"""Hugging Face image models: classifiers and the bare encoders in them, and timm models in transformers.

``ENCODERS`` says by class name what a family's head sees of its encoder. To add a family, add its name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from fs_plugins.adapters import timm
from fs_plugins.adapters.hf import PACKAGES, architecture, find, image_size, pixel_space
from torch import Tensor, nn

from fs_plugins import hookimpl
from fs_plugins.head import Head
from fs_plugins.vision import Features, Field, FlattenedTokens, Readout, VisionCall, is_a, unwrapped


class TokenMeans:
    """Means of parts of a readout's tokens, side by side; of pooled vectors themselves. Linear, without weights."""

    modules: tuple[nn.Module, ...] = ()

    def __init__(self, readout: str, *parts: slice) -> None:
        self.readout = readout
        self.parts = parts

    def __call__(self, features: Features) -> Tensor:
        """Features -> (N, E)."""
        value = features[self.readout]
        return value if value.ndim == 2 else torch.cat([value[:, part].mean(1) for part in self.parts], dim=1)


ALL = slice(None)
PATCHES = slice(1, None)
CLASS = slice(0, 1)
TEACHER = slice(1, 2)  # DeiT's second class token


@dataclass(frozen=True)
class Encoder:
    """Families whose heads see the same of their encoder: means of parts of the last tokens, or the pooler's output.

    Args:
        models: the beginnings of their class names.
        parts: of the tokens; none where it is the pooler's output. ``PATCHES`` leave out register tokens too.
        pooled: whether the bare model has a pooler.
    """

    models: tuple[str, ...]
    parts: tuple[slice, ...] = ()
    pooled: bool = True
    endings: tuple[str, ...] = ("ForImageClassification", "Model")


ENCODERS = (
    Encoder(("ViT", "DeiT", "DINOv3ViT"), (CLASS,)),
    Encoder(("ViTMSN", "Pvt"), (CLASS,), pooled=False),
    Encoder(("DeiT",), (CLASS, TEACHER), endings=("ForImageClassificationWithTeacher",)),
    Encoder(("Dinov2", "Dinov2WithRegisters"), (CLASS, PATCHES)),
    Encoder(("CLIP",), (PATCHES,), endings=("ForImageClassification",)),
    Encoder(("Siglip",), (ALL,), endings=("ForImageClassification",)),
    Encoder(("IJepa", "Levit"), (ALL,)),
    Encoder(("Levit",), (ALL,), endings=("ForImageClassificationWithTeacher",)),
    Encoder(("PvtV2",), (ALL,), pooled=False),
    Encoder(("Beit", "Data2VecVision", "Swin", "Swinv2", "FocalNet", "Hiera", "ConvNext", "ConvNextV2")),
    Encoder(("DINOv3ConvNext", "EfficientNet", "MobileNetV1", "MobileNetV2", "MobileViT", "MobileViTV2")),
    Encoder(("ResNet", "RegNet", "Bit")),
)


@hookimpl
def fs_packages() -> tuple[str, ...]:
    return PACKAGES


@hookimpl
def fs_vision_call(model: nn.Module) -> VisionCall | None:
    """Image classifiers and bare image encoders of transformers, by class (see ENCODERS), timm's in it among them."""
    whole = unwrapped(model)
    if is_a(whole, "transformers", "TimmWrapperForImageClassification", "TimmWrapperModel"):
        return _of_timm(whole)
    family = find(whole, ENCODERS)
    return family and _call(whole, family)


def _call(whole: Any, family: Encoder) -> VisionCall:
    is_bare = is_a(whole, "transformers", *(f"{name}Model" for name in family.models))
    module = whole if is_bare else getattr(whole, "vision_model", None) or whole.base_model
    config = getattr(whole.config, "vision_config", whole.config)
    has_pooler = family.pooled and _has_pooler(module)
    by_tokens = bool(family.parts) or not has_pooler
    names = ["last_hidden_state"] if by_tokens else ["pooler_output"]
    if is_bare:
        names = ["last_hidden_state", "pooler_output"] if has_pooler else ["last_hidden_state"]
    space = pixel_space(whole, config)
    return VisionCall(
        module=module,
        pixels=space,
        readouts=tuple(_readout(name, module) for name in names),
        image_size=image_size(config, space),
        architecture=architecture(config),
        embed=TokenMeans("last_hidden_state" if by_tokens else "pooler_output", *_parts(family, config)),
        head=None if is_bare else _head(whole, family, _width(module)),
    )


def _has_pooler(module: nn.Module) -> bool:
    """Where a bare model may be made without one, it keeps None in its place; MobileViT a switch."""
    return getattr(module, "pooler", True) is not None and getattr(module, "expand_output", True)


def _parts(family: Encoder, config: Any) -> list[slice]:
    """Register tokens stand between the class token and the patches."""
    registers = getattr(config, "num_register_tokens", 0)
    return [slice(1 + registers, None) if part is PATCHES else part for part in family.parts or (ALL,)]


def _head(whole: Any, family: Encoder, width: int) -> Head | None:
    """The layer after what the head sees; a teacher's beside it, whose scores are averaged with its own."""
    names = ("classifier", "cls_classifier", "distillation_classifier", "classifier_distill")
    layers = tuple(layer for name in names if (layer := getattr(whole, name, None)) is not None)
    if not whole.config.num_labels:
        return None
    each = (slice(0, width), slice(width, 2 * width)) if TEACHER in family.parts else ()
    return Head(layers, width * len(family.parts or (ALL,)), each, _labels(whole))


def _labels(whole: Any) -> tuple[str, ...]:
    return tuple(str(whole.config.id2label[i]) for i in range(whole.config.num_labels))


def _readout(name: str, module: nn.Module) -> Readout:
    """A field of an encoder's output; ResNets and the like have maps in it, and pooled ones of one place."""
    maps = is_a(module, "transformers", "ResNetModel", "RegNetModel", "BitModel")
    pooled = name == "pooler_output"
    tokens = 0 if pooled and not maps else 1 if pooled else None
    return Readout(name, (Field(name, int(pooled)),), width=_width(module), tokens=tokens, channels_first=True)


def _width(module: nn.Module) -> int:
    """D, which configurations write in many ways: the length of the last layer's scale or bias."""
    return [len(parameter) for parameter in module.parameters() if parameter.ndim == 1][-1]


def _of_timm(whole: Any) -> VisionCall:
    """The classifier calls its timm model as a module; the bare model calls methods of it, so it is hooked itself."""
    net, classifies = whole.timm_model, is_a(whole, "transformers", "TimmWrapperForImageClassification")
    space = pixel_space(whole, whole.config, argument="x" if classifies else "pixel_values", net=net)
    return VisionCall(
        module=net if classifies else whole,
        pixels=space,
        readouts=(timm.answer(net),) if classifies else _wrapped(whole, net),
        image_size=timm.image_size(net) or space.size,
        architecture=timm.architecture(net),
        embed=TokenMeans("pooler_output") if not classifies and _pools(whole) else FlattenedTokens(),
        head=timm.head(net, _labels(whole)) if classifies else None,
        inputs=("pixel_values",),
    )


def _pools(whole: Any) -> bool:
    return bool(whole.config.do_pooling and not whole.features_only)


def _wrapped(whole: Any, net: Any) -> tuple[Readout, ...]:
    """What the bare wrapper answers: tokens or a map, or the maps of ``features_only``, and what is pooled of them."""
    field = Field("last_hidden_state", 0)
    if whole.features_only:
        return tuple(replace(one, path=(field, *one.path)) for one in timm.maps(net))
    last = Readout(field.name, (field,), net.num_features, tokens=None, channels_first=timm.channels_first(net))
    pooled = Readout("pooler_output", (Field("pooler_output", 1),), width=timm.width(net))
    return (last, pooled) if _pools(whole) else (last,)
