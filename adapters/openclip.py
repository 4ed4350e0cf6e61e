"""open_clip: CLIP, CustomTextCLIP and CoCa, whatever their visual tower (ViT, ResNet, timm)."""

from __future__ import annotations

from typing import Any

from torch import nn

from fs_plugins import hookimpl
from fs_plugins.vision import Field, PixelSpace, Readout, VisionCall, is_a, per_channel, unwrapped

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@hookimpl
def fs_packages() -> tuple[str, ...]:
    return ("open_clip_torch",)


@hookimpl
def fs_vision_call(model: nn.Module) -> VisionCall | None:
    """CLIP, CustomTextCLIP and CoCa of the package open_clip: the projected embedding, and CoCa's tokens beside it."""
    clip = unwrapped(model)
    if not is_a(clip, "open_clip", "CLIP", "CustomTextCLIP", "CoCa"):
        return None
    return VisionCall(
        module=clip.visual,
        pixels=pixel_space(clip.visual, argument="x"),
        readouts=(pooled(clip), tokens(clip)) if is_a(clip, "open_clip", "CoCa") else (pooled(clip),),
        image_size=image_size(clip.visual),
        architecture=architecture(clip.visual),
        inputs=("image", "images"),
    )


def pixel_space(visual: Any, *, argument: str) -> PixelSpace:
    """Mean, std and size as open_clip's factory notes them on the tower, else OpenAI's."""
    record = getattr(visual, "preprocess_cfg", None)
    if record:
        source = "open_clip's own record (visual.preprocess_cfg)"
        mean, std = (per_channel(record[name], len(MEAN)) for name in ("mean", "std"))
        return PixelSpace(mean, std, argument, source, image_size(visual))
    source = "the default of open_clip (the tower has no preprocess_cfg)"
    return PixelSpace(MEAN, STD, argument, source, assumed=True)


def image_size(visual: Any) -> tuple[int, int]:
    size = visual.image_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def architecture(visual: Any) -> dict[str, int | str]:
    """What an open_clip tower says of itself."""
    kind = type(visual).__name__
    trunk = getattr(visual, "trunk", None)
    height, width = image_size(visual)
    family = f"open_clip {kind}" + (f" {type(trunk).__name__}" if trunk is not None else "")
    weights = sum(parameter.numel() for parameter in visual.parameters())
    return {"family": family, "image_size": f"{height}x{width}", "parameters": weights}


def pooled(clip: Any) -> Readout:
    """The embedding that is compared with text, after the tower's own projection."""
    known: tuple[Any, ...] = (clip.visual, getattr(clip, "text", None))  # timm's tower does not say, the text's does
    width = next(part.output_dim for part in known if hasattr(part, "output_dim"))
    return Readout("embedding", (Field("embedding", 0),), width=width)


def tokens(clip: Any) -> Readout:
    """CoCa: the pooled queries that its captioner attends to."""
    return Readout("tokens", (Field("tokens", 1),), width=clip.visual.output_dim, tokens=None)
