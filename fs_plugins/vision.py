"""What an adapter answers: where a model looks at an image, in which pixel space, and what it reads out.

Shapes: B images, C channels, H x W pixels, L tokens, D width, N rows (draws times images).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fs_plugins.checks import number, settle
from fs_plugins.errors import ModelError, PixelError, SettingError
from fs_plugins.head import Head
from fs_plugins.identity import fingerprint
from fs_plugins.layouts import Layout
from fs_plugins.outputs import Field, Readout, map_tensors
from fs_plugins.pictures import Picture, batch

__all__ = [
    "Features",
    "Field",
    "FlattenedTokens",
    "LinearEmbedding",
    "PixelSpace",
    "Readout",
    "VisionCall",
    "direct",
    "is_a",
    "is_direct",
    "map_tensors",
    "unwrapped",
]

Features = dict[str, Tensor]
"""Readout name -> (N, L, D) tokens or (N, D) pooled vectors."""


@dataclass(frozen=True)
class PixelSpace:
    """How a vision module's pixel argument maps to images in [0, 1] and back.

    Noise, ``sigma`` and ``eps`` live in [0, 1] and nowhere else; this is the only place that converts.

    Args:
        mean, std: per channel, in [0, 1] units: ``pixels = (image - mean) / std``.
        argument: the keyword of the vision module's pixel argument; it is also the first positional one.
        source: where mean, std and size come from, in words, for ``status``; empty if nobody knows, and then
            ``enable`` asks for a processor.
        size: (H, W) that the preprocessing makes, where it makes one size.
        layout: how the argument holds images.
        assumed: whether mean and std are only the usual ones of such encoders, because nobody knows those of this
            one. ``enable`` warns of that; what proves something, and training, refuse.
        prefix: what a processor's words for this module's pixels begin with (``high_res_image_mean``), where a model
            looks at an image through two modules that want it differently.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    argument: str = "pixel_values"
    source: str = "given by hand"
    size: tuple[int, int] | None = None
    layout: Layout = field(default_factory=Layout)
    assumed: bool = False
    prefix: str = ""

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not len(self.mean):
            raise SettingError(f"PixelSpace needs one mean and one std per channel, got {self.mean} and {self.std}.")
        settle(
            self,
            mean=tuple(number("PixelSpace.mean must hold a number for every channel", one) for one in self.mean),
            std=tuple(number("PixelSpace.std must be positive in every channel", s, lambda s: s > 0) for s in self.std),
        )

    @classmethod
    def from_processor(
        cls, processor: Any, *, source: str = "the processor given", channels: int = 3, prefix: str = ""
    ) -> PixelSpace:
        """Read mean, std and size off a Hugging Face processor or image processor; a PixelSpace is one already.

        Args:
            channels: of the images; a mean or std that is one number is that of all.
            prefix: what its words for the module's mean, std and size begin with.

        Raises:
            SettingError: the object has no ``image_mean``/``image_std``, or does not rescale to [0, 1].
        """
        if isinstance(processor, PixelSpace):
            return processor
        images = _of_timm(getattr(processor, "image_processor", processor))
        mean, std = (getattr(images, f"{prefix}image_{name}", None) for name in ("mean", "std"))
        if getattr(images, "do_normalize", True) is False:
            mean, std = 0.0, 1.0
        if mean is None or std is None:
            raise SettingError(
                f"{type(processor).__name__} has no {prefix}image_mean and {prefix}image_std. Pass the model's own "
                "processor, or a PixelSpace(mean=..., std=...)."
            )
        if getattr(images, "do_rescale", True) is False:
            raise SettingError(
                f"{type(processor).__name__} has do_rescale=False, so it does not say how its pixels relate to "
                "[0, 1]. Pass a PixelSpace(mean=..., std=...) that does."
            )
        factor = getattr(images, "rescale_factor", None)
        if factor is not None and abs(float(factor) * 255 - 1) > 1e-3:
            raise SettingError(
                f"{type(processor).__name__} rescales pixels by {factor} instead of 1/255, so its mean and std are not "
                "in [0, 1] units. Pass a PixelSpace(mean=..., std=...) in [0, 1] units."
            )
        size = _size(images, prefix)
        return cls(per_channel(mean, channels), per_channel(std, channels), source=source, size=size, prefix=prefix)

    def to_unit(self, pixels: Tensor) -> Tensor:
        """(..., C, H, W) normalised pixels -> fp32 images, nominally in [0, 1]."""
        mean, std = self._columns(pixels)
        return pixels.to(_wide(pixels.dtype)) * std + mean

    def from_unit(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Images in [0, 1] -> (..., C, H, W) pixels in ``dtype``. Inverse of ``to_unit`` up to rounding."""
        mean, std = self._columns(images)
        return ((images - mean) / std).to(dtype)

    def _columns(self, like: Tensor) -> tuple[Tensor, Tensor]:
        wide = _wide(like.dtype)
        mean = torch.tensor(self.mean, dtype=wide, device=like.device).view(-1, 1, 1)
        return mean, torch.tensor(self.std, dtype=wide, device=like.device).view(-1, 1, 1)

    def check(self, pixels: Any) -> None:
        """Refuse a pixel argument that cannot hold images of this space.

        Raises:
            PixelError: wrong type, shape or dtype.
        """
        if self.layout.listed and isinstance(pixels, list | tuple):
            for one in pixels:
                self._check(one)
        else:
            self._check(pixels)

    def _check(self, pixels: Any) -> None:
        if not isinstance(pixels, Tensor):
            raise PixelError(f"{self.argument} must be a tensor, got {type(pixels).__name__}.")
        if wrong := self.layout.check(pixels, len(self.mean)):
            shape, channels = tuple(pixels.shape), len(self.mean)
            other = len(shape) in (3, 4) and shape[-3] != channels
            ask = (
                f" Mean and std are for {channels} channels ({self.source}): is it another processor=?" if other else ""
            )
            raise PixelError(f"{self.argument} {wrong}, got shape {shape}.{ask}")
        if not pixels.is_floating_point():
            raise PixelError(
                f"{self.argument} must be floating point, normalised with mean {self.mean} and std {self.std}; "
                f"got {pixels.dtype}. Run the images through the model's processor."
            )

    def check_range(self, images: Tensor) -> str | None:
        """Refuse images in [0, 1] that are not; return a warning for those that hardly are.

        Raises:
            PixelError: non-finite values, or a range so far outside [0, 1] that the normalisation must be another one.
        """
        if images.numel() == 0:
            return None
        low, high = (bound.item() for bound in images.detach().aminmax())
        if not (low > -float("inf") and high < float("inf")):
            raise PixelError(
                f"{self.argument} holds NaN or infinite values; smoothing would spread them to every draw."
            )
        span = f"[{low:.2f}, {high:.2f}]"
        if low < -0.5 or high > 1.5:
            raise PixelError(
                f"{self.argument} maps to {span} instead of [0, 1] under mean {self.mean} and std {self.std} "
                f"({self.source}). Then sigma would mean something else. Use the model's own processor, or tell "
                "enable(..., processor=...) how these pixels were normalised."
            )
        if low < -0.02 or high > 1.02:
            return (
                f"{self.argument} maps to {span}, a little outside [0, 1], under mean {self.mean} and std {self.std} "
                f"({self.source}). Resizing can overshoot; if it is a wrong mean or std, pass enable(..., "
                "processor=...)."
            )
        return None


def per_channel(given: Any, channels: int) -> tuple[Any, ...]:
    """A mean or a std as frameworks write it: for every channel, or one number for all."""
    values = tuple(given) if isinstance(given, Iterable) and getattr(given, "ndim", 1) > 0 else (given,)
    return values * channels if len(values) == 1 else values


def _of_timm(images: Any) -> Any:
    """An image processor; transformers' wrapper of timm's, which says all in one record, in everybody's words."""
    record = getattr(images, "data_config", None)
    if not isinstance(record, Mapping):
        return images
    size = dict(zip(("height", "width"), (record.get("input_size") or ())[-2:], strict=False))
    return SimpleNamespace(image_mean=record.get("mean"), image_std=record.get("std"), size=size)


def _size(images: Any, prefix: str) -> tuple[int, int] | None:
    """(H, W) that an image processor makes of every picture, or None where it follows the picture."""
    cropped = getattr(images, "do_center_crop", False) is True
    size = getattr(images, prefix + ("crop_size" if cropped else "size"), None)
    if isinstance(size, int):
        return (size, size) if cropped else None
    height, width = (getattr(size, "get", lambda _: None)(side) for side in ("height", "width"))
    return (int(height), int(width)) if height and width else None


@runtime_checkable
class Embedding(Protocol):
    """Features -> (N, E), linear without bias: what certificates speak of.

    Args:
        modules: those of the model that it is made of. Training freezes them, ledgers are tied to their weights.
    """

    modules: tuple[nn.Module, ...]

    def __call__(self, features: Features) -> Tensor: ...


class FlattenedTokens:
    """The default certified embedding: every readout flattened, side by side. Linear, without bias."""

    modules: tuple[nn.Module, ...] = ()

    def __call__(self, features: Features) -> Tensor:
        """Features -> (N, E)."""
        flat = [value.flatten(1) for value in features.values()]
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)


class LinearEmbedding:
    """The embedding of a pooled readout by the model's own bias-free projection (CLIP zero-shot)."""

    def __init__(self, readout: str, linear: nn.Module) -> None:
        self.readout = readout
        self.linear = linear
        self.modules = (linear,)

    def __call__(self, features: Features) -> Tensor:
        """Features -> (N, E)."""
        value = features[self.readout]
        return self.linear(value.to(_dtype_of(self.linear))).to(value.dtype)


@dataclass(frozen=True)
class VisionCall:
    """One place where a model looks at images: an adapter's whole answer.

    Args:
        module: the outermost vision encoder, called with the pixels. It is hooked, never replaced.
        pixels: its pixel space.
        readouts: what is consumed out of its output, by name.
        image_size: (H, W) the encoder was built for; None where it takes images as they come.
        architecture: what the encoder is, as the registry writes it (family, widths, layers, patch size).
        embed: an Embedding, or a plain function that holds no weights; certificates speak of its direction.
        kwargs: arguments under which the module computes every readout, used where the caller left them out.
        inputs: keywords under which the model itself takes pixels; ``pixels.argument`` if empty.
        grad_scope: a module around which the framework switches gradients off on its own account; while its
            inputs require a gradient, they stay on.
        head: a classifier's own, on the embedded feature; None for models that have none.
        tested: whether somebody has tested models of this class; ``status`` and ``doctor`` say where nobody has.
        weights: the encoder's weights by the names that its checkpoint has for them, where the module holds them in
            another form (fused, sharded, some left out); it is recognised by these then.
    """

    module: nn.Module
    pixels: PixelSpace
    readouts: tuple[Readout, ...]
    image_size: tuple[int, int] | None
    architecture: Mapping[str, int | str]
    embed: Embedding | Callable[[Features], Tensor] = field(default_factory=FlattenedTokens)
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    grad_scope: nn.Module | None = None
    head: Head | None = None
    tested: bool = True
    weights: Callable[[], Mapping[str, Tensor]] | None = None

    def fingerprint(self) -> tuple[float, ...]:
        """Whose weights the encoder has, see ``identity.fingerprint``.

        Raises:
            ModelError: they cannot be read.
        """
        return fingerprint(self.module if self.weights is None else self.weights())

    def features(self, output: Any) -> Features:
        """The consumed features out of the module's output, one row per image (see ``Layout.opened``)."""
        return {readout.name: readout.get(output) for readout in self.readouts}

    def wide(self, output: Any) -> Features:
        """The same in fp32, or fp64 where the module works in it."""
        return {name: value.to(_wide(value.dtype)) for name, value in self.features(output).items()}

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All of the model that features and their embedding are computed by: the encoder, and the embedding's own."""
        if isinstance(self.embed, nn.Module):
            return (self.module, self.embed)
        return (self.module, *(self.embed.modules if isinstance(self.embed, Embedding) else ()))

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type the module works in."""
        return _dtype_of(self.module)

    @property
    def device(self) -> torch.device:
        """Where the module's weights are; meta if they are offloaded, the CPU if it shows none (packed ones)."""
        shown = (*self.module.parameters(), *self.module.buffers())
        return shown[0].device if shown else torch.device("cpu")

    @property
    def training(self) -> bool:
        """Whether a part is in training mode; torch's quantised modules have none, and say they are."""
        packed = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
        parts = (part for module in self.modules for part in module.modules())
        return any(part.training and not type(part).__module__.startswith(packed) for part in parts)

    def check_eval(self) -> None:
        """Refuse training mode: features are random in it, so an attack is weak and a certificate of something else.

        Raises:
            ModelError: a part is in training mode.
        """
        if self.training:
            raise ModelError(
                "The vision encoder is in training mode, where its features are random. Call model.eval() first."
            )

    @property
    def size_in_words(self) -> str:
        """The resolution the encoder sees, for people."""
        return f"{self.image_size[0]}x{self.image_size[1]}" if self.image_size else "as they come"

    def forward(self, pixels: Tensor) -> Any:
        """(N, C, H, W) still images, normalised -> the module's raw output, around any smoothing that is enabled."""
        argument, others = self.pixels.layout.still(pixels)
        with direct():
            return self.module(argument, **others, **self.kwargs)

    def look(self, images: Picture | Iterable[Picture]) -> Any:
        """(N, C, H, W) images in [0, 1], or a list of pictures -> the plain encoder's output, a row per image.

        Gradients follow the images.
        """
        shown = images if isinstance(images, Tensor) else self.batch("images", images)
        return self.pixels.layout.opened(self.forward(self.pixels.from_unit(shown, self.dtype)), len(shown))

    def batch(self, what: str, pictures: Picture | Iterable[Picture]) -> Tensor:
        """Pictures of one size, as people hold them -> (B, C, H, W) in [0, 1], where the encoder's weights are.

        Raises:
            SettingError: see ``pictures.batch``.
        """
        return self.beside(batch(what, pictures, len(self.pixels.mean)))

    def beside(self, images: Tensor) -> Tensor:
        """Images where the encoder's weights are; where they are, if the weights are offloaded."""
        device = next((parameter.device for parameter in self.module.parameters()), images.device)
        return images if device.type == "meta" else images.to(device)

    def encode(self, images: Picture | Iterable[Picture]) -> Features:
        """(N, C, H, W) images in [0, 1], or a list of pictures -> the plain encoder's features, fp32.

        Gradients follow the images.
        """
        return self.wide(self.look(images))

    def served(self, images: Tensor) -> Tensor:
        """(B, C, H, W) images in [0, 1] -> (B, E) embedded features, through any smoothing that is enabled.

        Gradients follow the images.
        """
        argument, others = self.pixels.layout.still(self.pixels.from_unit(self.beside(images), self.dtype))
        output = self.module(argument, **others, **self.kwargs)  # not forward, which goes around smoothing
        return self.embed(self.features(self.pixels.layout.opened(output, len(images))))

    @contextmanager
    def showing(self, output: Any) -> Iterator[None]:
        """Inside, the model goes on from this output of its encoder, whatever pixels it is given, smoothed or not.

        Args:
            output: the module's own, for as many images as the model is given. Gradients follow it.
        """
        own = vars(self.module).get("forward")
        self.module.forward = lambda *args, **kwargs: output
        try:
            with direct():
                yield
        finally:
            if own is None:
                del self.module.forward
            else:
                self.module.forward = own

    def with_processor(self, processor: Any) -> VisionCall:
        """The same call under the mean, std and size of the model's processor, or of a PixelSpace.

        Raises:
            SettingError: see ``PixelSpace.from_processor`` and ``with_pixels``.
        """
        own = self.pixels
        return self.with_pixels(PixelSpace.from_processor(processor, channels=len(own.mean), prefix=own.prefix))

    def with_pixels(self, pixels: PixelSpace) -> VisionCall:
        """The same call under another mean, std and, if it says one, size.

        Raises:
            SettingError: they are for images of another number of channels.
        """
        if len(pixels.mean) != len(self.pixels.mean):
            raise SettingError(
                f"The mean and std given are for {len(pixels.mean)} channels ({pixels.source}); this encoder's images "
                f"have {len(self.pixels.mean)}. Pass processor=<one for such images>, or a PixelSpace(mean=..., "
                "std=...) with a number for each channel."
            )
        own = replace(
            self.pixels,
            mean=pixels.mean,
            std=pixels.std,
            source=pixels.source,
            size=pixels.size,
            assumed=pixels.assumed,
        )
        return replace(self, pixels=own, image_size=self.image_size and (pixels.size or self.image_size))


_direct = threading.local()


@contextmanager
def direct() -> Iterator[None]:
    """Inside, this thread's vision calls go straight to the encoder; smoothing hooks stand aside."""
    _direct.depth = getattr(_direct, "depth", 0) + 1
    try:
        yield
    finally:
        _direct.depth -= 1


def is_direct() -> bool:
    return getattr(_direct, "depth", 0) > 0


def unwrapped(model: nn.Module) -> Any:
    """The model inside torch.compile, DistributedDataParallel, FSDP and PEFT wrappers."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module) or isinstance(
            inner := getattr(model, "_fsdp_wrapped_module", None), nn.Module
        ):
            model = inner
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif callable(getattr(model, "get_base_model", None)) and hasattr(model, "peft_config"):
            model = model.get_base_model()  # type: ignore[operator]
        else:
            return model


def is_a(model: nn.Module, package: str, *names: str) -> bool:
    """Whether the model's class, or one it derives from, is ``package``'s class of one of these names.

    Asks without importing the package.
    """
    return any(c.__name__ in names and c.__module__.split(".")[0] == package for c in type(model).__mro__)


def _dtype_of(module: nn.Module) -> torch.dtype:
    """The floating-point type a module works in; fp32 where it shows none, as torch's quantised modules do."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 where the caller works in it."""
    return torch.promote_types(dtype, torch.float32)
