"""A model with an encoder and classes as attack libraries take it: images in [0, 1] -> logits.

Shapes: B images, C channels, H x W pixels, E the width of the embedded feature, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from fs_plugins.attacks.victim import opaque
from fs_plugins.certificates.certifiers import Directions, classes_of
from fs_plugins.checks import number
from fs_plugins.choice import calls_of, numbered
from fs_plugins.errors import ModelError, SettingError
from fs_plugins.head import Head
from fs_plugins.hf.zeroshot import directions_of
from fs_plugins.patch import hooks_of
from fs_plugins.pictures import channels_first, check_unit, held
from fs_plugins.vision import VisionCall, unwrapped


def zero_shot(
    model: nn.Module,
    classes: Sequence[str] | Directions = None,
    *,
    prompt: str = "a photo of a {}",
    tokenizer: Any = None,
    scale: float | None = None,
    processor: Any = None,
    adapter: str | None = None,
    encoder: int = 0,
) -> Classifier:
    """The model as a classifier that attack libraries take as it is: (B, C, H, W) images in [0, 1] -> (B, K) logits.

    It answers as the model serves: through noise, purifier, encoder, mapper and average while smoothing is enabled on
    the model, before or after this call, and as the bare model otherwise.

    Args:
        model: any model an adapter claims, in eval mode. It is held, not copied.
        classes: their names, which a model of images and texts (CLIP, SigLIP, open_clip) embeds; or what
            ``certify_predictions`` takes as ``directions``: (K, E), names -> (E,), or an ``nn.Linear`` on the embedded
            feature. Left out, an image classifier's own head.
        prompt: what a class is called in a sentence, with ``{}`` for its name.
        tokenizer: of texts, or its folder or hub id; the processor's, or what is saved where the model is from, if left
            out. open_clip's models need theirs, ``open_clip.get_tokenizer(...)``.
        scale: what the cosines to directions are multiplied by; the model's own ``logit_scale`` if left out, or 1
            where it has none. Its own ``logit_bias`` (SigLIP) is added. A head's scores are its own.
        processor, adapter, encoder: as for ``certify``; of a model that is enabled, its pixels are as enabled.

    Returns:
        the classifier; its ``names`` are the classes', its ``call`` knows the images' size, and its ``scores`` is the
        part after the encoder, for ``attacks.Answer``.

    Raises:
        ModelError: no adapter, or several, claim the model; it is in training mode; it embeds no texts; or no classes
            are given and it has no head of its own.
        SettingError: a value out of range; classes that are no two different ones; no tokenizer; nobody knows how the
            model's pixels are normalised.
        PluginError: see its docstring.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"zero_shot takes a torch.nn.Module, got {type(model).__name__}.")
    enabled = [hook.smoother.call for hook in hooks_of(model)[0]] if processor is None else []
    call = numbered(enabled or calls_of(model, processor=processor, adapter=adapter)[1], encoder)
    call.check_eval()
    if scale is not None:
        scale = number("scale must be positive (CLIP's is 100)", scale, lambda found: found > 0)
    if isinstance(classes, Sequence) and any(isinstance(one, str) for one in classes):
        whole = unwrapped(model)
        if tokenizer is None:
            tokenizer = processor if hasattr(processor, "tokenizer") else getattr(whole, "name_or_path", "")
        classes = directions_of(whole, tokenizer, classes, prompt)
    elif classes is None and call.head is None:
        raise ModelError(
            "This model has no head of its own. Pass classes: their names, directions for them, or an nn.Linear on the "
            "embedded feature."
        )
    found = classes_of(call, cast(Directions, classes))
    if isinstance(classes, nn.Linear):
        found = Head.of(copy.deepcopy(classes).to(call.beside(classes.weight).device))
    return Classifier(model, call, found, scale)


class Classifier(nn.Module):
    """What ``zero_shot`` answers. Always in eval mode; no weight ever receives a gradient.

    For the length of a call no weight requires one; threads may share a model of which none ever does.

    Args:
        model: that serves, held as a part.
        call: where it looks at images.
        classes: its head; or directions, (K, E), and the classes' names.
        scale: of the cosines; None for the model's own.
    """

    head: Head | None
    directions: Tensor | None

    def __init__(
        self, model: nn.Module, call: VisionCall, classes: Head | tuple[Tensor, list[str] | None], scale: float | None
    ) -> None:
        super().__init__()
        self.model, self.call, self.scale = model, call, scale
        if isinstance(classes, Head):
            self.head, rows, names = classes, None, classes.labels
        else:
            self.head, rows, names = None, call.beside(_wide(classes[0].detach())), tuple(classes[1] or ())
        self.layers = nn.ModuleList(self.head.layers if self.head else ())
        self.register_buffer("directions", rows)
        self.names = names
        self.training = False

    def train(self, mode: bool = True) -> Self:
        """Eval mode, whatever is asked for: in training mode features are random, and an attack on them is weak."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) images in [0, 1] -> (B, K) logits, in single precision or the model's double.

        A step of an attack may leave [0, 1] by a half.

        Raises:
            SettingError: images of another size or range, or features of another width than the directions.
            ModelError: the model is in training mode; or gradients are asked for and its weights let none through.
            PixelError: smoothing is enabled, with a PSM that is not for such images.
        """
        self.call.check_eval()
        images = self._checked(images)
        if images.requires_grad and (why := opaque(self.call)):
            raise ModelError(why)
        with self._frozen():
            return self.scores(self.call.served(images))

    def scores(self, embedded: Tensor) -> Tensor:
        """(B, E) embedded features -> (B, K) logits.

        Raises:
            SettingError: features of another width.
        """
        if self.directions is None:
            head = cast(Head, self.head)
            self._check_width(embedded, head.width)
            return _wide(head(embedded.to(next(self.layers.parameters(), embedded))))
        self._check_width(embedded, self.directions.shape[1])
        units = nn.functional.normalize(_wide(embedded), dim=-1)
        cosines, whole = units @ self.directions.to(units).T, unwrapped(self.model)
        scale, bias = (getattr(whole, name, None) for name in ("logit_scale", "logit_bias"))
        if self.scale is not None:
            cosines = cosines * self.scale
        elif scale is not None:
            cosines = cosines * scale.to(units).exp()
        return cosines if bias is None else cosines + bias.to(units)

    def _check_width(self, embedded: Tensor, width: int) -> None:
        if embedded.shape[1] != width:
            raise SettingError(
                f"These classes are for features of width {width}, and this encoder's have {embedded.shape[1]}."
            )

    def _checked(self, images: Tensor) -> Tensor:
        images = held("images", images)
        size, channels = self.call.image_size, len(self.call.pixels.mean)
        if images.ndim != 4 or images.shape[1] != channels or size not in (None, tuple(images.shape[-2:])):
            wanted = f"(B, {channels}, {size[0]}, {size[1]})" if size else f"(B, {channels}, H, W)"
            raise SettingError(
                f"images must be {wanted}, at the resolution the encoder sees, got {tuple(images.shape)}."
                f"{channels_first(images.shape)}"
            )
        if not images.is_floating_point() or (images.numel() and not _near(images.detach())):
            check_unit("images", images)
        return images

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Inside, no parameter requires a gradient."""
        learnt = [parameter for parameter in self.parameters() if parameter.requires_grad]
        try:
            for parameter in learnt:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in learnt:
                parameter.requires_grad_(True)


def _near(images: Tensor) -> bool:
    low, high = map(float, images.aminmax())
    return low >= -0.5 and high <= 1.5


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
