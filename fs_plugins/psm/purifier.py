"""Purifiers: (N, 3, H, W) noisy images and sigma -> images, all in [0, 1] pixel units.

``UNetPurifier`` is the light U-Net denoiser of the paper (appendix S.9.2), of any width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fs_plugins.checks import number, whole
from fs_plugins.errors import SettingError

PAPER_UNET: dict[str, Any] = {"channels": (96, 128, 256, 416), "layers": 2, "unshuffle": 1, "attention": True}
"""The light purifier at the paper's size: 43.6 M parameters (the paper says 43.7 M and no widths)."""


MOST_MULTIPLE = 256
"""Images are padded to multiples of a side: a small file must not make large pictures of small ones."""


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


_CONTRAST = 0.25
"""The spread of photographs' pixels: nets are shown images of about unit spread."""


class UNetPurifier(nn.Module):
    """A residual U-Net (diffusers ``UNet2DModel``) conditioned on sigma, for images of any size.

    Args:
        channels: widths from the finest to the coarsest level.
        layers: residual blocks a level.
        unshuffle: side of the pixel blocks folded into channels first; 1 keeps full resolution.
        attention: self-attention in the middle block.
        spread: of fine detail in [0, 1] pixels, sigma_data of Karras et al. (2022, eq. 7): the noisier an image is, the
            less of it is kept and the more is painted anew, so that a narrow net need not carry the noise through; at
            sigma 0 images stay as they are. None keeps all of the image and adds a change.

    Raises:
        SettingError: sizes that no such net has, a spread that is not positive, or a net that pads images to multiples
            beyond ``MOST_MULTIPLE``.
    """

    def __init__(
        self,
        *,
        channels: tuple[int, ...] = (64, 128),
        layers: int = 1,
        unshuffle: int = 4,
        attention: bool = False,
        spread: float | None = None,
    ) -> None:
        from diffusers import UNet2DModel

        super().__init__()
        expected = "UNetPurifier.spread must be positive, in [0, 1] pixel units"
        self.spread = None if spread is None else number(expected, spread, lambda found: found > 0)
        channels = widths("UNetPurifier.channels", channels, 8)
        layers, unshuffle = depth("UNetPurifier.layers", layers), whole("UNetPurifier.unshuffle", unshuffle)
        if not isinstance(attention, bool):
            raise SettingError(f"UNetPurifier.attention must be true or false, got {attention!r}.")
        check_multiple(len(channels), unshuffle)
        folded = 3 * unshuffle**2
        self.unshuffle = unshuffle
        self.multiple = unshuffle * 2 ** (len(channels) - 1)
        net: Any = UNet2DModel(
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
        self.net = net

    def forward(self, images: Tensor, sigma: float | Tensor) -> Tensor:
        """(N, 3, H, W) noisy images (unclamped) -> (N, 3, H, W) purified images, clamped to [0, 1] in eval mode."""
        height, width = images.shape[-2:]
        pad = (0, -width % self.multiple, 0, -height % self.multiple)
        padded = F.pad(images, pad, mode="replicate") if any(pad) else images
        level = torch.as_tensor(sigma, dtype=images.dtype, device=images.device).expand(len(images))
        kept, scale, shown = self._parts(padded, level.view(-1, 1, 1, 1))
        change = self.net(F.pixel_unshuffle(shown, self.unshuffle), timestep=level * 1000).sample
        clean = (kept + scale * F.pixel_shuffle(change, self.unshuffle))[..., :height, :width]
        return clean if self.training else clean.clamp(0, 1)

    def _parts(self, images: Tensor, level: Tensor) -> tuple[Tensor, Tensor | float, Tensor]:
        """What is kept of noisy images, what the net's answer is scaled by, and what the net is shown."""
        centred = images - 0.5
        if self.spread is None:
            return images, 1.0, centred
        noise, detail = level.square(), self.spread**2
        kept = 0.5 + centred * detail / (noise + detail)
        return kept, level * self.spread / (noise + detail).sqrt(), centred / (noise + _CONTRAST**2).sqrt()
