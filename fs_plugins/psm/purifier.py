"""Purifiers: (N, 3, H, W) noisy images and sigma -> images, all in [0, 1] pixel units.

``UNetPurifier`` is the light U-Net denoiser of the paper (appendix S.9.2), of any width. ``BottleneckPurifier`` paints
pictures anew from a short code, ``CascadePurifier`` lets several purifiers see one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fs_plugins.checks import number, shown, whole
from fs_plugins.errors import PSMError, SettingError

PAPER_UNET: dict[str, Any] = {"channels": (96, 128, 256, 416), "layers": 2, "unshuffle": 1, "attention": True}
"""The light purifier at the paper's size: 43.6 M parameters (the paper says 43.7 M and no widths)."""


UNSHUFFLE = 4
"""The usual side of the blocks that are folded into channels."""
MOST_MULTIPLE = 256
"""Images are padded to multiples of a side: a small file must not make large pictures of small ones."""


def diffusers_class(name: str) -> Any:
    """A class of diffusers, also beside a torch for which torchvision was not built.

    Raises:
        PSMError: diffusers cannot be imported.
    """
    from fs_plugins import torchvision_schemas  # noqa: F401  (diffusers imports torchvision)

    try:
        import diffusers

        return getattr(diffusers, name)
    except (ImportError, RuntimeError) as error:  # the second is what diffusers makes of a fault in what it imports
        raise PSMError(f"diffusers, of which it is made, cannot be imported: {error}") from error


def unet_class() -> Any:
    """diffusers' ``UNet2DModel``; see ``diffusers_class``."""
    return diffusers_class("UNet2DModel")


def widths(name: str, given: Iterable[int], group: int) -> tuple[int, ...]:
    """Channels a level, whole multiples of ``group``.

    Raises:
        SettingError: they are none.
    """
    channels = tuple(given)
    if not channels or any(whole(name, width) % group for width in channels):
        raise SettingError(f"{name} must be multiples of {group}, got {channels}.")
    return channels


def depth(name: str, given: int) -> int:
    """Blocks a level, or one after the other: a small file must not keep one waiting for what it has no weights for.

    Raises:
        SettingError: none, or more than 32.
    """
    if whole(name, given) > 32:
        raise SettingError(f"{name} must be at most 32, got {given}.")
    return given


def check_multiple(levels: int, unshuffle: int = 1) -> None:
    """Refuse nets that make much of little pictures.

    Raises:
        SettingError: each level halves the side, and they are too many.
    """
    if levels > 32 or unshuffle * 2 ** (levels - 1) > MOST_MULTIPLE:
        raise SettingError(
            f"{levels} levels after unshuffling by {unshuffle} pad images to multiples beyond {MOST_MULTIPLE}; "
            "take fewer levels."
        )


def basis(unshuffle: int) -> Tensor:
    """(3 u^2, 3 u^2): the rows are pictures of u x u pixels, orthonormal, in the order of ``pixel_unshuffle``.

    Grey, red against blue and green against both, each times the discrete cosine transform (DCT-II) down and across,
    from the mean to the finest: what photographs have much of comes first.
    """
    places = torch.arange(unshuffle, dtype=torch.float64, device="cpu")
    waves = torch.cos(torch.pi * torch.outer(places, 2 * places + 1) / (2 * unshuffle))
    colours = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64, device="cpu")
    waves, colours = (rows / rows.norm(dim=1, keepdim=True) for rows in (waves, colours))
    return torch.kron(colours, torch.kron(waves, waves)).float()


def spectrum(images: Iterable[Tensor], unshuffle: int) -> list[float]:
    """Root mean squares of the coefficients of (3, H, W) images in [0, 1], about mid grey, to four digits.

    Sides are cut to multiples of ``unshuffle``. For ``UNetPurifier(spectrum=...)``.
    """
    to, total, count = basis(unshuffle), torch.zeros(3 * unshuffle**2, dtype=torch.float32, device="cpu"), 0
    for image in images:
        height, width = (side - side % unshuffle for side in image.shape[1:])
        folded = F.pixel_unshuffle(image[None, :, :height, :width] - 0.5, unshuffle)
        total += _turned(folded, to).square().mean((0, 2, 3))
        count += 1
    return [float(f"{value:.4g}") for value in (total / count).sqrt().tolist()]


def _turned(folded: Tensor, matrix: Tensor) -> Tensor:
    """A matrix times the channels of (N, C, H, W), in the type of these also where autocast would have less."""
    with torch.autocast(folded.device.type, enabled=False):
        return F.conv2d(folded, matrix.to(folded.dtype)[:, :, None, None])


class UNetPurifier(nn.Module):
    """A residual U-Net (diffusers ``UNet2DModel``) conditioned on sigma, for images of any size.

    Args:
        channels: widths from the finest to the coarsest level.
        layers: residual blocks a level.
        unshuffle: side of the pixel blocks folded into channels first; 1 keeps full resolution.
        attention: self-attention in the middle block.
        spectrum: how much pictures have of each row of ``basis(unshuffle)`` (see ``spectrum``). The net then works on
            these coefficients, each preconditioned by its own sigma_data (Karras et al., 2022, eq. 7): of what stands
            out of the noise nearly all is kept, of what drowns in it nothing (the filter of Wiener, 1949), and the net
            adds what it knows of the rest, so that a narrow one need not carry picture and noise through. At sigma 0
            images stay as they are. None keeps all of the image and adds a change. Training takes ``"measured"`` for
            that of its own pictures.

    Raises:
        SettingError: sizes that no such net has, a spectrum of another length or with a value that is not positive, or
            a net that pads images to multiples beyond ``MOST_MULTIPLE``.
    """

    def __init__(
        self,
        *,
        channels: tuple[int, ...] = (64, 128),
        layers: int = 1,
        unshuffle: int = UNSHUFFLE,
        attention: bool = False,
        spectrum: Iterable[float] | None = None,
    ) -> None:
        super().__init__()
        channels = widths("UNetPurifier.channels", channels, 8)
        layers, unshuffle = depth("UNetPurifier.layers", layers), whole("UNetPurifier.unshuffle", unshuffle)
        if not isinstance(attention, bool):
            raise SettingError(f"UNetPurifier.attention must be true or false, got {attention!r}.")
        check_multiple(len(channels), unshuffle)
        folded = 3 * unshuffle**2
        known = None if spectrum is None else _positive(spectrum, folded)
        self.spectrum: Any
        self.register_buffer("spectrum", known, persistent=False)
        self.basis: Any
        self.register_buffer("basis", None if known is None else basis(unshuffle), persistent=False)
        self.unshuffle = unshuffle
        self.multiple = unshuffle * 2 ** (len(channels) - 1)
        net: Any = unet_class()(
            in_channels=folded,
            out_channels=folded,
            block_out_channels=tuple(channels),
            down_block_types=("DownBlock2D",) * len(channels),
            up_block_types=("UpBlock2D",) * len(channels),
            layers_per_block=layers,
            norm_num_groups=8,
            add_attention=attention,
        )
        nn.init.zeros_(net.conv_out.weight)
        nn.init.zeros_(net.conv_out.bias)
        self.net: Any = net

    def forward(self, images: Tensor, sigma: float | Tensor) -> Tensor:
        """(N, 3, H, W) noisy images (unclamped) -> (N, 3, H, W) purified images, clamped to [0, 1] in eval mode."""
        height, width = images.shape[-2:]
        padded, level = _padded(images, self.multiple), _level(images, sigma)
        clean = (self._changed if self.basis is None else self._painted)(padded, level)[..., :height, :width]
        return clean if self.training else clean.clamp(0, 1)

    def _changed(self, images: Tensor, level: Tensor) -> Tensor:
        said = self._said(F.pixel_unshuffle(images - 0.5, self.unshuffle), level)
        return images + F.pixel_shuffle(said, self.unshuffle)

    def _said(self, folded: Tensor, level: Tensor) -> Tensor:
        return self.net(folded, timestep=level * 1000).sample

    def _painted(self, images: Tensor, level: Tensor) -> Tensor:
        """What is kept of noisy images' coefficients, and what the net adds to them."""
        seen = _turned(F.pixel_unshuffle(images - 0.5, self.unshuffle), self.basis)
        known, noise = self.spectrum.to(seen.dtype).view(1, -1, 1, 1), level.view(-1, 1, 1, 1)
        there = known.square() + noise.square()
        said = self._said(seen * there.rsqrt(), level).to(seen.dtype)
        clean = seen * known.square() / there + noise * known * there.rsqrt() * said
        return 0.5 + F.pixel_shuffle(_turned(clean, self.basis.t()), self.unshuffle)


class BottleneckPurifier(nn.Module):
    """Paints the picture anew from a short code (diffusers' ``AutoencoderKL``, its mean): what the code does not hold
    does not pass, whatever an attacker adds. For images of any size.

    Args:
        channels: widths from the finest to the coarsest level.
        latent: numbers of the code at each place of the coarsest level.
        layers: residual blocks a level; of the painting half one more.
        unshuffle: side of the pixel blocks folded into channels first.
        attention: self-attention in the middle block.

    Raises:
        SettingError: sizes that no such net has, or a net that pads images to multiples beyond ``MOST_MULTIPLE``.
    """

    def __init__(
        self,
        *,
        channels: tuple[int, ...] = (64, 128, 128),
        latent: int = 8,
        layers: int = 1,
        unshuffle: int = 4,
        attention: bool = True,
    ) -> None:
        super().__init__()
        channels = widths("BottleneckPurifier.channels", channels, 8)
        layers, unshuffle = depth("BottleneckPurifier.layers", layers), whole("BottleneckPurifier.unshuffle", unshuffle)
        latent = whole("BottleneckPurifier.latent", latent)
        if not isinstance(attention, bool):
            raise SettingError(f"BottleneckPurifier.attention must be true or false, got {attention!r}.")
        check_multiple(len(channels), unshuffle)
        self.unshuffle = unshuffle
        self.multiple = unshuffle * 2 ** (len(channels) - 1)
        folded = 3 * unshuffle**2
        net: Any = diffusers_class("AutoencoderKL")(
            in_channels=folded + 1,  # the noise level
            out_channels=folded,
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            block_out_channels=tuple(channels),
            layers_per_block=layers,
            latent_channels=latent,
            norm_num_groups=8,
            mid_block_add_attention=attention,
        )
        self.net: Any = net

    def forward(self, images: Tensor, sigma: float | Tensor) -> Tensor:
        """(N, 3, H, W) noisy images (unclamped) -> (N, 3, H, W) purified images, clamped to [0, 1] in eval mode."""
        height, width = images.shape[-2:]
        folded = F.pixel_unshuffle(_padded(images, self.multiple) - 0.5, self.unshuffle)
        level = _level(images, sigma).view(-1, 1, 1, 1).expand(-1, 1, *folded.shape[-2:])
        code = self.net.encode(torch.cat([folded, level], 1)).latent_dist.mean
        clean = 0.5 + F.pixel_shuffle(self.net.decode(code).sample, self.unshuffle)[..., :height, :width]
        return clean if self.training else clean.clamp(0, 1)


class CascadePurifier(nn.Module):
    """Several purifiers, each of which sees what the one before made, and is told the same noise level.

    Args:
        parts: the purifiers, the first one first.
        times: how often all of them have their turn, with the same weights.
    """

    def __init__(self, parts: Iterable[nn.Module], times: int = 1) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.times = times

    def forward(self, images: Tensor, sigma: float | Tensor) -> Tensor:
        """(N, 3, H, W) noisy images -> (N, 3, H, W) purified images."""
        for _ in range(self.times):
            for part in self.parts:
                images = part(images, sigma)
        return images


def _padded(images: Tensor, multiple: int) -> Tensor:
    height, width = images.shape[-2:]
    pad = (0, -width % multiple, 0, -height % multiple)
    return F.pad(images, pad, mode="replicate") if any(pad) else images


def _level(images: Tensor, sigma: float | Tensor) -> Tensor:
    """(N,) the noise level of each image."""
    return torch.as_tensor(sigma, dtype=images.dtype, device=images.device).expand(len(images))


def _positive(spectrum: Iterable[float], count: int) -> Tensor:
    try:
        given = list(spectrum)
    except TypeError:
        given = []
    if len(given) != count:
        raise SettingError(f"UNetPurifier.spectrum has {count} numbers, 3 unshuffle^2; got {shown(spectrum)}.")
    expected = "UNetPurifier.spectrum's numbers must be positive"
    numbers = [number(expected, value, lambda found: found > 0) for value in given]
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")
