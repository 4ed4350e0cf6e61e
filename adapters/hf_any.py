"""Models of transformers that nobody has tested, by transformers' own rules: only by name, and only if a probe agrees.

The rules say where an encoder is and what it may be asked for. What the language side reads out of it is found by
trial: on two random pictures, features are put in the place of others until the answer follows them
(``fs_plugins.probe``).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from fs_plugins.adapters.hf import PACKAGES, architecture, image_size, pixel_space
from fs_plugins.adapters.hf_multimodal import layout_of, refusal
from fs_plugins.adapters.hf_readouts import layers
from torch import Tensor, nn

from fs_plugins import ModelError, hookimpl
from fs_plugins.layouts import Layout
from fs_plugins.noise import uniform
from fs_plugins.probing import probe, witnessed
from fs_plugins.vision import Field, Readout, VisionCall, direct, is_a, unwrapped

TOWERS = (
    "vision_tower",
    "vision_model",
    "visual",
    "image_tower",
    "video_tower",
    "vision_encoder",
    "image_encoder",
    "vision_embed_tokens",
)
"""What transformers calls a model's vision encoder."""
BESIDE = (5, 6, 7)
"""Tokens of the probe's question: any will do."""


@hookimpl
def fs_packages() -> tuple[str, ...]:
    return PACKAGES


@hookimpl
def fs_unclaimed(model: nn.Module) -> str | None:
    whole = unwrapped(model)
    if refusal(whole) or not is_a(whole, "transformers", "PreTrainedModel") or not _towers(whole):
        return None
    return (
        "Nobody has tested this family of transformers. enable(model, adapter='hf_any', processor=<the model's>) takes "
        "transformers' own rules for it, if a probe on random pixels shows that they hold; docs/how-to/"
        "write-an-adapter.md shows how to declare it, in a line or in about 40."
    )


@hookimpl
def fs_vision_call(model: nn.Module, named: bool, processor: Any) -> VisionCall | None:
    """Any model of transformers that has a vision encoder, where it is asked for by name and a probe agrees."""
    whole = unwrapped(model)
    towers = _towers(whole) if named and is_a(whole, "transformers", "PreTrainedModel") else []
    if not towers:
        return None
    name = type(whole).__name__
    if why := refusal(whole):
        raise ModelError(why)
    if len(towers) > 1:
        kinds = " and ".join(type(tower).__name__ for tower in towers)
        raise ModelError(f"{name} looks with {kinds}, and a probe of pictures cannot tell for both. {_OWN}")
    bare = _bare(whole, towers[0])
    pictures = _Pictures(whole, bare, processor)
    tried = []
    for call in _readable(whole, bare):
        if pictures.show_all_of(call):
            return call
        tried.append(", ".join(readout.name for readout in call.readouts))
    raise ModelError(
        f"{name} was probed on random pixels: its answer takes more from a picture than {type(bare.module).__name__}'s "
        f"{', or its '.join(tried)}. Smoothing that would leave a way around. {_OWN}"
    )


_OWN = "It needs an adapter of its own: docs/how-to/write-an-adapter.md."


def _towers(whole: Any) -> list[nn.Module]:
    """All of ``model.model.<name>`` and ``model.<name>``."""
    owners = [owner for owner in (getattr(whole, "model", None), whole) if isinstance(owner, nn.Module)]
    found = [getattr(owner, name, None) for owner in owners for name in TOWERS]
    return list(dict.fromkeys(tower for tower in found if isinstance(tower, nn.Module)))


def _bare(whole: Any, tower: nn.Module) -> VisionCall:
    """All of the call but what is read."""
    vision = getattr(tower, "config", None) or whole.config.vision_config
    layout, argument = layout_of(vision)
    takes = inspect.signature(tower.forward).parameters
    if argument not in takes:
        argument = getattr(tower, "main_input_name", None) or next(iter(takes))
    space = pixel_space(whole, vision, argument=argument, layout=layout)
    inputs = [name for name in inspect.signature(whole.forward).parameters if name.startswith("pixel_values")]
    return VisionCall(
        module=tower,
        pixels=space,
        readouts=(),
        image_size=image_size(vision, space) if type(layout) is Layout else None,
        architecture=architecture(vision),
        inputs=tuple(inputs or ["pixel_values"]),
        tested=False,
    )


@torch.no_grad()
def _readable(whole: Any, call: VisionCall) -> Iterator[VisionCall]:
    """The same call with what may be read: what the configuration says, then one thing after the other."""
    deep = {"output_hidden_states": True}
    vision = getattr(call.module, "config", None)
    told = [getattr(whole.config, name, None) for name in ("vision_feature_layer", "vision_feature_layers")]
    if vision is not None and any(one is not None for one in told):
        for strategy in ("default", "full"):
            yield replace(call, readouts=layers(whole.config, vision, strategy=strategy), kwargs=deep)
    pixels, others = call.pixels.layout.still(_pixels(call, 0))
    takes = inspect.signature(call.module.forward).parameters
    asked = deep if deep.keys() <= takes.keys() or any(one.kind is one.VAR_KEYWORD for one in takes.values()) else {}
    with direct():
        output = call.module(pixels, **others, **asked)
    fields = output if isinstance(output, Mapping) else {"last_hidden_state": output}
    for position, (name, value) in enumerate(fields.items()):
        if name in ("pooler_output", "last_hidden_state") and isinstance(value, Tensor):
            yield from _cut(call, name, (Field(name, position),), value)
    for position, (name, value) in enumerate(fields.items()):
        if name == "hidden_states" and isinstance(value, Sequence):
            for layer in range(-1, -len(value) - 1, -1):
                if isinstance(value[layer], Tensor):
                    path = (Field(name, position), layer)
                    yield from _cut(replace(call, kwargs=deep), f"{name}[{layer}]", path, value[layer])


def _cut(call: VisionCall, name: str, path: tuple[Field | int, ...], value: Tensor) -> Iterator[VisionCall]:
    """Tokens without the first one, which may be of a class, then all; a vector as it is."""
    for skip in (1, 0) if value.ndim == 3 and value.shape[1] > 1 else (0,):
        whole = name + ("[1:]" if skip else "")
        readout = Readout(whole, path, width=value.shape[-1], tokens=0 if value.ndim == 2 else None, skip=skip)
        yield replace(call, readouts=(readout,))


def _pixels(call: VisionCall, seed: int) -> Tensor:
    """A random picture as the encoder takes it, (1, C, H, W) before its layout."""
    patch = getattr(call.pixels.layout, "patch", 8) * getattr(call.pixels.layout, "merge", 1)
    height, width = call.image_size or (4 * patch, 4 * patch)
    image = uniform(torch.Generator().manual_seed(seed), (1, len(call.pixels.mean), height, width))
    return call.pixels.from_unit(call.beside(image), call.dtype)


class _Pictures:
    """Two random pictures as the model itself is given them, with a question.

    Args:
        processor: the model's, that makes its inputs; where it is none that takes text, they are made by rule.
    """

    def __init__(self, whole: Any, call: VisionCall, processor: Any) -> None:
        self.whole = whole
        self.tolerance = 1e-4 if call.dtype in (torch.float32, torch.float64) else 1e-2
        make = _processed if hasattr(processor, "tokenizer") else _by_rule
        try:
            self.one, self.other = (make(whole, call, processor, seed) for seed in (1, 2))
            witnessed(whole, self.one, self.other, (call,), tolerance=self.tolerance)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"{type(whole).__name__} could not be asked about a random picture, to be probed "
                f"({type(error).__name__}: {error}). Pass processor=<its own>, which says how it is asked."
            ) from error

    def show_all_of(self, call: VisionCall) -> bool:
        """Whether the answer takes from a picture what this call reads, and nothing else."""
        try:
            probe(self.whole, self.one, self.other, calls=(call,), tolerance=self.tolerance)
        except ModelError:
            return False
        return True


def _processed(whole: Any, call: VisionCall, processor: Any, seed: int) -> Mapping[str, Any]:
    from PIL import Image

    from fs_plugins.hf.dialogue import dialogue, encode

    height, width = call.image_size or (224, 224)
    shown = uniform(torch.Generator().manual_seed(seed), (height, width, 3))
    picture = Image.fromarray((255 * shown).byte().numpy())
    inputs = encode(processor, [dialogue(processor, "What is this?")], [[picture]])
    return inputs.to(call.device, call.dtype)


@torch.no_grad()
def _by_rule(whole: Any, call: VisionCall, processor: Any, seed: int) -> Mapping[str, Any]:
    """Pixels in the encoder's layout, a placeholder for each of their tokens, and some text."""
    pixels, others = call.pixels.layout.still(_pixels(call, seed))
    takes = inspect.signature(whole.forward).parameters
    shown = {call.inputs[0]: pixels} | {
        name: value for given, value in others.items() for name in (given, f"image_{given}") if name in takes
    }
    config, count = whole.config, _tokens(whole, shown)
    image = next(
        (
            token
            for name in ("image_token_id", "image_token_index")
            if (token := getattr(config, name, None)) is not None
        ),
        0,
    )
    ids = torch.tensor([[*[image] * count, *BESIDE]], dtype=torch.long, device=call.device)
    kinds = {name: (ids == image).long() for name in ("token_type_ids", "mm_token_type_ids") if name in takes}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **shown, **kinds}


def _tokens(whole: Any, shown: Mapping[str, Any]) -> int:
    """How many tokens the language side gets of a picture, by ``get_image_features``; none where there is none."""
    if not hasattr(whole, "get_image_features"):
        return 0
    takes = inspect.signature(whole.get_image_features).parameters
    found = whole.get_image_features(**{name: value for name, value in shown.items() if name in takes})
    found = getattr(found, "pooler_output", found)
    while isinstance(found, Sequence):
        found = torch.cat([one.flatten(0, -2) for one in found])
    return found.numel() // found.shape[-1]
