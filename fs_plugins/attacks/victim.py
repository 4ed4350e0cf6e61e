"""What an attack sees of an encoder: plain, or through the smoothing that protects it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fs_plugins.choice import calls_of, check_pixels
from fs_plugins.errors import ModelError
from fs_plugins.identity import packed
from fs_plugins.noise import Source, keyed
from fs_plugins.patch import hooks_of
from fs_plugins.smoothing import FeatureSmoother
from fs_plugins.vision import VisionCall


@dataclass(frozen=True)
class Stream:
    """Randomness of one draw of one step of an attack, an image's own for each of ``keys``.

    It does not depend on which other images are attacked beside it. As a ``Source`` it feeds a smoother.
    """

    marks: tuple[object, ...]
    keys: tuple[object, ...]

    def at(self, *marks: object) -> Stream:
        return replace(self, marks=(*self.marks, *marks))

    def generators(self, images: Sequence[Tensor] | Tensor) -> list[torch.Generator]:
        return [keyed(*self.marks, key, device=image.device) for key, image in zip(self.keys, images, strict=True)]

    def choices(self) -> list[torch.Generator]:
        """The same on the CPU, wherever the images are: for what decides (places, sizes, signs) rather than adds."""
        return [keyed(*self.marks, key) for key in self.keys]


@dataclass(frozen=True)
class Seen:
    """What an encoder makes of B images.

    Args:
        embedding: (B, E) the certified embedding: all that the model consumes.
        pooled: (B, P) one vector for the picture as a whole: the mean of the tokens that the model consumes, or the
            embedding where it consumes a pooled vector.
        tokens: (B, L, D) what stands for parts of the picture; None where the encoder shows none.
        output: the encoder's whole output, as the model would be given it.
    """

    embedding: Tensor
    pooled: Tensor
    tokens: Tensor | None
    output: Any = None


class Victim:
    """An encoder under attack.

    Args:
        encoder: a VisionCall is seen plain, whatever smoothing is enabled (the oblivious attack); a FeatureSmoother is
            seen through noise, purifier, mapper and average (the adaptive one).
    """

    def __init__(self, encoder: VisionCall | FeatureSmoother) -> None:
        self.smoother = encoder if isinstance(encoder, FeatureSmoother) else None
        self.call: VisionCall = encoder.call if isinstance(encoder, FeatureSmoother) else encoder

    def see(self, images: Tensor, source: Source) -> Seen:
        """(B, C, H, W) in [0, 1], of any size -> what is served for them. Gradients follow the images.

        Raises:
            ModelError: gradients are asked for, and the encoder's weights let none through.
        """
        images = self._resized(images)
        if images.requires_grad and self._opaque:
            raise ModelError(self._opaque)
        if self.smoother is None:
            return self._seen(self.call.look(images))
        return self._seen(self.smoother.look(images, source=source, frugal=images.requires_grad))

    @cached_property
    def _opaque(self) -> str | None:
        return opaque(self.call)

    @torch.no_grad()
    def see_plain(self, images: Tensor) -> Seen:
        """The same without any smoothing, and without gradients: what an attack aims at, or away from."""
        return self._seen(self.call.look(self._resized(images)))

    def _resized(self, images: Tensor) -> Tensor:
        size = self.call.image_size
        if size is None or size == tuple(images.shape[-2:]):
            return images
        return torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)

    def _seen(self, output: Any) -> Seen:
        wide = self.call.wide(output)
        embedding = self.call.embed(wide)
        of_tokens = [readout for readout in self.call.readouts if readout.tokens != 0]
        if not of_tokens:
            return Seen(embedding, embedding, _hidden(output), output)
        # Not the class token, which CLIP pools: who consumes the others never reads it, and no mapper refines it.
        pooled = torch.cat([wide[readout.name].mean(1) for readout in of_tokens], dim=1)
        return Seen(embedding, pooled, wide[of_tokens[0].name], output)


def opaque(call: VisionCall) -> str | None:
    """Why no gradient can go through the encoder's weights; None if it can."""
    if found := packed(call.module):
        return (
            f"The encoder is quantised ({found[0]}), and no gradient flows through packed weights: around them "
            "little is left, and such an attack would flatter the model. Attack the encoder that it was quantised "
            'from and show it those pictures, or use the gradient-free attack (method="square").'
        )
    if any(parameter.is_inference() for module in call.modules for parameter in module.parameters()):
        return (
            "The encoder's weights were made inside torch.inference_mode, so no gradient can be recorded through "
            'them. Load the model outside it, or use the gradient-free attack (method="square").'
        )
    return None


def _hidden(output: Any) -> Tensor | None:
    """The tokens that a pooled encoder shows beside its pooled vector."""
    found = output.get("last_hidden_state") if isinstance(output, Mapping) else None
    return found.to(torch.promote_types(found.dtype, torch.float32)) if isinstance(found, Tensor) else None


Attackable = nn.Module | VisionCall | FeatureSmoother
"""A model, as it serves; its plain encoder; or a pipeline to attack through."""


def victims(models: Attackable | Sequence[Attackable]) -> list[Victim]:
    """One victim, or an ensemble of surrogates.

    Raises:
        ModelError: nothing to attack, something that is no encoder (see ``encoder_of``), or one in training mode.
    """
    several = models if isinstance(models, Sequence) else [models]
    if not several:
        raise ModelError("An attack needs at least one encoder.")
    found = [Victim(encoder_of(model)) for model in several]
    for victim in found:
        (victim.smoother or victim.call).check_eval()
    return found


def encoder_of(model: Attackable) -> VisionCall | FeatureSmoother:
    """What a model serves: its smoother where smoothing is enabled on it, else its plain encoder.

    Raises:
        ModelError: not one of the three, a model with several vision encoders, or see ``choice.calls_of``.
        SettingError, PluginError: see ``choice.calls_of``.
    """
    if isinstance(model, VisionCall):
        check_pixels([model])
    if isinstance(model, VisionCall | FeatureSmoother):
        return model
    if not isinstance(model, nn.Module):
        raise ModelError(
            "An attack takes a model, a VisionCall (fs_plugins.vision_call(model)), or a FeatureSmoother to attack "
            f"through (fs_plugins.smoothers(model)); got {type(model).__name__}."
        )
    enabled = [hook.smoother for hook in hooks_of(model)[0]]
    found: Sequence[VisionCall | FeatureSmoother] = enabled or calls_of(model)[1]
    if len(found) > 1:
        raise ModelError(
            f"This model has {len(found)} vision encoders. Attack one: fs_plugins.vision_call(model, encoder=0), say, "
            "or fs_plugins.smoothers(model)[0] through its smoothing."
        )
    return found[0]
