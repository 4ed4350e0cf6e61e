"""timm: image models of every architecture, with their head, without it, or as lists of maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fs_plugins import hookimpl
from fs_plugins.head import Head
from fs_plugins.layouts import Layout
from fs_plugins.vision import Field, PixelSpace, Readout, VisionCall, unwrapped


@hookimpl
def fs_packages() -> tuple[str, ...]:
    return ("timm",)


@hookimpl
def fs_encoder_families() -> dict[str, dict[str, type[int] | type[str]]]:
    return {"timm": {"architecture": str, "channels": int, "width": int}}


@hookimpl
def fs_vision_call(model: nn.Module) -> VisionCall | None:
    """Image models of the package timm: a classifier's logits, a pooled feature, tokens or maps, as they are served."""
    net = unwrapped(model)
    if not of_timm(net):
        return None
    return VisionCall(
        module=net,
        pixels=pixel_space(net),
        readouts=(answer(net),) if hasattr(net, "num_classes") else maps(net),
        image_size=image_size(net),
        architecture=architecture(net),
        head=head(net),
    )


def of_timm(net: Any) -> bool:
    """Whether timm's factory made a module, by what the factory notes on it."""
    made = any(kind.__module__.partition(".")[0] == "timm" for kind in type(net).__mro__)
    return made and isinstance(getattr(net, "pretrained_cfg", None), Mapping)


def answer(net: Any) -> Readout:
    """What a model returns: logits; without a head a pooled feature; without pooling tokens or a map."""
    if net.num_classes:
        return Readout("logits", (Field("logits", 0),), width=net.num_classes)
    if pools(net):
        return Readout("features", (Field("features", 0),), width=width(net))
    return Readout("tokens", (Field("tokens", 0),), width=width(net), tokens=None, channels_first=channels_first(net))


def head(net: Any, labels: tuple[str, ...] = ()) -> Head | None:
    """A classifier's logits are the feature already, and served as such."""
    classes = getattr(net, "num_classes", 0)
    return Head((nn.Identity(),), classes, labels=labels) if classes else None


def maps(net: Any) -> tuple[Readout, ...]:
    """Every map of the list that ``features_only=True`` makes a model return."""
    return tuple(
        Readout(f"maps[{i}]", (i,), width=channels, tokens=None, channels_first=channels_first(net))
        for i, channels in enumerate(net.feature_info.channels())
    )


def pools(net: Any) -> bool:
    """Whether a model without a head makes one feature of an image; ``num_classes=0, global_pool=""`` says no."""
    for owner in (getattr(net, "head", None), net):
        pool = getattr(owner, "pool_type", getattr(owner, "global_pool", None))
        if pool is not None:
            return bool(getattr(pool, "pool_type", pool))
    return True


def width(net: Any) -> int:
    """D of what a model without a head answers."""
    return getattr(net, "head_hidden_size", None) or net.num_features


def channels_first(net: Any) -> bool:
    """Whether its maps are (N, D, h, w)."""
    return str(getattr(net, "output_fmt", "NCHW")).endswith("NCHW")


def pixel_space(net: Any, *, argument: str = "x", layout: Layout | None = None) -> PixelSpace:
    """Mean, std and size as timm notes them on what it makes."""
    record = net.pretrained_cfg
    size = record.get("test_input_size") or record.get("input_size")
    return PixelSpace(
        tuple(record["mean"]),
        tuple(record["std"]),
        argument,
        "timm's own record (pretrained_cfg)",
        image_size(net) or (size and tuple(size[-2:])),
        layout or Layout(),
    )


def image_size(net: Any) -> tuple[int, int] | None:
    """(H, W) of models that take no other; convolutional ones take images as they come."""
    patches = getattr(net, "patch_embed", None)
    size = getattr(patches, "img_size", None)
    if size is not None:
        return (int(size[0]), int(size[1])) if getattr(patches, "strict_img_size", True) else None
    fixed = net.pretrained_cfg.get("fixed_input_size", False)
    return tuple(net.pretrained_cfg["input_size"][-2:]) if fixed else None


def architecture(net: Any) -> dict[str, int | str]:
    """What a timm model says of itself."""
    record = net.pretrained_cfg
    return {
        "family": "timm",
        "architecture": record.get("architecture") or type(net).__name__,
        "channels": record["input_size"][0],
        "width": getattr(net, "num_features", 0),
    }
